// What ops.cu and the kernels share: tensors and numbers, no options.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

#include "../call.h"

namespace cbloss {

// Row i is logits[i / K, :, i % K]. Computed in T: double for float64, else float.
struct Call {
  const void* logits;
  void* grad;  // may be logits; or null
  Strides logits_stride, grad_stride;
  int64_t rows, C, K;
  Formula formula;
  const void *logit_bias, *margin;  // T[C], or null
  const int64_t* target;
  void* saved;  // T[rows] or, for softmax, T[3 rows]: scale, M, R; or null
  // Of the loss, null in a recomputing backward
  const void *weight, *sample_weight, *normalizer;  // T[C], T[rows], T[1]; or null
  bool ignore;
  int64_t ignored;
  Reduction reduction;
  void* loss;  // T[1], or T[rows] if loss_per_row
  bool loss_per_row;
  // Of a recomputing backward
  const void* grad_loss;  // T[1], or T[rows] if grad_loss_per_row
  bool grad_loss_per_row;

  bool adjusted() const { return logit_bias || margin || formula.scale != 1; }
};

// What kernels are chosen by, and the stream to launch into.
struct Device {
  int multiprocessors;
  int shared, shared_of_block;  // bytes of shared memory: a multiprocessor's; a block's at most
  cudaStream_t stream;
};

// allocate(n): memory for n of T, which lives until the call returns.
template <class S>
cudaError_t loss(const Call& call, const Device& device,
                 const std::function<void*(int64_t)>& allocate);
template <class S>
cudaError_t gradient(const Call& call, const Device& device);
// g *= factor for numel elements side by side; where the factor is 1 nothing is touched.
template <class S>
cudaError_t scale(void* g, const void* factor, int64_t numel, const Device& device);

}  // namespace cbloss
