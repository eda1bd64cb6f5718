// PyTorch's tensors and threads over its stable C ABI.
#pragma once
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "call.h"
#include "torch_abi.h"

// PyTorch has written what went wrong to stderr.
inline void check_torch(AOTITorchError error, const char* function) {
  if (error != 0) throw std::runtime_error(std::string(function) + " failed in PyTorch");
}
#define CHECK_TORCH(function, ...) check_torch(function(__VA_ARGS__), #function)

inline DType dtype_of_code(int32_t code) {
  if (code == aoti_torch_dtype_float32()) return DType::Float32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::BFloat16;
  if (code == aoti_torch_dtype_float16()) return DType::Float16;
  if (code == aoti_torch_dtype_float64()) return DType::Float64;
  if (code == aoti_torch_dtype_int64()) return DType::Int64;
  if (code == aoti_torch_dtype_bool()) return DType::Bool;
  return DType::Other;
}

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}  // which is its own from now on

  AtenTensorHandle get() const { return handle_.get(); }
  int64_t dim() const { return number(aoti_torch_get_dim); }
  int64_t numel() const { return number(aoti_torch_get_numel); }
  const int64_t* sizes() const { return array(aoti_torch_get_sizes); }
  const int64_t* strides() const { return array(aoti_torch_get_strides); }
  int64_t size(int64_t d) const { return sizes()[d]; }
  int64_t stride(int64_t d) const { return strides()[d]; }
  DType dtype() const { return dtype_of_code(dtype_code()); }
  int64_t element_size() const { return int64_t(aoti_torch_dtype_element_size(dtype_code())); }
  int32_t device_type() const { return number<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return number<int32_t>(aoti_torch_get_device_index); }
  int64_t storage_bytes() const { return number(aoti_torch_get_storage_size); }
  int64_t storage_offset() const { return number(aoti_torch_get_storage_offset); }
  bool is_contiguous() const { return number<bool>(aoti_torch_is_contiguous); }
  const void* const_data_ptr() const { return number<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return number<void*>(torch_get_mutable_data_ptr); }
  void zero_() const { CHECK_TORCH(aoti_torch_zero_, get()); }

  // Uninitialised, of this one's type and on its device.
  Tensor new_empty(int64_t numel) const {
    const int64_t stride = 1;
    AtenTensorHandle made = nullptr;
    CHECK_TORCH(aoti_torch_empty_strided, 1, &numel, &stride, dtype_code(), device_type(),
                device_index(), &made);
    return Tensor(made);
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;

  template <class T = int64_t>
  T number(AOTITorchError (*of)(AtenTensorHandle, T*)) const {
    T found{};
    check_torch(of(get(), &found), "a property of a tensor");
    return found;
  }
  const int64_t* array(AOTITorchError (*of)(AtenTensorHandle, int64_t**)) const {
    int64_t* found = nullptr;
    check_torch(of(get(), &found), "a property of a tensor");
    return found;
  }
  int32_t dtype_code() const { return number<int32_t>(aoti_torch_get_dtype); }
};
using OptionalTensor = std::optional<Tensor>;

// Calls body(begin, end) for parts of [0, n) in PyTorch's threads.
template <class Body>
void parallel_for(int64_t n, int64_t grain_size, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* f) {
    (*static_cast<const Body*>(f))(begin, end);
  };
  CHECK_TORCH(torch_parallel_for, 0, n, grain_size, call, const_cast<Body*>(&body));
}

inline int64_t get_num_threads() {
  uint32_t found = 1;
  CHECK_TORCH(torch_get_num_threads, &found);
  return found;
}
