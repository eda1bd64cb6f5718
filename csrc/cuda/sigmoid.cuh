// The sigmoid family: every element stands alone (row_math.h), so one pass serves rows of any
// length.
#pragma once
#include "rows.cuh"

namespace cbloss {

// A row, or `span` vectors of it, by THREADS threads: one read of the logits, one write of the
// gradient.
template <class S, Gamma G, bool SMOOTH, int THREADS, int ITEMS, bool ALIGNED>
__global__ void __launch_bounds__(4 * WARP) sigmoid_rows(Rows<S> a) {
  using T = Compute<S>;
  constexpr bool SHORT = IS_HALF<S>;
  constexpr int N = Vec<S>::N;
  const int thread = threadIdx.x % THREADS;
  const int i = THREADS == WARP ? blockIdx.x * 4 + threadIdx.x / WARP : blockIdx.x;
  if (i >= a.rows) return;
  const Row<T> row = a.grad_loss ? target_of<true>(a, i) : target_of<false>(a, i);
  const T r = a.grad_loss ? weight_of<true>(a, i, row) : weight_of<false>(a, i, row);
  const S* x = row_of(a.logits, a.x, a.K, i);
  S* g = row_of(a.grad, a.g, a.K, i);
  const Layout<S, THREADS> at(x, a.C, row.y, thread);
  const int begin = blockIdx.y * a.span, end = ::min(begin + a.span, at.whole);
  const bool edges = blockIdx.y == 0;
  const T t = SMOOTH ? a.eps / a.C : T(0);  // the smoothed target of a negative

  const auto at_target = [&](T z_y) {
    const T t_y = 1 - (SMOOTH ? a.eps : T(0)) + t;
    return smoothed<G, SHORT>(z_y, a.gamma, t_y, SMOOTH);
  };
  T L = 0;
  if (edges && at.edge >= 0) {
    T slope;
    const T z = row.read ? T(x[at.edge]) : T(0);
    if (at.edge == row.y) {
      const Element<T> at_y = at_target(z);
      L = at_y.L, slope = at_y.g;
    } else {
      LossSum<G, SMOOTH, SHORT, T> sum;
      slope = sum.add(row.read ? z : -INF<T>, a.gamma, t, [&] { return !row.read; });
      L = sum.take();
    }
    if (a.grad) g[at.edge] = S(r * slope);
  }
  for (int first = begin; first < end; first += ITEMS * THREADS) {
    const int left = end - first - thread;
    Vec<S> z[ITEMS];
    load_tile<THREADS>(z, x + at.head, first + thread, row.read ? left : 0);
    Element<T> at_y{};
    const bool y_here = at.y_vector >= first && at.y_vector < ::min(end, first + ITEMS * THREADS);
    if (y_here) {
      at_y = at_target(row.read ? T(x[row.y]) : T(0));
      L += at_y.L;
      at.blank_y(z, first);
    }
    const int stored = a.grad ? left : 0;
    uint4* p = reinterpret_cast<uint4*>(g + at.head) + first + thread;
    LossSum<G, SMOOTH, SHORT, T> sum;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const bool there = k * THREADS < left;
      const auto slope = [&](int j) {
        return r * sum.add(z[k][j], a.gamma, t,
                           [&] { return !row.read || !there || at.is_y(first / THREADS + k, j); });
      };
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        const T even = slope(j);
        z[k].set(j, even, slope(j + 1));
      }
      if (k * THREADS < stored) store<S>(p + k * THREADS, z[k], ALIGNED);
    }
    L += sum.take();
    if (a.grad && y_here) g[row.y] = S(r * at_y.g);  // after its vector
  }
  if (!a.loss) return;
  L = THREADS == WARP ? sum_warp(L) : sum_block<4 * WARP>(L);
  if (thread > 0) return;
  a.loss[int64_t(i) * gridDim.y + blockIdx.y] = weighted(r, L);
  if (a.saved && blockIdx.y == 0) a.saved[i] = row.keep ? r : T(-1);
}

}  // namespace cbloss
