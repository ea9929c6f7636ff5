"""Compute cosine, arc cosine and powers with the same bits on every processor.

The C library chooses its variant of ``cos``, ``acos`` and ``pow`` by the processor's features, and their results
differ in the last bit: ranks on different machines would disagree about the learning rate. This module uses only
integers, `decimal` and operations that IEEE 754 defines exactly. A result is computed to a relative 2**-80 and rounded
once, so its error is less than 0.5001 units in the last place.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache

# Fixed point: the integer n stands for n / 2**_BITS. The smallest result, raised_cosine of the last double before 1, is
# about 2**-105, and has 87 bits left.
_BITS = 192
_ONE = 1 << _BITS
_FLOAT_ONE = float(_ONE)
# pi to 192 fractional bits, rounded.
_PI = 0x3_243F6A88_85A308D3_13198A2E_03707344_A4093822_299F31D0

# Every field is set, so that the caller's context has no influence. exp() multiplies the relative error of its argument
# by up to 745, the argument of the smallest double: hence more digits than a double needs.
_DIGITS = 34
_DECIMAL = Context(_DIGITS, ROUND_HALF_EVEN, Emin=-999_999, Emax=999_999, capitals=1, clamp=0, flags=[], traps=[])


# 1 - cos(a) = z (c_1 - z (c_2 - z (c_3 - ...))) with z = a**2 and c_k = 1 / (2 k)!. The angle is halved until 10 terms
# suffice: with z < 0.039 the first one left out is below 2**-110 of the sum, which is near 1/2: 120 bits are enough.
_SERIES_BITS = 120
_SERIES = [(1 << _SERIES_BITS) // math.factorial(2 * k) for k in range(10, 0, -1)]
_HALVINGS = 3
_WIDE = _BITS + 2 * _HALVINGS  # the square of the smaller angle keeps its bits
_TWO_WIDE = 2 << _WIDE


@lru_cache(maxsize=64)
def raised_cosine(x: float) -> float:
    """Return (1 + cos(pi x)) / 2."""
    if 0.0 <= x < 1.0:
        turned = int(x * _FLOAT_ONE)  # a power of two: the product is exact
    else:
        n, d = float(x).as_integer_ratio()
        turned = (n << _BITS) // d % (2 * _ONE)
        turned = min(turned, 2 * _ONE - turned)  # in [0, 1]
    # As a series, 1 - cos(pi v) has no cancellation, which 1 + cos(pi x) near x = 1 has; v is at most 1/2.
    v = turned if 2 * turned < _ONE else _ONE - turned
    small = _one_minus_cos((v * _PI) >> _BITS)
    return (small if 2 * turned > _ONE else 2 * _ONE - small) / (2 * _ONE)


def _one_minus_cos(angle: int) -> int:
    """Return 1 - cos(angle) in fixed point; ``angle`` is at most pi / 2."""
    square = (angle * angle) >> _BITS  # of the angle before halving; with _WIDE bits it is that of the smaller one
    z = square >> (_WIDE - _SERIES_BITS)
    total = 0
    for coefficient in _SERIES:
        total = coefficient - ((total * z) >> _SERIES_BITS)
    small = (square * total) >> _SERIES_BITS
    for _ in range(_HALVINGS):  # 1 - cos(2 a) = 2 (1 - cos a) (1 + cos a), again without cancellation
        small = (small * (_TWO_WIDE - small)) >> (_WIDE - 1)
    return small >> (_WIDE - _BITS)


@lru_cache(maxsize=64)
def arc_cosine(x: float) -> float:
    """Return acos(2 x - 1) / pi, for x in [0, 1].

    Raises:
        ValueError: ``x`` lies outside.
    """
    if not 0.0 <= x <= 1.0:
        raise ValueError(f"the arc cosine is defined in [0, 1], got {x!r}.")
    n, d = float(x).as_integer_ratio()
    # acos(2 x - 1) = 2 atan(sqrt((1 - x) / x)), and atan(1 / r) = pi / 2 - atan(r).
    low, high = sorted((n, d - n))
    root = math.isqrt((low << 2 * _BITS) // high)
    small = 2 * _arc_tangent(root)
    return (small if n > d - n else _PI - small) / _PI


def _arc_tangent(tangent: int) -> int:
    """Return the angle in [0, pi / 4] of a tangent in [0, 1], in fixed point."""
    halvings = 3  # of the angle: the series converges faster for small tangents
    for _ in range(halvings):
        hypotenuse = math.isqrt(_ONE * _ONE + tangent * tangent)
        tangent = (tangent << _BITS) // (_ONE + hypotenuse)
    square = (tangent * tangent) >> _BITS
    total, odd_power, k, sign = 0, tangent, 1, 1
    while odd_power:
        total += sign * (odd_power // k)
        odd_power = (odd_power * square) >> _BITS
        k, sign = k + 2, -sign
    return total << halvings


@lru_cache(maxsize=64)
def power(base: float, exponent: float) -> float:
    """Return ``base ** exponent``, for a base above 0.

    Raises:
        ValueError: ``base`` is not a finite number above 0, or ``exponent`` not finite.
    """
    if not (0.0 < base < math.inf and -math.inf < exponent < math.inf):
        raise ValueError(f"a power needs a finite base above 0 and a finite exponent, got {base!r} ** {exponent!r}.")
    if exponent == 0.5:
        return math.sqrt(base)
    if base == 1.0 or exponent == 0.0:
        return 1.0
    if exponent == 1.0:
        return float(base)
    # Decimal's ln, multiply and exp are correctly rounded by definition; its power is not.
    return float(_DECIMAL.exp(_DECIMAL.multiply(Decimal.from_float(float(exponent)), _logarithm(base))))


@lru_cache(maxsize=64)
def _logarithm(base: float) -> Decimal:
    return _DECIMAL.ln(Decimal.from_float(float(base)))
