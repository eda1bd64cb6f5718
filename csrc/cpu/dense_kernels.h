// Rows whose targets are a number a class (soft or multi-hot), or whose classes have weights of
// their own: logits and targets are copied to memory that stays in cache, whatever their types and
// strides, then vectors of classes.

template <class T, class Q>
void copy_as(const void* row, int64_t stride, int64_t C, T* out) {
  const Q* q = static_cast<const Q*>(row);
  if constexpr (IS_HALF<Q>) {
    for (int64_t j = 0; j < C; ++j) out[j] = load_one(q + j * stride);
  } else {
    for (int64_t j = 0; j < C; ++j) out[j] = T(q[j * stride]);
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
    const int64_t stride = a.logits_stride.c;
    if (stride == 1) {
      for (int64_t j = 0; j < a.C; j += N)
        store(z + j, a.C - j < N ? load_some(x + j, a.C - j) : load(x + j));
    } else {
      for (int64_t j = 0; j < a.C; ++j) z[j] = load_one(x + j * stride);
    }
    if (adjustment.any)
      for (int64_t j = 0; j < a.C; ++j) z[j] = adjustment(z[j], j);
    if (a.dense) read_targets(i);
    else
      std::fill_n(t, a.C, T(0)), t[a.target[i]] = 1, z[a.target[i]] -= adjustment.off(a.target[i]);
    std::fill(z + a.C, z + padded, -INF<T>);
    std::fill(t + a.C, t + padded, T(0));
  }
  void read_targets(int64_t i) {
    const char* row = static_cast<const char*>(a.dense) +
                      row_offset(a.dense_stride, a.K, i) * int64_t(a.dense_size());
    const int64_t stride = a.dense_stride.c;
    switch (a.dense_type) {
      case DType::Float64: return copy_as<T, double>(row, stride, a.C, t);
      case DType::Float32: return copy_as<T, float>(row, stride, a.C, t);
      case DType::BFloat16: return copy_as<T, BFloat16>(row, stride, a.C, t);
      case DType::Float16: return copy_as<T, Float16>(row, stride, a.C, t);
      default: return copy_as<T, bool>(row, stride, a.C, t);
    }
  }
  // The mean weight of the labels; 1 without labels.
  T label_weight(const T* weight) const {
    double sum = 0, weighted_sum = 0;
    for (int64_t j = 0; j < a.C; ++j) sum += t[j], weighted_sum += double(t[j]) * weight[j];
    return sum != 0 ? T(weighted_sum / sum) : T(1);
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

// body(j) for every vector; flush() at least every CHUNK.
template <int64_t N, class Body, class Flush>
CB_FN void for_vectors(int64_t padded, const Body& body, const Flush& flush) {
  for (int64_t b = 0; b < padded; b += CHUNK * N) {
    for (int64_t j = b; j < std::min(padded, b + CHUNK * N); j += N) body(j);
    flush();
  }
}

// Softmax: the largest logit is left out of the sums, as a class index is elsewhere.
template <class S, Mode MODE>
CB_ROW double dense_softmax(const Rows& a, const Dense<S>& row, S r) {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  constexpr int64_t N = Lanes<S>::N;
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
  V lanes_R{}, lanes_B{}, lanes_T{};
  DoubleLanes<V> R, B, others;
  for_vectors<N>(
      row.padded,
      [&](int64_t j) __attribute__((always_inline)) {
        const V below = load(z + j) - M, e = exp(below), t_j = load(t + j);
        lanes_R += e, lanes_T += t_j, lanes_B += t_j == V{} ? V{} : t_j * below;
        if constexpr (MODE != Mode::LOSS) store(z + j, e);
      },
      [&]() __attribute__((always_inline)) {
        R.add(lanes_R), B.add(lanes_B), others.add(lanes_T);
        lanes_R = lanes_B = lanes_T = V{};
      });
  const T T_others = T(others.sum());
  const SoftRow<V> s =
      soft_row<V, T>(V{} + T(R.sum()), V{} + r, V{} + (T_others + t_y), V{} + T_others,
                     V{} + T(B.sum()), V{} + D, T(a.C), V{} + largest_z, f);
  if constexpr (MODE != Mode::LOSS) {
    for (int64_t j = 0; j < row.padded; j += N)
      store(z + j, s.k * load(z + j) - s.uniform - s.hard * load(t + j));
    z[y] = lane(s.g_top, 0);
  }
  return double(lane(s.loss, 0));
}

template <class S, Mode MODE, Gamma G>
CB_ROW double dense_sigmoid(const Rows& a, const Dense<S>& row, S r) {
  using V = typename Lanes<S>::V;
  using T = typename Lanes<S>::T;
  constexpr int64_t N = Lanes<S>::N;
  const Numbers<T> f = numbers<T>(a.formula);
  const T* weight = a.formula.per_class ? static_cast<const T*>(a.weight) : nullptr;
  const T keep = 1 - f.eps, uniform = f.eps / T(a.C), slope = r * f.scale, far = T(1e30);
  const V one = constant<V>(1);
  DoubleLanes<V> total;
  LossSum<G, true, IS_HALF<S>, V> sum_L;
  for_vectors<N>(
      row.padded,
      [&](int64_t j) __attribute__((always_inline)) {
        const int64_t n = a.C - j;
        const V t = keep * load(row.t + j) + uniform;
        V z = load(row.z + j);  // what has no part in the loss must be finite: 0 * inf is NaN
        z = t == V{} ? max(V{} - far, z) : z;
        z = t == one ? min(V{} + far, z) : z;
        V g;
        if (weight) {
          const V w = n < N ? load_some(weight + j, n) : load(weight + j);
          const Element<V> e = mixed<Gamma::GENERAL, IS_HALF<S>>(z, t, f);
          const V L = weighted(w, e.L);
          sum_L.L += n < N && uniform != 0 ? (outside(z, n, -1) ? V{} : L) : L;
          g = w * e.g;
        } else if constexpr (G == Gamma::ZERO) {
          const V missed = outside(z, n, -1) ? V{} : t * max(V{}, -z);
          sum_L.softplus.linear += (one - t) * max(V{}, z) + missed;
          g = sum_L.softplus.multiply(z, t);
        } else {
          g = sum_L.add(z, t, f, [&] { return outside(z, n, -1); });
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
