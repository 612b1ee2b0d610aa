"""The few statistics that the tables need, exact and without SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """Whether two methods differ, seed by seed.

    Attributes:
        difference: mean of first minus second.
        interval: of that mean, 95 %.
        p: two-sided p-value of Student's t; nan with fewer than two pairs.
        n: pairs.
    """

    difference: float
    interval: Interval
    p: float
    n: int


def clopper_pearson(k: int, n: int, *, level: float = 0.95) -> Interval:
    """Exact interval of a probability of which k of n trials are a sample.

        low:  P(X >= k | p) = (1 - level) / 2        high: P(X <= k | p) = (1 - level) / 2

    Raises:
        ValueError: not 0 <= k <= n with n > 0.

    Source: Clopper, Pearson, Biometrika 26 (1934).
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"k of n must be 0 <= k <= n and n > 0, got {k} of {n}")
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else _root(lambda p: 1 - _binomial_cdf(k - 1, n, p) - tail)
    high = 1.0 if k == n else _root(lambda p: tail - _binomial_cdf(k, n, p))
    return Interval(low, high)


def paired_t(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Student's paired t-test.

        t = mean(d) / (std(d) / sqrt(n)),   d_i = first_i - second_i,   n - 1 degrees of freedom

    Raises:
        ValueError: the lengths differ.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n < 2:
        return PairedTest(differences[0] if n else math.nan, Interval(math.nan, math.nan), math.nan, n)
    mean = sum(differences) / n
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    if error == 0.0:
        return PairedTest(mean, Interval(mean, mean), 0.0 if mean else 1.0, n)
    reach = error * t_quantile(0.95, n - 1)
    return PairedTest(mean, Interval(mean - reach, mean + reach), 1 - t_within(abs(mean) / error, n - 1), n)


def t_within(t: float, freedom: int) -> float:
    """P(abs(T) <= t) of Student's t with a whole number of degrees of freedom.

    Source: Abramowitz, Stegun (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(1 + odd, freedom, 2):  # cosine, 2/3 cosine^3, ... or 1, 1/2 cosine^2, ...
        total += term
        term *= i / (i + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(level: float, freedom: int) -> float:
    """The t with P(abs(T) <= t) = level."""
    high = 1.0
    while t_within(high, freedom) < level:
        high *= 2
    return _root(lambda t: t_within(t, freedom) - level, high=high)


def _binomial_cdf(k: int, n: int, p: float) -> float:
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def _root(rising: Callable[[float], float], *, low: float = 0.0, high: float = 1.0) -> float:
    """Where a rising function crosses 0, by halving."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
