// The row kernels of softmax and sigmoid, and which of them a call takes. Compiled once per
// instruction set, by isa/*.cpp: CBLOSS_ISA names the namespace, the compiler's -m flags choose the
// instructions.
#pragma once
#include "call.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CB_FN inline __attribute__((always_inline))

namespace CBLOSS_ISA {

#include "vec.h"
//
#include "../row_math.h"
//
#include "common.h"
#include "memory.h"
//
#include "row_kernels.h"
//
#include "blocks.h"
#include "tile_kernels.h"
//
#include "soft_rows.h"
#include "soft_tiles.h"

// Vectors of classes need the classes side by side in memory, and enough of them; otherwise vectors
// of rows ("tiles") are faster.
constexpr int64_t FEW_CLASSES = 100;
bool side_by_side(int64_t C, const Strides& s) { return C >= FEW_CLASSES && s.c == 1; }

// Whether each class of a row has a target or a factor of its own, as in inputs.py.
bool class_by_class(const Call& a) {
  return a.soft || a.formula.per_class || (a.pos_weight && a.formula.eps != 0);
}

// What only GENERAL code has here: gamma and alpha of elements whose target may be any number, and
// class weights.
bool only_general(const Call& a) {
  const Formula& f = a.formula;
  const bool any_target = f.eps != 0 || class_by_class(a);
  return any_target && (f.gamma != 0 || has_alpha(f) || f.per_class);
}

// The rarer kernels have no code of their own for a recomputed gradient: they compute the loss,
// too, and leave it out.
constexpr Mode with_loss(Mode mode) { return mode == Mode::GRAD ? Mode::LOSS_AND_GRAD : mode; }

template <class S, Mode MODE>
RowKernel softmax_kernel(const Call& a, bool rows) {
  if (!class_by_class(a)) return rows ? softmax_rows<S, MODE> : softmax_tiles<S, MODE>;
  constexpr Mode M = with_loss(MODE);
  if (!rows) return softmax_soft_tiles<S, M>;
  return a.weight ? softmax_soft_rows<S, M, true> : softmax_soft_rows<S, M, false>;
}

template <class S, Mode MODE, Gamma G>
RowKernel sigmoid_kernel(const Call& a, bool rows) {
  constexpr Mode M = with_loss(MODE);
  if constexpr (G == Gamma::ZERO || G == Gamma::GENERAL) {  // see only_general
    if (class_by_class(a)) return rows ? sigmoid_soft_rows<S, M, G> : sigmoid_soft_tiles<S, M, G>;
    if (a.formula.eps != 0)
      return rows ? sigmoid_rows<S, M, G, true> : sigmoid_tiles<S, M, G, true>;
  }
  constexpr Mode RARE = G == Gamma::GENERAL ? M : MODE;
  return rows ? sigmoid_rows<S, RARE, G, false> : sigmoid_tiles<S, RARE, G, false>;
}

template <class S, Mode MODE>
RowKernel kernel_of(const Call& a) {
  const bool rows = side_by_side(a.C, a.logits_stride) &&
                    (MODE == Mode::LOSS || side_by_side(a.C, a.grad_stride));
  if (!a.formula.sigmoid) return softmax_kernel<S, MODE>(a, rows);
  switch (gamma_code(a.formula, only_general(a))) {
    case Gamma::ZERO: return sigmoid_kernel<S, MODE, Gamma::ZERO>(a, rows);
    case Gamma::HALF: return sigmoid_kernel<S, MODE, Gamma::HALF>(a, rows);
    case Gamma::ONE: return sigmoid_kernel<S, MODE, Gamma::ONE>(a, rows);
    case Gamma::TWO: return sigmoid_kernel<S, MODE, Gamma::TWO>(a, rows);
    case Gamma::ANY: return sigmoid_kernel<S, MODE, Gamma::ANY>(a, rows);
    default: return sigmoid_kernel<S, MODE, Gamma::GENERAL>(a, rows);
  }
}

template <class S>
RowKernel find_mode(Mode mode, const Call& a) {
  using T = typename Lanes<S>::T;
  const bool rows = side_by_side(a.C, a.soft_stride);
  switch (mode) {
    case Mode::LOSS: return kernel_of<S, Mode::LOSS>(a);
    case Mode::LOSS_AND_GRAD: return kernel_of<S, Mode::LOSS_AND_GRAD>(a);
    case Mode::CHECK: return rows ? check_rows<T> : check_tiles<T>;
    case Mode::LABELS: return rows ? label_weight_rows<T> : label_weight_tiles<T>;
    default: return kernel_of<S, Mode::GRAD>(a);
  }
}

RowKernel find(DType dtype, Mode mode, const Call& a) {
  switch (dtype) {
    case DType::BFloat16: return find_mode<BFloat16>(mode, a);
#if defined(__AVX512BF16__)  // differs from avx512 in how it rounds to bfloat16 alone
    default: return avx512::find(dtype, mode, a);
#else
    case DType::Float16: return find_mode<Float16>(mode, a);
    case DType::Float32: return find_mode<float>(mode, a);
#if defined(__AVX512F__)  // float64 is there to be right, and has no vectors
    default: return avx2::find(dtype, mode, a);
#else
    default: return find_mode<double>(mode, a);
#endif
#endif
  }
}

}  // namespace CBLOSS_ISA
