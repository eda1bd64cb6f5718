// What the row kernels share: the layout of a row, its 16-byte accesses, its scale, sums over
// threads.
//
// A row in memory is head | whole 16-byte vectors | tail. Head and tail are the edges, at most one
// column of which belongs to a thread. So no access leaves the row, whatever the number of classes,
// the strides and the offset. The target is replaced by -inf in its thread's registers: that leaves
// it out of every sum without an instruction per element, and its thread stores its gradient last.
#pragma once
#include "math.cuh"
#include "call.h"

namespace cbloss {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;
template <class S>
constexpr bool IS_HALF = sizeof(S) == 2;
constexpr int WARP = 32;

// A Call with types, as kernels take it, and what the host knows of the denominator.
template <class S>
struct TypedCall {
  using T = Compute<S>;
  const S* logits;
  S* grad;
  Strides x, g;
  int rows, C, K;
  FormulaOf<T> f;
  const T *bias, *margin, *pos_weight;
  const int64_t* target;
  bool has_background;
  int64_t background;
  T* saved;
  const T *weight, *sample_weight, *grad_loss;
  bool ignore, grad_loss_per_row;
  int64_t ignored;
  const T* denominators;  // T[parts], whose sum is the denominator; or null: it is `denominator`
  int parts;
  T denominator;
  T* loss;    // per row, or per block of a row or of rows; or null
  T* maxima;  // T[rows, blocks, PART] for softmax with several blocks per row
  int span;   // vectors of a row per block
};

template <class T>
CB_FN T* row_of(T* base, const Strides& stride, int K, int i) {
  if (K == 1) return base + i * stride.n;
  const int n = i / K;
  return base + n * stride.n + (i - n * K) * stride.k;
}

// How many rows one block of a kernel with THREADS threads per row has: one, or as many as four
// warps have, if a row has a warp or a part of one.
template <int THREADS>
constexpr int TOGETHER = THREADS <= WARP ? 4 * WARP / THREADS : 1;
template <int THREADS>
constexpr int LANES = THREADS < WARP ? THREADS : WARP;  // threads of a warp that share a row
// The row of a thread. The threads of a warp exchange values, so they return together: where none
// of its rows exists (none). A thread of another row that does not exist (not there) is given the
// last row, and must not write.
template <int THREADS>
struct Place {
  int i;
  bool none, there;
  CB_FN explicit Place(int rows) {
    constexpr int MATES = WARP / LANES<THREADS>;  // rows per warp
    i = blockIdx.x * TOGETHER<THREADS> + threadIdx.x / THREADS;
    none = i / MATES * MATES >= rows;
    there = MATES == 1 || i < rows;
    if (!there) i = rows - 1;
  }
};

// z of the logit x of a column, in kernels that adjust logits; -inf beyond the row stays -inf.
template <bool GENERAL, class S, class T = Compute<S>>
CB_FN T adjusted(const TypedCall<S>& a, T x, int column) {
  if (!GENERAL) return x;
  if (a.bias && column < a.C) x += a.bias[column];
  return a.f.logit_scale * x;
}
template <bool GENERAL, class S, class T = Compute<S>>
CB_FN T target_logit(const TypedCall<S>& a, T x_y, int y) {
  const T z = adjusted<GENERAL>(a, x_y, y);
  return GENERAL && a.margin ? z - a.f.logit_scale * a.margin[y] : z;
}

// A row's target, C in a background row: no column is that. A row that is ignored (not keep) or has
// an out-of-range target (not valid) is not read: its logits are taken as -inf and its target's as
// 0, which gives loss 0 and gradient 0 whatever is in memory. row_scale makes them NaN where the
// target is out of range.
template <class T>
struct Row {
  int y;
  bool keep, valid, read;
};
template <bool BACKGROUND = false, class S, class T = Compute<S>>
CB_FN Row<T> target_of(const TypedCall<S>& a, int i, bool backward) {
  const int64_t y = a.target[i];
  const bool keep = backward ? !(a.saved[i] < 0) : !(a.ignore && y == a.ignored);
  const bool background = BACKGROUND && a.has_background && y == a.background;
  const bool valid = (y >= 0 && y < a.C) || background;
  const int column = background ? a.C : int(y);
  return {valid ? column : 0, keep, valid, keep && valid};
}
// The row scale, r_i / denominator; in a backward what the forward saved, times grad_loss. 0 where
// the row is ignored, NaN where its target is out of range.
template <class S, class T = Compute<S>>
CB_FN T row_scale(const TypedCall<S>& a, int i, const Row<T>& row, bool backward) {
  T r;
  if (backward) {
    r = a.saved[i] * a.grad_loss[a.grad_loss_per_row ? i : 0];
  } else {
    r = a.weight && uint32_t(row.y) < uint32_t(a.C) ? a.weight[row.y] : T(1);
    if (a.sample_weight) r *= a.sample_weight[i];
    T denominator = a.denominator;
    if (a.denominators) {
      denominator = 0;
      for (int p = 0; p < a.parts; ++p) denominator += a.denominators[p];
    }
    r = denominator != 0 ? divide(r, denominator) : T(0);  // 0: nothing to average
  }
  return !row.keep ? 0 : row.valid ? r : T(NAN);
}

// 16 bytes of logits or gradient.
template <class S>
struct Vec {
  using T = Compute<S>;
  static constexpr int N = 16 / sizeof(S);
  uint4 words;
  CB_FN T operator[](int j) const {
    const uint32_t* w = &words.x;
    if constexpr (std::is_same_v<S, BFloat16>) {  // bfloat16 is the upper half of a float
      return __uint_as_float(j % 2 ? w[j / 2] & 0xffff0000u : w[j / 2] << 16);
    } else if constexpr (std::is_same_v<S, Float16>) {
      const __half2 pair = reinterpret_cast<const __half2&>(w[j / 2]);
      return j % 2 ? __high2float(pair) : __low2float(pair);
    } else {
      return reinterpret_cast<const S&>(w[j * sizeof(S) / 4]);
    }
  }
  // Elements j and j + 1, j even: half types are rounded in pairs.
  CB_FN void set(int j, T a, T b) {
    uint32_t* w = &words.x;
    if constexpr (std::is_same_v<S, BFloat16>) {
      reinterpret_cast<__nv_bfloat162&>(w[j / 2]) = __floats2bfloat162_rn(a, b);
    } else if constexpr (std::is_same_v<S, Float16>) {
      reinterpret_cast<__half2&>(w[j / 2]) = __floats2half2_rn(a, b);
    } else {
      reinterpret_cast<S&>(w[j * sizeof(S) / 4]) = a;
      reinterpret_cast<S&>(w[(j + 1) * sizeof(S) / 4]) = b;
    }
  }
  CB_FN void blank() {
#pragma unroll
    for (int j = 0; j < N; j += 2) set(j, -INF<T>, -INF<T>);
  }
  CB_FN void blank(int lane) {
#pragma unroll
    for (int j = 0; j < N; j += 2)
      if (lane / 2 == j / 2)
        set(j, lane == j ? -INF<T> : (*this)[j], lane == j ? (*this)[j + 1] : -INF<T>);
  }
};
// top = the larger, element by element; of half types two by one instruction.
template <class S>
CB_FN void raise(Vec<S>& top, const Vec<S>& z) {
  uint32_t* a = &top.words.x;
  const uint32_t* b = &z.words.x;
  if constexpr (IS_HALF<S>) {
    using Pair = std::conditional_t<std::is_same_v<S, BFloat16>, __nv_bfloat162, __half2>;
#pragma unroll
    for (int w = 0; w < 4; ++w)
      reinterpret_cast<Pair&>(a[w]) =
          __hmax2(reinterpret_cast<Pair&>(a[w]), reinterpret_cast<const Pair&>(b[w]));
  } else {
#pragma unroll
    for (int j = 0; j < Vec<S>::N; j += 2)
      top.set(j, larger(top[j], z[j]), larger(top[j + 1], z[j + 1]));
  }
}

// The columns of a row that a thread has: of THREADS threads, thread t has the vectors
// t + k THREADS.
template <class S, int THREADS>
struct Columns {
  static constexpr int N = Vec<S>::N, STEP = THREADS;
  static_assert(2 * (N - 1) <= THREADS, "at most one edge column per thread");
  int head, whole, edge;  // columns before the vectors; vectors; this thread's edge column, or -1
  int y_vector = -1, y_lane = 0;  // where the target is, if it is in a vector of this thread
  bool has_y;                     // it is in a vector of this thread or its edge

  CB_FN Columns(const S* x, int C, int y, int thread) {
    head = ::min(C, int(-(reinterpret_cast<uintptr_t>(x) / sizeof(S)) % N));
    whole = (C - head) / N;
    edge = thread < head ? thread : thread + whole * N;
    if (edge >= C) edge = -1;
    const int past_head = y - head, vector = past_head / N;
    if (past_head >= 0 && vector < whole && vector % THREADS == thread)
      y_vector = vector, y_lane = past_head % N;
    has_y = edge == y || y_vector >= 0;
  }
  CB_FN void leave_out() { whole = 0, edge = y_vector = -1, has_y = false; }
  CB_FN int column(int v, int lane) const { return head + v * N + lane; }
  CB_FN bool is_y(int k, int lane) const {
    return y_vector >= 0 && y_vector / THREADS == k && y_lane == lane;
  }
  // Replaces the target by -inf in vectors that begin at `first`, a multiple of THREADS.
  template <int ITEMS>
  CB_FN void blank_y(Vec<S> (&z)[ITEMS], int first) const {
    if (y_vector < 0) return;
    const int k_y = (y_vector - first) / THREADS;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
      if (k_y == k && y_vector >= first) z[k].blank(y_lane);
  }
};
// z[k] = the vector v + k THREADS from `first` on, -inf where k THREADS >= left.
template <int THREADS, class S, int ITEMS>
CB_FN void load_tile(Vec<S> (&z)[ITEMS], const S* first, int v, int left) {
  const uint4* p = reinterpret_cast<const uint4*>(first) + v;
  if ((ITEMS - 1) * THREADS < left) {  // all are there, as in all but the last ones of a row
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) z[k].words = p[k * THREADS];
    return;
  }
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    z[k].blank();
    if (k * THREADS < left) z[k].words = p[k * THREADS];
  }
}
template <class S>
CB_FN void store(uint4* p, const Vec<S>& z, bool aligned = true) {
  if (aligned) *p = z.words;
  else
#pragma unroll
    for (int j = 0; j < Vec<S>::N; ++j) reinterpret_cast<S*>(p)[j] = S(z[j]);
}

// Over a warp, or over each part of LANES lanes.
template <int LANES = WARP, class T, class F>
CB_FN T reduce_lanes(T value, F f) {
#pragma unroll
  for (int apart = LANES / 2; apart; apart /= 2)
    value = f(value, __shfl_xor_sync(~0u, value, apart));
  return value;
}
template <int LANES = WARP, class T>
CB_FN T sum_lanes(T value) {
  return reduce_lanes<LANES>(value, [](T a, T b) { return a + b; });
}
// The sum over a block; valid in all threads.
template <int THREADS, class T>
CB_FN T sum_block(T value) {
  __shared__ T of_warp[THREADS / WARP];
  value = sum_lanes(value);
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll
  for (int w = 1; w < THREADS / WARP; ++w) value += of_warp[w];
  return value;
}

}  // namespace cbloss
