// Rows whose targets are a number a class (soft or multi-hot), or whose classes have weights of
// their own: as row_kernels.h, and the targets beside the logits.

// visit(target of row 0 and class 0, in the type that it has).
template <class Visit>
void with_targets(const Rows& a, const Visit& visit) {
  switch (a.dense_type) {
    case DType::Float64: return visit(static_cast<const double*>(a.dense));
    case DType::Float32: return visit(static_cast<const float*>(a.dense));
    case DType::BFloat16: return visit(static_cast<const BFloat16*>(a.dense));
    case DType::Float16: return visit(static_cast<const Float16*>(a.dense));
    default: return visit(static_cast<const uint8_t*>(a.dense));  // bool: 0 or 1
  }
}

// out = the C numbers of a row in any type.
template <class T, class Q>
void copy_as(const Q* q, int64_t stride, int64_t C, T* out) {
  constexpr int64_t N = Lanes<T>::N;
  const int64_t whole = stride == 1 ? C / N * N : 0;
  for (int64_t j = 0; j < whole; j += N) store(out + j, load_as<typename Lanes<T>::V>(q + j));
  for (int64_t j = whole; j < C; ++j) out[j] = load_as<T>(q + j * stride);
}

// The targets of a row as they lie or, of another type or stride, copied to where they stay in
// cache.
template <class T>
class Targets {
  const Rows& a;
  std::unique_ptr<T[]> copy;
  int64_t last = 0;

  bool as_they_lie() const {
    constexpr DType COMPUTED = sizeof(T) == 8 ? DType::Float64 : DType::Float32;
    return a.dense && a.dense_type == COMPUTED && a.dense_stride.c == 1;
  }

 public:
  explicit Targets(const Rows& a) : a(a), copy(as_they_lie() ? nullptr : new T[a.C]()) {}
  const T* operator()(int64_t i, int64_t y) {
    if (!a.dense) {
      copy[last] = 0, copy[y] = 1, last = y;
      return copy.get();
    }
    const int64_t offset = row_offset(a.dense_stride, a.K, i);
    if (!copy) return static_cast<const T*>(a.dense) + offset;
    with_targets(a, [&](auto* t) { copy_as(t + offset, a.dense_stride.c, a.C, copy.get()); });
    return copy.get();
  }
};

// The mean weight of a row's labels; 1 without labels.
template <class T>
T label_weight(const T* t, const T* weight, int64_t C) {
  using V = typename Lanes<T>::V;
  V labels{}, weights{};
  DoubleLanes<V> all_labels, all_weights;
  for_vectors<Lanes<T>::N>(
      C,
      [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const V t_j = load_up_to(t + j, n);
        labels += t_j, weights += t_j * load_up_to(weight + j, n);
      },
      [&]() __attribute__((always_inline)) {
        all_labels.add(labels), all_weights.add(weights), labels = weights = V{};
      });
  const double sum = all_labels.sum();
  return sum != 0 ? T(all_weights.sum() / sum) : T(1);
}

// The first class whose logit is M; C if there is none.
template <class S, class T>
int64_t find_logit(const S* x, int64_t C, T M) {
  constexpr int64_t N = Lanes<S>::N;
  int64_t j = 0;
  while (j + N <= C && !any(load(x + j) == M)) j += N;
  while (j < C && load_one(x + j) != M) ++j;
  return j;
}

// The largest logit is left out of the sums, as a class index is elsewhere.
template <Mode MODE, class S, class T = typename Lanes<S>::T>
CB_ROW double softmax_dense_row(const Rows& a, const S* x, const T* t, T r, S* g, T* scratch) {
  using V = typename Lanes<S>::V;
  constexpr int64_t N = Lanes<S>::N;
  const int64_t C = a.C;
  const Numbers<T> f = numbers<T>(a.formula);
  V top = V{} - LARGEST<T>;
  for_vectors<N>(
      C,
      [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        top = max(padded(load_up_to(x + j, n), n, -INF<T>), top);
      },
      [] {});
  const T M = T(largest(top));
  const int64_t at = find_logit(x, C, M), y = at < C ? at : 0;  // none: none is finite, or all NaN
  const T t_y = t[y];
  T* e;  // e^{z - M} waits in the gradient, or in scratch
  if constexpr (std::is_same_v<S, T>) e = g;
  else e = scratch;
  V lanes_R{}, lanes_B{}, lanes_D{}, lanes_W{};
  DoubleLanes<V> R, B, D, others;
  for_negatives(
      x, C, y,
      [&](int64_t j, V z, int64_t n, auto blank) __attribute__((always_inline)) {
        const V below = z - M, e_j = exp(below), t_j = blank ? V{} : load_up_to(t + j, n);
        lanes_R += e_j, lanes_W += t_j, lanes_B += t_j == V{} ? V{} : t_j * below;
        if (f.eps != 0) lanes_D += blank ? V{} : below;
        if constexpr (MODE != Mode::LOSS) store_n(e + j, e_j, n);
      },
      [&]() __attribute__((always_inline)) {
        R.add(lanes_R), B.add(lanes_B), D.add(lanes_D), others.add(lanes_W);
        lanes_R = lanes_B = lanes_D = lanes_W = V{};
      });
  const T W_others = T(others.sum()), sum_R = at < C ? T(R.sum()) : T(NAN);
  const SoftRow<V> s = soft_row<V, T>(V{} + sum_R, V{} + r, V{} + (W_others + t_y), V{} + W_others,
                                      V{} + T(B.sum()), V{} + T(D.sum()), T(C), V{} + M, f);
  if constexpr (MODE != Mode::LOSS) {
    for_vectors<N>(
        C,
        [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          const V g_j = s.k * load_up_to(e + j, n) - s.uniform - s.hard * load_up_to(t + j, n);
          store_n(g + j, g_j, n);
        },
        [] {});
    store_one(g + y, T(lane(s.g_top, 0)));
  }
  return double(lane(s.loss, 0));
}

// LossSum for any targets, in classes with weights of their own where weight() is not null.
template <Gamma G, bool SHORT, class V>
struct DenseSum : LossSum<G, true, SHORT, V> {
  template <class T, class Weight>
  CB_FN V add(V z, V t, const Numbers<T>& f, const T* weights, const Weight& weight) {
    if constexpr (G == Gamma::ZERO) return this->softplus.add(z, t);
    Element<V> e;
    if (any(t != V{})) {
      e = mixed<G, SHORT>(z, t, f);
    } else {  // most vectors of a multi-hot row hold no label: one side is all that they need
      e = negative<G, SHORT>(z, f);
      e.L = weighted(V{} + f.alpha_neg, e.L), e.g = f.alpha_neg * e.g;
    }
    if (weights) {
      const V w = weight(weights);
      e.L = weighted(w, e.L), e.g = w * e.g;
    }
    this->L += e.L;
    return e.g;
  }
};

template <Mode MODE, Gamma G, class S, class T = typename Lanes<S>::T>
CB_ROW double sigmoid_dense_row(const Rows& a, const S* x, const T* t, T r, S* g) {
  using V = typename Lanes<S>::V;
  constexpr int64_t N = Lanes<S>::N;
  const Numbers<T> f = numbers<T>(a.formula);
  const T* weight = a.formula.per_class ? static_cast<const T*>(a.weight) : nullptr;
  const T keep = 1 - f.eps, uniform = f.eps / T(a.C), slope = r * f.scale;
  DoubleLanes<V> total;
  DenseSum<G, IS_HALF<S>, V> sum_L;
  for_vectors<N>(
      a.C,
      [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const V z = padded(load_up_to(x + j, n), n, -INF<T>);  // without a loss, where t is 0
        const V t_j = padded(keep * load_up_to(t + j, n) + uniform, n, T(0));
        const V g_j =
            sum_L.add(z, t_j, f, weight, [&](const T* w) { return load_up_to(w + j, n); });
        if constexpr (MODE != Mode::LOSS) store_n(g + j, slope * g_j, n);
      },
      [&]() __attribute__((always_inline)) { total.add(sum_L.take()); });
  return weighted(double(r), total.sum());
}

// run(x, t, r, g, scratch) returns the loss.
template <class S, Mode MODE, class Run>
void for_dense_rows(const Rows& a, int64_t begin, int64_t end, const Run& run) {
  using T = typename Lanes<S>::T;
  Targets<T> targets(a);
  const T* of_labels = a.formula.per_class ? nullptr : static_cast<const T*>(a.weight);
  for_rows<S, MODE>(a, begin, end, [&](int64_t i, auto* x, int64_t y, T r, auto* g, T* scratch) {
    const T* t = targets(i, y);
    if (of_labels) {
      r *= label_weight(t, of_labels, a.C);
      static_cast<T*>(a.scale)[i] = r;  // for a recomputing backward
    }
    const double loss = run(x, t, r, g, scratch);
    if constexpr (MODE != Mode::GRAD) static_cast<T*>(a.loss)[i] = T(loss);
  });
}

template <class S, Mode MODE>
void softmax_dense_rows(const Rows& a, int64_t begin, int64_t end) {
  for_dense_rows<S, MODE>(a, begin, end, [&](auto* x, auto* t, auto r, auto* g, auto* scratch) {
    return softmax_dense_row<MODE>(a, x, t, r, g, scratch);
  });
}
template <class S, Mode MODE, Gamma G>
void sigmoid_dense_rows(const Rows& a, int64_t begin, int64_t end) {
  for_dense_rows<S, MODE>(a, begin, end, [&](auto* x, auto* t, auto r, auto* g, auto*) {
    return sigmoid_dense_row<MODE, G>(a, x, t, r, g);
  });
}

// For a denominator that is the sum of r_i: scale_i times the mean weight of the row's labels.
template <class S>
void label_weight_rows(const Rows& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  Targets<T> targets(a);
  T* scale = static_cast<T*>(a.scale);
  for (int64_t i = begin; i < end; ++i)
    scale[i] *= label_weight(targets(i, 0), static_cast<const T*>(a.weight), a.C);
}
