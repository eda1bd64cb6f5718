// What ops.cpp and the row kernels share: a call's tensors and numbers, without its options.
#pragma once
#include <cstdint>
#include <string>

#include "../call.h"
#include "glibc.h"

// What a kernel computes. CHECK and LABELS read soft targets alone: CHECK looks for values out of
// range, LABELS computes the row weights.
enum class Mode { LOSS, LOSS_AND_GRAD, GRAD, CHECK, LABELS };

// The first out-of-range soft target, whichever thread sees it first.
struct BadTarget {
  int64_t at = -1;  // flat index in (N, C, K)
  double value;
};
void note_bad_target(BadTarget& first, int64_t at, double value);

// Row i is logits[i / K, :, i % K]. Computed in T: double for Float64, else float.
struct Call {
  const void* logits;
  void* grad;  // may be logits
  Strides logits_stride, grad_stride;
  int64_t C, K;
  const int64_t* target;  // class indices; null with soft targets
  bool has_background;    // rows with this target have no class: common.h
  int64_t background;
  const void* soft;  // soft targets, of type soft_type; null with class indices
  Strides soft_stride;
  DType soft_type;
  bool partial;  // soft targets equal to this are unknown labels
  double unknown;
  bool unknown_seen;   // among the first elements: then there will be more
  BadTarget* bad;      // where all modes but GRAD note an out-of-range soft target
  const void* weight;  // T[C]: of classes (per_class, softmax) or of sigmoid's labels; may be null
  void* scale;         // T[rows]: r_i / denominator; negative where the row is ignored
  void* loss;          // T[rows]
  // T[rows] for softmax, or null: LOSS writes them, GRAD reads them to recompute the gradient. With
  // class indices M and R; with soft targets r = r_i / denominator, and scale = s_i / denominator.
  void *M, *R, *r;
  const void* grad_loss;  // for GRAD: T[1], or T[rows] if grad_loss_per_row
  bool grad_loss_per_row;
  const void *logit_bias, *margin, *pos_weight;  // T[C], or null
  Formula formula;
};

using RowKernel = void (*)(const Call&, int64_t begin, int64_t end);
using FindKernel = RowKernel(DType, Mode, const Call&);
FindKernel find_kernel;  // of the chosen instruction set

// For tests: switches to the instruction set of that name; "" changes nothing. Returns the names of
// those that this machine has, best first.
std::string set_isa(const std::string& name);

// The kernels compiled for each instruction set.
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
