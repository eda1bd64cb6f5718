// Kernels over vectors of classes: one row at a time, its classes side by side in memory.

// Calls body(j, z, n, blank) for all vectors of a row, where z is -inf in the blank lanes: the
// target's (y = C: there is none) and those past the end. Calls flush() at least every CHUNK
// vectors. The order of the calls depends on C and y alone. Meanwhile the C elements from `later`
// on are fetched. Two calls a turn, whose instructions the compiler lets alternate: each is one
// long chain, and few of them fit into what a processor looks ahead.
template <class S, class Body, class Flush>
CB_FN void for_negatives(const S* x, const S* later, int64_t C, int64_t y, const Body& body,
                         const Flush& flush) {
  using V = typename Lanes<S>::V;
  constexpr int64_t N = Lanes<S>::N;
  const int64_t whole = C / N * N, at_y = y / N * N;
  const decltype(outside(V{}, 0, 0)) none{};
  const int64_t segment[2][2] = {{0, at_y}, {at_y + N, whole}};
  for (const auto& [begin, end] : segment)
    for (int64_t b = begin; b < end; b += CHUNK * N) {
      const int64_t stop = std::min(end, b + CHUNK * N);
      int64_t j = b;
      for (; j + N < stop; j += 2 * N) {
        for (int64_t k = 0; k < 2 * N; k += LINE<S>) prefetch(later + j + k);
        const V z = load(x + j), next = load(x + j + N);  // may not pass a store
        body(j, z, N, none), body(j + N, next, N, none);
      }
      if (j < stop) body(j, load(x + j), N, none);
      flush();
    }
  for (int64_t j = at_y; j < C; j = j < whole ? whole : C) {
    const int64_t n = std::min(C - j, N);
    const V z = load_some(x + j, n);
    const auto blank = outside(z, n, y - j);
    body(j, blank ? V{} - INF<typename Lanes<S>::T> : z, n, blank);  // -inf: its term is 0
  }
  flush();
}

// Calls body(j, n) for every vector of a row, whole ones first. Calls flush() at least every CHUNK
// vectors.
template <int64_t N, class Body, class Flush>
CB_FN void for_vectors(int64_t C, const Body& body, const Flush& flush) {
  const int64_t whole = C / N * N;
  for (int64_t b = 0; b < whole; b += CHUNK * N) {
    for (int64_t j = b; j < std::min(whole, b + CHUNK * N); j += N) body(j, N);
    flush();
  }
  if (whole < C) body(whole, C - whole), flush();
}

template <class S, class V>
CB_FN void store_n(S* p, V v, int64_t n) {
  if (n == Lanes<S>::N) store(p, v);
  else store_some(p, v, n);
}

// p_j = map(q_j) in one pass; q may be p. READS: q comes from memory, not from cache.
template <bool READS, class S, class Q, class Map>
CB_FN void transform(S* p, const Q* q, int64_t C, const Map& map) {
  constexpr int64_t N = Lanes<S>::N;
  const int64_t whole = C / N * N;
  for (int64_t j = 0; j < whole; j += N) {
    if constexpr (READS) prefetch(ahead(q + j));
    store(p + j, map(load(q + j)));
  }
  if (whole < C) store_some(p + whole, map(load_some(q + whole, C - whole)), C - whole);
}

template <class S>
void zero_row(S* g, int64_t C) {
  for (int64_t j = 0; j < C; ++j) g[j] = S{};
}

// The first n elements of a vector, then 0; n may be larger than the number of lanes.
template <class S>
CB_FN auto load_up_to(const S* p, int64_t n) {
  return n < Lanes<S>::N ? load_some(p, n) : load(p);
}

// v with the value beyond in the lanes from n on.
template <class V, class T>
CB_FN V padded(V v, int64_t n, T beyond) {
  if (n >= Lanes<T>::N) return v;
  return outside(v, n, -1) ? V{} + beyond : v;
}

// The largest logit, NaN left out, of several vectors at a time: each waits for the one before.
template <class S>
typename Lanes<S>::T largest_logit(const S* x, int64_t C) {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  constexpr int64_t N = Lanes<S>::N, SUMS = 4;
  V top[SUMS];
  for (V& t : top) t = V{} - LARGEST<T>;
  int64_t j = 0;
  for (; j + SUMS * N <= C; j += SUMS * N) {
    for (int64_t k = 0; k < SUMS * N; k += LINE<S>) prefetch(ahead(x + j + k));
    for (int64_t s = 0; s < SUMS; ++s) top[s] = max(load(x + j + s * N), top[s]);
  }
  for (; j < C; j += N) top[0] = max(padded(load_up_to(x + j, C - j), C - j, -INF<T>), top[0]);
  return T(largest(max(max(top[0], top[1]), max(top[2], top[3]))));
}

// D = sum over all j of (z_j - M), for label smoothing: one more pass over a row that is in cache.
template <class S, class T>
double sum_below(const S* x, int64_t C, T M) {
  using V = typename Lanes<S>::V;
  V lanes{};
  DoubleLanes<V> total;
  for_vectors<Lanes<S>::N>(
      C, [&](int64_t j, int64_t n) { lanes += padded(load_up_to(x + j, n) - M, n, T(0)); },
      [&] { total.add(lanes), lanes = V{}; });
  return total.sum();
}

// to = from, converted to another type.
template <class S, class Q>
void copy_row(const S* from, Q* to, int64_t C) {
  constexpr int64_t N = Lanes<S>::N;
  for (int64_t j = 0; j < C; j += N) {
    prefetch(ahead(from + j));
    store_n(to + j, load_up_to(from + j, C - j), std::min(C - j, N));
  }
}

// A row of adjusted logits in a buffer of its own, which stays in cache for the passes that follow.
template <class S>
class AdjustedRow {
  using T = typename Lanes<S>::T;
  const Adjustment<T> adjustment;
  const int64_t C;
  std::unique_ptr<T[]> z;

 public:
  explicit AdjustedRow(const Call& a)
      : adjustment(a), C(a.C), z(adjustment.any ? new T[C] : nullptr) {}
  bool any() const { return adjustment.any; }
  const T* operator()(const S* x, int64_t y) {
    copy_row(x, z.get(), C);
    adjustment.apply(z.get(), C);
    if (y < C) z[y] -= adjustment.scaled_margin(y);
    return z.get();
  }
};

// A row that is not ignored.
template <class S>
struct Row {
  using T = typename Lanes<S>::T;
  int64_t i, y;    // y as in class_of
  const S* x;      // its logits
  const S* later;  // what to fetch while x, which is in cache, is computed on
  T r;
  S* g;        // its gradient
  T* scratch;  // C elements, unless a gradient of type T holds them: then null
};

// Calls run(row) for every row that is not ignored. Adjusted rows of half types are run as float
// rows, whose gradient is converted afterwards.
template <class S, class Run>
void for_rows(const Call& a, int64_t begin, int64_t end, const Run& run) {
  using T = typename Lanes<S>::T;
  constexpr bool IS_T = std::is_same_v<S, T>;
  const RowScale<T> scale(a);
  AdjustedRow<S> adjusted(a);
  const std::unique_ptr<T[]> scratch(IS_T || !a.grad ? nullptr : new T[a.C]);
  for (int64_t i = begin; i < end; ++i) {
    const S* x = static_cast<const S*>(a.logits) + row_offset(a.logits_stride, a.K, i);
    S* g = static_cast<S*>(a.grad) + row_offset(a.grad_stride, a.K, i);
    if (scale.ignored(i)) {
      if (a.loss) static_cast<T*>(a.loss)[i] = 0;
      if (a.grad) zero_row(g, a.C);
      continue;
    }
    const int64_t y = class_of(a, i);
    const S* later = next_to_fetch(a, x);
    const T r = scale(i);
    if (!adjusted.any()) {
      run(Row<S>{i, y, x, later, r, g, scratch.get()});
    } else if constexpr (IS_T) {
      run(Row<S>{i, y, adjusted(x, y), later, r, g, scratch.get()});
    } else {
      const auto* as_floats = reinterpret_cast<const T*>(later);
      run(Row<T>{i, y, adjusted(x, y), as_floats, r, scratch.get(), scratch.get()});
      if (a.grad) copy_row(scratch.get(), g, a.C);
    }
  }
}

// Not inlined, because several kernels share the code.
#define CB_ROW __attribute__((noinline))

template <class S>
using RowFunction = void(const Call&, const Row<S>&);

// What for_rows() runs. By pointers: for_rows() is compiled once for all kernels of a type.
template <class S>
struct RunRow {
  const Call& a;
  RowFunction<S>* run;
  RowFunction<typename Lanes<S>::T>* run_adjusted;
  void operator()(const Row<S>& row) const { run(a, row); }
  template <class T>
  void operator()(const Row<T>& row) const {
    run_adjusted(a, row);
  }
};

// Reads the logits from memory once (after the pass for the maximum the row is in cache) and writes
// the gradient once.
template <Mode MODE, class S, class T = typename Lanes<S>::T>
CB_ROW void softmax_one_row(const Call& a, const Row<S>& given) {
  using V = typename Lanes<S>::V;
  constexpr bool IN_GRAD = std::is_same_v<S, T>;  // e^{z - M} is stored there, or in scratch
  const int64_t C = a.C, i = given.i, y = given.y;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const S* x = given.x;
  S* g = given.g;
  T *M_ = static_cast<T*>(a.M), *R_ = static_cast<T*>(a.R);
  std::unique_ptr<S[]> limit;
  T M, R = 0;
  if constexpr (MODE == Mode::GRAD) {
    M = M_[i], R = R_[i];
  } else {
    M = max(largest_logit(x, C), load_one(x + y));
    if (M_) M_[i] = M;
  }
  const T top = M;
  if (__builtin_expect(M == INF<T>, 0)) {
    limit.reset(new S[C]);
    limit_row(x, 1, C, limit.get(), 1);
    x = limit.get(), M = 0;
  }
  const T d = load_one(x + y) - M;
  const T D = f.eps != 0 && MODE != Mode::GRAD ? T(sum_below(x, C, M)) : T(0);
  T* e;
  if constexpr (IN_GRAD) e = g;
  else e = given.scratch;
  if constexpr (MODE != Mode::GRAD) {
    V lanes{};
    DoubleLanes<V> total;
    for_negatives(
        x, given.later, C, y,
        [&](int64_t j, V z, int64_t n, auto) __attribute__((always_inline)) {
          const V t = exp(z - M);
          lanes += t;
          if constexpr (MODE == Mode::LOSS_AND_GRAD) store_n(e + j, t, n);
        },
        [&]() __attribute__((always_inline)) { total.add(lanes), lanes = V{}; });
    R = T(total.sum());
    if (R_) R_[i] = R;
  }
  const SoftmaxRow<V> row =
      softmax_row<V, T>(V{} + d, V{} + R, V{} + given.r, V{} + D, T(C), V{} + top, f);
  if constexpr (MODE != Mode::GRAD) static_cast<T*>(a.loss)[i] = lane(row.loss, 0);
  if constexpr (MODE == Mode::LOSS_AND_GRAD)
    transform<false>(g, e, C,
                     [&](V t) __attribute__((always_inline)) { return row.k * t - row.uniform; });
  if constexpr (MODE == Mode::GRAD)
    transform<true>(g, x, C, [&](V z) __attribute__((always_inline)) {
      return row.k * exp(z - M) - row.uniform;
    });
  if constexpr (MODE != Mode::LOSS) store_one(g + y, T(lane(row.g_y, 0)));
}

template <class S, Mode MODE>
void softmax_rows(const Call& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  for_rows<S>(a, begin, end, RunRow<S>{a, softmax_one_row<MODE, S>, softmax_one_row<MODE, T>});
}

// Reads the logits once and writes the gradient once.
template <Mode MODE, Gamma G, bool SMOOTH, class S, class T = typename Lanes<S>::T>
CB_ROW void sigmoid_one_row(const Call& a, const Row<S>& row) {
  using V = typename Lanes<S>::V;
  const int64_t C = a.C, y = row.y;
  const S* x = row.x;
  S* g = row.g;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const T t = f.eps / T(C);  // the smoothed target of the other classes
  const T others = SMOOTH ? T(1) : f.alpha_neg;
  const T slope = row.r * f.logit_scale, slope_others = slope * others;
  Element<V> at_y{};
  if (y < C) {
    at_y = at_target<G, SMOOTH, IS_HALF<S>>(V{} + load_one(x + y), T(C), f);
    if (a.pos_weight) scale(at_y, V{} + static_cast<const T*>(a.pos_weight)[y]);
  }
  DoubleLanes<V> total;
  LossSum<G, SMOOTH, IS_HALF<S>, V> sum_L;
  for_negatives(
      x, ahead(x), C, y,
      [&](int64_t j, V z, int64_t n, auto blank) __attribute__((always_inline)) {
        const V g_z = sum_L.add(z, t, f, [&] { return blank; });
        if constexpr (MODE != Mode::LOSS) store_n(g + j, slope_others * g_z, n);
      },
      [&]() __attribute__((always_inline)) { total.add(sum_L.take()); });
  if (MODE != Mode::GRAD && a.loss)
    static_cast<T*>(a.loss)[row.i] =
        T(weighted(double(row.r), weighted(double(others), total.sum()) + lane(at_y.L, 0)));
  if (MODE != Mode::LOSS && y < C) store_one(g + y, slope * T(lane(at_y.g, 0)));
}

template <class S, Mode MODE, Gamma G, bool SMOOTH>
void sigmoid_rows(const Call& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  for_rows<S>(
      a, begin, end,
      RunRow<S>{a, sigmoid_one_row<MODE, G, SMOOTH, S>, sigmoid_one_row<MODE, G, SMOOTH, T>});
}
