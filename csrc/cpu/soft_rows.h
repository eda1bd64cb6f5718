// Kernels over vectors of classes, as in row_kernels.h, for soft targets (one number per class;
// soft or multi-hot) and for class weights.

// Calls visit with a pointer to the call's soft targets in their own type.
template <class Visit>
void with_targets(const Call& a, const Visit& visit) {
  switch (a.soft_type) {
    case DType::Float64: return visit(static_cast<const double*>(a.soft));
    case DType::Float32: return visit(static_cast<const float*>(a.soft));
    case DType::BFloat16: return visit(static_cast<const BFloat16*>(a.soft));
    case DType::Float16: return visit(static_cast<const Float16*>(a.soft));
    default: return visit(static_cast<const uint8_t*>(a.soft));  // bool: 0 or 1
  }
}

// out = the C elements of a row, from any type.
template <class T, class Q>
void copy_as(const Q* q, int64_t stride, int64_t C, T* out) {
  constexpr int64_t N = Lanes<T>::N;
  const int64_t whole = stride == 1 ? C / N * N : 0;
  for (int64_t j = 0; j < whole; j += N) {
    prefetch(ahead(q + j));
    store(out + j, load_as<typename Lanes<T>::V>(q + j));
  }
  for (int64_t j = whole; j < C; ++j) out[j] = load_as<T>(q + j * stride);
}

// The targets of a row: in place, or in a copy that stays in cache if the kernels cannot read their
// type or stride. With class indices, as class weights may have: 1 at the target, else 0; the copy
// has one element more, for rows without a class.
template <class T>
class Targets {
  const Call& a;
  std::unique_ptr<T[]> copy;
  int64_t last = 0;

  bool as_they_lie() const {
    constexpr DType COMPUTED = sizeof(T) == 8 ? DType::Float64 : DType::Float32;
    return a.soft && a.soft_type == COMPUTED && a.soft_stride.c == 1;
  }

 public:
  explicit Targets(const Call& a) : a(a), copy(as_they_lie() ? nullptr : new T[a.C + 1]()) {}
  const T* operator()(int64_t i, int64_t y) {
    if (!a.soft) {
      copy[last] = 0, copy[y] = 1, last = y;
      return copy.get();
    }
    const int64_t offset = row_offset(a.soft_stride, a.K, i);
    if (!copy) return static_cast<const T*>(a.soft) + offset;
    with_targets(a, [&](auto* t) { copy_as(t + offset, a.soft_stride.c, a.C, copy.get()); });
    return copy.get();
  }
};

// Whether there may be an out-of-range target among those seen, by one operation per vector: the
// bits of t >= 0, as unsigned integers, are in the order of t, and those of infinity, NaN and all
// negative numbers are larger. -0 is among them, but find_bad_target accepts it.
template <class V>
struct TargetCheck {
  decltype(bits(V{})) largest{};
  CB_FN void see(V t) { largest = max(bits(t), largest); }  // 0 for an unknown label
  CB_FN bool fails(const Call& a) const {
    return any(largest > bits(constant<V>(a.formula.sigmoid ? 1 : FLT_MAX)));
  }
};

// Notes the first out-of-range target of row i, if there is one; a recomputed gradient's were seen
// before.
template <class T>
__attribute__((noinline, cold)) void find_bad_target(const Call& a, int64_t i) {
  if (!a.bad) return;
  with_targets(a, [&](auto* t) {
    t += row_offset(a.soft_stride, a.K, i);
    for (int64_t c = 0; c < a.C; ++c) {
      const T t_c = load_as<T>(t + c * a.soft_stride.c);
      if (a.partial && t_c == T(a.unknown)) continue;
      if (!(t_c >= 0 && t_c <= (a.formula.sigmoid ? T(1) : LARGEST<T>)))
        return note_bad_target(*a.bad, (i / a.K * a.C + c) * a.K + i % a.K, t_c);
    }
  });
}

// Labels that nobody knows, where a call may have any.
template <class V>
struct Unknown {
  using T = decltype(lane(V{}, 0));
  const bool any;
  const V value;
  explicit Unknown(const Call& a) : any(a.partial), value(V{} + T(a.unknown)) {}
  CB_FN V known(V given) const { return any ? (given == value ? V{} : given) : given; }
  // The target 0 of a logit of -inf, smoothed or not, has loss 0 and gradient 0.
  CB_FN void blank(V& given, V& t, V& z) const {
    if (!any) return;
    const auto here = given == value;
    given = here ? V{} : given, t = here ? V{} : t, z = here ? V{} - INF<T> : z;
  }
};

// The mean weight of a row's labels; 1 where it has none.
template <class T>
T mean_weight(double weights, double labels) {
  return labels != 0 ? T(weights / labels) : T(1);
}
template <class T>
T label_weight(const Call& a, const T* t, const T* weight) {
  using V = typename Lanes<T>::V;
  const Unknown<V> unknown(a);
  V labels{}, weights{};
  DoubleLanes<V> all_labels, all_weights;
  for_vectors<Lanes<T>::N>(
      a.C,
      [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        prefetch(ahead(t + j));
        const V t_j = unknown.known(load_up_to(t + j, n));
        labels += t_j, weights += t_j * load_up_to(weight + j, n);
      },
      [&]() __attribute__((always_inline)) {
        all_labels.add(labels), all_weights.add(weights), labels = weights = V{};
      });
  return mean_weight<T>(all_weights.sum(), all_labels.sum());
}

// The first class whose logit is M, or C if there is none.
template <class S, class T>
int64_t find_logit(const S* x, int64_t C, T M) {
  constexpr int64_t N = Lanes<S>::N;
  int64_t j = 0;
  while (j + N <= C && !any(load(x + j) == M)) j += N;
  while (j < C && load_one(x + j) != M) ++j;
  return j;
}

// The loss of a row, with targets t. in_range: whether no target but an unknown label is out of
// range. A recomputed gradient is LOSS_AND_GRAD too, without a.loss.
template <class S>
using SoftRowFunction = double(const Call&, const Row<S>&, const typename Lanes<S>::T* t,
                               bool& in_range);

// The largest logit is left out of the sums, as the target is with class indices.
template <Mode MODE, bool WEIGHTED, class S, class T = typename Lanes<S>::T>
CB_ROW double softmax_soft_row(const Call& a, const Row<S>& given, const T* t, bool& in_range) {
  using V = typename Lanes<S>::V;
  constexpr int64_t N = Lanes<S>::N;
  const int64_t C = a.C, i = given.i;
  const S* x = given.x;
  S* g = given.g;
  const T s = given.r;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const T M = largest_logit(x, C);
  const int64_t at = find_logit(x, C, M), y = at < C ? at : 0;  // at == C: all are -inf or NaN
  const T* w = static_cast<const T*>(a.weight);
  const T t_y = t[y], a_y = WEIGHTED ? t_y * w[y] : t_y;
  T* e;  // e^{z - M} is stored in the gradient, or in scratch
  if constexpr (std::is_same_v<S, T>) e = g;
  else e = given.scratch;
  V lanes_R{}, lanes_B{}, lanes_D{}, lanes_W{}, lanes_t{};
  DoubleLanes<V> R, B, D, others, labels;
  TargetCheck<V> check;
  check.see(V{} + t_y);
  for_negatives(
      x, given.later, C, y,
      [&](int64_t j, V z, int64_t n, auto blank) __attribute__((always_inline)) {
        prefetch(ahead(t + j));
        const V below = z - M, e_j = exp(below), t_j = blank ? V{} : load_up_to(t + j, n);
        V a_j = t_j;
        if constexpr (WEIGHTED) a_j *= load_up_to(w + j, n), lanes_t += t_j;
        check.see(t_j);
        lanes_R += e_j, lanes_W += a_j, lanes_B += a_j == V{} ? V{} : a_j * below;
        if (f.eps != 0) lanes_D += blank ? V{} : below;
        if constexpr (MODE != Mode::LOSS) store_n(e + j, e_j, n);
      },
      [&]() __attribute__((always_inline)) {
        R.add(lanes_R), B.add(lanes_B), D.add(lanes_D), others.add(lanes_W);
        lanes_R = lanes_B = lanes_D = lanes_W = V{};
        if constexpr (WEIGHTED) labels.add(lanes_t), lanes_t = V{};
      });
  in_range = !check.fails(a);
  const T W_others = T(others.sum()), sum_R = at < C ? T(R.sum()) : T(NAN);
  T r = s;
  if (a.grad_loss) r = RowScale<T>(a, a.r)(i);
  else if (WEIGHTED) r *= mean_weight<T>(others.sum() + a_y, labels.sum() + t_y);
  if (!a.grad_loss && a.r) static_cast<T*>(a.r)[i] = r;
  const SoftRow<V> row =
      soft_row<V, T>(V{} + sum_R, V{} + s, V{} + r, V{} + (W_others + a_y), V{} + W_others,
                     V{} + T(B.sum()), V{} + T(D.sum()), T(C), V{} + M, f);
  if constexpr (MODE != Mode::LOSS) {
    for_vectors<N>(
        C,
        [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          V a_j = load_up_to(t + j, n);
          if constexpr (WEIGHTED) a_j *= load_up_to(w + j, n);
          store_n(g + j, row.k * load_up_to(e + j, n) - row.uniform - row.hard * a_j, n);
        },
        [] {});
    store_one(g + y, T(lane(row.g_top, 0)));
  }
  return double(lane(row.loss, 0));
}

// What a row of the sigmoid family may have beside targets and class weights. Most have neither:
// their code knows neither, and a row that turns out to have unknown labels is computed once more.
template <class V>
struct Special {
  using T = decltype(lane(V{}, 0));
  const Unknown<V> unknown;
  const T* pos_weight;
  explicit Special(const Call& a) : unknown(a), pos_weight(static_cast<const T*>(a.pos_weight)) {}
  // Whether all rows have it. A gradient that is written over the logits cannot be computed twice.
  static bool everywhere(const Call& a, bool overwrites) {
    return a.pos_weight || a.unknown_seen || (a.partial && overwrites);
  }
};

// LossSum for any targets and, unless null, class weights and pos_weight, which load(pointer)
// loads.
template <Gamma G, bool SPECIAL, bool SHORT, class V>
struct SoftSum : LossSum<G, true, SHORT, V> {
  template <class T, class Load>
  CB_FN V add(V z, V t, const FormulaOf<T>& f, const T* weight, const T* pos_weight,
              const Load& load) {
    if constexpr (G == Gamma::ZERO && !SPECIAL) return this->softplus.add(z, t);
    if (G == Gamma::ZERO && !pos_weight) return this->softplus.add(z, t);
    Element<V> e;
    if (any(t != V{})) {
      const bool positive = SPECIAL && pos_weight;
      e = mixed<G, SHORT>(z, t, positive ? load(pos_weight) : constant<V>(1), f);
    } else {  // as in most vectors of a multi-hot row: without the positive side
      if constexpr (G == Gamma::ZERO) return this->softplus.add(z, t);
      e = negative<G, SHORT>(z, f);
      scale(e, V{} + f.alpha_neg);
    }
    if (weight) scale(e, load(weight));
    this->L += e.L;
    return e.g;
  }
  CB_FN V take() {
    if constexpr (G != Gamma::ZERO || !SPECIAL) return LossSum<G, true, SHORT, V>::take();
    const V total = this->softplus.value() + this->L;
    *this = SoftSum{};
    return total;
  }
};

template <Mode MODE, Gamma G, bool SPECIAL, class S, class T = typename Lanes<S>::T>
CB_ROW double sigmoid_soft_row(const Call& a, const Row<S>& row, const T* t, bool& in_range) {
  using V = typename Lanes<S>::V;
  constexpr int64_t N = Lanes<S>::N;
  const S* x = row.x;
  const FormulaOf<T> f = formula_of<T>(a.formula);
  const T* weight = a.formula.per_class ? static_cast<const T*>(a.weight) : nullptr;
  const Special<V> special(a);
  const T keep = 1 - f.eps, uniform = f.eps / T(a.C), slope = row.r * f.logit_scale;
  DoubleLanes<V> total;
  SoftSum<G, SPECIAL, IS_HALF<S>, V> sum_L;
  TargetCheck<V> check;
  for_vectors<N>(
      a.C,
      [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        prefetch(ahead(x + j)), prefetch(ahead(t + j));
        V z = padded(load_up_to(x + j, n), n, -INF<T>);  // its loss is 0 where t is 0
        V given = load_up_to(t + j, n), t_j = padded(keep * given + uniform, n, T(0));
        if constexpr (SPECIAL) special.unknown.blank(given, t_j, z);
        check.see(given);
        const V g_j = sum_L.add(z, t_j, f, weight, special.pos_weight,
                                [&](const T* w) { return load_up_to(w + j, n); });
        if constexpr (MODE != Mode::LOSS) store_n(row.g + j, slope * g_j, n);
      },
      [&]() __attribute__((always_inline)) { total.add(sum_L.take()); });
  in_range = !check.fails(a);
  return weighted(double(row.r), total.sum());
}

// What for_rows() runs, with the row's targets. By pointers, as RunRow.
template <class S>
struct RunSoftRow {
  using T = typename Lanes<S>::T;
  const Call& a;
  SoftRowFunction<S>*run, *run_special;  // what Special is about, if there can be any
  SoftRowFunction<T>*run_adjusted, *run_adjusted_special;
  bool special = false;                 // run is not called
  const T* weight_of_labels = nullptr;  // which makes r
  mutable Targets<T> targets{a};

  void operator()(const Row<S>& row) const { both(row, run, run_special); }
  template <class Q>
  void operator()(const Row<Q>& row) const {
    both(row, run_adjusted, run_adjusted_special);
  }

 private:
  template <class Q>
  void both(Row<Q> row, SoftRowFunction<Q>* plain, SoftRowFunction<Q>* with_special) const {
    const T* t = targets(row.i, row.y);
    if (weight_of_labels) {
      row.r *= label_weight(a, t, weight_of_labels);
      static_cast<T*>(a.scale)[row.i] = row.r;  // for a backward that recomputes the gradient
    }
    bool good = false;
    double loss = 0;
    if (!special) loss = plain(a, row, t, good);
    if (!good && (special || a.partial)) loss = with_special(a, row, t, good);
    if (!good) find_bad_target<T>(a, row.i);
    if (a.loss) static_cast<T*>(a.loss)[row.i] = T(loss);
  }
};

template <class S, Mode MODE, bool WEIGHTED>
void softmax_soft_rows(const Call& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  constexpr auto run = softmax_soft_row<MODE, WEIGHTED, S>;
  constexpr auto run_adjusted = softmax_soft_row<MODE, WEIGHTED, T>;
  for_rows<S>(a, begin, end, RunSoftRow<S>{a, run, nullptr, run_adjusted, nullptr});
}
template <class S, Mode MODE, Gamma G>
void sigmoid_soft_rows(const Call& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  const T* weight_of_labels = a.formula.per_class ? nullptr : static_cast<const T*>(a.weight);
  const bool special = Special<typename Lanes<S>::V>::everywhere(a, a.grad == a.logits);
  for_rows<S>(a, begin, end,
              RunSoftRow<S>{a, sigmoid_soft_row<MODE, G, false, S>,
                            sigmoid_soft_row<MODE, G, true, S>, sigmoid_soft_row<MODE, G, false, T>,
                            sigmoid_soft_row<MODE, G, true, T>, special, weight_of_labels});
}

// Mode::CHECK, which runs before a gradient is written over the logits.
template <class T>
void check_rows(const Call& a, int64_t begin, int64_t end) {
  Targets<T> targets(a);
  for (int64_t i = begin; i < end; ++i) {
    using V = typename Lanes<T>::V;
    const T* t = targets(i, 0);
    const Unknown<V> unknown(a);
    TargetCheck<V> check;
    for_vectors<Lanes<T>::N>(
        a.C,
        [&](int64_t j, int64_t n) {
          prefetch(ahead(t + j));
          check.see(unknown.known(load_up_to(t + j, n)));
        },
        [] {});
    if (check.fails(a)) find_bad_target<T>(a, i);
  }
}

// Mode::LABELS, for a denominator that is the sum of r_i: the row scale times the mean weight of
// the row's labels.
template <class T>
void label_weight_rows(const Call& a, int64_t begin, int64_t end) {
  Targets<T> targets(a);
  const T* scale = static_cast<const T*>(a.scale);
  for (int64_t i = begin; i < end; ++i)
    static_cast<T*>(a.r)[i] =
        scale[i] * label_weight(a, targets(i, 0), static_cast<const T*>(a.weight));
}
