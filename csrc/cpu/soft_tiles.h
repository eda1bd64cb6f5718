// What soft_rows.h computes, over vectors of rows, as in tile_kernels.h.

template <class S>
struct SoftTile : Tile<S> {
  using typename Tile<S>::V;
  using typename Tile<S>::T;
  using Tile<S>::Tile, Tile<S>::a;

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

// Writes the gradients over z and returns the losses. The largest logit is left out of the sums, as
// the target is with class indices. t are the targets times the class weights; tile.r is s.
template <Mode MODE, class S, class V = typename Lanes<S>::V>
CB_FN V softmax_soft_tile(const SoftTile<S>& tile, V r, V* z, const V* t) {
  using T = typename Lanes<S>::T;
  using Index = typename Tile<S>::Index;
  const int64_t C = tile.a.C;
  const FormulaOf<T> f = formula_of<T>(tile.a.formula);
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
        if constexpr (MODE != Mode::GRAD) check.see(t[c]);
        part_R += e, part_W += t_c;
        part_B += t_c == V{} ? V{} : t_c * below, part_D += is_top ? V{} : below;
        if constexpr (MODE != Mode::LOSS) z[c] = e;
      },
      [&]() __attribute__((always_inline)) {
        R += part_R, B += part_B, D += part_D, W_others += part_W;
        part_R = part_B = part_D = part_W = V{};
      });
  if (check.fails(tile.a)) tile.note_bad_targets();
  R = top < Index{} ? V{} + T(NAN) : R;  // top == -1: all are -inf or NaN
  const SoftRow<V> row = soft_row<V, T>(R, tile.r, r, W_others + t_top, W_others, B, D, T(C), M, f);
  if constexpr (MODE != Mode::LOSS)
    for (int64_t c = 0; c < C; ++c) {
      const V g = row.k * z[c] - row.uniform - row.hard * t[c];
      z[c] = top == tile.index(c) ? row.g_top : g;
    }
  return row.loss;
}

template <Mode MODE, Gamma G, bool SPECIAL, class S, class V = typename Lanes<S>::V>
CB_FN V sigmoid_soft_tile(const SoftTile<S>& tile, V* z, const V* t, bool& in_range) {
  using T = typename Lanes<S>::T;
  const Call& a = tile.a;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const T* weight = a.formula.per_class ? static_cast<const T*>(a.weight) : nullptr;
  const Special<V> special(a);
  const T keep = 1 - f.eps, uniform = f.eps / T(a.C);
  const V slope = tile.r * f.logit_scale;
  V total{};
  SoftSum<G, SPECIAL, IS_HALF<S>, V> sum_L;
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
  return weighted(tile.r, total);
}

// Calls run(tile, z, t, load_logits), which returns the losses and writes the gradients over z.
template <class S, Mode MODE, class Run>
void for_soft_tiles(const Call& a, int64_t begin, int64_t end, const Run& run) {
  using V = typename Lanes<S>::V;
  constexpr int64_t N = Lanes<S>::N;
  const Adjustment<typename Lanes<S>::T> adjustment(a);
  const std::unique_ptr<V[]> z(new V[a.C]), t(new V[a.C]);
  const std::unique_ptr<double[]> gathered(new double[a.C * N]);
  S* gathered_logits = reinterpret_cast<S*>(gathered.get());
  for (int64_t i = begin; i < end; i += N) {
    SoftTile<S> tile(a, i, end);
    const auto load_logits = [&] {
      tile.load_logits(z.get(), gathered_logits);
      if (adjustment.any) tile.adjust(adjustment, z.get());
    };
    load_logits();
    tile.load_targets(t.get(), gathered.get());
    const V loss = run(tile, z.get(), t.get(), load_logits);
    if constexpr (MODE != Mode::GRAD) tile.put(a.loss, tile.ignored ? V{} : loss);
    if constexpr (MODE != Mode::LOSS) {
      for (int64_t c = 0; c < a.C; ++c) z[c] = tile.ignored ? V{} : z[c];
      tile.store_grad(z.get(), gathered_logits);
    }
  }
}

template <class S, Mode MODE>
void softmax_soft_tiles(const Call& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  using V = typename Lanes<S>::V;
  const T* weight = static_cast<const T*>(a.weight);
  for_soft_tiles<S, MODE>(a, begin, end, [&](auto& tile, V* z, V* t, auto) {
    V r = tile.r;
    if (weight) {
      r *= tile.label_weight(t);
      for (int64_t c = 0; c < a.C; ++c) t[c] *= weight[c];
    }
    if (MODE == Mode::GRAD) r = tile.saved_scale(a.r);
    else if (a.r) tile.put(a.r, r);
    return softmax_soft_tile<MODE>(tile, r, z, t);
  });
}
template <class S, Mode MODE, Gamma G>
void sigmoid_soft_tiles(const Call& a, int64_t begin, int64_t end) {
  const bool weighs_labels = a.weight && !a.formula.per_class;
  const bool special = Special<typename Lanes<S>::V>::everywhere(a, false);
  for_soft_tiles<S, MODE>(a, begin, end, [&](auto& tile, auto* z, auto* t, auto& load_logits) {
    if (weighs_labels) {
      tile.r *= tile.label_weight(t);
      tile.put(a.scale, tile.r);  // for a backward that recomputes the gradient
    }
    bool good = false;
    typename Lanes<S>::V loss{};
    if (!special) loss = sigmoid_soft_tile<MODE, G, false>(tile, z, t, good);
    if (!good && (special || a.partial)) {
      if (!special) load_logits();  // the gradients are there
      loss = sigmoid_soft_tile<MODE, G, true>(tile, z, t, good);
    }
    if (MODE != Mode::GRAD && !good) tile.note_bad_targets();
    return loss;
  });
}

// Calls run(tile, t), without the logits.
template <class S, class Run>
void for_target_tiles(const Call& a, int64_t begin, int64_t end, const Run& run) {
  using V = typename Lanes<S>::V;
  constexpr int64_t N = Lanes<S>::N;
  const std::unique_ptr<V[]> t(new V[a.C]);
  const std::unique_ptr<double[]> gathered(new double[a.C * N]);
  for (int64_t i = begin; i < end; i += N) {
    const SoftTile<S> tile(a, i, end);
    tile.load_targets(t.get(), gathered.get());
    run(tile, t.get());
  }
}

// Mode::CHECK, which runs before a gradient is written over the logits.
template <class S>
void check_tiles(const Call& a, int64_t begin, int64_t end) {
  for_target_tiles<S>(a, begin, end, [&](const auto& tile, const auto* t) {
    using V = typename Lanes<S>::V;
    const Unknown<V> unknown(a);
    TargetCheck<V> check;
    for (int64_t c = 0; c < a.C; ++c) check.see(unknown.known(t[c]));
    if (check.fails(a)) tile.note_bad_targets();
  });
}

// Mode::LABELS, for a denominator that is the sum of r_i: the row scale times the mean weight of
// the row's labels.
template <class S>
void label_weight_tiles(const Call& a, int64_t begin, int64_t end) {
  for_target_tiles<S>(a, begin, end, [&](const auto& tile, const auto* t) {
    tile.put(a.r, tile.r * tile.label_weight(t));
  });
}
