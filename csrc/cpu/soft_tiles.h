// What soft_rows.h computes, over vectors of rows, as in tile_kernels.h.

template <class T>
struct SoftTile : Tile<T> {
  using typename Tile<T>::V;
  using Tile<T>::Tile, Tile<T>::a;

  // gathered has room for N * C elements of any type.
  CB_ROW void load_targets(V* t, double* gathered) const {
    if (!a.soft)
      for (int64_t c = 0; c < a.C; ++c) t[c] = this->is_y(c) ? constant<V>(1) : V{};
    else
      with_targets(a, [&](auto* x) {
        using Q = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
        this->read(x, a.soft_stride, t, reinterpret_cast<Q*>(gathered));
      });
  }
  // The mean weights of the rows' labels; 1 for a row without labels.
  CB_ROW V label_weight(const V* t) const {
    const T* weight = static_cast<const T*>(a.weight);
    const Unknown<V> unknown(a);
    V labels{}, weights{}, part_labels{}, part_weights{};
    for_classes(
        a.C,
        [&](int64_t c) {
          const V t_c = unknown.known(t[c]);
          part_labels += t_c, part_weights += t_c * weight[c];
        },
        [&] {
          labels += part_labels, weights += part_weights;
          part_labels = part_weights = V{};
        });
    return labels == V{} ? constant<V>(1) : weights / labels;
  }
  CB_FN void note_bad_targets() const {
    for (int64_t l = 0; l < this->n; ++l) find_bad_target<T>(a, this->i + l);
  }
  // r of a backward, from what the forward saved and the incoming gradient.
  V saved_scale(const void* saved) const {
    const RowScale<T> scale(a, saved);
    V v{};
    for (int64_t l = 0; l < this->n; ++l) set_lane(v, l, scale(this->i + l));
    return v;
  }
};

// Writes the gradients over the logits z and returns the losses; t are the targets, which it may
// change, tile.r is changed to what a backward needs. in_range as in soft_rows.h.
template <class T>
using SoftTileFunction = typename Lanes<T>::V(SoftTile<T>& tile, typename Lanes<T>::V* z,
                                              typename Lanes<T>::V* t, bool& in_range);

// The largest logit is left out of the sums, as the target is with class indices.
template <Mode MODE, class T>
CB_ROW typename Lanes<T>::V softmax_soft_tile(SoftTile<T>& given, typename Lanes<T>::V* z,
                                              typename Lanes<T>::V* t, bool& in_range) {
  using V = typename Lanes<T>::V;
  using Index = typename Tile<T>::Index;
  const SoftTile<T> tile = given;
  const Call& a = tile.a;
  V r = tile.r;
  if (const T* weight = static_cast<const T*>(a.weight)) {
    r *= tile.label_weight(t);
    for (int64_t c = 0; c < a.C; ++c) t[c] *= weight[c];
  }
  if (a.grad_loss) r = tile.saved_scale(a.r);
  else if (a.r) tile.put(a.r, r);
  const int64_t C = a.C;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  V M = V{} - LARGEST<T>;
  for (int64_t c = 0; c < C; ++c) M = max(z[c], M);
  Index top = Index{} - 1;  // the first class whose logit is M
  for (int64_t c = C; c-- > 0;) top = z[c] == M ? tile.index(c) : top;
  V R{}, B{}, D{}, W_others{}, t_top{}, part_R{}, part_B{}, part_D{}, part_W{};
  TargetCheck<V> check;
  for_classes(
      C,
      [&](int64_t c) __attribute__((always_inline)) {
        const auto is_top = top == tile.index(c);
        const V below = z[c] - M, e = is_top ? V{} : exp(below), t_c = is_top ? V{} : t[c];
        t_top = is_top ? t[c] : t_top;
        check.see(t[c]);
        part_R += e, part_W += t_c;
        part_B += t_c == V{} ? V{} : t_c * below, part_D += is_top ? V{} : below;
        if constexpr (MODE != Mode::LOSS) z[c] = e;
      },
      [&]() __attribute__((always_inline)) {
        R += part_R, B += part_B, D += part_D, W_others += part_W;
        part_R = part_B = part_D = part_W = V{};
      });
  in_range = !check.fails(a);
  R = top < Index{} ? V{} + T(NAN) : R;  // top == -1: all are -inf or NaN
  const SoftRow<V> row = soft_row<V, T>(R, tile.r, r, W_others + t_top, W_others, B, D, T(C), M, f);
  if constexpr (MODE != Mode::LOSS)
    for (int64_t c = 0; c < C; ++c) {
      const V g = row.k * z[c] - row.uniform - row.hard * t[c];
      z[c] = top == tile.index(c) ? row.g_top : g;
    }
  return row.loss;
}

template <Mode MODE, Gamma G, bool SPECIAL, bool SHORT, class T>
CB_ROW typename Lanes<T>::V sigmoid_soft_tile(SoftTile<T>& given, typename Lanes<T>::V* z,
                                              typename Lanes<T>::V* t, bool& in_range) {
  using V = typename Lanes<T>::V;
  SoftTile<T> tile = given;
  const Call& a = tile.a;
  if (a.weight && !a.formula.per_class) tile.r *= tile.label_weight(t);
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const T* weight = a.formula.per_class ? static_cast<const T*>(a.weight) : nullptr;
  const Special<V> special(a);
  const T keep = 1 - f.eps, uniform = f.eps / T(a.C);
  const V slope = tile.r * f.logit_scale;
  V total{};
  SoftSum<G, SPECIAL, SHORT, V> sum_L;
  TargetCheck<V> check;
  for_classes(
      a.C,
      [&](int64_t c) __attribute__((always_inline)) {
        V z_c = z[c], given = t[c], t_c = keep * given + uniform;
        if constexpr (SPECIAL) special.unknown.blank(given, t_c, z_c);
        check.see(given);
        const V g = sum_L.add(z_c, t_c, f, weight, special.pos_weight,
                              [&](const T* w) { return V{} + w[c]; });
        if constexpr (MODE != Mode::LOSS) z[c] = slope * g;
      },
      [&]() __attribute__((always_inline)) { total += sum_L.take(); });
  in_range = !check.fails(a);
  if (in_range || SPECIAL || !a.partial) given.r = tile.r;  // else SPECIAL's turn comes
  return weighted(tile.r, total);
}

// run_special knows what Special is about. special: run is not called.
template <class S>
void for_soft_tiles(const Call& a, int64_t begin, int64_t end,
                    SoftTileFunction<typename Lanes<S>::T>* run,
                    SoftTileFunction<typename Lanes<S>::T>* run_special, bool special) {
  using T = typename Lanes<S>::T;
  using V = typename Lanes<T>::V;
  constexpr int64_t N = Lanes<T>::N;
  const S* x = static_cast<const S*>(a.logits);
  S* g = static_cast<S*>(a.grad);
  const std::unique_ptr<V[]> z(new V[a.C]), t(new V[a.C]);
  const std::unique_ptr<double[]> gathered(new double[a.C * N]);
  S* gathered_logits = reinterpret_cast<S*>(gathered.get());
  for (int64_t i = begin; i < end; i += N) {
    SoftTile<T> tile(a, i, end);
    const auto load = [&] {
      tile.read(x, a.logits_stride, z.get(), gathered_logits);
      tile.adjust(z.get());
    };
    load();
    tile.load_targets(t.get(), gathered.get());
    bool good = false;
    V loss{};
    if (!special) loss = run(tile, z.get(), t.get(), good);
    if (!good && (special || a.partial)) {
      if (!special) load();  // the gradients are there
      loss = run_special(tile, z.get(), t.get(), good);
    }
    if (!good) tile.note_bad_targets();
    if (a.weight && a.formula.sigmoid && !a.formula.per_class)
      tile.put(a.scale, tile.r);  // for a backward that recomputes the gradient
    if (a.loss) tile.put(a.loss, tile.ignored ? V{} : loss);
    if (!g) continue;
    for (int64_t c = 0; c < a.C; ++c) z[c] = tile.ignored ? V{} : z[c];
    tile.write(g, a.grad_stride, z.get(), gathered_logits);
  }
}

template <class S, Mode MODE>
void softmax_soft_tiles(const Call& a, int64_t begin, int64_t end) {
  for_soft_tiles<S>(a, begin, end, softmax_soft_tile<MODE, typename Lanes<S>::T>, nullptr, false);
}
template <class S, Mode MODE, Gamma G>
void sigmoid_soft_tiles(const Call& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  for_soft_tiles<S>(a, begin, end, sigmoid_soft_tile<MODE, G, false, IS_HALF<S>, T>,
                    sigmoid_soft_tile<MODE, G, true, IS_HALF<S>, T>,
                    Special<typename Lanes<S>::V>::everywhere(a, false));
}

// Calls run(tile, t), without the logits.
template <class T, class Run>
void for_target_tiles(const Call& a, int64_t begin, int64_t end, const Run& run) {
  using V = typename Lanes<T>::V;
  constexpr int64_t N = Lanes<T>::N;
  const std::unique_ptr<V[]> t(new V[a.C]);
  const std::unique_ptr<double[]> gathered(new double[a.C * N]);
  for (int64_t i = begin; i < end; i += N) {
    const SoftTile<T> tile(a, i, end);
    tile.load_targets(t.get(), gathered.get());
    run(tile, t.get());
  }
}

// Mode::CHECK, which runs before a gradient is written over the logits.
template <class T>
void check_tiles(const Call& a, int64_t begin, int64_t end) {
  for_target_tiles<T>(a, begin, end, [&](const auto& tile, const auto* t) {
    using V = typename Lanes<T>::V;
    const Unknown<V> unknown(a);
    TargetCheck<V> check;
    for (int64_t c = 0; c < a.C; ++c) check.see(unknown.known(t[c]));
    if (check.fails(a)) tile.note_bad_targets();
  });
}

// Mode::LABELS, for a denominator that is the sum of r_i: the row scale times the mean weight of
// the row's labels.
template <class T>
void label_weight_tiles(const Call& a, int64_t begin, int64_t end) {
  for_target_tiles<T>(a, begin, end, [&](const auto& tile, const auto* t) {
    tile.put(a.r, tile.r * tile.label_weight(t));
  });
}
