// The values inside a call's tensors: how they are read, checked and told. Included by ops.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iomanip>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

#include "../ops.h"
#include "call.h"
#include "half.h"

namespace {

template <class T>
constexpr DType COMPUTED = sizeof(T) == 8 ? DType::Float64 : DType::Float32;

// "[2, 0, 17]" for the flat index i of a tensor; "[i]" for a vector.
std::string position(const Tensor& t, int64_t i) {
  std::string text;
  for (int64_t d = t.dim(); d-- > 0;) {
    text = std::to_string(i % t.size(d)) + (text.empty() ? "" : ", " + text);
    i /= t.size(d);
  }
  return "[" + text + "]";
}

// The shortest text that is read back as v: a target of 1 + 1e-7 must not be printed as 1.
template <class T>
std::string shortest(T v) {
  std::ostringstream text(std::ios_base::out);
  for (int digits = 6; digits <= std::numeric_limits<T>::max_digits10; ++digits) {
    text.str(""), text << std::setprecision(digits) << v;
    if (T(std::strtod(text.str().c_str(), nullptr)) == v) break;
  }
  return text.str();
}

// " or ignore_index=-100", where there is such an index.
std::string or_index(const char* name, std::optional<int64_t> index) {
  return index ? std::string(" or ") + name + "_index=" + std::to_string(*index) : "";
}

template <class T, class Good>
void check_all(const T* vector, int64_t C, const char* name, const Good& good, const char* what) {
  bool all = true;
  for (int64_t c = 0; c < C; ++c) all &= good(vector[c]);
  if (all) return;
  const T* bad = std::find_if_not(vector, vector + C, good);
  require(false, name, "[", bad - vector, "] = ", *bad, ": must be ", what);
}

// The data of a vector of the type that the loss is computed in; null if there is no vector.
template <class T>
const T* data(const OptionalTensor& t, int64_t numel, const char* name) {
  if (!t) return nullptr;
  check_vector(*t, COMPUTED<T>, numel, name);
  return static_cast<const T*>(t->const_data_ptr());
}
template <class T>
const T* finite(const OptionalTensor& t, int64_t numel, const char* name) {
  const T* vector = data<T>(t, numel, name);
  if (vector) check_all(vector, numel, name, [](T v) { return v - v == 0; }, "finite");
  return vector;
}

template <class T>
const T* weights(const OptionalTensor& t, int64_t numel, const char* name) {
  const T* vector = data<T>(t, numel, name);
  const auto good = [](T w) { return w >= 0 && w < INFINITY; };
  if (vector) check_all(vector, numel, name, good, "finite and >= 0");
  return vector;
}

// A number as a tensor of that type would hold it.
double rounded(double v, DType type) {
  switch (type) {
    case DType::Float32: return float(v);
    case DType::BFloat16: return rounded_to_bfloat16(float(v));
    case DType::Float16: return rounded_to_float16(float(v));
    default: return v;
  }
}

// Whether one of the first targets is negative: a sample decides, so that the kernel does not
// depend on the number of threads.
bool sees_unknown(const Call& a, int64_t rows) {
  const auto among = [&](auto* t) {
    int64_t left = 1024;
    for (int64_t i = 0; i < rows && left > 0; ++i)
      for (int64_t c = 0; c < a.C && left-- > 0; ++c) {
        const Strides& s = a.soft_stride;
        if (float(t[i / a.K * s.n + c * s.c + i % a.K * s.k]) < 0) return true;
      }
    return false;
  };
  switch (a.soft_type) {
    case DType::Float64: return among(static_cast<const double*>(a.soft));
    case DType::Float32: return among(static_cast<const float*>(a.soft));
    case DType::BFloat16: return among(static_cast<const BFloat16*>(a.soft));
    default: return among(static_cast<const Float16*>(a.soft));
  }
}

}  // namespace
