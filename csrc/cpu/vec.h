// Vectors of W floats: load, convert, exp, log. Included by kernels.h alone, once per instruction
// set, inside the namespace of that set: the linker would merge inline functions of the same name,
// and the baseline could then call AVX-512 code.
//
// Vec is a vector type of GCC and Clang: + - * / < ?: work lane by lane in every instruction set.
// double is computed one element at a time by libm, through functions of the same names.

#if defined(__AVX512F__)
constexpr int W = 16;
#define X86_SIMD(name) _mm512_##name
#elif defined(__AVX2__)
constexpr int W = 8;
#define X86_SIMD(name) _mm256_##name
#else
constexpr int W = 4;
#if defined(__SSE2__)
#define X86_SIMD(name) _mm_##name
#endif
#endif
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IVec __attribute__((vector_size(4 * W)));
typedef uint32_t UVec __attribute__((vector_size(4 * W)));
typedef uint16_t HVec __attribute__((vector_size(2 * W)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that a storage type is computed in, and how many elements make a vector.
template <class S>
struct Lanes {
  using V = Vec;
  using T = float;
  static constexpr int N = W;
};
template <>
struct Lanes<double> {
  using V = double;
  using T = double;
  static constexpr int N = 1;
};

template <class S>
constexpr bool IS_HALF = sizeof(S) == 2;

template <class T>
CB_FN T constant(float x) {
  return T{} + x;
}
template <class T>
CB_FN T largest_finite() {
  if constexpr (std::is_same_v<T, double>) return DBL_MAX;
  else return constant<T>(FLT_MAX);
}
template <class T>
CB_FN T smallest_normal() {
  if constexpr (std::is_same_v<T, double>) return DBL_MIN;
  else return constant<T>(FLT_MIN);
}
template <class T>
CB_FN T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
CB_FN T max(T a, T b) {
  return a > b ? a : b;
}
#ifdef X86_SIMD  // one instruction each, where compilers make two of the functions above
CB_FN Vec min(Vec a, Vec b) { return X86_SIMD(min_ps)(a, b); }
CB_FN Vec max(Vec a, Vec b) { return X86_SIMD(max_ps)(a, b); }
#endif
CB_FN double add_positive(double sum, double z) { return sum + max(0.0, z); }
CB_FN Vec add_positive(Vec sum, Vec z) { return sum + max(Vec{}, z); }
CB_FN double neg_abs(double x) { return -std::fabs(x); }
CB_FN Vec neg_abs(Vec x) { return (Vec)((UVec)x | 0x80000000u); }

template <bool SHORT = false>
CB_FN double exp(double x) {
  return std::exp(x);
}
CB_FN double log(double x) { return std::log(x); }
CB_FN double rcp(double x) { return 1 / x; }
CB_FN double log1p_neg(double m) { return std::log1p(-m); }

// b e^(a x) for a x <= 88, as 2^n e^r with |r| <= ln2/2: relative error 4.1e-7 (SHORT: 4e-6), 2e-7
// of it by the rounding of LN2 where |a x| is large. Below a x = -87.3 the result is 0. a and b are
// powers of two, a may be negative: both are in the constants, exactly.
template <bool SHORT = false>
CB_FN Vec exp_times(float a, Vec x, float b) {
  constexpr float LOG2_E = 1.44269504f, LN2 = 0.693147181f, LOWEST = -87.3f;
  constexpr float ROUND = 12582912.f + 127;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * (a * LOG2_E) + ROUND, n = shifted - ROUND;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Vec r = x - n * (LN2 / a);
#else
  constexpr float HIGH = 0.693359375f;  // n * HIGH is exact
  const Vec r = (x - n * (HIGH / a)) + (n * ((HIGH - LN2) / a));
#endif
  const float a_2 = a * a, a_3 = a_2 * a, a_4 = a_3 * a;
  Vec p;  // of a r
  if constexpr (SHORT) {
    p = r * (b * a_4 * 4.151318790e-02f) + b * a_3 * 1.678794694e-01f;
    p = p * r + b * a_2 * 5.000303824e-01f;
    p = p * r + b * a * 9.999665808e-01f;
  } else {
    p = r * (b * a_4 * a * 8.290144645e-3f) + b * a_4 * 4.189885101e-2f;
    p = p * r + b * a_3 * 1.666764394e-1f;
    p = p * r + b * a_2 * 4.999914276e-1f;
    p = p * r + b * a * 9.999997037e-01f;
  }
  p = p * r + b;
  const Vec least = Vec{} + LOWEST / a;
#if defined(__AVX512F__)
  const Vec low = a < 0 ? least : x, high = a < 0 ? x : least;
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(low, high, _CMP_NLT_UQ), p, n);
#else
  const IVec power = (IVec)shifted << 23;  // 2^n: the low bits of shifted are n + 127
  return (a < 0 ? least < x : x < least) ? Vec{} : p * (Vec)power;
#endif
}
template <bool SHORT = false>
CB_FN Vec exp(Vec x) {
  return exp_times<SHORT>(1, x, 1);
}

// log x for normal x > 0, and 0, by atanh: absolute error 1e-7 in [1/2, 2], elsewhere
// relative 1.3e-7. Lanes that belong to no row may have any x: unsigned numbers may wrap around.
CB_FN Vec log(Vec x) {
  constexpr float LN2 = 0.693147181f;
  const UVec bits = (UVec)x;
  const IVec n = (IVec)(bits - 0x3f3504f3u) >> 23;  // mantissa in [sqrt(1/2), sqrt 2)
  const Vec m = (Vec)(bits - ((UVec)n << 23)), f = m - 1.f, s = f / (m + 1.f), t = s * s;
  const Vec p = ((t * 0.1111111f + 0.1428571f) * t + 0.2f) * t + 0.3333333f;
  const Vec y = __builtin_convertvector(n, Vec) * LN2 + (2.f * s + 2.f * s * t * p);
  const Vec special = x == 0.f ? Vec{} - std::numeric_limits<float>::infinity() : x;
  return (x > 0.f) & (x <= FLT_MAX) ? y : special;  // log of infinity and NaN: unchanged
}

// q^gamma for q in [0, 1]. Other gammas than 1, 2 and 4 replace a q below the smallest normal
// number by that number.
template <class T, class Scalar>
CB_FN T power(T q, Scalar gamma) {
  if (gamma == 1) return q;
  if (gamma == 2) return q * q;
  if (gamma == 4) return (q * q) * (q * q);
  return exp(gamma * log(max(smallest_normal<T>(), q)));
}
template <class T>
CB_FN T divide(T a, T b) {
  return a / b;
}

// 1/x for finite x > 0, with relative error 2^-23. By AVX-512 an estimate of 14 bits and one Newton
// step, in place of a division, which takes as long as ten multiplications.
CB_FN Vec rcp(Vec x) {
#if defined(__AVX512F__)
  const Vec y = _mm512_rcp14_ps(x);
  return y + y * (1.f - x * y);
#else
  return 1.f / x;
#endif
}

// sqrt(sigma(z)) = 2 / sqrt(4 + h^2), h = 2 e^{-z/2}, bounded so that h^2 is finite: relative error
// 4.1e-7 (SHORT: 4e-6). By an estimate of 12 bits or more and one Newton step where there is one.
template <bool SHORT>
CB_FN Vec root_sigma(Vec z) {
  const Vec h = exp_times<SHORT>(-0.5f, max(Vec{} - 87.f, z), 2), x = h * h + 4.f;
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const Vec y = _mm512_rsqrt14_ps(x);
#else
  const Vec y = z < -87.f ? Vec{} : (Vec)_mm256_rsqrt_ps(x);  // 0: no subnormal, slow products
#endif
  return y * (3.f - x * y * y);
#else
  Vec root;
  for (int l = 0; l < W; ++l) root[l] = __builtin_sqrtf(x[l]);
  return z < -87.f ? Vec{} : 2.f / root;
#endif
}

// From half types to float, and back with rounding to nearest even.
template <class U>  // the bits of floats, in a vector of any length
CB_FN U bfloat16_bits(U u) {
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
#if defined(__AVX512F__)
CB_FN Vec widen(HVec h, BFloat16) {  // 16-bit lane 2l + 1 is h[l]: one shuffle, no shift
  const __m512i spread = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                          7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i all = _mm512_castsi256_si512((__m256i)h);
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, spread, all);
}
#if defined(__AVX512BF16__)
CB_FN HVec narrow(Vec x, BFloat16) { return (HVec)_mm512_cvtneps_pbh(x); }
#else
CB_FN HVec narrow(Vec x, BFloat16) {
  const __m512i u = (__m512i)x, up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
  return (HVec)_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif
#elif defined(__AVX2__)  // by intrinsics: compilers take twice as many instructions
CB_FN Vec widen(HVec h, BFloat16) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
}
CB_FN HVec narrow(Vec x, BFloat16) {
  const __m256i rounded = (__m256i)bfloat16_bits((UVec)x);
  return (HVec)_mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                _mm256_extracti128_si256(rounded, 1));
}
#else
CB_FN Vec widen(HVec h, BFloat16) { return (Vec)(__builtin_convertvector(h, UVec) << 16); }
CB_FN HVec narrow(Vec x, BFloat16) { return __builtin_convertvector(bfloat16_bits((UVec)x), HVec); }
#endif
#if defined(__AVX512F__)
CB_FN Vec widen(HVec h, Float16) { return _mm512_cvtph_ps((__m256i)h); }
CB_FN HVec narrow(Vec x, Float16) { return (HVec)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
CB_FN Vec widen(HVec h, Float16) { return _mm256_cvtph_ps((__m128i)h); }
CB_FN HVec narrow(Vec x, Float16) { return (HVec)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#else
CB_FN Vec widen(HVec h, Float16) {
  const UVec u = __builtin_convertvector(h, UVec), magnitude = u & 0x7fff;
  const Vec finite = (Vec)(magnitude << 13) * 0x1p112f;  // exponent bias 127 - 15; subnormals too
  const UVec special = (magnitude << 13) | 0x7f800000;   // infinity, NaN
  return (Vec)((magnitude >= 0x7c00 ? special : (UVec)finite) | (u & 0x8000) << 16);
}
CB_FN HVec narrow(Vec x, Float16) {
  const UVec u = (UVec)x, sign = u & 0x80000000, a = u ^ sign;
  const UVec tiny = (UVec)((Vec)a + 0.5f) - 0x3f000000;  // below 2^-14: rounded by the addition
  const UVec normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  const UVec special = a > 0x7f800000 ? UVec{} + 0x7e00 : UVec{} + 0x7c00;
  const UVec h = a >= 0x477ff000 ? special : a < 0x38800000 ? tiny : normal;
  return __builtin_convertvector(h | sign >> 16, HVec);
}
#endif

// Loads and stores of Lanes::N elements; the *_some functions access the first n alone.
CB_FN Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CB_FN void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
template <class S>
CB_FN Vec load(const S* p) {
  HVec h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, S{});
}
template <class S>
CB_FN void store(S* p, Vec v) {
  const HVec h = narrow(v, S{});
  std::memcpy(p, &h, sizeof h);
}
CB_FN double load(const double* p) { return *p; }
CB_FN void store(double* p, double v) { *p = v; }
#if defined(__AVX512F__)
CB_FN __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
CB_FN Vec load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
CB_FN void store_some(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
template <class S>
CB_FN Vec load_some(const S* p, int64_t n) {
  return widen((HVec)_mm256_maskz_loadu_epi16(first(n), p), S{});
}
template <class S>
CB_FN void store_some(S* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)narrow(v, S{}));
}
#else
template <class S>
CB_FN Vec load_some(const S* p, int64_t n) {
  S part[W] = {};
  std::memcpy(part, p, n * sizeof(S));
  return load(part);
}
template <class S>
CB_FN void store_some(S* p, Vec v, int64_t n) {
  S part[W];
  store(part, v);
  std::memcpy(p, part, n * sizeof(S));
}
#endif
CB_FN double load_some(const double* p, int64_t n) { return n ? *p : 0; }
CB_FN void store_some(double* p, double v, int64_t n) {
  if (n) *p = v;
}
template <class S>
CB_FN typename Lanes<S>::T load_one(const S* p) {
  if constexpr (IS_HALF<S>) return load_some(p, 1)[0];
  else return *p;
}
template <class S>
CB_FN void store_one(S* p, typename Lanes<S>::T x) {
  if constexpr (IS_HALF<S>) store_some(p, constant<Vec>(x), 1);
  else *p = x;
}

CB_FN Vec load(const uint8_t* p) {  // by intrinsics: compilers convert one element at a time
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Vec v;
  for (int l = 0; l < W; ++l) v[l] = p[l];
  return v;
#endif
}
// The N elements of a vector V, or one element where V is double, from any type.
template <class V, class Q>
CB_FN V load_as(const Q* p) {
  if constexpr (!std::is_same_v<V, Vec>) {
    return V(load_one(p));
  } else if constexpr (std::is_same_v<Q, double>) {
    typedef double Doubles __attribute__((vector_size(8 * W)));
    Doubles d;
    std::memcpy(&d, p, sizeof d);
    return __builtin_convertvector(d, Vec);
  } else {
    return load(p);
  }
}

// The low halves of W indices.
CB_FN IVec load_indices(const int64_t* p) {
#if defined(__AVX512F__)
  const __m256i low = _mm512_cvtepi64_epi32(_mm512_loadu_si512(p));
  const __m256i high = _mm512_cvtepi64_epi32(_mm512_loadu_si512(p + W / 2));
  return (IVec)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined(X86_SIMD)
  const auto* floats = reinterpret_cast<const float*>(p);
  const auto low = X86_SIMD(loadu_ps)(floats), high = X86_SIMD(loadu_ps)(floats + W);
  const IVec even = (IVec)X86_SIMD(shuffle_ps)(low, high, 0x88);  // in each 128 bits
#if defined(__AVX2__)
  return (IVec)_mm256_permute4x64_epi64((__m256i)even, 0xd8);
#else
  return even;
#endif
#else
  IVec y;
  for (int l = 0; l < W; ++l) y[l] = int32_t(p[l]);
  return y;
#endif
}

// Access to single lanes.
CB_FN double lane(double v, int) { return v; }
CB_FN float lane(Vec v, int l) { return v[l]; }
CB_FN int64_t lane_index(int64_t v, int) { return v; }
CB_FN int64_t lane_index(IVec v, int l) { return v[l]; }
CB_FN void set_lane(double& v, int, double x) { v = x; }
CB_FN void set_lane(Vec& v, int l, float x) { v[l] = x; }

CB_FN UVec bits(Vec v) { return (UVec)v; }
CB_FN uint64_t bits(double v) {
  uint64_t b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}

// Whether a comparison is true in any lane.
CB_FN bool any(bool mask) { return mask; }
CB_FN bool any(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t some = 0;
  for (int l = 0; l < W; ++l) some |= mask[l];
  return some;
#endif
}

// A sum in double for each lane, to which partial sums in float are added.
template <class V>
struct DoubleLanes {
  static constexpr int N = std::is_same_v<V, double> ? 1 : W;
  double lanes[N] = {};
  CB_FN void add(V v) {
    if constexpr (N == 1) {
      lanes[0] += v;
    } else {
      for (int l = 0; l < N; ++l) lanes[l] += v[l];
    }
  }
  CB_FN double sum() const {
    double s = 0;
    for (double lane : lanes) s += lane;
    return s;
  }
};

CB_FN double largest(double v) { return v; }
CB_FN float largest(Vec v) {
  float m = v[0];
  for (int l = 1; l < W; ++l) m = v[l] > m ? v[l] : m;
  return m;
}
