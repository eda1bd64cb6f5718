// What the kernels over vectors of classes and over vectors of rows share. Included by kernels.h
// in the namespace of its instruction set.

constexpr int64_t CHUNK = 64;  // vectors summed in float lanes before they are added to a double

template <class T>
constexpr T INF = std::numeric_limits<T>::infinity();
template <class T>
constexpr T LARGEST = std::numeric_limits<T>::max();

inline int64_t row_offset(const Strides& s, int64_t K, int64_t i) {
  return K == 1 ? i * s.n : i / K * s.n + i % K * s.k;
}

// From a row to the next of its sample.
inline int64_t row_step(const Strides& s, int64_t K) { return K == 1 ? s.n : s.k; }

// The class of a row, C where it has none. With soft targets 0.
inline int64_t class_of(const Call& a, int64_t i) {
  if (!a.target) return 0;
  const int64_t y = a.target[i];
  return a.has_background && y == a.background ? a.C : y;
}

// A GPU's NaN has all bits set, and would become 0 where rounding to bfloat16 adds to them.
template <class V>
CB_FN V quiet(V x) {
  return x == x ? x : V{} + NAN;
}

// The row scale, r_i / denominator, times the incoming gradient where the call has one. Negative:
// the row is ignored.
template <class T>
struct RowScale {
  const T *scale, *grad_loss;
  bool per_row;
  explicit RowScale(const Call& a) : RowScale(a, a.scale) {}
  RowScale(const Call& a, const void* scale)
      : scale(static_cast<const T*>(scale)),
        grad_loss(static_cast<const T*>(a.grad_loss)),
        per_row(a.grad_loss_per_row) {}
  bool ignored(int64_t i) const { return scale[i] < 0; }
  T operator()(int64_t i) const {
    return grad_loss ? scale[i] * quiet(grad_loss[per_row ? i : 0]) : scale[i];
  }
};

// z = logit_scale (x + bias), less logit_scale * margin at the target, where the call has these.
template <class T>
struct Adjustment {
  const T *bias, *margin;
  T logit_scale;
  bool any;
  explicit Adjustment(const Call& a)
      : bias(static_cast<const T*>(a.logit_bias)),
        margin(static_cast<const T*>(a.margin)),
        logit_scale(T(a.formula.logit_scale)),
        any(bias || margin || logit_scale != 1) {}
  template <class V>
  V operator()(V x, int64_t c) const {  // a vector of rows
    return logit_scale * (bias ? x + bias[c] : x);
  }
  void apply(T* z, int64_t C) const {  // a vector of classes
    if (bias)
      for (int64_t c = 0; c < C; ++c) z[c] = logit_scale * (z[c] + bias[c]);
    else if (logit_scale != 1)
      for (int64_t c = 0; c < C; ++c) z[c] *= logit_scale;
  }
  T scaled_margin(int64_t y) const { return margin ? logit_scale * margin[y] : T(0); }
};

// If one logit of a row is +inf and the others are not, the formulas have a limit: its class has
// probability 1. Writes the row of that limit, 0 for its logit and -inf for the others; NaN where
// there is no limit, because of two infinite logits or a NaN.
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

// An element's loss and gradient times a weight.
template <class V>
CB_FN void scale(Element<V>& e, V weight) {
  e.L = weighted(weight, e.L), e.g *= weight;
}

// The lanes from n on and the lane of the target, y (none if it is not a lane).
CB_FN bool outside(double, int64_t n, int64_t y) { return n == 0 || y == 0; }
CB_FN IVec outside(Vec, int64_t n, int64_t y) {
  IVec l;
  for (int i = 0; i < W; ++i) l[i] = i;
  return (l >= int32_t(n)) | (l == (y >= 0 && y < W ? int32_t(y) : -1));
}
