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
template <class S>
struct Classes {
  using T = Compute<S>;
  T z[CLASSES];
  CB_FN Classes(const S* x, int64_t stride, int C, const Row<T>& row, int first) {
#pragma unroll
    for (int j = 0; j < CLASSES; ++j) {
      const bool there = row.read && first + j < C && first + j != row.y;
      z[j] = there ? T(x[(first + j) * stride]) : -INF<T>;
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

template <class S, bool SMOOTH>
__global__ void __launch_bounds__(TILE) softmax_tiles(Rows<S> a, bool per_row) {
  using T = Compute<S>;
  const int i = blockIdx.x * TILE + threadIdx.x;
  T loss = 0;
  if (i < a.rows) {
    const Row<T> row = a.grad_loss ? target_of<true>(a, i) : target_of<false>(a, i);
    const T r = a.grad_loss ? weight_of<true>(a, i, row) : weight_of<false>(a, i, row);
    const S* x = row_of(a.logits, a.x, a.K, i);
    const T z_y = row.read ? T(x[row.y * a.x.c]) : T(0);
    Part<T, SMOOTH> part;
    if (a.grad_loss) {
      part.M = a.saved[int64_t(a.rows) + i], part.R = a.saved[int64_t(a.rows) * 2 + i];
    } else {
      // Else ever larger logits would move the sum, and round it, C / CLASSES times.
      if (a.C > MANY)
        for (int first = 0; first < a.C; first += CLASSES) {
          const Classes<S> c(x, a.x.c, a.C, row, first);
#pragma unroll
          for (int j = 0; j < CLASSES; ++j) part.M = larger(part.M, c.z[j]);
        }
      for (int first = 0; first < a.C; first += CLASSES) {
        const Classes<S> c(x, a.x.c, a.C, row, first);
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
      const Classes<S> c(x, a.x.c, a.C, row, first);
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
    const Row<T> row = a.grad_loss ? target_of<true>(a, i) : target_of<false>(a, i);
    const T r = a.grad_loss ? weight_of<true>(a, i, row) : weight_of<false>(a, i, row);
    const S* x = row_of(a.logits, a.x, a.K, i);
    S* g = row_of(a.grad, a.g, a.K, i);
    const T t = SMOOTH ? a.eps / a.C : 0, z_y = row.read ? T(x[row.y * a.x.c]) : T(0);
    const T t_y = 1 - (SMOOTH ? a.eps : T(0)) + t;
    const Element<T> at_y = smoothed<G, IS_HALF<S>>(z_y, a.gamma, t_y, SMOOTH);
    T L = at_y.L;
    for (int first = 0; first < a.C; first += CLASSES) {
      const Classes<S> c(x, a.x.c, a.C, row, first);
      LossSum<G, SMOOTH, IS_HALF<S>, T> sum;
#pragma unroll
      for (int j = 0; j < CLASSES; ++j) {
        const int column = first + j;
        const T slope = sum.add(c.z[j], a.gamma, t,
                                [&] { return !row.read || column >= a.C || column == row.y; });
        if (a.grad && column < a.C) g[column * a.g.c] = S(r * (column == row.y ? at_y.g : slope));
      }
      L += sum.take();
    }
    loss = weighted(r, L);
    if (a.saved && !a.grad_loss) a.saved[i] = row.keep ? r : T(-1);
  }
  if (a.loss) put_tile_loss(a, i, loss, per_row);
}

}  // namespace cbloss
