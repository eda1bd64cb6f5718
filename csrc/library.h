// Functions as PyTorch operators over its stable C ABI: their arguments come on a stack, each as a
// number, or as a pointer to something that is the function's own from then on.
#pragma once
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "tensor.h"

namespace stack {

// What lies on the stack is as torch 2.11 has it.
constexpr uint64_t ABI_VERSION = 0x020b000000000000;

// The low bytes of a value, which all of PyTorch's machines have first.
template <class T>
T bits(StableIValue value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(value));
  T copy;
  std::memcpy(&copy, &value, sizeof(T));
  return copy;
}

template <class T>
struct Read {
  static T from(StableIValue value) { return bits<T>(value); }
};
template <>
struct Read<Tensor> {
  static Tensor from(StableIValue value) { return Tensor(bits<AtenTensorHandle>(value)); }
};
template <class T>
struct Read<std::optional<T>> {
  static std::optional<T> from(StableIValue value) {
    const std::unique_ptr<StableIValue> inner(bits<StableIValue*>(value));
    if (!inner) return {};
    return Read<T>::from(*inner);
  }
};
template <>
struct Read<Numbers> {
  static Numbers from(StableIValue value) {
    struct Delete {
      void operator()(StableListHandle list) const { torch_delete_list(list); }
    };
    const std::unique_ptr<StableListOpaque, Delete> list(bits<StableListHandle>(value));
    size_t size = 0;
    CHECK_TORCH(torch_list_size, list.get(), &size);
    Numbers numbers{{}, int64_t(size)};
    for (size_t i = 0; i < size && i < Numbers::MOST; ++i) {
      StableIValue item = 0;
      CHECK_TORCH(torch_list_get_item, list.get(), i, &item);
      numbers.values[i] = bits<double>(item);
    }
    return numbers;
  }
};

// A function as PyTorch calls an operator. It returns nothing: its results are what it writes.
template <auto FUNCTION>
struct Boxed;
template <class... Arguments, void (*FUNCTION)(Arguments...)>
struct Boxed<FUNCTION> {
  static void call(StableIValue* values, uint64_t inputs, uint64_t outputs) {
    if (inputs != sizeof...(Arguments) || outputs != 0)
      throw std::runtime_error("the operator's schema does not match its kernel");
    run(values, std::index_sequence_for<Arguments...>{});
  }

 private:
  template <size_t... I>
  static void run(StableIValue* values, std::index_sequence<I...>) {
    // All are taken off the stack before one is looked at.
    const std::tuple<std::decay_t<Arguments>...> taken{
        Read<std::decay_t<Arguments>>::from(values[I])...};
    FUNCTION(std::get<I>(taken)...);
  }
};

}  // namespace stack

// Kernels of operators for a dispatch key. They stay registered: a library is never unloaded.
class Library {
 public:
  Library(const char* name, const char* dispatch_key) {
    CHECK_TORCH(aoti_torch_library_init_impl, name, dispatch_key, __FILE__, __LINE__, &handle_);
  }
  template <auto FUNCTION>
  Library& impl(const char* operator_name) {
    CHECK_TORCH(torch_library_impl, handle_, operator_name, stack::Boxed<FUNCTION>::call,
                stack::ABI_VERSION);
    return *this;
  }

 private:
  TorchLibraryHandle handle_ = nullptr;
};
