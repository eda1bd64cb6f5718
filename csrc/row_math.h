// The formulas of softmax and sigmoid, once for every C++ backend: no loops, no torch.
//
// T is a number or a vector of numbers, Scalar is the type of one number. A backend includes this
// file inside its own namespace, after it has defined CB_FN (how these functions are declared) and
// the operations on T (vec.h on the CPU, math.cuh on a GPU):
// - arithmetic, comparison and ?:, element by element;
// - constant, largest_finite, neg_abs, log, exp, root_sigma = sqrt(sigma), power, divide, rcp,
//   add_positive(sum, z) = sum + max(z, 0); for double also log1p_neg, but not root_sigma;
// - min and max, which are NaN where their second argument is NaN, so that a NaN logit gives NaN.
//
// SHORT: the results are stored in a half type, so exp and log1m_over may use shorter polynomials.

// call.h's Formula in the type that the loss is computed in.
template <class Scalar>
struct FormulaOf {
  Scalar gamma, gamma_neg, alpha, alpha_neg, clip, eps, zeta, logit_scale;
};
template <class Scalar>
FormulaOf<Scalar> formula_of(const Formula& f) {
  return {Scalar(f.gamma), Scalar(f.gamma_neg), Scalar(f.alpha), Scalar(f.alpha_neg),
          Scalar(f.clip),  Scalar(f.eps),       Scalar(f.zeta),  Scalar(f.logit_scale)};
}

// -log(1 - m)/m on [0, 1/2], minimax: relative error 2.5e-7 (SHORT: 7e-6).
template <bool SHORT = false, class T>
CB_FN T log1m_over(T m) {
  if constexpr (std::is_same_v<T, double>) {
    return m > 0 ? -log1p_neg(m) / m : m + 1;
  } else if constexpr (SHORT) {
    T p = m * 0.8463787436f - 0.3110924959f;
    p = p * m + 0.4033622444f;
    p = p * m + 0.3136711717f;
    p = p * m + 0.5008954406f;
    return p * m + 0.9999935031f;
  } else {
    T p = m * 1.184951782f - 1.081576824f;
    p = p * m + 0.7854571939f;
    p = p * m + 0.03800872341f;
    p = p * m + 0.2722522616f;
    p = p * m + 0.3318624794f;
    p = p * m + 0.5000365376f;
    return p * m + 0.9999998808f;
  }
}

// r * loss, but 0 where the row's weight is 0 and its loss has overflowed: not 0 * inf = NaN.
template <class T>
CB_FN T weighted(T r, T loss) {
  const T zero{}, largest = largest_finite<T>();
  return r * (((r == zero) & (loss > largest)) ? largest : loss);
}

// Softmax, one row, from M = max_j z_j, d = z_y - M, R = sum over j != y of e^{z_j - M} and, for
// label smoothing, D = sum over all j of (z_j - M).
//   loss = r [(1-eps) q^gamma (-log p) + eps/C sum_j (lse - z_j) + zeta lse^2],  q = 1 - p = R / S
//   d loss / d x_j = k e^{z_j - M} - uniform  (j != y),  g_y (j = y),  z = logit_scale (x + ...)
template <class T>
struct SoftmaxRow {
  T loss, k, g_y, uniform;
};
template <class T, class Scalar>
CB_FN SoftmaxRow<T> softmax_row(T d, T R, T r, T D, Scalar C, T M, const FormulaOf<Scalar>& f) {
  const T one = constant<T>(1), half = constant<T>(0.5f), largest = largest_finite<T>();
  const T e_y = exp(d), S = R + e_y, inv = divide(one, S), p = e_y * inv, q = R * inv;
  const auto sure = q <= half;  // then -log p is computed from q: exact as p -> 1
  const T u_sure = log1m_over(min(half, q)), log_S = log(S);
  const T nll = sure ? q * u_sure : log_S - d;
  const T u =
      sure ? u_sure : min(largest, divide(nll, q));  // finite where p is 0: p * u has a limit
  T focus = one;                                     // q^gamma
  if (f.gamma != 0) focus = power(q, f.gamma);
  const T a = (1 - f.eps) * focus * (one + f.gamma * p * u), slope = r * f.logit_scale;
  SoftmaxRow<T> row{weighted(r, (1 - f.eps) * focus * nll), slope * a * inv, -(slope * a * q), T{}};
  if (f.eps != 0) {
    row.loss += weighted(r, f.eps / C * (C * (sure ? nll + d : log_S) - D));
    row.k += slope * f.eps * inv;
    row.uniform = slope * (f.eps / C);
    row.g_y += slope * f.eps * p - row.uniform;
  }
  if (f.zeta != 0) {
    const T lse = M + log_S, steep = slope * (2 * f.zeta) * min(largest, lse);
    const T bounded = min(largest, max(-largest, steep));  // finite: p may be 0
    row.loss += weighted(r, f.zeta * lse * lse);
    row.k += bounded * inv;
    row.g_y += bounded * p;
  }
  return row;
}

// The same with soft targets t and class weights w, from M = z_top, the largest logit, R = sum over
// j != top of e^{z_j - M}, W = sum_j t_j w_j, W_others the same without top's term, B = sum_j t_j
// w_j (z_j - M) and, for label smoothing, D. s is the scale of the soft targets' term, r of the
// other terms.
//   loss = s (1-eps) sum_j t_j w_j (lse - z_j) + r [eps/C sum_j (lse - z_j) + zeta lse^2]
//   d loss / d x_j = k e^{z_j - M} - uniform - hard t_j w_j  (j != top),  g_top (j = top)
template <class T>
struct SoftRow {
  T loss, k, g_top, uniform, hard;
};
template <class T, class Scalar>
CB_FN SoftRow<T> soft_row(T R, T s, T r, T W, T W_others, T B, T D, Scalar C, T M,
                          const FormulaOf<Scalar>& f) {
  const T one = constant<T>(1), half = constant<T>(0.5f), largest = largest_finite<T>();
  const T S = one + R, inv = divide(one, S), q = R * inv;
  const T nll = q <= half ? q * log1m_over(min(half, q)) : log(S);  // of top: exact as p -> 1
  const T slope = r * f.logit_scale, hard = s * f.logit_scale * (1 - f.eps);
  SoftRow<T> row{weighted(s, (1 - f.eps) * (W * nll - B)), hard * W * inv,
                 hard * (W_others - W * q), T{}, hard};
  if (f.eps != 0) {
    row.loss += weighted(r, f.eps / C * (C * nll - D));
    row.k += slope * f.eps * inv;
    row.uniform = slope * (f.eps / C);
    row.g_top += slope * f.eps * inv - row.uniform;
  }
  if (f.zeta != 0) {
    const T lse = M + nll, steep = slope * (2 * f.zeta) * min(largest, lse);
    const T bounded = min(largest, max(-largest, steep));
    row.loss += weighted(r, f.zeta * lse * lse);
    row.k += bounded * inv;
    row.g_top += bounded * inv;
  }
  return row;
}

// Sigmoid, one element with target t = 0. For t = 1: the same at -z, and the gradient negated.
//   L = s^gamma sp(z),  g = dL/dz = s^gamma (gamma sigma(-z) sp(z) + s),  s = sigma(z) = 1 - p_t,
//   sp(z) = log(1 + e^z)
template <class T>
struct Element {
  T L, g;
};
// gamma, as a constant where the code is for one value: a factor of 1 or 2 is no multiplication.
template <Gamma G, class Scalar>
CB_FN Scalar known(Scalar gamma) {
  if constexpr (G == Gamma::HALF) return Scalar(0.5f);
  if constexpr (G == Gamma::ONE) return Scalar(1);
  if constexpr (G == Gamma::TWO) return Scalar(2);
  return gamma;
}
template <Gamma G, bool SHORT, class T, class Scalar>
CB_FN Element<T> sigmoid_element(T z, Scalar gamma) {
  const T zero{}, one = constant<T>(1);
  T s, c, m, focus = one;  // sigma(z), sigma(-z), the smaller of the two, s^gamma
  if constexpr (G == Gamma::HALF && !std::is_same_v<T, double>) {
    focus = root_sigma<SHORT>(z), s = focus * focus, c = one - s, m = min(s, c);
  } else {
    const T e = exp<SHORT>(neg_abs(z)), inv = rcp(one + e);
    m = e * inv, s = z < zero ? m : inv, c = z < zero ? inv : m;
  }
  const T l = m * log1m_over<SHORT>(m);  // log(1 + e^{-|z|}), exact for tiny m
  const T sp = l + max(zero, z);
  if constexpr (G == Gamma::ZERO) return {sp, s};
  if constexpr (G == Gamma::ONE) focus = s;
  if constexpr (G == Gamma::TWO) focus = s * s;
  if constexpr (G == Gamma::HALF && std::is_same_v<T, double>) focus = sqrt(s);
  if constexpr (G == Gamma::ANY) focus = exp<SHORT>(-gamma * (l + max(zero, -z)));
  if constexpr (G == Gamma::GENERAL)  // gamma may be 0: 0 * inf is NaN
    focus = exp<SHORT>(-gamma * min(largest_finite<T>(), l + max(zero, -z)));
  // Where sp > 50, c * sp is below 1e-20. The bound avoids 0 * inf, and that the rounding error of
  // c is multiplied by a large sp.
  return {focus * sp, focus * (known<G>(gamma) * c * min(constant<T>(50), sp) + s)};
}

// gamma = 0, many elements: sum log(1 + e_j) = log prod (1 + e_j) needs one logarithm for all of
// them. The product minus 1 is stored, so that tiny e_j count. For at most 120 elements, so that
// the product stays below 2^120.
template <bool SHORT, class T>
struct SoftplusSum {
  T linear{}, Q{};    // sum max(z, 0); prod (1 + e^{-|z|}) - 1
  CB_FN T add(T z) {  // returns sigma(z)
    linear = add_positive(linear, z);
    return multiply(z);
  }
  CB_FN T multiply(T z) {
    const T one = constant<T>(1), e = exp<SHORT>(neg_abs(z)), u = one + e, s = rcp(u);
    Q = Q * u + e;
    return z < T{} ? e * s : s;
  }
  CB_FN T add(T z, T t) {  // any target t; returns sigma(z) - t, exact where that is close to 0
    const T zero{}, one = constant<T>(1), e = exp<SHORT>(neg_abs(z)), u = one + e, larger = rcp(u);
    const T smaller = e * larger, s = z < zero ? smaller : larger, c = z < zero ? larger : smaller;
    Q = Q * u + e;
    linear += weighted(one - t, max(zero, z)) + weighted(t, max(zero, -z));
    return (one - t) * s - t * c;
  }
  CB_FN T value() const {
    const T one = constant<T>(1), half = constant<T>(0.5f), S = one + Q, m = divide(Q, S);
    return linear + (m <= half ? m * log1m_over(min(half, m)) : log(S));
  }
};

// One element with t = 0 and a shifted probability p = max(s - clip, 0), clip > 0.
//   L = p^gamma (-log(1-p)),  g = p^gamma (gamma u + 1/(1-p)) s (1-s),  u = -log(1-p)/p
template <bool SHORT, class T, class Scalar>
CB_FN Element<T> clipped_element(T z, Scalar gamma, Scalar clip) {
  const T zero{}, one = constant<T>(1), half = constant<T>(0.5f);
  const T e = exp<SHORT>(neg_abs(z)), inv = rcp(one + e), m = e * inv;
  const T s = z < zero ? m : inv, c = z < zero ? inv : m;
  const T p = max(zero, s - clip), rest = c + clip;
  const auto near = p <= half;
  const T u_near = log1m_over<SHORT>(min(half, p));
  const T nll = near ? p * u_near : -log(rest), u = near ? u_near : divide(nll, p);
  const T focus = power(p, gamma), g = focus * (gamma * u + divide(one, rest)) * s * c;
  return {focus * nll, p == zero ? zero : g};
}
template <Gamma G, bool SHORT, class T, class Scalar>
CB_FN Element<T> negative(T z, const FormulaOf<Scalar>& f) {
  if constexpr (G == Gamma::GENERAL)
    if (f.clip != 0) return clipped_element<SHORT>(z, f.gamma_neg, f.clip);
  return sigmoid_element<G, SHORT>(z, G == Gamma::GENERAL ? f.gamma_neg : f.gamma);
}

// One element with any target t: v alpha t L(z, 1) + (1 - alpha) (1 - t) L(z, 0), v = pos_weight.
template <Gamma G, bool SHORT, class T, class Scalar>
CB_FN Element<T> mixed(T z, T t, T v, const FormulaOf<Scalar>& f) {
  const Element<T> one = sigmoid_element<G, SHORT>(-z, f.gamma), zero = negative<G, SHORT>(z, f);
  const T t_1 = v * (t * f.alpha), t_0 = (1 - t) * f.alpha_neg;
  return {weighted(t_1, one.L) + weighted(t_0, zero.L), t_0 * zero.g - t_1 * one.g};
}

// The element of the target class. Without smoothing, its loss and gradient include alpha; the
// caller multiplies the sums of the other classes by alpha_neg.
template <Gamma G, bool SMOOTH, bool SHORT, class T, class Scalar>
CB_FN Element<T> at_target(T z_y, Scalar C, const FormulaOf<Scalar>& f) {
  if constexpr (SMOOTH) {
    return mixed<G, SHORT>(z_y, T{} + (1 - f.eps + f.eps / C), constant<T>(1), f);
  } else {
    const Element<T> one = sigmoid_element<G, SHORT>(-z_y, f.gamma);
    return {weighted(T{} + f.alpha, one.L), -f.alpha * one.g};
  }
}

// The sum of the other classes' losses, for at most 64 elements per lane between two take().
template <Gamma G, bool SMOOTH, bool SHORT, class V>
struct LossSum {
  V L{};
  SoftplusSum<SHORT, V> softplus;
  // Adds an element with target t (0 without smoothing) and returns its dL/dz. With smoothing,
  // elements that are excluded() add nothing; without, the caller passes z = -inf for them.
  template <class T, class Scalar, class Excluded>
  CB_FN V add(V z, T t, const FormulaOf<Scalar>& f, const Excluded& excluded) {
    const V zero{};
    if constexpr (G == Gamma::ZERO) {
      if constexpr (!SMOOTH) return softplus.add(z);
      softplus.linear += (1 - t) * max(zero, z) + (excluded() ? zero : t * max(zero, -z));
      return softplus.multiply(z) - t;
    } else {
      Element<V> e;
      if constexpr (SMOOTH) e = mixed<G, SHORT>(z, zero + t, constant<V>(1), f);
      else e = negative<G, SHORT>(z, f);
      if constexpr (SMOOTH) L += excluded() ? zero : e.L;
      else L += e.L;
      return e.g;
    }
  }
  CB_FN V take() {
    const V total = G == Gamma::ZERO ? softplus.value() : L;
    *this = LossSum{};
    return total;
  }
};
