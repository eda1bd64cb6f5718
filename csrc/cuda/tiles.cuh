// Softmax and sigmoid kernels for few classes, or classes that are not side by side in memory: a
// thread has a whole row. Neighbouring threads have neighbouring rows, so they use the same cache
// lines. Where the rows of a block are one piece of memory (SHARED), it is read and written in
// whole vectors, by way of shared memory.
#pragma once
#include "sigmoid.cuh"
#include "softmax.cuh"

namespace cbloss {

constexpr int TILE = 128;   // rows per block
constexpr int CLASSES = 8;  // classes in registers at a time
constexpr int MANY = 1024;  // with more classes, a first pass computes the maximum

// Elements from one row to the next in shared memory, such that threads that access the same class
// of neighbouring rows use different banks.
template <class S>
__host__ __device__ constexpr int pitch_of(int C) {
  return IS_HALF<S> ? (C % 4 == 0 ? C + 2 : C) : C | 1;
}

// The rows of a block, copied to shared memory from one piece of global memory.
template <class S>
struct Piece {
  static constexpr int N = Vec<S>::N;
  S* shared;
  int C, pitch, n;  // n: number of elements
  int64_t first;    // index of the first of them in the call's memory

  CB_FN Piece(const TypedCall<S>& a, void* shared)
      : shared(static_cast<S*>(shared)), C(a.C), pitch(pitch_of<S>(a.C)) {
    first = int64_t(blockIdx.x) * TILE * C;
    n = ::min(TILE, a.rows - int(blockIdx.x) * TILE) * C;
  }
  CB_FN S* row() const { return shared + int(threadIdx.x) * pitch; }
  CB_FN S& at(int e) const { return shared[e / C * pitch + e % C]; }

  // Calls vectors(p, places) for each 16-byte vector of memory, element(p, place) for the edges.
  template <class P, class Vectors, class Element>
  CB_FN void visit(P* memory, const Vectors& vectors, const Element& element) const {
    memory += first;
    const int head = ::min(n, int(-(reinterpret_cast<uintptr_t>(memory) / sizeof(S)) % N));
    const int whole = (n - head) / N;
    for (int v = threadIdx.x; v < whole; v += TILE) {
      const int e = head + v * N;
      S* places[N];
      places[0] = &at(e);
      int c = e % C;
#pragma unroll
      for (int j = 1; j < N; ++j) {
        const bool next = ++c == C;  // the next row begins
        places[j] = places[j - 1] + (next ? pitch - C + 1 : 1);
        c = next ? 0 : c;
      }
      vectors(memory + e, places);
    }
    const int edge = int(threadIdx.x) < head ? int(threadIdx.x) : int(threadIdx.x) + whole * N;
    if (edge < n) element(memory[edge], at(edge));
  }
  CB_FN void load(const S* x) const {
    visit(
        x,
        [](const S* p, S* const(&to)[N]) {
          const Vec<S> z{*reinterpret_cast<const uint4*>(p)};
#pragma unroll
          for (int j = 0; j < N; ++j) *to[j] = S(z[j]);
        },
        [](const S& z, S& to) { to = z; });
  }
  CB_FN void store(S* g) const {
    using T = Compute<S>;
    visit(
        g,
        [](S* p, S* const(&from)[N]) {
          Vec<S> z;
#pragma unroll
          for (int j = 0; j < N; j += 2) z.set(j, T(*from[j]), T(*from[j + 1]));
          *reinterpret_cast<uint4*>(p) = z.words;
        },
        [](S& z, const S& from) { z = from; });
  }
};

// The logits and the gradient of a thread's row, in global or shared memory.
template <class S, bool SHARED>
struct ThreadRow {
  const S* x;
  S* g;
  int64_t x_c = 1, g_c = 1;
  CB_FN ThreadRow(const TypedCall<S>& a, int i, const Piece<S>& piece) {
    if constexpr (SHARED) {
      x = g = piece.row();
    } else {
      x = row_of(a.logits, a.x, a.K, i), x_c = a.x.c;
      g = row_of(a.grad, a.g, a.K, i), g_c = a.g.c;
    }
  }
  CB_FN const S* at(int c) const { return x + c * x_c; }
  CB_FN S logit(int c) const { return *at(c); }
  CB_FN S& slope(int c) const { return g[c * g_c]; }
};

// The logits of classes [first, first + CLASSES) of a row, -inf at the target and past the end.
template <class S, bool GENERAL>
struct Classes {
  using T = Compute<S>;
  T z[CLASSES];
  template <bool SHARED>
  CB_FN Classes(const TypedCall<S>& a, const ThreadRow<S, SHARED>& data, const Row<T>& row,
                int first) {
#pragma unroll
    for (int j = 0; j < CLASSES; ++j) {
      const int c = first + j;
      const bool there = row.read && c < a.C && c != row.y;
      z[j] = there ? adjusted<GENERAL>(a, T(data.logit(c)), c) : -INF<T>;
    }
  }
};

// Stores the loss of each row or the sum of the block's.
template <class S, class T = Compute<S>>
CB_FN void put_tile_loss(const TypedCall<S>& a, int i, T loss, bool per_row) {
  if (per_row) {
    if (i < a.rows) a.loss[i] = loss;
    return;
  }
  loss = sum_block<TILE>(i < a.rows ? loss : T(0));
  if (threadIdx.x == 0) a.loss[blockIdx.x] = loss;
}

// Calls row_loss(i, data), which returns the loss of row i and stores its gradient in `data`.
template <bool SHARED, class S, class RowLoss>
CB_FN void run_tile(const TypedCall<S>& a, bool per_row, const RowLoss& row_loss) {
  CB_DYNAMIC_SHARED(uint4, memory);
  const Piece<S> piece(a, memory);
  if constexpr (SHARED) {
    piece.load(a.logits);
    __syncthreads();
  }
  const int i = blockIdx.x * TILE + threadIdx.x;
  Compute<S> loss = 0;
  if (i < a.rows) loss = row_loss(i, ThreadRow<S, SHARED>(a, i, piece));
  if (a.loss) put_tile_loss(a, i, loss, per_row);
  if constexpr (SHARED) {
    if (!a.grad) return;
    __syncthreads();
    piece.store(a.grad);
  }
}

template <class S, bool GENERAL, bool SHARED>
__global__ void __launch_bounds__(TILE) softmax_tiles(TypedCall<S> a, bool per_row) {
  using T = Compute<S>;
  run_tile<SHARED>(a, per_row, [&](int i, const ThreadRow<S, SHARED>& data) {
    const Row<T> row = target_of(a, i, a.grad_loss);
    const T r = row_scale(a, i, row, a.grad_loss);
    const T z_y = row.read ? target_logit<GENERAL>(a, T(data.logit(row.y)), row.y) : T(0);
    Part<T, GENERAL> part;
    if (a.grad_loss) {
      part.M = a.saved[int64_t(a.rows) + i], part.R = a.saved[int64_t(a.rows) * 2 + i];
    } else {
      // Otherwise the sum could be moved to a larger maximum, and rounded, C / CLASSES times.
      if (a.C > MANY)
        for (int first = 0; first < a.C; first += CLASSES) {
          const Classes<S, GENERAL> c(a, data, row, first);
#pragma unroll
          for (int j = 0; j < CLASSES; ++j) part.M = larger(part.M, c.z[j]);
        }
      for (int first = 0; first < a.C; first += CLASSES) {
        const Classes<S, GENERAL> c(a, data, row, first);
        part.template add<CLASSES>([&](int j) { return c.z[j]; });
      }
    }
    const SoftmaxRow<T> f = row_result(a, row, r, z_y, part);
    if (a.saved && !a.grad_loss) {
      a.saved[i] = row.keep ? r : T(-1);
      a.saved[int64_t(a.rows) + i] = part.M, a.saved[int64_t(a.rows) * 2 + i] = part.R;
    }
    for (int first = 0; a.grad && first < a.C; first += CLASSES) {
      const Classes<S, GENERAL> c(a, data, row, first);
#pragma unroll
      for (int j = 0; j < CLASSES; ++j) {
        const T e = exp(below(c.z[j], clamped(part.M)));
        const T slope = first + j == row.y ? f.g_y : f.k * e - f.uniform;
        if (first + j < a.C) data.slope(first + j) = S(slope);
      }
    }
    return f.loss;
  });
}

template <class S, Gamma G, bool SMOOTH, bool SHARED>
__global__ void __launch_bounds__(TILE) sigmoid_tiles(TypedCall<S> a, bool per_row) {
  using T = Compute<S>;
  run_tile<SHARED>(a, per_row, [&](int i, const ThreadRow<S, SHARED>& data) {
    const Row<T> row = target_of<true>(a, i, a.grad_loss);
    const T r = row_scale(a, i, row, a.grad_loss);
    constexpr bool GENERAL = G == Gamma::GENERAL;
    const FormulaOf<T> f = used<G>(a.f);
    const T t = SMOOTH ? f.eps / a.C : T(0), others = SMOOTH ? T(1) : f.alpha_neg;
    const T slope = r * f.logit_scale, slope_others = slope * others;
    const bool labelled = row.read && row.y < a.C;
    Element<T> at_y = target_element<G, SMOOTH>(a, f, row.y, labelled, data.at(row.y));
    if (!labelled) at_y.L = 0;
    T L = 0;
    for (int first = 0; first < a.C; first += CLASSES) {
      const Classes<S, GENERAL> c(a, data, row, first);
      LossSum<G, SMOOTH, IS_HALF<S>, T> sum;
#pragma unroll
      for (int j = 0; j < CLASSES; ++j) {
        const int column = first + j;
        const T g_c =
            sum.add(c.z[j], t, f, [&] { return !row.read || column >= a.C || column == row.y; });
        if (a.grad && column < a.C)
          data.slope(column) = S(column == row.y ? slope * at_y.g : slope_others * g_c);
      }
      L += sum.take();
    }
    if (a.saved && !a.grad_loss) a.saved[i] = row.keep ? r : T(-1);
    return weighted(r, weighted(others, L) + at_y.L);
  });
}

}  // namespace cbloss
