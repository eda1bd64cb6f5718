// What describes a call in every C++ backend.
#pragma once
#include <cstdint>

struct Strides {  // of (N, C, K), in elements
  int64_t n, c, k;
};

enum class Reduction { NONE, MEAN, WEIGHTED_MEAN, SUM };  // in the order of spec.REDUCTIONS
