// The operations that row_math.h needs, on a GPU: of float by four special functions, which are one
// instruction each, of double by CUDA's library.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../call.h"

#define CB_FN __device__ __forceinline__
#ifndef CB_DYNAMIC_SHARED  // shared memory whose size is given at launch
#define CB_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace cbloss {

// Errors, from the PTX ISA: relative 2^-22 of ex2, 1 ulp of rcp, relative 2^-22.9 of rsqrt; of lg2
// 2^-22, absolute in (1/2, 2), relative elsewhere. Tests on a CPU define their own functions.
#ifndef CBLOSS_SPECIAL_FUNCTIONS
#define CBLOSS_SPECIAL_FUNCTIONS
#define CB_SPECIAL(name, instruction)                              \
  CB_FN float name(float x) {                                      \
    float y;                                                       \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                                      \
  }
CB_SPECIAL(ex2, "ex2")
CB_SPECIAL(lg2, "lg2")
CB_SPECIAL(rcp, "rcp")
CB_SPECIAL(rsqrt, "rsqrt")
#undef CB_SPECIAL
// NaN where a or b is NaN; one instruction from sm_80 on.
CB_FN float min(float a, float b) {
  float c;
#if __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
#else
  c = a < b || a != a ? a : b;
#endif
  return c;
}
CB_FN float max(float a, float b) {
  float c;
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
#else
  c = a > b || a != a ? a : b;
#endif
  return c;
}
#endif

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

template <class T>
constexpr T INF = T(INFINITY);
template <class T>
CB_FN T constant(float x) {
  return x;
}
template <class T>
CB_FN T largest_finite() {
  return std::is_same_v<T, double> ? T(DBL_MAX) : T(FLT_MAX);
}

CB_FN float neg_abs(float x) { return -fabsf(x); }
template <bool SHORT = false>
CB_FN float exp(float x) {
  return ex2(x * LOG2E);
}
// For one value per row, x not NaN: corrects the rounding error of the product, 2e-6 at x = -40.
CB_FN float exp_exact(float x) {
  x = fmaxf(x, -200);
  const float y = x * LOG2E, rest = fmaf(x, LOG2E, -y) + x * 1.925963033e-8f;
  return ex2(y) * fmaf(rest, LN2, 1);
}
// sqrt(sigma(z)) = rsqrt(1 + h^2), h = e^{-z/2}: infinite for z < -177, then the root is 0.
template <bool SHORT>
CB_FN float root_sigma(float z) {
  const float h = ex2(z * (-0.5f * LOG2E));
  return rsqrt(1 + h * h);
}
CB_FN float log(float x) { return lg2(x) * LN2; }
CB_FN float divide(float a, float b) { return a * rcp(b); }
// q^gamma for q in (0, 1], as 2^(gamma n) m^gamma: the rounding error of the product gamma log2(q)
// would be 1e-5 where q is tiny.
CB_FN float power(float q, float gamma) {
  const uint32_t bits = __float_as_uint(fmaxf(q, FLT_MIN));
  const int n = int(bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt 2)
  const float m = __uint_as_float(bits - (uint32_t(n) << 23)), k = rintf(fmaxf(gamma * n, -126));
  return ex2(fmaf(gamma, lg2(m), fmaf(gamma, n, -k))) * ex2(k);
}

CB_FN double min(double a, double b) { return a < b ? a : b; }
CB_FN double max(double a, double b) { return a > b ? a : b; }
CB_FN double neg_abs(double x) { return -::fabs(x); }
template <bool SHORT = false>
CB_FN double exp(double x) {
  return ::exp(x);
}
CB_FN double exp_exact(double x) { return ::exp(x); }
CB_FN double log(double x) { return ::log(x); }
CB_FN double log1p_neg(double m) { return ::log1p(-m); }
CB_FN double rcp(double x) { return 1 / x; }
CB_FN double divide(double a, double b) { return a / b; }
CB_FN double power(double q, double gamma) { return ::pow(q, gamma); }

// sum + max(z, 0): the comparison is another's, too, and the addition is left out by a predicate.
template <class T>
CB_FN T add_positive(T sum, T z) {
  return z < T(0) ? sum : sum + z;
}

// The larger of the two; NaN only if both are NaN: a single NaN enters the sum of exponentials.
CB_FN float larger(float a, float b) { return fmaxf(a, b); }
CB_FN double larger(double a, double b) { return ::fmax(a, b); }

#include "../row_math.h"

}  // namespace cbloss
