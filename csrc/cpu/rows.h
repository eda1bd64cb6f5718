// What ops.cpp and the row kernels share: tensors and numbers, no options.
#pragma once
#include <cstdint>

#include "../call.h"

enum class DType { Float64, Float32, BFloat16, Float16, Bool };
enum class Family { SOFTMAX, SIGMOID };
// CHECK and LABELS read dense targets alone: one looks for bad ones, the other makes r.
enum class Mode { LOSS, LOSS_AND_GRAD, GRAD, CHECK, LABELS };

// The first number that is no target, whichever thread sees it first.
struct BadTarget {
  int64_t at = -1;  // flat index of (N, C, K)
  double value;
};
void note_bad_target(BadTarget& first, int64_t at, double value);

// Row i is logits[i / K, :, i % K]. Computed in T: double for Float64, else float.
struct Rows {
  const void* logits;
  void* grad;  // may be logits
  Strides logits_stride, grad_stride;
  int64_t C, K;
  const int64_t* target;
  const void* dense;  // a target a class, of dense_type; or null: class indices
  Strides dense_stride;
  DType dense_type;
  BadTarget* bad;      // of dense targets, whose values all modes but GRAD look at
  const void* weight;  // T[C]: of classes (per_class, softmax), or of sigmoid's labels; or null
  void* scale;         // T[rows]: r_i / denominator; negative where the row is ignored
  void* loss;          // T[rows]
  // T[rows], softmax, for recomputing: written by LOSS, read by GRAD; or null. M and R of class
  // indices; of dense targets r_i / denominator: there scale is s_i / denominator.
  void *M, *R, *r;
  const void* grad_loss;  // GRAD: T[1], or T[rows] if grad_loss_per_row
  bool grad_loss_per_row;
  const void *logit_bias, *margin;  // T[C], or null
  Formula formula;
};

using RowKernel = void (*)(const Rows&, int64_t begin, int64_t end);
using FindKernel = RowKernel(DType, Family, Mode, const Rows&);
FindKernel find_kernel;  // of the instruction set that serves
// One variant of the kernels an instruction set.
namespace baseline {
FindKernel find;
}
namespace avx2 {
FindKernel find;
}
namespace avx512 {
FindKernel find;
}
namespace avx512_bf16 {
FindKernel find;
}
