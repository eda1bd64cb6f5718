// What ops.cu and the kernels share: a call's tensors and numbers, without its options.
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
  const void *logit_bias, *margin, *pos_weight;  // T[C], or null
  const int64_t* target;
  bool has_background;  // rows with this target have no class
  int64_t background;
  void* saved;  // T[rows] or, for softmax, T[3 rows]: row scale, M, R; or null
  // Of a loss; null in a backward that recomputes the gradient.
  const void *weight, *sample_weight, *normalizer;  // T[C], T[rows], T[1]; or null
  bool ignore;
  int64_t ignored;
  Reduction reduction;
  void* loss;  // T[1], or T[rows] if loss_per_row
  bool loss_per_row;
  // Of a backward that recomputes the gradient.
  const void* grad_loss;  // T[1], or T[rows] if grad_loss_per_row
  bool grad_loss_per_row;

  bool adjusted() const { return logit_bias || margin || formula.logit_scale != 1; }
};

// What the choice of a kernel depends on, and the stream to launch on.
struct Device {
  int multiprocessors;
  int shared, shared_of_block;  // bytes of shared memory: per multiprocessor; per block, at most
  cudaStream_t stream;

  // Bytes of shared memory per block that are CUDA's own, or declared by a kernel: at most.
  static constexpr int RESERVED = 1024;
  int dynamic_limit() const { return shared_of_block - RESERVED; }
};

// allocate(n) returns memory for n elements of T, which lives until the call returns.
template <class S>
cudaError_t loss(const Call& call, const Device& device,
                 const std::function<void*(int64_t)>& allocate);
template <class S>
cudaError_t gradient(const Call& call, const Device& device);
// g *= factor for numel elements side by side; nothing is read or written where the factor is 1.
template <class S>
cudaError_t scale_gradient(void* g, const void* factor, int64_t numel, const Device& device);

}  // namespace cbloss
