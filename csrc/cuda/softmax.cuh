// The softmax kernels. With M = max_j z_j, e_j = e^{z_j - M} and R = sum over j != y of e_j, the
// gradient is k e_j - uniform, and g_y at the target: a kernel computes M and R, softmax_row
// (row_math.h) all that follows from them.
#pragma once
#include "row.cuh"

namespace cbloss {

constexpr int PART = 5;  // elements of a Part in memory, and the target's logit

// M, at most the largest finite number, and z - M for such an M: 0 where both are +inf, as in the
// limit; NaN if z is.
template <class T>
CB_FN T clamped(T M) {
  return ::min(M, largest_finite<T>());
}
template <class T>
CB_FN T below(T z, T clamped_M) {
  return min(T(0), z - clamped_M);
}

// A count among a part's numbers; in float by its bits, since not every int above 2^24 is a float.
template <class T>
CB_FN T stored(int n) {
  if constexpr (sizeof(T) == sizeof(int)) return __uint_as_float(uint32_t(n));
  else return T(n);
}
CB_FN int number_of(float stored) { return int(__float_as_uint(stored)); }
CB_FN int number_of(double stored) { return int(stored); }

// A part of a row: its largest logit M (at least the lowest finite number), R = sum e^{z - M} and,
// for smoothing (GENERAL), D = sum (z - M) of the n logits that are not -inf. The target and what
// is beyond the row are passed as -inf, so the target is in none of the sums.
template <class T, bool GENERAL>
struct Part {
  T M = -largest_finite<T>(), R = 0, D = 0;
  int n = 0;

  template <int N, class Z>
  CB_FN void add(const Z& z) {  // N logits z(j)
    T top = M;
#pragma unroll
    for (int j = 0; j < N; ++j) top = larger(top, z(j));
    rebase(top);
    const T m = clamped(top);
    T sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T t = below(z(j), m);
      sum += exp(t);
      add_distance(z(j), t);
    }
    R += sum;
  }
  CB_FN void add_distance(T z, T t) {
    if (GENERAL && z != -INF<T>) D += t, ++n;
  }
  CB_FN void rebase(T top) {  // to a larger maximum
    const T step = clamped(M) - clamped(top);
    R *= exp_exact(step);
    if (GENERAL && n > 0) D += T(n) * step;
    M = top;
  }
  template <int LANES>
  CB_FN void join_lanes() {
    rebase(reduce_lanes<LANES>(M, [](T a, T b) { return larger(a, b); }));
    add_lanes<LANES>();
  }
  template <int LANES>
  CB_FN void add_lanes() {
    R = sum_lanes<LANES>(R);
    if (GENERAL) D = sum_lanes<LANES>(D), n = sum_lanes<LANES>(n);
  }
  // Joins the parts of the block's warps, for every thread. All lanes of a warp have the same part.
  template <int WARPS>
  CB_FN void join_warps() {
    if constexpr (WARPS > 1) {
      __shared__ T of_warp[WARPS][PART];
      if (threadIdx.x % WARP == 0) put(of_warp[threadIdx.x / WARP]);
      __syncthreads();
      *this = Part{};
#pragma unroll
      for (int w = 0; w < WARPS; ++w) M = larger(M, of_warp[w][0]);
#pragma unroll
      for (int w = 0; w < WARPS; ++w) add_part(of_warp[w]);
    }
  }
  CB_FN void put(T* p) const { p[0] = M, p[1] = R, p[2] = D, p[3] = stored<T>(n); }
  CB_FN void add_part(const T* p) {  // whose maximum is at most M
    const T step = clamped(p[0]) - clamped(M);
    R += p[1] * exp_exact(step);
    const int more = GENERAL ? number_of(p[3]) : 0;
    if (more > 0) D += p[2] + T(more) * step, n += more;
  }
};

// Loss and gradient of a row, from the part that is the whole row; adds the target to its maximum.
template <class S, bool GENERAL, class T = Compute<S>>
CB_FN SoftmaxRow<T> row_result(const TypedCall<S>& a, const Row<T>& row, T r, T z_y,
                               Part<T, GENERAL>& part) {
  if (z_y > part.M) part.rebase(z_y);
  const T infinite = part.R + (z_y == INF<T> ? 1 : 0);
  if (part.M == INF<T> && infinite > T(1.5)) part.R = NAN;        // two are infinite: no limit
  if (GENERAL && row.read && part.n < a.C - 1) part.D = -INF<T>;  // a class is masked
  const T d = part.M == INF<T> && z_y < INF<T> ? -INF<T> : below(z_y, clamped(part.M));
  FormulaOf<T> f = a.f;
  if (!GENERAL) f.eps = 0, f.logit_scale = 1;
  return softmax_row(d, part.R, r, part.D + d, T(a.C), part.M, f);
}
template <class S, class T = Compute<S>>
CB_FN void put_loss(const TypedCall<S>& a, int i, const Row<T>& row, T r, T loss, T M, T R) {
  if (a.loss) a.loss[i] = loss;
  if (a.saved) {  // for a backward that recomputes the gradient
    a.saved[i] = row.keep ? r : T(-1);
    a.saved[int64_t(a.rows) + i] = M;
    a.saved[int64_t(a.rows) * 2 + i] = R;
  }
}
// e^{z - M} for |M| <= NEAR by one multiply-add and one special function: 2^(z log2 e - c), where c
// is M log2 e, rounded. The rounding error of c is a factor of all exponentials, applied once.
constexpr float NEAR = 1e6f;
struct Exponential {
  float c, factor;
  CB_FN explicit Exponential(float M) : c(M * LOG2E), factor(ex2(-fmaf(M, LOG2E, -c))) {}
  CB_FN float operator()(float z) const { return ex2(fmaf(z, LOG2E, -c)); }
};

// z_j of a vector; adjusted logits are stored where their exponentials will be.
template <bool GENERAL, class S, int N>
CB_FN float held_logit(const Vec<S>& z, const float (&e)[N], int j) {
  if constexpr (GENERAL) return e[j];
  else return z[j];
}

// A row held in registers by THREADS threads: reads the logits once and writes the gradient once.
template <class S, bool GENERAL, int THREADS, int ITEMS>
__global__ void __launch_bounds__(TOGETHER<THREADS>* THREADS) softmax_rows(TypedCall<S> a) {
  constexpr int N = Vec<S>::N, WARPS = (THREADS + WARP - 1) / WARP;
  const int thread = threadIdx.x % THREADS;
  const Place<THREADS> place(a.rows);
  if (place.none) return;
  const int i = place.i;
  Row<float> row = target_of(a, i, false);
  const S* x = row_of(a.logits, a.x, a.K, i);
  Columns<S, THREADS> at(x, a.C, row.y, thread);
  if (!place.there) row.read = false, at.leave_out();
  const int left = at.whole - thread;  // vectors from this thread's first on

  Vec<S> z[ITEMS];
  load_tile<THREADS>(z, x + at.head, thread, row.read ? left : 0);
  const bool edge_there = row.read && at.edge >= 0 && at.edge != row.y;
  const float z_edge = edge_there ? adjusted<GENERAL>(a, float(x[at.edge]), at.edge) : -INF<float>;
  const float z_y = row.read ? target_logit<GENERAL>(a, float(x[row.y]), row.y) : 0.f;
  const float r = row_scale(a, i, row, false);  // here, because its loads depend on each other
  at.blank_y(z, 0);

  float e[ITEMS][N], e_edge, factor = 1, M = larger(z_edge, -FLT_MAX);
  if constexpr (GENERAL) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        e[k][j] = adjusted<GENERAL>(a, z[k][j], at.column(thread + k * THREADS, j));
        M = larger(M, e[k][j]);
      }
  } else {
    Vec<S> top = z[0];
#pragma unroll
    for (int k = 1; k < ITEMS; ++k) raise(top, z[k]);
#pragma unroll
    for (int j = 0; j < N; ++j) M = larger(M, top[j]);
  }
  M = reduce_lanes<LANES<THREADS>>(M, [](float a, float b) { return larger(a, b); });

  // Exponentials relative to the warp's own maximum: then one barrier joins maxima and sums.
  Part<float, GENERAL> part;
  part.M = M;
  if (fabsf(M) <= NEAR) {
    const Exponential exponential(M);
    factor = exponential.factor, e_edge = exponential(z_edge);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float z_j = held_logit<GENERAL>(z[k], e[k], j);
        e[k][j] = exponential(z_j), part.add_distance(z_j, z_j - M);
      }
  } else {  // infinity too
    e_edge = exp(below(z_edge, clamped(M)));
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float z_j = held_logit<GENERAL>(z[k], e[k], j), t = below(z_j, clamped(M));
        e[k][j] = exp(t), part.add_distance(z_j, t);
      }
  }
  float sum = e_edge;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) sum += e[k][j];
  part.R = sum * factor;
  part.add_distance(z_edge, below(z_edge, clamped(M)));
  part.template add_lanes<LANES<THREADS>>();
  part.template join_warps<WARPS>();
  SoftmaxRow<float> f = row_result(a, row, r, z_y, part);
  if (thread == 0 && place.there) put_loss(a, i, row, r, f.loss, part.M, part.R);
  if (!a.grad) return;
  if (THREADS <= WARP) __syncwarp();  // in place: after all threads have read the target's logit
  S* g = row_of(a.grad, a.g, a.K, i);
  const float k_warp = f.k * factor * exp_exact(clamped(M) - clamped(part.M));
  uint4* p = reinterpret_cast<uint4*>(g + at.head) + thread;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
#pragma unroll
    for (int j = 0; j < N; j += 2)
      z[k].set(j, k_warp * e[k][j] - f.uniform, k_warp * e[k][j + 1] - f.uniform);
    if (k * THREADS < left) store<S>(p + k * THREADS, z[k]);
  }
  if (at.edge >= 0) g[at.edge] = S(k_warp * e_edge - f.uniform);
  if (at.has_y) g[row.y] = S(f.g_y);
}

// For rows that do not fit in registers: the part of vectors [first, end), each thread loads BATCH
// of them at a time. They are copied to `kept`, if it is not null, for the second read.
constexpr int BATCH = 4;
template <class S, bool GENERAL, int THREADS, class T = Compute<S>>
CB_FN Part<T, GENERAL> part_of(const TypedCall<S>& a, const S* x, const Columns<S, THREADS>& at,
                               const Row<T>& row, int first, int end, int thread,
                               uint4* kept = nullptr) {
  constexpr int N = Vec<S>::N;
  Part<T, GENERAL> part;
  for (; first < end; first += BATCH * THREADS) {
    const int left = row.read ? end - first - thread : 0;
    Vec<S> z[BATCH];
    load_tile<THREADS>(z, x + at.head, first + thread, left);
    if (kept)
#pragma unroll
      for (int k = 0; k < BATCH; ++k)
        if (k * THREADS < left) kept[first + thread + k * THREADS] = z[k].words;
    at.blank_y(z, first);
    part.template add<BATCH * N>([&](int j) {
      return adjusted<GENERAL>(a, z[j / N][j % N],
                               at.column(first + thread + j / N * THREADS, j % N));
    });
  }
  return part;
}
// Adds the edges (once per row) and joins the parts of all threads.
template <class S, bool GENERAL, int THREADS, class T>
CB_FN void join_row(Part<T, GENERAL>& part, const TypedCall<S>& a, const S* x,
                    const Columns<S, THREADS>& at, const Row<T>& row, bool edges) {
  const bool there = edges && row.read && at.edge >= 0 && at.edge != row.y;
  const T z_edge = there ? adjusted<GENERAL>(a, T(x[at.edge]), at.edge) : -INF<T>;
  part.template add<1>([&](int) { return z_edge; });
  part.template join_lanes<WARP>();
  part.template join_warps<THREADS / WARP>();
}
template <bool GENERAL, class S, int THREADS, class T>
CB_FN void put_gradient(const TypedCall<S>& a, const S* x, S* g, const Columns<S, THREADS>& at,
                        const Row<T>& row, int first, int end, int thread, T M,
                        const SoftmaxRow<T>& f, const uint4* kept = nullptr) {
  constexpr int N = Vec<S>::N;
  const T m = clamped(M);
  const int begin = first;
  const bool aligned = reinterpret_cast<uintptr_t>(g + at.head) % 16 == 0;
  const S* vectors = kept ? reinterpret_cast<const S*>(kept) : x + at.head;
  if (first == 0 && at.edge >= 0) {
    const T z = row.read ? adjusted<GENERAL>(a, T(x[at.edge]), at.edge) : -INF<T>;
    g[at.edge] = S(at.edge == row.y ? f.g_y : f.k * exp(below(z, m)) - f.uniform);
  }
  for (; first < end; first += BATCH * THREADS) {
    const int left = end - first - thread;
    Vec<S> z[BATCH];
    load_tile<THREADS>(z, vectors, first + thread, row.read ? left : 0);
    uint4* p = reinterpret_cast<uint4*>(g + at.head) + first + thread;
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      const auto slope = [&](int j) {
        const T z_j = adjusted<GENERAL>(a, z[k][j], at.column(first + thread + k * THREADS, j));
        return f.k * exp(below(z_j, m)) - f.uniform;
      };
#pragma unroll
      for (int j = 0; j < N; j += 2) z[k].set(j, slope(j), slope(j + 1));
      if (k * THREADS < left) store<S>(p + k * THREADS, z[k], aligned);
    }
  }
  if (at.y_vector >= begin && at.y_vector < end) g[row.y] = S(f.g_y);  // after its vector
}

// A row of any length by a block. The second read is of shared memory, where each thread reads the
// vectors that it has stored itself, or of what the L2 cache still holds.
template <class S, bool GENERAL, int THREADS, bool SHARED>
__global__ void __launch_bounds__(THREADS) softmax_long(TypedCall<S> a) {
  using T = Compute<S>;
  CB_DYNAMIC_SHARED(uint4, shared);
  uint4* kept = SHARED ? shared : nullptr;
  const int i = blockIdx.x, thread = threadIdx.x;
  const Row<T> row = target_of(a, i, false);
  const S* x = row_of(a.logits, a.x, a.K, i);
  const Columns<S, THREADS> at(x, a.C, row.y, thread);
  const T z_y = row.read ? target_logit<GENERAL>(a, T(x[row.y]), row.y) : T(0);
  Part<T, GENERAL> part = part_of<S, GENERAL>(a, x, at, row, 0, at.whole, thread, kept);
  join_row(part, a, x, at, row, true);
  const T r = row_scale(a, i, row, false);
  const SoftmaxRow<T> f = row_result(a, row, r, z_y, part);
  if (thread == 0) put_loss(a, i, row, r, f.loss, part.M, part.R);
  if (!a.grad) return;
  S* g = row_of(a.grad, a.g, a.K, i);
  put_gradient<GENERAL>(a, x, g, at, row, 0, at.whole, thread, part.M, f, kept);
}

// The part of `span` vectors of a row, for few rows of many classes.
template <class S, bool GENERAL, int THREADS>
__global__ void __launch_bounds__(THREADS) softmax_parts(TypedCall<S> a) {
  using T = Compute<S>;
  const int i = blockIdx.x, first = blockIdx.y * a.span, thread = threadIdx.x;
  const Row<T> row = target_of(a, i, false);
  const S* x = row_of(a.logits, a.x, a.K, i);
  const Columns<S, THREADS> at(x, a.C, row.y, thread);
  const int end = ::min(first + a.span, at.whole);
  Part<T, GENERAL> part = part_of<S, GENERAL>(a, x, at, row, first, end, thread);
  join_row(part, a, x, at, row, first == 0);
  if (thread > 0) return;
  T* p = a.maxima + (int64_t(i) * gridDim.y + blockIdx.y) * PART;
  part.put(p);
  p[PART - 1] = row.read ? target_logit<GENERAL>(a, T(x[row.y]), row.y) : T(0);
}

// The gradient of `span` vectors of a row: from the row's parts, together with the loss, or in a
// BACKWARD from what a forward saved.
template <class S, bool GENERAL, bool BACKWARD, int THREADS>
__global__ void __launch_bounds__(TOGETHER<THREADS>* THREADS) softmax_apply(TypedCall<S> a) {
  using T = Compute<S>;
  const int thread = threadIdx.x % THREADS, first = blockIdx.y * a.span;
  const Place<THREADS> place(a.rows);
  if (place.none) return;
  const int i = place.i;
  const Row<T> row = target_of(a, i, BACKWARD);
  const S* x = row_of(a.logits, a.x, a.K, i);
  const T r = row_scale(a, i, row, BACKWARD);
  T z_y;
  Part<T, GENERAL> part;
  if (!BACKWARD) {
    const T* p = a.maxima + int64_t(i) * gridDim.y * PART;
    const int lane = threadIdx.x % WARP, parts = gridDim.y;
    z_y = p[PART - 1];
    for (int w = lane; w < parts; w += WARP) part.M = larger(part.M, p[w * PART]);
    part.M = reduce_lanes(part.M, [](T a, T b) { return larger(a, b); });
    for (int w = lane; w < parts; w += WARP) part.add_part(p + w * PART);
    part.template add_lanes<WARP>();
  } else {
    part.M = a.saved[int64_t(a.rows) + i], part.R = a.saved[int64_t(a.rows) * 2 + i];
    z_y = row.read ? target_logit<GENERAL>(a, T(x[row.y]), row.y) : T(0);
    if (THREADS <= WARP) __syncwarp();  // in place: after all threads have read it
    else __syncthreads();
  }
  const SoftmaxRow<T> f = row_result(a, row, r, z_y, part);
  if (!BACKWARD && thread == 0 && first == 0) put_loss(a, i, row, r, f.loss, part.M, part.R);
  if (!a.grad) return;
  Columns<S, THREADS> at(x, a.C, row.y, thread);
  if (!place.there) at.leave_out();
  const int end = ::min(first + a.span, at.whole);
  S* g = row_of(a.grad, a.g, a.K, i);
  put_gradient<GENERAL>(a, x, g, at, row, first, end, thread, part.M, f);
}

}  // namespace cbloss
