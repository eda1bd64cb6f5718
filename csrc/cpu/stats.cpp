#include "stats.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "half.h"

namespace {

template <class S>
void by_class(const Call& a, int64_t rows, std::optional<int64_t> ignore_index, double* stats) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const Formula& f = a.formula;
  const auto at = [&](const void* data, const Strides& s, int64_t i) {
    const int64_t n = a.K == 1 ? i : i / a.K;  // a division takes as long as the rest
    return T(static_cast<const S*>(data)[n * s.n + (i - n * a.K) * s.k + a.target[i] * s.c]);
  };
  const auto of = [](const void* vector, int64_t i) { return static_cast<const T*>(vector)[i]; };
  const auto has_class = [&](int64_t y) {
    return !(ignore_index && y == *ignore_index) && !(a.has_background && y == a.background);
  };
  const int64_t C = a.C;
  std::fill_n(stats, 4 * C, 0.0);
  // Two elements per row, each in its own cache line: the loads of a block overlap.
  constexpr int64_t BLOCK = 64;
  T x[BLOCK], g[BLOCK];
  for (int64_t begin = 0; begin < rows; begin += BLOCK) {
    const int64_t end = std::min(rows, begin + BLOCK);
    for (int64_t i = begin; i < end; ++i) {
      if (!has_class(a.target[i])) continue;
      x[i - begin] = at(a.logits, a.logits_stride, i), g[i - begin] = at(a.grad, a.grad_stride, i);
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = a.target[i];
      if (!has_class(y)) continue;
      T z = x[i - begin], p;
      if (a.logit_bias) z += of(a.logit_bias, y);
      if (a.margin) z -= of(a.margin, y);
      z *= T(f.logit_scale);
      if (f.sigmoid) {
        p = 1 / (1 + std::exp(-z));
      } else {
        const T M = of(a.M, i), e_y = z >= M ? 1 : std::exp(z - M);  // both may be infinite
        p = e_y / (of(a.R, i) + e_y);
      }
      stats[y] += 1, stats[C + y] += of(a.loss, i), stats[2 * C + y] += std::fabs(g[i - begin]);
      stats[3 * C + y] += p;
    }
  }
  for (int64_t c = 0; c < C; ++c) stats[3 * C + c] /= stats[c];  // NaN where there is no row
}

}  // namespace

void class_stats(const Call& a, DType dtype, int64_t rows, std::optional<int64_t> ignore_index,
                 double* stats) {
  switch (dtype) {
    case DType::Float64: return by_class<double>(a, rows, ignore_index, stats);
    case DType::Float32: return by_class<float>(a, rows, ignore_index, stats);
    case DType::BFloat16: return by_class<BFloat16>(a, rows, ignore_index, stats);
    default: return by_class<Float16>(a, rows, ignore_index, stats);
  }
}
