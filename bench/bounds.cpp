// For bounds.py: the functions of csrc/cpu/vec.h and csrc/row_math.h, those of one variable swept
// over float32 numbers and compared with double, the others evaluated where Python asks.
#include "../csrc/call.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CB_FN inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

#include "../csrc/cpu/vec.h"
//
#include "../csrc/row_math.h"

// Results below the smallest normal number may be 0; e^-87.3 is just above it.
constexpr double FLUSHED = 1.22e-38;

double relative(double got, double want) {
  const double error = std::fabs(got - want) - FLUSHED;
  if (!(error > 0)) return got == got ? 0 : INFINITY;
  return error / std::fabs(want);
}
double absolute(double got, double want) { return std::fabs(got - want); }

struct Worst {
  double error;
  float at;
};

// The largest error of f against exact over the floats whose bits are first, first + step, ...
template <class F, class Exact, class Error>
Worst sweep(uint32_t first, uint32_t last, uint32_t step, F f, Exact exact, Error error) {
  Worst worst{-1, 0};
  for (uint64_t bits = first; bits <= last; bits += uint64_t(step) * W) {
    UVec u;
    for (int l = 0; l < W; ++l)
      u[l] = uint32_t(std::min<uint64_t>(bits + uint64_t(l) * step, last));
    const Vec x = (Vec)u, y = f(x);
    for (int l = 0; l < W; ++l) {
      const double e = error(double(y[l]), exact(double(x[l])));
      if (!(e <= worst.error)) worst = {e, x[l]};
    }
  }
  return worst;
}

double softplus(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))); }
double sigma(double z) {
  const double e = std::exp(-std::fabs(z));
  return (z < 0 ? e : 1) / (1 + e);
}
double exact_L(double z, double gamma) { return std::pow(sigma(z), gamma) * softplus(z); }
double exact_g(double z, double gamma) {
  return std::pow(sigma(z), gamma) * (gamma * sigma(-z) * softplus(z) + sigma(z));
}
double exact_log1m_over(double m) { return m > 0 ? -std::log1p(-m) / m : 1; }

template <bool SHORT>
Worst function(const char* name, uint32_t first, uint32_t last, uint32_t step) {
  const auto is = [name](const char* other) { return !std::strcmp(name, other); };
  const auto run = [=](auto f, auto exact) { return sweep(first, last, step, f, exact, relative); };
  const auto e_to = [](double x) { return std::exp(x); };
  const auto root = [](double z) { return std::sqrt(sigma(z)); };
  if (is("exp")) return run([](Vec x) { return exp<SHORT>(x); }, e_to);
  if (is("root_sigma")) return run([](Vec z) { return root_sigma<SHORT>(z); }, root);
  if (is("log1m_over")) return run([](Vec m) { return log1m_over<SHORT>(m); }, exact_log1m_over);
  const auto log_of = [](Vec x) { return log(x); };
  const auto log_of_double = [](double x) { return std::log(x); };
  if (is("log")) return run(log_of, log_of_double);
  if (is("log, absolute")) return sweep(first, last, step, log_of, log_of_double, absolute);
  if (is("rcp")) return run([](Vec x) { return rcp(x); }, [](double x) { return 1 / x; });
  if (is("softplus")) {
    const auto sum = [](Vec z) {
      SoftplusSum<SHORT, Vec> one;
      one.add(z);
      return one.value();
    };
    return run(sum, softplus);
  }
  const auto sum_g = [](Vec z) { return SoftplusSum<SHORT, Vec>{}.add(z); };
  if (is("sigma")) return run(sum_g, sigma);
#define ELEMENT(G, GAMMA)                                                                 \
  if (is("L, gamma " #GAMMA))                                                             \
    return run([](Vec z) { return sigmoid_element<Gamma::G, SHORT>(z, float(GAMMA)).L; }, \
               [](double z) { return exact_L(z, GAMMA); });                               \
  if (is("g, gamma " #GAMMA))                                                             \
    return run([](Vec z) { return sigmoid_element<Gamma::G, SHORT>(z, float(GAMMA)).g; }, \
               [](double z) { return exact_g(z, GAMMA); });
  ELEMENT(ZERO, 0)
  ELEMENT(HALF, 0.5)
  ELEMENT(ONE, 1)
  ELEMENT(TWO, 2)
  ELEMENT(ANY, 5)
  return {NAN, 0};
}

}  // namespace

EXPORT double worst_of(const char* name, bool is_short, uint32_t first, uint32_t last,
                       uint32_t step, float* at) {
  const Worst found =
      is_short ? function<true>(name, first, last, step) : function<false>(name, first, last, step);
  *at = found.at;
  return found.error;
}

// Functions of several variables at n points, a multiple of 16. in and out: arrays one after the
// other, n numbers each.
EXPORT void evaluate(const char* name, const double* numbers, double classes, int64_t n,
                     const float* in, float* out) {
  const Formula formula{false,      numbers[0], numbers[1], numbers[2], numbers[3],
                        numbers[4], numbers[5], numbers[6], numbers[7]};
  const auto f = formula_of<float>(formula);
  const float C = float(classes);
  const auto is = [name](const char* other) { return !std::strcmp(name, other); };
  for (int64_t i = 0; i < n; i += W) {
    const auto v = [=](int64_t k) { return load(in + k * n + i); };
    const auto put = [=](int64_t k, Vec x) { store(out + k * n + i, x); };
    if (is("softmax_row")) {
      const auto row = softmax_row(v(0), v(1), v(2), v(3), C, v(4), f);
      put(0, row.loss), put(1, row.k), put(2, row.g_y), put(3, row.uniform);
    } else if (is("soft_row")) {
      const auto row = soft_row(v(0), v(1), v(2), v(3), v(4), v(5), v(6), C, v(7), f);
      put(0, row.loss), put(1, row.k), put(2, row.g_top), put(3, row.uniform), put(4, row.hard);
    } else if (is("sigmoid_element")) {
      const auto e = sigmoid_element<Gamma::GENERAL, false>(v(0), f.gamma);
      put(0, e.L), put(1, e.g);
    } else if (is("clipped_element")) {
      const auto e = clipped_element<false>(v(0), f.gamma_neg, f.clip);
      put(0, e.L), put(1, e.g);
    } else if (is("mixed")) {
      const auto e = mixed<Gamma::GENERAL, false>(v(0), v(1), v(2), f);
      put(0, e.L), put(1, e.g);
    }
  }
}
