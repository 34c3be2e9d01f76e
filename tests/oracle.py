"""The truth, in float64 NumPy and by another road than the library's: no axes, no broadcasting, only labels.

Every element of x carries the number of the statistic it belongs to (`labels`, an int array of x's shape). Sums are
`np.bincount` over labels. Masked-out elements have weight 0; finite ones are still normalized.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    y: np.ndarray  # x's shape
    xhat: np.ndarray  # x's shape
    mean: np.ndarray  # x's shape: of each element's own statistic
    var: np.ndarray
    r: np.ndarray
    n: np.ndarray


def wide(a):
    return np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64)


def total(a, labels):
    """Sums by label, given back to every element."""
    size = labels.max(initial=-1) + 1
    count = lambda part: np.bincount(labels.ravel(), part.ravel(), minlength=size)[labels] if a.size else part
    return count(a.real) + 1j * count(a.imag) if np.iscomplexobj(a) else count(a)


def weight(x, mask, weights):
    w = np.ones(x.shape) if weights is None else np.broadcast_to(np.asarray(weights, np.float64), x.shape)
    return w if mask is None else np.where(mask, w, 0.0)


def normalize(x, labels, scale, bias, *, epsilon, centered=True, mask=None, weights=None) -> Truth:
    x, w = wide(x), weight(np.asarray(x), mask, weights)
    n = total(w, labels)
    counted = np.where(n == 0, 1.0, n)
    seen = np.where(w == 0, 0.0, x)
    mean = total(w * seen, labels) / counted if centered else np.zeros_like(x)
    var = total(w * np.abs(np.where(w == 0, 0.0, x - mean)) ** 2, labels) / counted
    with np.errstate(divide="ignore"):
        r = np.where((n == 0) | (var + epsilon == 0), 0.0, 1 / np.sqrt(var + epsilon))
    xhat = (x - mean) * r
    y = xhat * (1.0 if scale is None else wide(scale)) + (0.0 if bias is None else wide(bias))
    return Truth(y, xhat, mean, var, r, n)


def gradients(x, labels, scale, bias, g, *, epsilon, centered=True, mask=None, weights=None):
    """The cotangents of x, scale and bias for the cotangent g of y, written out:

    dx = r (h - w / n (sum(h) + xhat sum(h xhat))) with h = g scale; no sum(h) where the mean is not taken out.
    """
    truth = normalize(x, labels, scale, bias, epsilon=epsilon, centered=centered, mask=mask, weights=weights)
    w, g = weight(np.asarray(x), mask, weights), wide(g)
    share = w / np.where(truth.n == 0, 1.0, truth.n)
    h = g * (1.0 if scale is None else wide(scale))
    dx = truth.r * (h - share * (centered * total(h, labels) + truth.xhat * total(h * truth.xhat, labels)))
    return dx, reduced_to(g * truth.xhat, scale), reduced_to(g, bias)


# --- activations: f and its derivative, written out -------------------------------------------------------------------

_sigmoid = lambda z: 0.5 * (1.0 + np.tanh(0.5 * z))
_cdf = lambda z: 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2.0)))
_pdf = lambda z: np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
_inner = lambda z: np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))
_silu = (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1.0 + z * (1.0 - _sigmoid(z))))

ACTIVATIONS = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "silu": _silu,
    "swish": _silu,
    "gelu": (lambda z: z * _cdf(z), lambda z: _cdf(z) + z * _pdf(z)),
    "gelu_tanh": (
        lambda z: 0.5 * z * (1.0 + _inner(z)),
        lambda z: 0.5 * (1.0 + _inner(z))
        + 0.5 * z * (1.0 - _inner(z) ** 2) * math.sqrt(2.0 / math.pi) * (1.0 + 3 * 0.044715 * z**2),
    ),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1.0 - _sigmoid(z))),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
}


def reduced_to(a, like):
    """The sum of a over the axes along which `like`, of the same rank, is broadcast."""
    if like is None:
        return None
    return a.sum(tuple(i for i, n in enumerate(np.shape(like)) if n == 1), keepdims=True)
