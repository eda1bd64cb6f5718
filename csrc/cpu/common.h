// What both layouts of the row kernels use. Included by rows.cpp in the namespace of its
// instruction set.

constexpr int64_t CHUNK = 64;  // vectors summed in float lanes before they join a double

template <class T>
constexpr T INF = std::numeric_limits<T>::infinity();
template <class T>
constexpr T LARGEST = std::numeric_limits<T>::max();

inline int64_t row_offset(const Strides& s, int64_t K, int64_t i) {
  return K == 1 ? i * s.n : i / K * s.n + i % K * s.k;
}

// r_i, with the incoming gradient when only the gradient is computed; negative: ignored.
template <class T>
struct RowScale {
  const T *scale, *grad_loss;
  bool per_row;
  explicit RowScale(const Rows& a) : RowScale(a, a.scale) {}
  RowScale(const Rows& a, const void* scale)
      : scale(static_cast<const T*>(scale)),
        grad_loss(static_cast<const T*>(a.grad_loss)),
        per_row(a.grad_loss_per_row) {}
  bool ignored(int64_t i) const { return scale[i] < 0; }
  T operator()(int64_t i) const {
    return grad_loss ? scale[i] * grad_loss[per_row ? i : 0] : scale[i];
  }
};

// z = scale (x + bias), and the margin of y taken off its own logit, where a call asks for it.
template <class T>
struct Adjustment {
  const T *bias, *margin;
  T scale;
  bool any;
  explicit Adjustment(const Rows& a)
      : bias(static_cast<const T*>(a.logit_bias)),
        margin(static_cast<const T*>(a.margin)),
        scale(T(a.formula.scale)),
        any(bias || margin || scale != 1) {}
  template <class V>
  V operator()(V x, int64_t c) const {  // a vector of rows
    return scale * (bias ? x + bias[c] : x);
  }
  void apply(T* z, int64_t C) const {  // a vector of classes
    if (bias)
      for (int64_t c = 0; c < C; ++c) z[c] = scale * (z[c] + bias[c]);
    else if (scale != 1)
      for (int64_t c = 0; c < C; ++c) z[c] *= scale;
  }
  T off(int64_t y) const { return margin ? scale * margin[y] : T(0); }
};

// Where the largest logit is +inf the formulas still have a limit if it is alone: it takes all of
// p. Writes that row, moved to 0 and -inf (NaN where there is no limit); its maximum is 0.
template <class S, class Out>
void limit_row(const S* x, int64_t stride, int64_t C, Out* z, int64_t z_stride) {
  using T = typename Lanes<S>::T;
  int64_t infinite = 0;
  for (int64_t j = 0; j < C; ++j) infinite += load_one(x + j * stride) == INF<T>;
  for (int64_t j = 0; j < C; ++j) {
    const T v = load_one(x + j * stride);
    store_one(z + j * z_stride, v != v || infinite > 1 ? T(NAN) : v == INF<T> ? T(0) : -INF<T>);
  }
}

// Lanes from n on and the lane of the target.
CB_FN bool outside(double, int64_t n, int64_t y) { return n == 0 || y == 0; }
CB_FN IVec outside(Vec, int64_t n, int64_t y) {
  IVec l;
  for (int i = 0; i < W; ++i) l[i] = i;
  return (l >= int32_t(n)) | (l == (y >= 0 && y < W ? int32_t(y) : -1));
}
