// Statistics of the rows of each class, from what a forward leaves: losses, gradient, M and R.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "../ops.h"

namespace {

// stats (4, C) = rows, sums of losses and of |gradient at the target|, mean p of the target, by its
// class; loss = the sum of the losses. All in the rows' order.
template <class S, class T>
void by_class(const Tensor& logits, const Tensor& target, const OptionalTensor& logit_bias,
              const OptionalTensor& margin, const Tensor& losses, const Tensor& grad,
              const Tensor& saved, bool sigmoid, T scale, std::optional<int64_t> ignore_index,
              const Tensor& stats, const Tensor& loss) {
  const Shape shape(logits);
  const int64_t rows = shape.rows, C = shape.C, K = shape.K;
  const auto at = [&](const Tensor& t, int64_t i, int64_t y) {
    const Strides s = strides_of(t);
    return T(static_cast<const S*>(t.const_data_ptr())[i / K * s.n + i % K * s.k + y * s.c]);
  };
  const auto data = [&](const Tensor& t, int64_t numel, const char* name) {
    check_vector(t, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float, numel, name);
    return static_cast<const T*>(t.const_data_ptr());
  };
  check_vector(target, ScalarType::Long, rows, "target");
  check_grad(grad, logits);
  const int64_t* targets = static_cast<const int64_t*>(target.const_data_ptr());
  const T* L = data(losses, rows, "losses");
  const T* M = data(saved, saved_rows(sigmoid) * rows, "saved") + rows;
  const T *bias = logit_bias ? data(*logit_bias, C, "logit_bias") : nullptr,
          *margins = margin ? data(*margin, C, "margin") : nullptr;
  data(stats, 4 * C, "stats"), data(loss, 1, "loss");
  T* sums = static_cast<T*>(stats.mutable_data_ptr());
  std::fill_n(sums, 4 * C, T(0));
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = targets[i];
    total += L[i];
    if (ignore_index && y == *ignore_index) continue;
    require<std::out_of_range>(0 <= y && y < C, "target ", y, " is no class of ", C);
    const T z_y =
        scale * (at(logits, i, y) + (bias ? bias[y] : T(0)) - (margins ? margins[y] : T(0)));
    T p;
    if (sigmoid) {
      p = 1 / (1 + std::exp(-z_y));
    } else {
      const T e_y = std::exp(z_y - M[i]);
      p = e_y / (M[rows + i] + e_y);  // R
    }
    sums[y] += 1, sums[C + y] += L[i], sums[2 * C + y] += std::fabs(at(grad, i, y));
    sums[3 * C + y] += p;
  }
  for (int64_t c = 0; c < C; ++c) sums[3 * C + c] /= sums[c];  // NaN where there is no row
  *static_cast<T*>(loss.mutable_data_ptr()) = T(total);
}

void class_stats(Tensor logits, Tensor target, OptionalTensor logit_bias, OptionalTensor margin,
                 Tensor losses, Tensor grad, Tensor saved, std::vector<double> numbers,
                 std::optional<int64_t> ignore_index, Tensor stats, Tensor loss) {
  const Formula f = formula_of(numbers);
  const auto run = [&](auto s, auto t) {
    using T = decltype(t);
    by_class<decltype(s), T>(logits, target, logit_bias, margin, losses, grad, saved, f.sigmoid,
                             T(f.scale), ignore_index, stats, loss);
  };
  switch (logits.scalar_type()) {
    case ScalarType::Double: return run(double(), double());
    case ScalarType::Float: return run(float(), float());
    case ScalarType::BFloat16: return run(c10::BFloat16(), float());
    default: return run(c10::Half(), float());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cbloss_fused, CPU, m) { m.impl("_class_stats", TORCH_BOX(&class_stats)); }
