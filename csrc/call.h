// What describes a call in every C++ backend.
#pragma once
#include <cstdint>

struct Strides {  // of (N, C, K), in elements
  int64_t n, c, k;
};

// The numbers of a loss, in the order of call.py.
struct Formula {
  bool sigmoid;
  double gamma, eps, zeta, gamma_neg, alpha, alpha_neg, clip, scale;
  bool per_class;
  // Positives and negatives alike.
  bool plain() const { return gamma_neg == gamma && clip == 0 && alpha == 1 && alpha_neg == 1; }
};

enum class Reduction { NONE, MEAN, WEIGHTED_MEAN, SUM };  // in the order of call.REDUCTIONS
