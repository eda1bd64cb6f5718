"""What every kernel is declared with, and the functions of single numbers that formulas need."""

import triton
import triton.language as tl

# Nothing is specialised on an argument's value, alignment or size: a compiled kernel is kept and
# used for every call of its types and constants. That is why arguments are single numbers and
# pointers: of a tuple, Triton 3.6 and 3.7 specialise on every value, and take floats as float32.
POINTERS = (
    "logits target weight sample_weight normalizer logit_bias margin pos_weight grad_loss loss "
    "grad saved scale losses parts"
)
SCALARS = (
    "rows C K x_n x_c x_k t_n t_c t_k g_n g_c g_k "
    "gamma gamma_neg alpha alpha_neg clip eps zeta logit_scale "
    "denominator ignored background unknown splits span count numel"
)
kernel = triton.jit(do_not_specialize=[*POINTERS.split(), *SCALARS.split()])
i32, i64, f64 = tl.int32, tl.int64, tl.float64  # of a kernel's numbers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def largest_finite(T: tl.constexpr):
    largest: tl.constexpr = 1.7976931348623157e308 if tl.float64 == T else 3.4028234663852886e38
    return tl.full((), largest, T)


@triton.jit
def clamp_finite(M):
    """So that -inf - M is -inf and inf - M is inf, never NaN."""
    largest = largest_finite(M.dtype)
    return tl.maximum(tl.minimum(M, largest, tl.PropagateNan.ALL), -largest, tl.PropagateNan.ALL)


@triton.jit
def scalar(x, T: tl.constexpr):
    """A float64 argument in the type that is computed in."""
    return tl.full((), x, T)


@triton.jit
def exp(x):
    """e^x; one special function but for float64."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def exp_neg(x):
    """e^-x: the sign in the constant, where it costs nothing."""
    if x.dtype == tl.float64:
        return tl.exp(-x)
    else:
        return tl.exp2(x * -LOG2E)


@triton.jit
def log(x):
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        return tl.log2(x) * LN2


@triton.jit
def rcp(x):
    """1/x of x >= 1 (infinity too): a division costs some eight instructions, rsqrt^2 two."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def log1m_over(m, SHORT: tl.constexpr):
    """-log(1 - m)/m on [0, 1/2], minimax: relative error 2e-7 (SHORT, for half types: 7e-6)."""
    if m.dtype == tl.float64:
        u = 1.0 - m
        return tl.where(u == 1.0, 1.0, -tl.log(u) / (1.0 - u))  # the rounding of u cancels
    elif SHORT:
        p = tl.fma(m, 0.8463787436, -0.3110924959)
        p = tl.fma(p, m, 0.4033622444)
        p = tl.fma(p, m, 0.3136711717)
        p = tl.fma(p, m, 0.5008954406)
        return tl.fma(p, m, 0.9999935031)
    else:
        p = tl.fma(m, 1.184951782, -1.081576824)
        p = tl.fma(p, m, 0.7854571939)
        p = tl.fma(p, m, 0.03800872341)
        p = tl.fma(p, m, 0.2722522616)
        p = tl.fma(p, m, 0.3318624794)
        p = tl.fma(p, m, 0.5000365376)
        return tl.fma(p, m, 0.9999998808)


@triton.jit
def weighted(r, loss):
    """r * loss where an overflowed loss of a row without weight counts 0, not 0 * inf = NaN."""
    return r * tl.where(r == 0, tl.where(loss == INF, 0.0, loss), loss)
