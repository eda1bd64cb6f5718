// Rows whose targets are a number a class (soft or multi-hot), or whose classes have weights of
// their own: logits and targets are copied to memory that stays in cache, whatever their types and
// strides, then vectors of classes.

// out = the C numbers of a row in any type; those side by side in whole vectors.
template <class T, class Q>
void copy_as(const void* row, int64_t stride, int64_t C, T* out) {
  const Q* q = static_cast<const Q*>(row);
  if constexpr (IS_HALF<Q> && std::is_same_v<T, float>)
    if (stride == 1) return copy_row(q, out, C);
  const auto one = [](const Q* p) {
    if constexpr (IS_HALF<Q>) return T(load_one(p));
    else return T(*p);
  };
  if (stride == 1)  // a constant: the compiler makes vectors of it
    for (int64_t j = 0; j < C; ++j) out[j] = one(q + j);
  else
    for (int64_t j = 0; j < C; ++j) out[j] = one(q + j * stride);
}

// body(j) for every vector; flush() at least every CHUNK.
template <int64_t N, class Body, class Flush>
CB_FN void for_vectors(int64_t padded, const Body& body, const Flush& flush) {
  for (int64_t b = 0; b < padded; b += CHUNK * N) {
    for (int64_t j = b; j < std::min(padded, b + CHUNK * N); j += N) body(j);
    flush();
  }
}

// A row of z and t; both end in a whole vector: z = -inf, t = 0.
template <class T>
struct Dense {
  T *z, *t;
  int64_t padded;
};
template <class S>
class DenseRow : public Dense<typename Lanes<S>::T> {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  static constexpr int64_t N = Lanes<S>::N;
  const Rows& a;
  const Adjustment<T> adjustment;
  std::unique_ptr<T[]> memory;

 public:
  using Dense<T>::z, Dense<T>::t, Dense<T>::padded;
  explicit DenseRow(const Rows& a) : a(a), adjustment(a) {
    padded = (a.C + N - 1) / N * N;
    memory.reset(new T[2 * padded]);
    z = memory.get(), t = z + padded;
  }
  void read(int64_t i) {
    const S* x = static_cast<const S*>(a.logits) + row_offset(a.logits_stride, a.K, i);
    copy_as<T, S>(x, a.logits_stride.c, a.C, z);
    adjustment.apply(z, a.C);
    if (a.dense) {
      read_targets(i);
    } else {
      const int64_t y = a.target[i];
      std::fill_n(t, a.C, T(0));
      t[y] = 1, z[y] -= adjustment.off(y);
    }
    std::fill(z + a.C, z + padded, -INF<T>);
    std::fill(t + a.C, t + padded, T(0));
  }
  void read_targets(int64_t i) {
    const char* row = static_cast<const char*>(a.dense) +
                      row_offset(a.dense_stride, a.K, i) * int64_t(a.dense_size());
    const int64_t stride = a.dense_stride.c;
    switch (a.dense_type) {
      case DType::Float64: copy_as<T, double>(row, stride, a.C, t); break;
      case DType::Float32: copy_as<T, float>(row, stride, a.C, t); break;
      case DType::BFloat16: copy_as<T, BFloat16>(row, stride, a.C, t); break;
      case DType::Float16: copy_as<T, Float16>(row, stride, a.C, t); break;
      default: copy_as<T, bool>(row, stride, a.C, t);
    }
    std::fill(t + a.C, t + padded, T(0));
  }
  // The mean weight of the labels; 1 without labels.
  T label_weight(const T* weight) const {
    V labels{}, weights{};
    DoubleLanes<V> all_labels, all_weights;
    for_vectors<N>(
        padded,
        [&](int64_t j) __attribute__((always_inline)) {
          const V t_j = load(t + j);
          labels += t_j, weights += t_j * load_up_to(weight + j, a.C - j);
        },
        [&]() __attribute__((always_inline)) {
          all_labels.add(labels), all_weights.add(weights), labels = weights = V{};
        });
    const double sum = all_labels.sum();
    return sum != 0 ? T(all_weights.sum() / sum) : T(1);
  }
  void store_gradient(int64_t i) const {  // which is where z was
    S* g = static_cast<S*>(a.grad) + row_offset(a.grad_stride, a.K, i);
    if (a.grad_stride.c == 1) {
      for (int64_t j = 0; j < a.C; j += N) store_n(g + j, load(z + j), std::min(a.C - j, N));
    } else {
      for (int64_t j = 0; j < a.C; ++j) store_one(g + j * a.grad_stride.c, z[j]);
    }
  }
};

// Softmax: the largest logit is left out of the sums, as a class index is elsewhere.
template <class T, Mode MODE>
CB_ROW double dense_softmax(const Rows& a, const Dense<T>& row, T r) {
  using V = typename Lanes<T>::V;
  constexpr int64_t N = Lanes<T>::N;
  const Numbers<T> f = numbers<T>(a.formula);
  T *z = row.z, *t = row.t;
  V top = V{} - LARGEST<T>;
  for (int64_t j = 0; j < row.padded; j += N) top = max(load(z + j), top);
  const T largest_z = T(largest(top));
  T M = largest_z;
  if (M == INF<T>) {
    std::unique_ptr<T[]> limit(new T[a.C]);
    limit_row(z, 1, a.C, limit.get(), 1);
    std::copy_n(limit.get(), a.C, z), M = 0;
  }
  const int64_t at = std::find(z, z + a.C, M) - z, y = at < a.C ? at : 0;
  const T D = f.eps != 0 ? T(sum_below(z, a.C, M)) : T(0), t_y = t[y];
  z[y] = at < a.C ? -INF<T> : T(NAN), t[y] = 0;
  V lanes_R{}, lanes_B{}, lanes_W{};
  DoubleLanes<V> R, B, others;
  for_vectors<N>(
      row.padded,
      [&](int64_t j) __attribute__((always_inline)) {
        const V below = load(z + j) - M, e = exp(below), t_j = load(t + j);
        lanes_R += e, lanes_W += t_j, lanes_B += t_j == V{} ? V{} : t_j * below;
        if constexpr (MODE != Mode::LOSS) store(z + j, e);
      },
      [&]() __attribute__((always_inline)) {
        R.add(lanes_R), B.add(lanes_B), others.add(lanes_W);
        lanes_R = lanes_B = lanes_W = V{};
      });
  const T W_others = T(others.sum());
  const SoftRow<V> s =
      soft_row<V, T>(V{} + T(R.sum()), V{} + r, V{} + (W_others + t_y), V{} + W_others,
                     V{} + T(B.sum()), V{} + D, T(a.C), V{} + largest_z, f);
  if constexpr (MODE != Mode::LOSS) {
    for (int64_t j = 0; j < row.padded; j += N)
      store(z + j, s.k * load(z + j) - s.uniform - s.hard * load(t + j));
    z[y] = lane(s.g_top, 0);
  }
  return double(lane(s.loss, 0));
}

template <class T, Mode MODE, Gamma G>
CB_ROW double dense_sigmoid(const Rows& a, const Dense<T>& row, T r) {
  using V = typename Lanes<T>::V;
  constexpr int64_t N = Lanes<T>::N;
  const Numbers<T> f = numbers<T>(a.formula);
  const T* weight = a.formula.per_class ? static_cast<const T*>(a.weight) : nullptr;
  const T keep = 1 - f.eps, uniform = f.eps / T(a.C), slope = r * f.scale;
  DoubleLanes<V> total;
  LossSum<G, true, false, V> sum_L;
  for_vectors<N>(
      row.padded,
      [&](int64_t j) __attribute__((always_inline)) {
        const int64_t n = a.C - j;
        const V z = load(row.z + j), smoothed = keep * load(row.t + j) + uniform;
        const V t = n < N ? (outside(z, n, -1) ? V{} : smoothed) : smoothed;  // -inf and 0: no loss
        V g;
        if constexpr (G == Gamma::ZERO) {
          g = sum_L.softplus.add(z, t);
        } else {
          Element<V> e = mixed<G, false>(z, t, f);
          if (weight) {
            const V w = load_up_to(weight + j, n);
            e.L = weighted(w, e.L), e.g = w * e.g;
          }
          sum_L.L += e.L, g = e.g;
        }
        if constexpr (MODE != Mode::LOSS) store(row.z + j, slope * g);
      },
      [&]() __attribute__((always_inline)) { total.add(sum_L.take()); });
  return weighted(double(r), total.sum());
}

template <class S, Mode MODE, class Row>
void dense_rows(const Rows& a, int64_t begin, int64_t end, const Row& run) {
  using T = typename Lanes<S>::T;
  const RowScale<T> scale(a);
  DenseRow<S> row(a);
  const bool by_labels = a.weight && !a.formula.per_class;
  for (int64_t i = begin; i < end; ++i) {
    if (scale.ignored(i)) {
      if constexpr (MODE != Mode::GRAD) static_cast<T*>(a.loss)[i] = 0;
      if constexpr (MODE != Mode::LOSS) {
        std::fill_n(row.z, row.padded, T(0));
        row.store_gradient(i);
      }
      continue;
    }
    row.read(i);
    T r = scale(i);
    if (by_labels) {
      r *= row.label_weight(static_cast<const T*>(a.weight));
      static_cast<T*>(a.scale)[i] = r;  // for a recomputing backward
    }
    const double loss = run(row, r);
    if constexpr (MODE != Mode::GRAD) static_cast<T*>(a.loss)[i] = T(loss);
    if constexpr (MODE != Mode::LOSS) row.store_gradient(i);
  }
}

template <class S, Mode MODE>
void softmax_dense(const Rows& a, int64_t begin, int64_t end) {
  dense_rows<S, MODE>(a, begin, end, [&](auto& row, auto r) {
    return dense_softmax<decltype(r), MODE>(a, row, r);
  });
}
template <class S, Mode MODE, Gamma G>
void sigmoid_dense(const Rows& a, int64_t begin, int64_t end) {
  dense_rows<S, MODE>(a, begin, end, [&](auto& row, auto r) {
    return dense_sigmoid<decltype(r), MODE, G>(a, row, r);
  });
}

// For a denominator that is the sum of r_i: scale_i times the mean weight of the row's labels.
template <class S>
void label_weights(const Rows& a, int64_t begin, int64_t end) {
  using T = typename Lanes<S>::T;
  DenseRow<S> row(a);
  for (int64_t i = begin; i < end; ++i) {
    row.read_targets(i);
    static_cast<T*>(a.scale)[i] *= row.label_weight(static_cast<const T*>(a.weight));
  }
}
