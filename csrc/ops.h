// What the operators of every C++ backend share. The schemas are in ops.py.
#pragma once
#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "call.h"
#include "library.h"
#include "tensor.h"

template <class Error = std::invalid_argument, class... Parts>
void require(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream text(std::ios_base::out);  // the default is newer than manylinux_2_28
  (text << ... << parts);
  throw Error(text.str());
}

// The shape of the logits as (N, C, K), where K = 1 stands for (N, C). A row is a pair (n, k).
struct Shape {
  int64_t N, C, K, rows;
  explicit Shape(const Tensor& logits) {
    require(logits.dim() == 2 || logits.dim() == 3, "logits must be (N, C) or (N, C, K), got ",
            logits.dim(), " dimensions");
    N = logits.size(0), C = logits.size(1), K = logits.dim() == 3 ? logits.size(2) : 1,
    rows = N * K;
    require(C >= 1 && C < INT32_MAX, "logits must have 1 to 2^31 - 2 classes, got ", C);
  }
};

inline Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 0};
}

// What an operator is given beside the logits.
struct Inputs {
  const Tensor& target;
  const OptionalTensor &weight, &sample_weight, &normalizer, &logit_bias, &margin, &pos_weight;
  std::optional<int64_t> ignore_index, background_index;
};

inline const OptionalTensor NONE;

inline void check_vector(const Tensor& t, DType dtype, int64_t numel, const char* name) {
  require(t.dtype() == dtype && t.numel() == numel && t.is_contiguous(), name, " must be ", numel,
          " contiguous elements of the type that the loss is computed in");
}

inline void check_shape(const Tensor& t, const Tensor& logits, const char* name) {
  require(t.dim() == logits.dim() && std::equal(t.sizes(), t.sizes() + t.dim(), logits.sizes()),
          name, " must have the shape of logits");
}
inline void check_grad(const Tensor& grad, const Tensor& logits) {
  check_shape(grad, logits, "grad");
  require(grad.dtype() == logits.dtype(), "grad must have the dtype of logits");
}

inline Reduction reduction_of(int64_t number) {
  require(0 <= number && number <= int(Reduction::SUM), "reduction must be 0, 1, 2 or 3, got ",
          number);
  return Reduction(number);
}

// How many numbers per row a forward saves for a backward that recomputes the gradient: the row
// scale and, for softmax, M and R.
inline int64_t saved_rows(bool sigmoid) { return sigmoid ? 1 : 3; }
