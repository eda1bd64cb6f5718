// The sigmoid kernels: every element's loss depends on its logit alone, so one pass is enough for
// rows of any length.
#pragma once
#include "row.cuh"

namespace cbloss {

// The formula as the kernel needs it: without GENERAL, what is always 1 is a constant.
template <Gamma G, class T>
CB_FN FormulaOf<T> used(FormulaOf<T> f) {
  if (G != Gamma::GENERAL) f.alpha = f.alpha_neg = f.logit_scale = 1;
  return f;
}

// The element of the target y, from its logit; read: it may be looked at.
template <Gamma G, bool SMOOTH, class S, class T = Compute<S>>
CB_FN Element<T> target_element(const TypedCall<S>& a, FormulaOf<T> f, int y, bool read,
                                const S* x_y) {
  constexpr bool GENERAL = G == Gamma::GENERAL;
  const T z_y = read ? target_logit<GENERAL>(a, T(*x_y), y) : T(0);
  if (GENERAL && !SMOOTH && a.pos_weight && read) f.alpha *= a.pos_weight[y];
  return at_target<G, SMOOTH, IS_HALF<S>>(z_y, T(a.C), f);
}

// Blocks per multiprocessor that the compiler keeps room for; 0: it chooses. For the longest
// formula it would choose nine, and spill.
template <Gamma G, bool SMOOTH>
constexpr int BLOCKS_OF_ROWS = G == Gamma::GENERAL && SMOOTH ? 7 : 0;

// A row, or `span` vectors of it, by THREADS threads: one read of the logits, one write of the
// gradient.
template <class S, Gamma G, bool SMOOTH, int THREADS, int ITEMS, bool ALIGNED>
__global__ void __launch_bounds__(4 * WARP, BLOCKS_OF_ROWS<G, SMOOTH>)
    sigmoid_rows(TypedCall<S> a) {
  using T = Compute<S>;
  constexpr bool SHORT = IS_HALF<S>;
  constexpr int N = Vec<S>::N;
  const int thread = threadIdx.x % THREADS;
  const Place<THREADS> place(a.rows);
  if (place.none) return;
  const int i = place.i;
  const Row<T> row = a.grad_loss ? target_of<true>(a, i, true) : target_of<true>(a, i, false);
  const T r = a.grad_loss ? row_scale(a, i, row, true) : row_scale(a, i, row, false);
  const S* x = row_of(a.logits, a.x, a.K, i);
  S* g = row_of(a.grad, a.g, a.K, i);
  Columns<S, THREADS> at(x, a.C, row.y, thread);
  if (!place.there) at.leave_out();
  const int begin = blockIdx.y * a.span, end = ::min(begin + a.span, at.whole);
  const bool edges = blockIdx.y == 0;
  constexpr bool GENERAL = G == Gamma::GENERAL;
  const FormulaOf<T> f = used<G>(a.f);
  const T t = SMOOTH ? f.eps / a.C : T(0);  // the smoothed target of the other classes
  const T others = SMOOTH ? T(1) : f.alpha_neg;
  const T slope = r * f.logit_scale, slope_others = slope * others;

  T L = 0, L_target = 0;  // of the other classes; of the target, apart because of alpha
  T& L_y = GENERAL ? L_target : L;
  if (edges && at.edge >= 0) {
    T g_edge;
    if (at.edge == row.y) {
      const Element<T> at_y = target_element<G, SMOOTH>(a, f, row.y, row.read, x + row.y);
      L_y += at_y.L, g_edge = slope * at_y.g;
    } else {
      LossSum<G, SMOOTH, SHORT, T> sum;
      const T z = row.read ? adjusted<GENERAL>(a, T(x[at.edge]), at.edge) : -INF<T>;
      g_edge = slope_others * sum.add(z, t, f, [&] { return !row.read; });
      L += sum.take();
    }
    if (a.grad) g[at.edge] = S(g_edge);
  }
  for (int first = begin; first < end; first += ITEMS * THREADS) {
    const int left = end - first - thread;
    Vec<S> z[ITEMS];
    load_tile<THREADS>(z, x + at.head, first + thread, row.read ? left : 0);
    Element<T> at_y{};
    const bool y_here = at.y_vector >= first && at.y_vector < ::min(end, first + ITEMS * THREADS);
    if (y_here) {
      at_y = target_element<G, SMOOTH>(a, f, row.y, row.read, x + row.y);
      L_y += at_y.L;
      at.blank_y(z, first);
    }
    const int stored = a.grad ? left : 0;
    uint4* p = reinterpret_cast<uint4*>(g + at.head) + first + thread;
    LossSum<G, SMOOTH, SHORT, T> sum;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const bool there = k * THREADS < left;
      const auto g_of = [&](int j) {
        const int column = at.column(first + thread + k * THREADS, j);
        return slope_others * sum.add(adjusted<GENERAL>(a, z[k][j], column), t, f, [&] {
          return !row.read || !there || at.is_y(first / THREADS + k, j);
        });
      };
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        const T even = g_of(j);
        z[k].set(j, even, g_of(j + 1));
      }
      if (k * THREADS < stored) store<S>(p + k * THREADS, z[k], ALIGNED);
    }
    L += sum.take();
    if (a.grad && y_here) g[row.y] = S(slope * at_y.g);  // after its vector
  }
  if (!a.loss) return;
  if (GENERAL) L = weighted(others, L) + L_y;
  L = THREADS <= WARP ? sum_lanes<LANES<THREADS>>(L) : sum_block<4 * WARP>(L);
  if (thread > 0 || !place.there) return;
  a.loss[int64_t(i) * gridDim.y + blockIdx.y] = weighted(r, L);
  if (a.saved && blockIdx.y == 0) a.saved[i] = row.keep ? r : T(-1);
}

}  // namespace cbloss
