// From rows whose classes lie side by side to vectors of rows, and back, by blocks of W rows and 4
// classes: 4 x 4 elements in each 128 bits of a vector. Included by kernels.h in the namespace of
// its instruction set.

constexpr int64_t SIDE = 4;

#if defined(__SSE2__)
using Quad = __m128;

// SIDE elements of any type.
#if defined(__AVX2__)
CB_FN Quad load_quad(const float* p) { return _mm_loadu_ps(p); }
CB_FN Quad load_quad(const double* p) { return _mm256_cvtpd_ps(_mm256_loadu_pd(p)); }
CB_FN __m128i load_8_bytes(const void* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
CB_FN Quad load_quad(const BFloat16* p) {
  return (Quad)_mm_slli_epi32(_mm_cvtepu16_epi32(load_8_bytes(p)), 16);
}
CB_FN Quad load_quad(const Float16* p) { return _mm_cvtph_ps(load_8_bytes(p)); }
CB_FN Quad load_quad(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
}
CB_FN void store_quad(float* p, Quad q) { _mm_storeu_ps(p, q); }
CB_FN void store_8_bytes(void* p, __m128i v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v); }
CB_FN void store_quad(BFloat16* p, Quad q) {
#if defined(__AVX512BF16__)
  store_8_bytes(p, (__m128i)_mm_cvtneps_pbh(q));
#else
  typedef uint32_t UQuad __attribute__((vector_size(16)));
  const __m128i rounded = (__m128i)bfloat16_bits((UQuad)q);
  store_8_bytes(p, _mm_packus_epi32(rounded, rounded));
#endif
}
CB_FN void store_quad(Float16* p, Quad q) {
  store_8_bytes(p, _mm_cvtps_ph(q, _MM_FROUND_TO_NEAREST_INT));
}
#else  // W = SIDE
template <class Q>
CB_FN Quad load_quad(const Q* p) {
  return (Quad)load_as<Vec>(p);
}
template <class S>
CB_FN void store_quad(S* p, Quad q) {
  store(p, (Vec)q);
}
#endif

#if defined(__AVX512F__)
CB_FN Vec join(const Quad (&q)[W / SIDE]) {
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(q[0]), q[1], 1);
  return (Vec)_mm512_insertf32x4(_mm512_insertf32x4(low, q[2], 2), q[3], 3);
}
CB_FN void split(Vec v, Quad (&q)[W / SIDE]) {
  q[0] = _mm512_castps512_ps128(v), q[1] = _mm512_extractf32x4_ps(v, 1);
  q[2] = _mm512_extractf32x4_ps(v, 2), q[3] = _mm512_extractf32x4_ps(v, 3);
}
#elif defined(__AVX2__)
CB_FN Vec join(const Quad (&q)[W / SIDE]) {
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(q[0]), q[1], 1);
}
CB_FN void split(Vec v, Quad (&q)[W / SIDE]) {
  q[0] = _mm256_castps256_ps128(v), q[1] = _mm256_extractf128_ps(v, 1);
}
#else
CB_FN Vec join(const Quad (&q)[W / SIDE]) { return (Vec)q[0]; }
CB_FN void split(Vec v, Quad (&q)[W / SIDE]) { q[0] = (Quad)v; }
#endif

// Swaps rows and columns of the 4 x 4 elements in each 128 bits.
CB_FN void transpose(Vec (&v)[SIDE]) {
  const auto pairs = [](auto x) { return X86_SIMD(castps_pd)(x); };
  const auto a = pairs(X86_SIMD(unpacklo_ps)(v[0], v[1]));
  const auto b = pairs(X86_SIMD(unpackhi_ps)(v[0], v[1]));
  const auto c = pairs(X86_SIMD(unpacklo_ps)(v[2], v[3]));
  const auto d = pairs(X86_SIMD(unpackhi_ps)(v[2], v[3]));
  v[0] = (Vec)X86_SIMD(unpacklo_pd)(a, c), v[1] = (Vec)X86_SIMD(unpackhi_pd)(a, c);
  v[2] = (Vec)X86_SIMD(unpacklo_pd)(b, d), v[3] = (Vec)X86_SIMD(unpackhi_pd)(b, d);
}

// out[c] = row[l][c] in lane l. C >= SIDE; the last block may overlap the one before.
template <class Q>
CB_FN void blocks_from_rows(const Q* const (&row)[W], int64_t C, Vec* out) {
  for (int64_t next = 0; next < C; next += SIDE) {
    const int64_t c = std::min(next, C - SIDE);
    Vec v[SIDE];
    for (int64_t k = 0; k < SIDE; ++k) {
      Quad q[W / SIDE];
      for (int64_t m = 0; m < W / SIDE; ++m) q[m] = load_quad(row[m * SIDE + k] + c);
      v[k] = join(q);
    }
    transpose(v);
    for (int64_t k = 0; k < SIDE; ++k) out[c + k] = v[k];
  }
}
// row[l][c] = lane l of z[c].
template <class S>
CB_FN void rows_from_blocks(const Vec* z, int64_t C, S* const (&row)[W]) {
  for (int64_t next = 0; next < C; next += SIDE) {
    const int64_t c = std::min(next, C - SIDE);
    Vec v[SIDE];
    for (int64_t k = 0; k < SIDE; ++k) v[k] = z[c + k];
    transpose(v);
    for (int64_t k = 0; k < SIDE; ++k) {
      Quad q[W / SIDE];
      split(v[k], q);
      for (int64_t m = 0; m < W / SIDE; ++m) store_quad(row[m * SIDE + k] + c, q[m]);
    }
  }
}
constexpr bool HAS_BLOCKS = true;
#else
template <class Q>
void blocks_from_rows(const Q* const (&)[W], int64_t, Vec*) {}
template <class S>
void rows_from_blocks(const Vec*, int64_t, S* const (&)[W]) {}
constexpr bool HAS_BLOCKS = false;
#endif
