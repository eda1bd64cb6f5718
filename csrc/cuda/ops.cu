// The CUDA operators over the LibTorch stable ABI. They never synchronise, and allocate scratch
// memory alone.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <string>
#include <vector>

#include "../ops.h"
#include "call.h"

// The dispatch key of the tensors; tests build the operators for the CPU.
#ifndef CBLOSS_DEVICE
#define CBLOSS_DEVICE CUDA
#endif
#ifndef CBLOSS_ARCHITECTURES
#define CBLOSS_ARCHITECTURES ""
#endif

namespace {

using torch::stable::accelerator::DeviceGuard;

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

// The tensor's device and its current stream, for launches.
struct Current {
  DeviceGuard guard;
  cbloss::Device device;
  explicit Current(const Tensor& t) : guard(t.get_device_index()) {
    const int index = t.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    device = {attribute<cudaDevAttrMultiProcessorCount>(index),
              attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(index),
              attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(index),
              static_cast<cudaStream_t>(stream)};
  }
};

// Calls run(S{}) for the storage type S of the logits.
template <class Run>
void dispatch(const Tensor& logits, const Run& run) {
  switch (logits.scalar_type()) {
    case ScalarType::Double: return run(double{});
    case ScalarType::Float: return run(float{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    case ScalarType::Half: return run(__half{});
    default: require(false, "logits must be float64, float32, bfloat16 or float16");
  }
}
ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A tensor on another device must not reach a kernel.
void check_device(const Tensor& t, const Tensor& logits, const char* name) {
  require(t.is_cpu() == logits.is_cpu() && t.get_device_index() == logits.get_device_index(), name,
          " must be on the device of the logits");
}

void check_like(const Tensor& t, const Tensor& logits, int64_t numel, const char* name) {
  check_vector(t, compute_type(logits), numel, name);
  check_device(t, logits, name);
}
const void* input(const OptionalTensor& t, const Tensor& logits, int64_t numel, const char* name) {
  if (!t) return nullptr;
  check_like(*t, logits, numel, name);
  return t->const_data_ptr();
}
void* buffer(const OptionalTensor& t, const Tensor& logits, int64_t numel, const char* name) {
  if (!t) return nullptr;
  check_like(*t, logits, numel, name);
  return t->mutable_data_ptr();
}

cbloss::Call call_of(const Tensor& logits, const Inputs& in, const Shape& shape,
                     const Formula& formula) {
  const Tensor& target = in.target;
  check_vector(target, ScalarType::Long, shape.rows, "target");
  require(!formula.per_class,
          "the CUDA kernels do not support class_weighting='class', Triton's do");
  require(!in.pos_weight || formula.eps == 0,
          "the CUDA kernels do not support pos_weight with label_smoothing, Triton's do");
  constexpr int64_t MOST = INT32_MAX - 4096;  // so that an index past the end does not overflow
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

void loss(Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor sample_weight,
          OptionalTensor normalizer, OptionalTensor logit_bias, OptionalTensor margin,
          OptionalTensor pos_weight, std::vector<double> numbers,
          std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
          int64_t reduction, Tensor loss, OptionalTensor grad, OptionalTensor saved) {
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
  call.saved = buffer(saved, logits, saved_rows(formula.sigmoid) * shape.rows, "saved");
  if (grad) set_grad(call, *grad, logits);
  if (shape.rows == 0) {
    if (!call.loss_per_row) torch::stable::fill_(loss, 0);
    return;
  }
  const Current current(logits);
  std::vector<Tensor> scratch;
  const auto allocate = [&](int64_t size) {
    return scratch.emplace_back(torch::stable::new_empty(loss, {size})).mutable_data_ptr();
  };
  dispatch(logits,
           [&](auto s) { check(cbloss::loss<decltype(s)>(call, current.device, allocate)); });
}

void gradient(Tensor logits, Tensor target, OptionalTensor /*weight*/, OptionalTensor logit_bias,
              OptionalTensor margin, OptionalTensor pos_weight, Tensor saved, Tensor grad_loss,
              std::vector<double> numbers, std::optional<int64_t> ignore_index,
              std::optional<int64_t> background_index, Tensor grad) {
  const Inputs in{target,          {}, {}, {}, logit_bias, margin, pos_weight, ignore_index,
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
void scale_gradient(Tensor grad, Tensor grad_loss, int64_t numel) {
  const void* factor = input(grad_loss, grad, 1, "grad_loss");
  int64_t bytes = 0, offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(grad.get(), &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(grad.get(), &offset));
  require(0 <= numel && numel <= bytes / int64_t(grad.element_size()) - offset,
          "numel must lie within grad's storage, got ", numel);
  if (numel == 0) return;
  const Current current(grad);
  dispatch(grad, [&](auto s) {
    check(cbloss::scale_gradient<decltype(s)>(grad.mutable_data_ptr(), factor, numel,
                                              current.device));
  });
}

std::string architectures() { return CBLOSS_ARCHITECTURES; }

// Why no kernel can be launched here, or "". Queries the driver's version alone, and no device.
std::string unusable() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const int needed = CUDART_VERSION / 1000;  // any minor version of it is enough
  if (driver / 1000 >= needed) return "";
  std::ostringstream text;
  text << "built with CUDA " << needed << ", but the driver supports only CUDA " << driver / 1000
       << "." << driver % 1000 / 10;
  return text.str();
}

// Registers these kernels for the operators' default overloads on CUDA tensors too.
void serve() {
  static torch::stable::detail::StableLibrary library(
      torch::stable::detail::StableLibrary::Kind::IMPL, "cbloss_fused", "CUDA", __FILE__, __LINE__);
  library.impl("loss", TORCH_BOX(&loss)).impl("gradient", TORCH_BOX(&gradient));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cbloss_fused, CBLOSS_DEVICE, m) {
  m.impl("loss.cuda", TORCH_BOX(&loss));
  m.impl("gradient.cuda", TORCH_BOX(&gradient));
  m.impl("_scale", TORCH_BOX(&scale_gradient));
}
STABLE_TORCH_LIBRARY_IMPL(cbloss_fused, CompositeExplicitAutograd, m) {
  m.impl("_cuda_architectures", TORCH_BOX(&architectures));
  m.impl("_cuda_unusable", TORCH_BOX(&unusable));
  m.impl("_serve_cuda", TORCH_BOX(&serve));
}
