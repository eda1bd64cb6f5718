// The row kernels of both families. Compiled once per instruction set: CBLOSS_ISA names the
// namespace, the compiler's -m flags choose the instructions.
#include "rows.h"

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
//
#include "row_kernels.h"
#include "tile_kernels.h"
//
#include "dense_rows.h"
#include "dense_tiles.h"

// A row kernel wants its classes side by side and enough of them to fill vectors.
constexpr int64_t FEW_CLASSES = 100;

template <class S, Mode MODE, Gamma G, bool SMOOTH>
RowKernel sigmoid_kernel(bool rows) {
  return rows ? sigmoid_rows<S, MODE, G, SMOOTH> : sigmoid_tiles<S, MODE, G, SMOOTH>;
}

template <class S, Mode MODE, Gamma G>
RowKernel sigmoid_dense_kernel(bool rows) {
  return rows ? sigmoid_dense_rows<S, MODE, G> : sigmoid_dense_tiles<S, MODE, G>;
}

template <class S, Mode MODE>
RowKernel find_kernel(Family family, const Rows& a) {
  const Formula& f = a.formula;
  const bool rows =
      a.C >= FEW_CLASSES && a.logits_stride.c == 1 && (MODE == Mode::LOSS || a.grad_stride.c == 1);
  if (a.dense || f.per_class) {
    if (family == Family::SOFTMAX)
      return rows ? softmax_dense_rows<S, MODE> : softmax_dense_tiles<S, MODE>;
    return f.gamma == 0 && f.plain() && !f.per_class
               ? sigmoid_dense_kernel<S, MODE, Gamma::ZERO>(rows)
               : sigmoid_dense_kernel<S, MODE, Gamma::GENERAL>(rows);
  }
  if (family == Family::SOFTMAX) return rows ? softmax_rows<S, MODE> : softmax_tiles<S, MODE>;
  if (f.eps != 0)  // not worth code of its own for each gamma
    return f.gamma == 0 && f.plain() ? sigmoid_kernel<S, MODE, Gamma::ZERO, true>(rows)
                                     : sigmoid_kernel<S, MODE, Gamma::GENERAL, true>(rows);
  if (f.gamma_neg != f.gamma || f.clip != 0)
    return sigmoid_kernel<S, MODE, Gamma::GENERAL, false>(rows);
  if (f.gamma == 0) return sigmoid_kernel<S, MODE, Gamma::ZERO, false>(rows);
  if (f.gamma == 0.5) return sigmoid_kernel<S, MODE, Gamma::HALF, false>(rows);
  if (f.gamma == 1) return sigmoid_kernel<S, MODE, Gamma::ONE, false>(rows);
  if (f.gamma == 2) return sigmoid_kernel<S, MODE, Gamma::TWO, false>(rows);
  return sigmoid_kernel<S, MODE, Gamma::ANY, false>(rows);
}

template <class S>
RowKernel find_mode(Family family, Mode mode, const Rows& a) {
  const bool target_rows = a.C >= FEW_CLASSES && a.dense_stride.c == 1;
  switch (mode) {
    case Mode::LOSS: return find_kernel<S, Mode::LOSS>(family, a);
    case Mode::LOSS_AND_GRAD: return find_kernel<S, Mode::LOSS_AND_GRAD>(family, a);
    case Mode::CHECK: return target_rows ? check_rows<S> : check_tiles<S>;
    case Mode::LABELS: return target_rows ? label_weight_rows<S> : label_weight_tiles<S>;
    default: return find_kernel<S, Mode::GRAD>(family, a);
  }
}

RowKernel find(DType dtype, Family family, Mode mode, const Rows& a) {
#if defined(__AVX512BF16__)  // only rounds to bfloat16 otherwise than avx512
  if (dtype != DType::BFloat16) return avx512::find(dtype, family, mode, a);
  return find_mode<BFloat16>(family, mode, a);
#else
  switch (dtype) {
    case DType::Float64: return find_mode<double>(family, mode, a);
    case DType::Float32: return find_mode<float>(family, mode, a);
    case DType::BFloat16: return find_mode<BFloat16>(family, mode, a);
    default: return find_mode<Float16>(family, mode, a);
  }
#endif
}

}  // namespace CBLOSS_ISA
