// Kernels over vectors of rows, with a loop over the classes: for few classes, or classes that are
// not side by side in memory.

// N rows at a time, the rows of one vector of T: where they lie.
template <class T>
struct Place {
  using V = typename Lanes<T>::V;
  static constexpr int64_t N = Lanes<T>::N;

  const Call& a;
  int64_t i, n;  // first row, number of rows

  Place(const Call& a, int64_t i, int64_t end) : a(a), i(i), n(std::min(end - i, N)) {}
  // Whether all N rows are there, a row_step() apart.
  bool evenly_apart() const { return n == N && (a.K == 1 || i / a.K == (i + N - 1) / a.K); }
  // Whether vectors can be loaded and stored directly.
  bool adjacent(const Strides& s) const { return row_step(s, a.K) == 1 && evenly_apart(); }
  bool in_blocks(const Strides& s) const { return HAS_BLOCKS && N > 1 && s.c == 1 && a.C >= SIDE; }
  // A row's offset; lanes from n on repeat the last row.
  int64_t offset(const Strides& s, int64_t l) const {
    return row_offset(s, a.K, i + std::min(l, n - 1));
  }
  template <class Q>
  void set_rows(Q* x, const Strides& s, Q* (&row)[N]) const {
    const bool even = evenly_apart();
    const int64_t step = row_step(s, a.K);
    row[0] = x + offset(s, 0);
    for (int64_t l = 1; l < N; ++l) row[l] = even ? row[l - 1] + step : x + offset(s, l);
  }
  // out[c] = these rows' elements of class c, from a tensor x of any type.
  template <class Q>
  void read(const Q* x, const Strides& s, V* out, Q* gathered) const {
    if (adjacent(s)) {
      x += row_offset(s, a.K, i);
      for (int64_t c = 0; c < a.C; ++c) out[c] = load_as<V>(x + c * s.c);
      return;
    }
    if constexpr (N > 1) {
      if (in_blocks(s)) {
        const Q* row[N];
        set_rows(x, s, row);
        return blocks_from_rows(row, a.C, out);
      }
    }
    for (int64_t l = 0; l < N; ++l) {
      const Q* row = x + offset(s, l);
      for (int64_t c = 0; c < a.C; ++c) gathered[c * N + l] = row[c * s.c];
    }
    for (int64_t c = 0; c < a.C; ++c) out[c] = load_as<V>(gathered + c * N);
  }
  // Writes these rows' elements of a tensor g.
  template <class S>
  void write(S* g, const Strides& s, const V* z, S* gathered) const {
    if (adjacent(s)) {
      g += row_offset(s, a.K, i);
      for (int64_t c = 0; c < a.C; ++c) store(g + c * s.c, z[c]);
      return;
    }
    if constexpr (N > 1) {
      if (in_blocks(s) && n == N) {
        S* row[N];
        set_rows(g, s, row);
        return rows_from_blocks(z, a.C, row);
      }
    }
    for (int64_t c = 0; c < a.C; ++c) store(gathered + c * N, z[c]);
    for (int64_t l = 0; l < n; ++l) {
      S* row = g + row_offset(s, a.K, i + l);
      for (int64_t c = 0; c < a.C; ++c) row[c * s.c] = gathered[c * N + l];
    }
  }
};

// The rows of one vector, and what there is to know about each.
template <class T>
struct Tile : Place<T> {
  using typename Place<T>::V;
  using Place<T>::a, Place<T>::i, Place<T>::n, Place<T>::N;
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t, IVec>;
  V r{};
  Index y{}, ignored{};

  Tile(const Call& a, int64_t i, int64_t end) : Place<T>(a, i, end) {
    const RowScale<T> scale(a);
    if constexpr (N == 1) {
      ignored = scale.ignored(i), r = scale(i);
      y = class_of(a, i);
    } else {
      r = get(scale.scale);
      ignored = r < V{};
      if (scale.grad_loss)
        r *= quiet(scale.per_row ? get(scale.grad_loss) : V{} + scale.grad_loss[0]);
      if (a.target) y = classes();
    }
  }
  // As class_of(), in 32 bits: an index that is out of range belongs to a row that is ignored.
  IVec classes() const {
    if (n == N && !a.has_background) return load_indices(a.target + i);
    IVec y{};
    for (int64_t l = 0; l < n; ++l) y[l] = int32_t(class_of(a, i + l));
    return y;
  }
  Index index(int64_t c) const { return Index{} + std::conditional_t<N == 1, int64_t, int32_t>(c); }
  auto is_y(int64_t c) const { return y == index(c); }
  // The rows' numbers of their own classes, from a vector of the classes; 0 where they have none.
  V of_classes(const void* vector) const {
    V v{};
    for (int64_t l = 0; l < n; ++l) {
      const int64_t y_l = lane_index(y, l);
      if (y_l >= 0 && y_l < a.C) set_lane(v, l, static_cast<const T*>(vector)[y_l]);
    }
    return v;
  }
  void adjust(V* z) const {
    const Adjustment<T> adjustment(a);
    if (adjustment.any) adjust(adjustment, z);
  }
  CB_ROW void adjust(const Adjustment<T>& adjustment, V* z) const {
    for (int64_t c = 0; c < a.C; ++c) z[c] = adjustment(z[c], c);
    if (!adjustment.margin) return;
    T* lanes = reinterpret_cast<T*>(z);
    for (int64_t l = 0; l < n; ++l) {
      const int64_t y_l = lane_index(y, l);
      if (y_l >= 0 && y_l < a.C) lanes[y_l * N + l] -= adjustment.scaled_margin(y_l);
    }
  }
  void put(void* out, V v) const {
    T* p = static_cast<T*>(out) + i;
    if constexpr (N == 1) *p = v;
    else store_n(p, v, n);
  }
  V get(const void* in) const { return load_up_to(static_cast<const T*>(in) + i, n); }
};

// Calls body(c) for every class, and flush() at least every CHUNK classes.
template <class Body, class Flush>
CB_FN void for_classes(int64_t C, const Body& body, const Flush& flush) {
  for (int64_t b = 0; b < C; b += CHUNK) {
    const int64_t stop = std::min(C, b + CHUNK);
    int64_t c = b;
    for (; c + 1 < stop; c += 2) body(c), body(c + 1);  // as in for_negatives()
    if (c < stop) body(c);
    flush();
  }
}

// Tiles that are read together, and written together, where rows lie side by side and classes do
// not. Of one tile alone a class has a part of a cache line, which may be gone when the next tile
// wants the rest: where classes are a power of two apart, as in images, their lines all compete for
// the same few places of a cache.
template <class S>
class Group {
  using V = typename Lanes<S>::V;
  static constexpr int64_t N = Lanes<S>::N;
  // Rows of a group, whose logits fit into the smallest first-level caches. Fewer do not pay: the
  // hardware fetches one tile after the other better.
  static constexpr int64_t ROWS = 64, BYTES = 1 << 15;
  const Call& a;

 public:
  int64_t most = 1;  // tiles

  explicit Group(const Call& a) : a(a) {
    const auto fits = [&](const Strides& s) { return row_step(s, a.K) == 1 && s.c != 1; };
    const bool in_cache = a.C * ROWS * int64_t(sizeof(typename Lanes<S>::T)) <= BYTES;
    if (in_cache && fits(a.logits_stride) && (!a.grad || fits(a.grad_stride))) most = ROWS / N;
  }
  // From row i on: whole tiles of one sample, or one.
  int64_t tiles(int64_t i, int64_t end) const {
    const int64_t left = a.K == 1 ? end - i : std::min(end - i, a.K - i % a.K);
    return std::clamp(left / N, int64_t(1), most);
  }
  // z[t * C + c] = class c of tile t.
  void read(int64_t i, int64_t tiles, V* z) const {
    const Strides& s = a.logits_stride;
    const S* x = static_cast<const S*>(a.logits) + row_offset(s, a.K, i);
    for (int64_t c = 0; c < a.C; ++c, x += s.c)
      for (int64_t t = 0; t < tiles; ++t) {
        prefetch(x + (tiles + t) * N);  // of the next group
        z[t * a.C + c] = load_as<V>(x + t * N);
      }
  }
  void write(int64_t i, int64_t tiles, const V* z) const {
    const Strides& s = a.grad_stride;
    S* g = static_cast<S*>(a.grad) + row_offset(s, a.K, i);
    for (int64_t c = 0; c < a.C; ++c, g += s.c)
      for (int64_t t = 0; t < tiles; ++t) store(g + t * N, z[t * a.C + c]);
  }
};

// A kernel of the tile that begins with row i, rows up to end: z are its logits, over which it
// writes the gradient. Half types share those of float.
template <class T>
using TileFunction = void(const Call& a, int64_t i, int64_t end, typename Lanes<T>::V* z);

template <class S>
void for_tiles(const Call& a, int64_t begin, int64_t end, TileFunction<typename Lanes<S>::T>* run) {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  constexpr int64_t N = Lanes<S>::N;
  const S* x = static_cast<const S*>(a.logits);
  S* g = static_cast<S*>(a.grad);
  const Group<S> group(a);
  const std::unique_ptr<V[]> z(new V[a.C * group.most]);
  const std::unique_ptr<S[]> gathered(new S[a.C * N]);
  for (int64_t first = begin, tiles; first < end; first += tiles * N) {
    tiles = group.tiles(first, end);
    if (tiles > 1) group.read(first, tiles, z.get());
    for (int64_t t = 0; t < tiles; ++t) {
      const Place<T> place(a, first + t * N, end);
      V* z_t = z.get() + t * a.C;
      if (tiles == 1) place.read(x, a.logits_stride, z_t, gathered.get());
      run(a, place.i, end, z_t);
      if (g && tiles == 1) place.write(g, a.grad_stride, z_t, gathered.get());
    }
    if (g && tiles > 1) group.write(first, tiles, z.get());
  }
}

// limit_row() for the rows whose largest logit, M, is infinite; z has -inf at the targets, whose
// logits are z_y. Returns these.
template <class T, class V = typename Lanes<T>::V>
__attribute__((noinline, cold)) V limit_tile(const Tile<T> tile, V M, V* z, V z_y) {
  constexpr int64_t N = Lanes<T>::N;
  for (int64_t l = 0; l < tile.n; ++l) {
    if (lane(M, l) != INF<T>) continue;
    T* column = reinterpret_cast<T*>(z) + l;
    const int64_t y = lane_index(tile.y, l);
    const bool has_y = y >= 0 && y < tile.a.C;
    if (has_y) column[y * N] = lane(z_y, l);
    limit_row(column, N, tile.a.C, column, N);
    if (has_y) set_lane(z_y, l, column[y * N]), column[y * N] = -INF<T>;
  }
  return z_y;
}

template <Mode MODE, class T>
CB_ROW void softmax_tile(const Call& a, int64_t i, int64_t end, typename Lanes<T>::V* z) {
  using V = typename Lanes<T>::V;
  const Tile<T> tile(a, i, end);
  tile.adjust(z);
  const int64_t C = a.C;
  const FormulaOf<T> f = formula_of<T>(a.formula);
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
  if (__builtin_expect(any(M == V{} + INF<T>), 0)) {
    z_y = limit_tile(tile, M, z, z_y);
    M = M == V{} + INF<T> ? V{} : M;
  }
  const V d = z_y - M;
  if (MODE != Mode::GRAD && f.eps != 0)
    for_classes(
        C, [&](int64_t c) { part += tile.is_y(c) ? d : z[c] - M; }, [&] { D += part, part = V{}; });
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
  }
}

template <class S, Mode MODE>
void softmax_tiles(const Call& a, int64_t begin, int64_t end) {
  for_tiles<S>(a, begin, end, softmax_tile<MODE, typename Lanes<S>::T>);
}

// SHORT as in row_math.h.
template <Mode MODE, Gamma G, bool SMOOTH, bool SHORT, class T>
CB_ROW void sigmoid_tile(const Call& a, int64_t i, int64_t end, typename Lanes<T>::V* z) {
  using V = typename Lanes<T>::V;
  const Tile<T> tile(a, i, end);
  tile.adjust(z);
  const int64_t C = a.C;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const T t = f.eps / T(C), others = SMOOTH ? T(1) : f.alpha_neg;
  const V slope = tile.r * f.logit_scale, slope_others = slope * others;
  V z_y{}, total{};
  LossSum<G, SMOOTH, SHORT, V> sum_L;
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
  Element<V> at_y = at_target<G, SMOOTH, SHORT>(z_y, T(C), f);
  if (a.pos_weight) scale(at_y, tile.of_classes(a.pos_weight));
  if (a.has_background) at_y.L = tile.is_y(C) ? V{} : at_y.L;
  const V g_y = slope * at_y.g;
  const V row_loss = weighted(tile.r, weighted(V{} + others, total) + at_y.L);
  if (MODE != Mode::GRAD && a.loss) tile.put(a.loss, tile.ignored ? V{} : row_loss);
  if constexpr (MODE != Mode::LOSS) {
    for (int64_t c = 0; c < C; ++c) {
      const auto is_y = tile.is_y(c);
      const V g = is_y ? g_y : z[c];
      z[c] = tile.ignored ? V{} : g;
    }
  }
}

template <class S, Mode MODE, Gamma G, bool SMOOTH>
void sigmoid_tiles(const Call& a, int64_t begin, int64_t end) {
  for_tiles<S>(a, begin, end, sigmoid_tile<MODE, G, SMOOTH, IS_HALF<S>, typename Lanes<S>::T>);
}
