// Kernels over vectors of rows, with a loop over the classes: for few classes, or classes that are
// not side by side in memory.

// N rows at a time: the rows of one vector.
template <class S>
struct Tile {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t, IVec>;
  static constexpr int64_t N = Lanes<S>::N;

  const Call& a;
  int64_t i, n;  // first row, number of rows
  V r{};
  Index y{}, ignored{};

  Tile(const Call& a, int64_t i, int64_t end) : a(a), i(i), n(std::min(end - i, N)) {
    const RowScale<T> scale(a);
    if constexpr (N == 1) {
      ignored = scale.ignored(i), r = scale(i);
      y = class_of(a, i);
    } else {
      for (int64_t l = 0; l < n; ++l) {
        ignored[l] = scale.ignored(i + l) ? -1 : 0;
        r[l] = scale(i + l);
        if (a.target && !a.has_background) y[l] = int32_t(a.target[i + l]);
      }
      if (a.has_background)
        for (int64_t l = 0; l < n; ++l) y[l] = int32_t(class_of(a, i + l));
    }
  }
  Index index(int64_t c) const { return Index{} + std::conditional_t<N == 1, int64_t, int32_t>(c); }
  auto is_y(int64_t c) const { return y == index(c); }
  // Whether vectors can be loaded and stored directly: N rows, side by side in memory.
  bool adjacent(const Strides& s) const {
    if (n != N) return false;
    return a.K == 1 ? s.n == 1 : s.k == 1 && i / a.K == (i + N - 1) / a.K;
  }
  // out[c] = these rows' elements of class c, from a tensor x of any type.
  template <class Q>
  void read(const Q* x, const Strides& s, V* out, Q* gathered) const {
    if (adjacent(s)) {
      x += row_offset(s, a.K, i);
      for (int64_t c = 0; c < a.C; ++c) out[c] = load_as<V>(x + c * s.c);
      return;
    }
    for (int64_t l = 0; l < N; ++l) {
      const Q* row = x + row_offset(s, a.K, l < n ? i + l : i);  // lanes from n on repeat row i
      for (int64_t c = 0; c < a.C; ++c) gathered[c * N + l] = row[c * s.c];
    }
    for (int64_t c = 0; c < a.C; ++c) out[c] = load_as<V>(gathered + c * N);
  }
  void load_logits(V* z, S* gathered) const {
    read(static_cast<const S*>(a.logits), a.logits_stride, z, gathered);
  }
  // The rows' numbers of their own classes, from a vector of the classes; 0 where they have none.
  V of_classes(const void* vector) const {
    V v{};
    for (int64_t l = 0; l < n; ++l) {
      const int64_t y_l = lane_index(y, l);
      if (y_l >= 0 && y_l < a.C) set_lane(v, l, static_cast<const T*>(vector)[y_l]);
    }
    return v;
  }
  void adjust(const Adjustment<T>& adjustment, V* z) const {
    if (!adjustment.any) return;
    for (int64_t c = 0; c < a.C; ++c) z[c] = adjustment(z[c], c);
    if (!adjustment.margin) return;
    T* lanes = reinterpret_cast<T*>(z);
    for (int64_t l = 0; l < n; ++l) {
      const int64_t y_l = lane_index(y, l);
      if (y_l >= 0 && y_l < a.C) lanes[y_l * N + l] -= adjustment.scaled_margin(y_l);
    }
  }
  void store_grad(const V* z, S* gathered) const {
    S* g = static_cast<S*>(a.grad);
    const Strides& s = a.grad_stride;
    if (adjacent(s)) {
      g += row_offset(s, a.K, i);
      for (int64_t c = 0; c < a.C; ++c) store(g + c * s.c, z[c]);
      return;
    }
    for (int64_t c = 0; c < a.C; ++c) store(gathered + c * N, z[c]);
    for (int64_t l = 0; l < n; ++l) {
      S* row = g + row_offset(s, a.K, i + l);
      for (int64_t c = 0; c < a.C; ++c) row[c * s.c] = gathered[c * N + l];
    }
  }
  void put(void* out, V v) const {
    T* p = static_cast<T*>(out) + i;
    if constexpr (N == 1) *p = v;
    else store_n(p, v, n);
  }
  V get(const void* in) const { return load_some(static_cast<const T*>(in) + i, n); }
};

// Calls body(c) for every class, and flush() at least every CHUNK classes.
template <class Body, class Flush>
CB_FN void for_classes(int64_t C, const Body& body, const Flush& flush) {
  for (int64_t b = 0; b < C; b += CHUNK) {
    for (int64_t c = b; c < std::min(C, b + CHUNK); ++c) body(c);
    flush();
  }
}

template <class S, Mode MODE>
void softmax_tiles(const Call& a, int64_t begin, int64_t end) {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  constexpr int64_t N = Lanes<S>::N;
  const int64_t C = a.C;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const Adjustment<T> adjustment(a);
  std::unique_ptr<V[]> z(new V[C]);
  std::unique_ptr<S[]> gathered(new S[C * N]);
  for (int64_t i = begin; i < end; i += N) {
    const Tile<S> tile(a, i, end);
    tile.load_logits(z.get(), gathered.get());
    tile.adjust(adjustment, z.get());
    V M = V{} - LARGEST<T>, R{}, D{}, z_y{}, part{};
    for (int64_t c = 0; c < C; ++c) {  // the target is left out, never subtracted
      const auto is_y = tile.is_y(c);
      z_y = is_y ? z[c] : z_y;
      z[c] = is_y ? V{} - INF<T> : z[c];
      M = max(z[c], M);
    }
    M = max(M, z_y);
    if constexpr (MODE == Mode::GRAD) M = tile.get(a.M), R = tile.get(a.R);
    else if (a.M) tile.put(a.M, M);
    const V top = M;  // +inf where a row has a limit
    for (int64_t l = 0; l < tile.n; ++l)
      if (__builtin_expect(lane(M, l) == INF<T>, 0)) {
        const Strides& s = a.logits_stride;
        T* column = reinterpret_cast<T*>(z.get()) + l;
        limit_row(static_cast<const S*>(a.logits) + row_offset(s, a.K, i + l), s.c, C, column, N);
        const int64_t y = lane_index(tile.y, l);
        if (y >= 0 && y < C) set_lane(z_y, l, column[y * N]), column[y * N] = -INF<T>;
        set_lane(M, l, 0);
      }
    const V d = z_y - M;
    if (MODE != Mode::GRAD && f.eps != 0) {
      for_classes(
          C, [&](int64_t c) { part += tile.is_y(c) ? d : z[c] - M; },
          [&] { D += part, part = V{}; });
    }
    for_classes(
        C,
        [&](int64_t c) __attribute__((always_inline)) {
          const V e = exp(z[c] - M);
          if constexpr (MODE != Mode::GRAD) part += e;
          if constexpr (MODE != Mode::LOSS) z[c] = e;
        },
        [&] {
          if constexpr (MODE != Mode::GRAD) R += part, part = V{};
        });
    if (MODE != Mode::GRAD && a.R) tile.put(a.R, R);
    const SoftmaxRow<V> row = softmax_row<V, T>(d, R, tile.r, D, T(C), top, f);
    if constexpr (MODE != Mode::GRAD) tile.put(a.loss, tile.ignored ? V{} : row.loss);
    if constexpr (MODE != Mode::LOSS) {
      for (int64_t c = 0; c < C; ++c) {
        const auto is_y = tile.is_y(c);
        const V g = is_y ? row.g_y : row.k * z[c] - row.uniform;
        z[c] = tile.ignored ? V{} : g;
      }
      tile.store_grad(z.get(), gathered.get());
    }
  }
}

template <class S, Mode MODE, Gamma G, bool SMOOTH>
void sigmoid_tiles(const Call& a, int64_t begin, int64_t end) {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  constexpr int64_t N = Lanes<S>::N;
  const int64_t C = a.C;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const Adjustment<T> adjustment(a);
  const T t = f.eps / T(C), others = SMOOTH ? T(1) : f.alpha_neg;
  std::unique_ptr<V[]> z(new V[C]);
  std::unique_ptr<S[]> gathered(new S[C * N]);
  for (int64_t i = begin; i < end; i += N) {
    const Tile<S> tile(a, i, end);
    tile.load_logits(z.get(), gathered.get());
    tile.adjust(adjustment, z.get());
    const V slope = tile.r * f.logit_scale, slope_others = slope * others;
    V z_y{}, total{};
    LossSum<G, SMOOTH, IS_HALF<S>, V> sum_L;
    for_classes(
        C,
        [&](int64_t c) __attribute__((always_inline)) {
          const auto is_y = tile.is_y(c);
          z_y = is_y ? z[c] : z_y;
          const V z_c = is_y ? V{} - INF<T> : z[c];  // -inf: its term is 0
          const V g_c = sum_L.add(z_c, t, f, [&] { return is_y; });
          if constexpr (MODE != Mode::LOSS) z[c] = slope_others * g_c;
        },
        [&]() __attribute__((always_inline)) { total += sum_L.take(); });
    Element<V> at_y = at_target<G, SMOOTH, IS_HALF<S>>(z_y, T(C), f);
    if (a.pos_weight) scale(at_y, tile.of_classes(a.pos_weight));
    if (a.has_background) at_y.L = tile.is_y(C) ? V{} : at_y.L;
    const V g_y = slope * at_y.g;
    const V row_loss = weighted(tile.r, weighted(V{} + others, total) + at_y.L);
    if constexpr (MODE != Mode::GRAD) tile.put(a.loss, tile.ignored ? V{} : row_loss);
    if constexpr (MODE != Mode::LOSS) {
      for (int64_t c = 0; c < C; ++c) {
        const auto is_y = tile.is_y(c);
        const V g = is_y ? g_y : z[c];
        z[c] = tile.ignored ? V{} : g;
      }
      tile.store_grad(z.get(), gathered.get());
    }
  }
}
