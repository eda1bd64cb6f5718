"""The kernels' functions of several variables against mpmath, by samples: see bounds.py.

Points are spread log-uniformly, with corners: p and q down to what float32 holds, logits of any
size, weights of 0. The formulas are those of row_math.h's comments, in 60 digits of the same
float32 numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from math import inf
from random import Random
from typing import Any, NamedTuple

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
FLUSHED = 1.22e-38  # bounds.cpp
FIELDS = ("gamma", "eps", "zeta", "gamma_neg", "alpha", "alpha_neg", "clip", "logit_scale")
DEFAULTS = dict(zip(FIELDS, (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0), strict=True))
Point = tuple[float, ...]


class Sampled(NamedTuple):
    """A function: its inputs, what is exact, and the promised error of its results.

    exact(mpmath, point, C, **formula) gives for each result its value and what its error is
    relative to: the sum of the magnitudes of the terms that make it, which may cancel.
    """

    name: str
    results: tuple[str, ...]
    draw: Callable[[Random], Point]
    exact: Callable[..., Sequence[tuple[Any, Any]]]
    formulas: tuple[dict[str, float], ...]
    bound: float


def log_uniform(random: Random, low: float, high: float) -> float:
    """10^low to 10^high."""
    return float(10.0 ** random.uniform(low, high))


def draw_softmax(random: Random) -> Point:
    """d, R, r, D, M of a row of 100 classes: y is the largest, or another is."""
    M = random.choice((-1, 1)) * log_uniform(random, -6, 6)
    rest = log_uniform(random, -36, 1.9)
    if random.random() < 0.5:
        return 0.0, rest, log_uniform(random, -8, 0), -99 * log_uniform(random, -6, 3), M
    d = -log_uniform(random, -6, 1.9)
    return d, 1.0 + min(rest, 98.0), 1.0, d - 98 * log_uniform(random, -6, 3), M


def exact_softmax(mp: Any, point: Point, C: float, **f: float) -> list[tuple[Any, Any]]:
    d, R, r, D, M = (mp.mpf(v) for v in point)
    gamma, eps, zeta = mp.mpf(f["gamma"]), mp.mpf(f["eps"]), mp.mpf(f["zeta"])
    e_y = mp.exp(d)
    S = R + e_y
    p, q, log_S = e_y / S, R / S, mp.log(S)
    nll, lse = log_S - d, M + log_S
    a = (1 - eps) * q**gamma * (1 + gamma * p * nll / q)
    parts = r * (1 - eps) * q**gamma * nll, r * eps / C * (C * log_S - D), r * zeta * lse**2
    steep, steepest = 2 * zeta * lse, 2 * zeta * (abs(M) + log_S)
    return [
        (sum(parts), sum(parts) + r * steepest * abs(lse)),
        (r * (a + eps + steep) / S, r * (a + eps + steepest) / S),
        (r * (-a * q + (eps + steep) * p - eps / C), r * (a * q + (eps + steepest) * p + eps / C)),
    ]


def draw_soft(random: Random) -> Point:
    """R, s, r, W, W_others, B, D, M of a row of 100 classes."""
    R = log_uniform(random, -36, 1.9)
    W = log_uniform(random, -3, 3)
    others = W * random.choice((0.0, 1.0, random.random(), log_uniform(random, -7, 0)))
    scale = log_uniform(random, -8, 0)
    B = -others * log_uniform(random, -3, 3)
    D = -99 * log_uniform(random, -6, 3)
    M = random.choice((-1, 1)) * log_uniform(random, -6, 6)
    return R, scale, scale * random.random(), W, others, B, D, M


def exact_soft(mp: Any, point: Point, C: float, **f: float) -> list[tuple[Any, Any]]:
    R, s, r, W, others, B, D, M = (mp.mpf(v) for v in point)
    eps, zeta = mp.mpf(f["eps"]), mp.mpf(f["zeta"])
    S = 1 + R
    p, q, log_S = 1 / S, R / S, mp.log(S)
    lse = M + log_S
    steep, steepest, hard = 2 * zeta * lse, 2 * zeta * (abs(M) + log_S), s * (1 - eps)
    parts = hard * (W * log_S - B), r * eps / C * (C * log_S - D), r * zeta * lse**2
    return [
        (sum(parts), sum(parts) + r * steepest * abs(lse)),
        ((hard * W + r * (eps + steep)) / S, (hard * W + r * (eps + steepest)) / S),
        (
            hard * (others - W * q) + r * ((eps + steep) * p - eps / C),
            hard * (others + W * q) + r * ((eps + steepest) * p + eps / C),
        ),
    ]


def draw_logit(random: Random) -> Point:
    return (random.choice((-1, 1)) * log_uniform(random, -6, 2.1),)


def exact_element(mp: Any, point: Point, C: float, **f: float) -> list[tuple[Any, Any]]:
    z, gamma = mp.mpf(point[0]), mp.mpf(f["gamma"])
    s, sp = 1 / (1 + mp.exp(-z)), mp.log1p(mp.exp(z))
    L, g = s**gamma * sp, s**gamma * (gamma * (1 - s) * sp + s)
    return [(L, L), (g, g)]


def exact_clipped(mp: Any, point: Point, C: float, **f: float) -> list[tuple[Any, Any]]:
    """p is within 1e-7 where it is clipped, and so are its powers: errors are absolute."""
    z, gamma, clip = mp.mpf(point[0]), mp.mpf(f["gamma_neg"]), mp.mpf(f["clip"])
    s = 1 / (1 + mp.exp(-z))
    p = max(s - clip, mp.mpf(0))
    if p == 0:
        return [(p, mp.mpf(1)), (p, mp.mpf(1))]
    nll = -mp.log1p(-p)
    L, g = p**gamma * nll, p**gamma * (gamma * nll / p + 1 / (1 - p)) * s * (1 - s)
    return [(L, 1 + L), (g, 1 + g)]


def draw_mixed(random: Random) -> Point:
    """z, t, pos_weight."""
    t = random.choice((0.0, 1.0, random.random(), log_uniform(random, -7, 0)))
    return draw_logit(random)[0], t, random.choice((0.0, 1.0, log_uniform(random, -3, 3)))


def exact_mixed(mp: Any, point: Point, C: float, **f: float) -> list[tuple[Any, Any]]:
    z, t, v = point
    (one, _), (minus_slope, _) = exact_element(mp, (-z,), C, gamma=f["gamma"])
    (zero, _), (slope, _) = exact_element(mp, (z,), C, gamma=f["gamma_neg"])
    t_1, t_0 = mp.mpf(v) * t * mp.mpf(f["alpha"]), (1 - mp.mpf(t)) * mp.mpf(f["alpha_neg"])
    L, g = t_1 * one + t_0 * zero, t_0 * slope - t_1 * minus_slope
    return [(L, L), (g, t_0 * slope + t_1 * minus_slope)]


PLAIN = tuple({"gamma": gamma} for gamma in GAMMAS)
SMOOTHED = tuple(f | {"eps": 0.125, "zeta": 2.0**-7} for f in PLAIN)
BOTH = tuple({"gamma": g, "gamma_neg": g} for g in GAMMAS)
CLIPPED = tuple(f | {"clip": 0.0625} for f in BOTH)
BALANCED = tuple(f | {"alpha": 0.25, "alpha_neg": 0.75} for f in BOTH)
ROW, SOFT_ROW, ELEMENT = ("loss", "k", "g_y"), ("loss", "k", "g_top"), ("L", "g")
SAMPLED = (
    Sampled("softmax_row", ROW, draw_softmax, exact_softmax, PLAIN + SMOOTHED, 1e-5),
    Sampled("soft_row", SOFT_ROW, draw_soft, exact_soft, PLAIN[:1] + SMOOTHED[:1], 1e-6),
    Sampled("sigmoid_element", ELEMENT, draw_logit, exact_element, PLAIN, 6e-6),
    Sampled("clipped_element", ELEMENT, draw_logit, exact_clipped, CLIPPED, 1e-6),
    Sampled("mixed", ELEMENT, draw_mixed, exact_mixed, BALANCED, 6e-6),
)


def worst(loaded: ctypes.CDLL, function: Sampled, n: int, seed: int = 0) -> list[tuple[float, Any]]:
    """For each result the largest error of n points of each formula, and where."""
    import mpmath

    C = 100.0
    n += -n % 16
    found: list[tuple[float, Any]] = [(-1.0, None)] * len(function.results)
    for given in function.formulas:
        formula = DEFAULTS | given
        random = Random(f"{seed} {given}")
        points = [as_floats(function.draw(random)) for _ in range(n)]
        inputs = (ctypes.c_float * (n * len(points[0])))(
            *(value for column in zip(*points, strict=True) for value in column)
        )
        outputs = (ctypes.c_float * (n * 5))()
        numbers = (ctypes.c_double * len(FIELDS))(*(formula[name] for name in FIELDS))
        loaded.evaluate(
            function.name.encode(), numbers, ctypes.c_double(C), ctypes.c_int64(n), inputs, outputs
        )
        with mpmath.workdps(60):
            for i, point in enumerate(points):
                exact = function.exact(mpmath, point, C, **formula)
                for k, (want, size) in enumerate(exact):
                    found[k] = max(
                        found[k], (error(outputs[k * n + i], want, size), (given, point)),
                        key=lambda each: each[0],
                    )  # fmt: skip
    return found


def as_floats(point: Point) -> Point:
    """Rounded to float32."""
    return tuple((ctypes.c_float * len(point))(*point))


def error(got: float, want: Any, size: Any) -> float:
    if got != got or abs(got) == inf:
        return inf
    beyond = abs(got - want) - FLUSHED
    return float(beyond / size) if beyond > 0 else 0.0
