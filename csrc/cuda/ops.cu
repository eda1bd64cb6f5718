// The CUDA operators. They never synchronise, and allocate scratch memory alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <string>

#include "../ops.h"
#include "call.h"

#ifndef CBLOSS_ARCHITECTURES
#define CBLOSS_ARCHITECTURES ""
#endif

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string advice;
  if (error == cudaErrorNoKernelImageForDevice)
    advice = "; built for " CBLOSS_ARCHITECTURES
             ": rebuild with TORCH_CUDA_ARCH_LIST, or pass backend='triton'";
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error) + advice);
}

// An attribute of a device, queried once.
template <cudaDeviceAttr ATTRIBUTE>
int attribute(int device) {
  static std::atomic<int> known[64];
  if (device >= 0 && device < 64 && known[device]) return known[device];
  int value = 0;
  check(cudaDeviceGetAttribute(&value, ATTRIBUTE, device));
  if (device >= 0 && device < 64) known[device] = value;
  return value;
}

// Makes a tensor's device the current one while it lives, with that device's stream for launches.
struct Current {
  DeviceGuardHandle guard = nullptr;
  cbloss::Device device;
  explicit Current(const Tensor& t) {
    const int index = t.device_index();
    void* stream = nullptr;
    CHECK_TORCH(aoti_torch_get_current_cuda_stream, index, &stream);
    device = {attribute<cudaDevAttrMultiProcessorCount>(index),
              attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(index),
              attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(index),
              static_cast<cudaStream_t>(stream)};
    CHECK_TORCH(aoti_torch_create_device_guard, index, &guard);  // last: nothing raises after it
  }
  ~Current() { aoti_torch_delete_device_guard(guard); }
  Current(const Current&) = delete;
};

// Calls run(S{}) for the storage type S of the logits.
template <class Run>
void dispatch(const Tensor& logits, const Run& run) {
  switch (logits.dtype()) {
    case DType::Float64: return run(double{});
    case DType::Float32: return run(float{});
    case DType::BFloat16: return run(__nv_bfloat16{});
    case DType::Float16: return run(__half{});
    default: require(false, "logits must be float64, float32, bfloat16 or float16");
  }
}
DType compute_type(const Tensor& logits) {
  return logits.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
}

// A tensor on another device must not reach a kernel.
void check_device(const Tensor& t, const Tensor& logits, const char* name) {
  require(t.device_type() == logits.device_type() && t.device_index() == logits.device_index(),
          name, " must be on the device of the logits");
}

void check_like(const Tensor& t, const Tensor& logits, int64_t numel, const char* name) {
  check_vector(t, compute_type(logits), numel, name);
  check_device(t, logits, name);
}
const void* input(const Tensor& t, const Tensor& logits, int64_t numel, const char* name) {
  check_like(t, logits, numel, name);
  return t.const_data_ptr();
}
const void* input(const OptionalTensor& t, const Tensor& logits, int64_t numel, const char* name) {
  return t ? input(*t, logits, numel, name) : nullptr;
}
void* buffer(const Tensor& t, const Tensor& logits, int64_t numel, const char* name) {
  check_like(t, logits, numel, name);
  return t.mutable_data_ptr();
}

cbloss::Call call_of(const Tensor& logits, const Inputs& in, const Shape& shape,
                     const Formula& formula) {
  const Tensor& target = in.target;
  check_vector(target, DType::Int64, shape.rows, "target");
  require(!formula.per_class,
          "the CUDA kernels do not support class_weighting='class', Triton's do");
  require(!in.pos_weight || formula.eps == 0,
          "the CUDA kernels do not support pos_weight with label_smoothing, Triton's do");
  constexpr int64_t MOST = INT32_MAX - 65536;  // so that an index past the end does not overflow
  require(shape.rows <= MOST && shape.C <= MOST, "the CUDA kernels take at most ", MOST,
          " rows and classes, got ", shape.rows, " and ", shape.C);
  check_device(target, logits, "target");
  cbloss::Call call{};
  call.logits = logits.const_data_ptr(), call.logits_stride = strides_of(logits);
  if (shape.C == 1) call.logits_stride.c = 1;
  call.rows = shape.rows, call.C = shape.C, call.K = shape.K;
  call.formula = formula;
  call.logit_bias = input(in.logit_bias, logits, shape.C, "logit_bias");
  call.margin = input(in.margin, logits, shape.C, "margin");
  call.pos_weight = input(in.pos_weight, logits, shape.C, "pos_weight");
  call.has_background = in.background_index.has_value();
  call.background = in.background_index.value_or(0);
  call.target = static_cast<const int64_t*>(target.const_data_ptr());
  return call;
}
void set_grad(cbloss::Call& call, const Tensor& grad, const Tensor& logits) {
  check_grad(grad, logits);
  check_device(grad, logits, "grad");
  call.grad = grad.mutable_data_ptr(), call.grad_stride = strides_of(grad);
  if (call.C == 1) call.grad_stride.c = 1;
}

void loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
          const OptionalTensor& sample_weight, const OptionalTensor& normalizer,
          const OptionalTensor& logit_bias, const OptionalTensor& margin,
          const OptionalTensor& pos_weight, const Numbers& numbers,
          std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
          int64_t reduction, const Tensor& loss, const OptionalTensor& grad,
          const OptionalTensor& saved) {
  const Inputs in{target, weight,     sample_weight, normalizer,      logit_bias,
                  margin, pos_weight, ignore_index,  background_index};
  const Shape shape(logits);
  const Formula formula = Formula::of(numbers);
  cbloss::Call call = call_of(logits, in, shape, formula);
  call.weight = input(weight, logits, shape.C, "weight");
  call.sample_weight = input(sample_weight, logits, shape.rows, "sample_weight");
  call.normalizer = input(normalizer, logits, 1, "normalizer");
  call.ignore = ignore_index.has_value(), call.ignored = ignore_index.value_or(0);
  call.reduction = reduction_of(reduction);
  call.loss_per_row = loss.dim() > 0;
  call.loss = buffer(loss, logits, call.loss_per_row ? shape.rows : 1, "loss");
  if (saved) call.saved = buffer(*saved, logits, saved_rows(formula.sigmoid) * shape.rows, "saved");
  if (grad) set_grad(call, *grad, logits);
  if (shape.rows == 0) {
    if (!call.loss_per_row) loss.zero_();
    return;
  }
  const Current current(logits);
  OptionalTensor scratch;  // one call of allocate at most
  const auto allocate = [&](int64_t size) {
    return scratch.emplace(loss.new_empty(size)).mutable_data_ptr();
  };
  dispatch(logits,
           [&](auto s) { check(cbloss::loss<decltype(s)>(call, current.device, allocate)); });
}

void gradient(const Tensor& logits, const Tensor& target, const OptionalTensor& /*weight*/,
              const OptionalTensor& logit_bias, const OptionalTensor& margin,
              const OptionalTensor& pos_weight, const Tensor& saved, const Tensor& grad_loss,
              const Numbers& numbers, std::optional<int64_t> ignore_index,
              std::optional<int64_t> background_index, const Tensor& grad) {
  const Inputs in{target,          NONE, NONE, NONE, logit_bias, margin, pos_weight, ignore_index,
                  background_index};
  const Shape shape(logits);
  const Formula formula = Formula::of(numbers);
  cbloss::Call call = call_of(logits, in, shape, formula);
  set_grad(call, grad, logits);
  call.saved = buffer(saved, logits, saved_rows(formula.sigmoid) * shape.rows, "saved");
  call.grad_loss_per_row = grad_loss.dim() > 0;
  call.grad_loss = input(grad_loss, logits, call.grad_loss_per_row ? shape.rows : 1, "grad_loss");
  if (shape.rows == 0) return;
  const Current current(logits);
  dispatch(logits, [&](auto s) { check(cbloss::gradient<decltype(s)>(call, current.device)); });
}

// Multiplies numel elements of memory, from grad's first on, by grad_loss, unless that is 1.
void scale_gradient(const Tensor& grad, const Tensor& grad_loss, int64_t numel) {
  const void* factor = input(grad_loss, grad, 1, "grad_loss");
  const int64_t beyond = grad.storage_bytes() / grad.element_size() - grad.storage_offset();
  require(0 <= numel && numel <= beyond, "numel must lie within grad's storage, got ", numel);
  if (numel == 0) return;
  const Current current(grad);
  dispatch(grad, [&](auto s) {
    check(cbloss::scale_gradient<decltype(s)>(grad.mutable_data_ptr(), factor, numel,
                                              current.device));
  });
}

}  // namespace

// What Python calls through ctypes.
#define CB_EXPORT extern "C" __attribute__((visibility("default")))

// Gives the kernels to operators of a library of PyTorch: ".cuda" overloads, or the default ones.
// Returns whether PyTorch took them.
CB_EXPORT int cbloss_register(const char* library, const char* dispatch_key) try {
  Library(library, dispatch_key)
      .impl<&loss>("loss.cuda")
      .impl<&gradient>("gradient.cuda")
      .impl<&scale_gradient>("_scale");
  return 1;
} catch (const std::exception&) {
  return 0;
}
CB_EXPORT int cbloss_register_default(const char* library, const char* dispatch_key) try {
  Library(library, dispatch_key).impl<&loss>("loss").impl<&gradient>("gradient");
  return 1;
} catch (const std::exception&) {
  return 0;
}

CB_EXPORT const char* cbloss_architectures() { return CBLOSS_ARCHITECTURES; }

// The version of CUDA that this was built with, 1000 * major + 10 * minor.
CB_EXPORT int cbloss_built_with() { return CUDART_VERSION; }
