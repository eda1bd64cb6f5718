// Both families for few classes, or classes that do not lie side by side: a thread has a whole row.
// Neighbouring threads have neighbouring rows, so one of them brings the other's cache lines.
#pragma once
#include "sigmoid.cuh"
#include "softmax.cuh"

namespace cbloss {

constexpr int TILE = 128;   // rows of a block
constexpr int CLASSES = 8;  // in registers at a time
constexpr int MANY = 1024;  // classes: the maximum is taken first

// Classes [first, first + CLASSES) of a row, -inf at the target and past the end.
template <class S, bool GENERAL>
struct Classes {
  using T = Compute<S>;
  T z[CLASSES];
  CB_FN Classes(const Rows<S>& a, const S* x, const Row<T>& row, int first) {
#pragma unroll
    for (int j = 0; j < CLASSES; ++j) {
      const int c = first + j;
      const bool there = row.read && c < a.C && c != row.y;
      z[j] = there ? adjusted<GENERAL>(a, T(x[c * a.x.c]), c) : -INF<T>;
    }
  }
};

// The loss of a row, or of a block's rows: whatever the call's reduction adds up.
template <class S, class T = Compute<S>>
CB_FN void put_tile_loss(const Rows<S>& a, int i, T loss, bool per_row) {
  if (per_row) {
    if (i < a.rows) a.loss[i] = loss;
    return;
  }
  loss = sum_block<TILE>(i < a.rows ? loss : T(0));
  if (threadIdx.x == 0) a.loss[blockIdx.x] = loss;
}

template <class S, bool GENERAL>
__global__ void __launch_bounds__(TILE) softmax_tiles(Rows<S> a, bool per_row) {
  using T = Compute<S>;
  const int i = blockIdx.x * TILE + threadIdx.x;
  T loss = 0;
  if (i < a.rows) {
    const Row<T> row = target_of(a, i, a.grad_loss);
    const T r = weight_of(a, i, row, a.grad_loss);
    const S* x = row_of(a.logits, a.x, a.K, i);
    const T z_y = row.read ? target_logit<GENERAL>(a, T(x[row.y * a.x.c]), row.y) : T(0);
    Part<T, GENERAL> part;
    if (a.grad_loss) {
      part.M = a.saved[int64_t(a.rows) + i], part.R = a.saved[int64_t(a.rows) * 2 + i];
    } else {
      // Else ever larger logits would move the sum, and round it, C / CLASSES times.
      if (a.C > MANY)
        for (int first = 0; first < a.C; first += CLASSES) {
          const Classes<S, GENERAL> c(a, x, row, first);
#pragma unroll
          for (int j = 0; j < CLASSES; ++j) part.M = larger(part.M, c.z[j]);
        }
      for (int first = 0; first < a.C; first += CLASSES) {
        const Classes<S, GENERAL> c(a, x, row, first);
        part.template add<CLASSES>([&](int j) { return c.z[j]; });
      }
    }
    const SoftmaxRow<T> f = formula(a, row, r, z_y, part);
    loss = f.loss;
    if (a.saved && !a.grad_loss) {
      a.saved[i] = row.keep ? r : T(-1);
      a.saved[int64_t(a.rows) + i] = part.M, a.saved[int64_t(a.rows) * 2 + i] = part.R;
    }
    S* g = row_of(a.grad, a.g, a.K, i);
    for (int first = 0; a.grad && first < a.C; first += CLASSES) {
      const Classes<S, GENERAL> c(a, x, row, first);
#pragma unroll
      for (int j = 0; j < CLASSES; ++j) {
        const T e = exp(below(c.z[j], clamped(part.M)));
        const T slope = first + j == row.y ? f.g_y : f.k * e - f.uniform;
        if (first + j < a.C) g[(first + j) * a.g.c] = S(slope);
      }
    }
  }
  if (a.loss) put_tile_loss(a, i, loss, per_row);
}

template <class S, Gamma G, bool SMOOTH>
__global__ void __launch_bounds__(TILE) sigmoid_tiles(Rows<S> a, bool per_row) {
  using T = Compute<S>;
  const int i = blockIdx.x * TILE + threadIdx.x;
  T loss = 0;
  if (i < a.rows) {
    const Row<T> row = target_of(a, i, a.grad_loss);
    const T r = weight_of(a, i, row, a.grad_loss);
    const S* x = row_of(a.logits, a.x, a.K, i);
    S* g = row_of(a.grad, a.g, a.K, i);
    constexpr bool GENERAL = G == Gamma::GENERAL;
    const Numbers<T> f = used<G>(a.f);
    const T t = SMOOTH ? f.eps / a.C : T(0), others = SMOOTH ? T(1) : f.alpha_neg;
    const T slope = r * f.scale, slope_others = slope * others;
    const T z_y = row.read ? target_logit<GENERAL>(a, T(x[row.y * a.x.c]), row.y) : T(0);
    const Element<T> at_y = at_target<G, SMOOTH, IS_HALF<S>>(z_y, T(a.C), f);
    T L = 0;
    for (int first = 0; first < a.C; first += CLASSES) {
      const Classes<S, GENERAL> c(a, x, row, first);
      LossSum<G, SMOOTH, IS_HALF<S>, T> sum;
#pragma unroll
      for (int j = 0; j < CLASSES; ++j) {
        const int column = first + j;
        const T g_c =
            sum.add(c.z[j], t, f, [&] { return !row.read || column >= a.C || column == row.y; });
        if (a.grad && column < a.C)
          g[column * a.g.c] = S(column == row.y ? slope * at_y.g : slope_others * g_c);
      }
      L += sum.take();
    }
    loss = weighted(r, weighted(others, L) + at_y.L);
    if (a.saved && !a.grad_loss) a.saved[i] = row.keep ? r : T(-1);
  }
  if (a.loss) put_tile_loss(a, i, loss, per_row);
}

}  // namespace cbloss
