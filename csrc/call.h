// What describes an operator call in every C++ backend.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

enum class DType { Float64, Float32, BFloat16, Float16, Bool, Int64, Other };

struct Strides {  // of (N, C, K), in elements
  int64_t n, c, k;
};

// An operator's list of numbers.
struct Numbers {
  static constexpr int64_t MOST = 10;
  double values[MOST];
  int64_t count;
};

// The numbers of a loss, in the order of options.py's Formula.
struct Formula {
  bool sigmoid;
  double gamma, eps, zeta;
  double gamma_neg, alpha = 1, alpha_neg = 1, clip = 0, logit_scale = 1;
  bool per_class = false;

  // From an operator's argument, whose last six numbers may be missing.
  static Formula of(const Numbers& given) {
    const auto& n = given.values;
    if (given.count != 4 && given.count != 10)
      throw std::invalid_argument("formula must have 4 or 10 numbers, got " +
                                  std::to_string(given.count));
    Formula f{n[0] != 0, n[1], n[2], n[3], n[1]};
    if (given.count == 10)
      f.gamma_neg = n[4], f.alpha = n[5], f.alpha_neg = n[6], f.clip = n[7], f.logit_scale = n[8],
      f.per_class = n[9] != 0;
    return f;
  }
};

// The code of the sigmoid kernels. Each value of gamma that people use has code of its own, ANY
// serves the others. GENERAL alone knows gamma_neg and clip, and whatever else a backend gives to
// no other code.
enum class Gamma { ZERO, HALF, ONE, TWO, ANY, GENERAL };

// The two functions below are static because the CPU kernels are compiled once per instruction set:
// the linker would merge inline copies, and could keep one with AVX-512 instructions.
static inline bool has_alpha(const Formula& f) { return f.alpha != 1 || f.alpha_neg != 1; }

// The code that a formula takes. only_general: it needs what only the backend's GENERAL code has.
static inline Gamma gamma_code(const Formula& f, bool only_general) {
  if (only_general || f.gamma_neg != f.gamma || f.clip != 0) return Gamma::GENERAL;
  if (f.gamma == 0) return Gamma::ZERO;
  if (f.gamma == 0.5) return Gamma::HALF;
  if (f.gamma == 1) return Gamma::ONE;
  if (f.gamma == 2) return Gamma::TWO;
  return Gamma::ANY;
}

enum class Reduction { NONE, MEAN, WEIGHTED_MEAN, SUM };  // in the order of options.py's REDUCTIONS
