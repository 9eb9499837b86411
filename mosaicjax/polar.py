"""The polar factor of a matrix, nearly: its singular values brought near 1, by products of matrices alone.

Each iteration is an odd polynomial of degree 5, a X + b (X X^T) X + c (X X^T)^2 X.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import Array

from mosaicjax.errors import InputError

Triples = tuple[tuple[float, float, float], ...]

JORDAN = (3.4445, -4.7750, 2.0315)
TINY = 1e-7
MARGIN = 1.01
"""Polynomials are steep at the upper end, where they magnify rounding: values are kept this much below it."""
GRAM_RATIO = 2
"""From this ratio of a matrix's sides on, iterations are of its Gram matrix: fewer FLOPs."""


@dataclass(frozen=True)
class Polynomials(abc.ABC):
    """Which polynomial each iteration is."""

    @abc.abstractmethod
    def coefficients(self, iterations: int) -> Triples:
        """Of each iteration: a, b and c."""


@dataclass(frozen=True)
class Jordan(Polynomials):
    """The same polynomial each time, steep at 0: singular values come to lie between 0.7 and 1.2.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def coefficients(self, iterations: int) -> Triples:
        """See `Polynomials.coefficients`."""
        return (JORDAN,) * iterations


@dataclass(frozen=True)
class PolarExpress(Polynomials):
    """The best polynomial of each iteration for what the one before it leaves of singular values.

    The largest distance from 1 is, but for a margin of one hundredth, as small as so many iterations can make
    it, for singular values from `lower` to 1 of the matrix's Frobenius norm. Three iterations with `lower`
    0.02 bring those to 0.9 to 1.1.

    Source: Amsel et al. 2025, arXiv 2505.16932.
    """

    lower: float = 1e-3

    def coefficients(self, iterations: int) -> Triples:
        """See `Polynomials.coefficients`.

        Raises:
            InputError: `lower` is not between 0 and 1.
        """
        if not 0 < self.lower < 1:
            raise InputError("PolarExpress.lower", expected="between 0 and 1", got=self.lower)
        return _composed(self.lower, iterations)


@cache
def _composed(lower: float, iterations: int) -> Triples:
    found: list[tuple[float, float, float]] = []
    upper = 1.0
    for _ in range(iterations):
        a, b, c = minimax(lower, upper)
        last = len(found) == iterations - 1
        found.append((a, b, c) if last else (a / MARGIN, b / MARGIN**3, c / MARGIN**5))
        # Of the best polynomial the ends of the interval are the farthest from 1, on either side.
        lower = a * lower + b * lower**3 + c * lower**5
        upper = 2.0 - lower
    return tuple(found)


def minimax(lower: float, upper: float) -> tuple[float, float, float]:
    """a, b and c of the odd polynomial of degree 5 that is nearest to 1 between two positive numbers.

    By Remez's exchange: it is as far from 1 at both ends and at two points between, on alternating sides.
    """
    # Of an interval that is hardly one the polynomial is Newton and Schulz's own.
    if upper - lower < 1e-7:
        middle = (lower + upper) / 2
        return 15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5
    points = np.array([lower, lower + (upper - lower) / 4, lower + (upper - lower) * 3 / 4, upper])
    a = b = c = distance = 0.0
    for _ in range(100):
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = (float(each) for each in np.linalg.solve(system, np.ones(4)))
        # Where the polynomial's slope, a + 3 b x^2 + 5 c x^4, is 0.
        root = np.sqrt(9 * b * b - 20 * a * c)
        points[1:3] = np.sort(np.sqrt((-3 * b + np.array([-root, root])) / (10 * c)))
        if abs(abs(error) - distance) < 1e-14:
            break
        distance = abs(error)
    return a, b, c


def near_polar(x_NRC: Array, coefficients: Triples) -> Array:
    """Matrices with all singular values near 1, and the same singular vectors.

    Shapes: [N, R, C]. A long matrix in float32 or more is multiplied once, by a polynomial of its Gram
    matrix, which is the same in exact arithmetic and costs fewer FLOPs; in bfloat16 the square of a small
    singular value would be lost.
    """
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    if tall:
        x_NRC = x_NRC.transpose(0, 2, 1)
    x_NRC = x_NRC / (jnp.linalg.norm(x_NRC, axis=(1, 2), keepdims=True) + TINY)
    if x_NRC.shape[2] >= GRAM_RATIO * x_NRC.shape[1] and x_NRC.dtype.itemsize >= 4:
        made = _by_gram(x_NRC, coefficients)
    else:
        made = x_NRC
        for a, b, c in coefficients:
            gram = jnp.einsum("nrc,nsc->nrs", made, made)
            made = a * made + jnp.einsum("nrs,nsc->nrc", b * gram + c * (gram @ gram), made)
    return made.transpose(0, 2, 1) if tall else made


def _by_gram(x_NRC: Array, coefficients: Triples) -> Array:
    gram = jnp.einsum("nrc,nsc->nrs", x_NRC, x_NRC)
    eye = jnp.eye(gram.shape[1], dtype=gram.dtype)[None]
    product = None
    for number, (a, b, c) in enumerate(coefficients):
        factor = a * eye + b * gram + c * (gram @ gram)
        # All of these are polynomials of one symmetric matrix: any order of factors will do.
        product = factor if product is None else factor @ product
        if number < len(coefficients) - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x_NRC
