"""Whitening: groups of channels by their covariance, with derivatives of every order, also of equal eigenvalues.

Legend: x is (N, ..., G, d, ...), its channel axis split into G groups of d channels; `at` is the axis of groups. n
(G,), mean (G, d) and second (G, d, d), the mean of p**2 z z^T with z = x - mean, are of what counts. p: the prescale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arithmetic import nonzero_divisor
from .._core.collectives import psum_grouped, slots_over_devices
from .._core.dtypes import accumulator
from .._core.masks import usable
from .._core.platforms import recompute
from .._core.vma import tangent_like
from .statistics import drop_symbolic_zeros

Array = jax.Array

_dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Covariance(NamedTuple):
    """What is known of each group of channels."""

    count: Array
    shift: Array  # mean == shift + low, |low| small beside the spread of x
    low: Array
    second: Array

    @property
    def mean(self) -> Array:
        return self.shift + self.low


@dataclass(frozen=True)
class Groups:
    """Where the groups of channels are in x, and over which devices they are brought together."""

    at: int
    ndim: int
    prescale: float
    axis_name: Any = None
    plain: bool = False

    @property
    def letters(self) -> str:
        """Of the axes of x, for einsum: g and d are the groups and the channels of one."""
        others = iter("abcehijklmnopq")
        return "".join("gd"[a - self.at] if a - self.at in (0, 1) else next(others) for a in range(self.ndim))

    def per(self, a: Array) -> Array:
        """(G,), or (G, d), with x's rank."""
        shape = a.shape if a.ndim == 2 else (*a.shape, 1)
        return a.reshape((1,) * self.at + shape + (1,) * (self.ndim - self.at - 2))

    def total(self, a: Array, shape: tuple[int, ...], out: str) -> Array:
        """The sum over places: (G,) for "g", (G, d) for "gd"."""
        full = tuple(1 if i == self.at + 1 and out == "g" else n for i, n in enumerate(shape))
        axes = tuple(i for i in range(self.ndim) if i not in (self.at, self.at + 1))
        sums = jnp.broadcast_to(a, full).sum(axes)
        return sums[:, 0] if out == "g" else sums

    def outer(self, a: Array, b: Array) -> Array:
        """The sum of a b^T over places."""
        other = self.letters.replace("d", "f")
        return _dot(f"{self.letters},{other}->gdf", a, b)

    def apply(self, matrix: Array, z: Array) -> Array:
        """The product of each group's matrix and z."""
        other = self.letters.replace("d", "f")
        return _dot(f"gdf,{other}->{self.letters}", matrix, z)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)
def covariance(groups: Groups, x: Array, weights: Array) -> Covariance:
    """Of x, whose places have these weights, one for all channels of a group; a weight of 0 leaves a place out."""
    z, w = _present(x, weights), weights.astype(accumulator(x))
    n = groups.total(w, x.shape, "g")
    over = lambda n: (1.0 / nonzero_divisor(n))[:, None]
    mean = groups.total(w * z, x.shape, "gd") * over(n)
    z = jnp.where(weights == 0, 0.0, z - groups.per(mean))
    left = groups.total(w * z, x.shape, "gd") * over(n)  # what rounding left of the mean
    z = jnp.where(weights == 0, 0.0, (z - groups.per(left)) * groups.prescale)
    local = Covariance(n, mean, left, groups.outer(w * z, z))
    if groups.axis_name is not None:
        local = _merged(groups, local)
    return local._replace(second=local.second / nonzero_divisor(local.count)[:, None, None])


def _merged(groups: Groups, local: Covariance) -> Covariance:
    """Over devices: sums of outer products about the mean of all. One all-reduce, or two where matrices are large."""
    slots = slots_over_devices(list(local), groups.axis_name)
    if slots is not None:
        n, shifts, lows, seconds = slots
        shift = shifts[jnp.argmax(n.max(1))]  # of the device that has most, so that nothing cancels
        gap = jnp.where(n[..., None] > 0, (shifts - shift[None]) + lows, 0.0)
        total = n.sum(0)
        low = (n[..., None] * gap).sum(0) / nonzero_divisor(total)[:, None]
        apart = (gap - low[None]) * groups.prescale
        return Covariance(total, shift, low, (seconds + _dot("kg,kgd,kgf->kgdf", n, apart, apart)).sum(0))
    n = local.count
    total, first = psum_grouped([n, n[:, None] * local.mean], groups.axis_name, None)
    over = 1.0 / nonzero_divisor(total)[:, None]
    shift = first * over
    gap = jnp.where(n[:, None] > 0, (local.shift - shift) + local.low, 0.0)
    apart = gap * groups.prescale
    own = local.second + _dot("g,gd,gf->gdf", n, apart, apart)
    first, second = psum_grouped([n[:, None] * gap, own], groups.axis_name, None)
    low = first * over
    return Covariance(total, shift, low, second - _dot("g,gd,gf->gdf", total, low, low) * groups.prescale**2)


def _present(x: Array, weights: Array) -> Array:
    return jnp.where(weights == 0, 0.0, x.astype(accumulator(x)))


@functools.partial(covariance.defjvp, symbolic_zeros=True)
def _(groups, primals, tangents):
    x, weights = primals
    dx, dweights = drop_symbolic_zeros(tangents)
    out = covariance(groups, x, weights)
    tangent = recompute(functools.partial(_covariance_tangent, groups), groups.plain)
    moved = tangent(x, weights, out, (dx, dweights))
    return out, Covariance(*(tangent_like(a, t.astype(a.dtype)) for a, t in zip(out, moved, strict=True)))


def _covariance_tangent(groups: Groups, x, weights, out: Covariance, tangents) -> Covariance:
    """d(mean) = sum(w dx + dw z) / n; d(second) = sum(w (dx z^T + z dx^T) + dw z z^T) / n - second dn / n."""
    dx, dweights = tangents
    w = weights.astype(accumulator(x))
    z = (_present(x, weights) - groups.per(out.shift)) - groups.per(out.low)
    z = jnp.where(weights == 0, 0.0, z * groups.prescale)
    dn, still, first, second = (jnp.zeros_like(a) for a in out)
    if dx is not None:
        dz = w * jnp.where(weights == 0, 0.0, dx.astype(z.dtype) * groups.prescale)
        first = first + groups.total(dz, x.shape, "gd")
        half = groups.outer(dz, z)
        second = second + half + half.mT
    if dweights is not None:
        dw = dweights.astype(z.dtype)
        dn = dn + groups.total(dw, x.shape, "g")
        first = first + groups.total(dw * z, x.shape, "gd")
        second = second + groups.outer(dw * z, z)
    if groups.axis_name is not None:
        dn, first, second = psum_grouped([dn, first, second], groups.axis_name, None)
    n = nonzero_divisor(out.count)
    return Covariance(
        dn, still, first / (n[:, None] * groups.prescale), (second - out.second * dn[:, None, None]) / n[:, None, None]
    )


# --- from the covariance to the matrix ---


def by_newton(second: Array, epsilon: float, steps: int) -> Array:
    """P_steps / sqrt(tr S) of P_0 = I, P_{k+1} = (3 P_k - P_k^3 S / tr S) / 2, with S = second + epsilon I."""
    eye = jnp.broadcast_to(jnp.eye(second.shape[-1], dtype=second.dtype), second.shape)
    s = second + epsilon * eye
    trace = jnp.trace(s, axis1=-2, axis2=-1)[..., None, None]
    void = trace == 0
    safe = jnp.where(void, 1.0, trace)
    unit = lax.stop_gradient(1.0 / safe)  # brings the trace to 1: the derivatives of 1 / trace leave float32's range
    safe = safe * unit
    s, p = jnp.where(void, 0.0, (s * unit) / safe), eye
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    for _ in range(steps):
        p = 1.5 * p - 0.5 * product(product(product(p, p), p), s)
    return jnp.where(void, 0.0, p * (lax.rsqrt(safe) * jnp.sqrt(unit)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def by_eigh(second: Array, epsilon: float) -> Array:
    """(second + epsilon I)^(-1/2), on what it is not singular.

    With W^2 S = I, dW solves W dW + dW W = -W^2 dS W^2. In that form no difference of eigenvalues is divided by, as it
    is in the derivative of eigh, and the derivatives of the solution are solutions again.
    """
    values, vectors = jnp.linalg.eigh(second)
    values = jnp.maximum(values, 0.0) + epsilon
    roots = jnp.where(values == 0, 0.0, lax.rsqrt(nonzero_divisor(values)))
    return _dot("...ij,...j,...kj->...ik", vectors, roots, vectors)


@by_eigh.defjvp
def _(epsilon, primals, tangents):
    w = by_eigh(*primals, epsilon)
    return w, -_sandwiched(w, tangents[0])


def _sandwiched(w: Array, ds: Array) -> Array:
    square = _dot("...ij,...jk->...ik", w, w)
    return _sylvester(w, _dot("...ij,...jk,...kl->...il", square, 0.5 * (ds + ds.mT), square))


def _sylvester(w: Array, c: Array) -> Array:
    """The solution of W X + X W = C, of a symmetric W without negative eigenvalues; 0 where W is 0."""
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(w))
    values = jnp.maximum(values, 0.0)
    sums = values[..., :, None] + values[..., None, :]

    def operator(x: Array) -> Array:
        return _dot("...ij,...jk->...ik", w, x) + _dot("...ij,...jk->...ik", x, w)

    def solve(_, c: Array) -> Array:
        inner = _dot("...ji,...jk,...kl->...il", vectors, c, vectors)
        inner = jnp.where(sums == 0, 0.0, inner / nonzero_divisor(sums))
        return _dot("...ij,...jk,...lk->...il", vectors, inner, vectors)

    return lax.custom_linear_solve(operator, c, solve, symmetric=True)


# --- from the matrix to the output ---


def whitened(groups: Groups, x: Array, keep: Array | None, shift: Array, low: Array, matrix: Array) -> Array:
    """W (x - shift - low), with 0 for padding, in the accumulator's dtype."""
    wide = x.astype(accumulator(x))
    if keep is not None:
        wide = jnp.where(usable(x, keep), wide, lax.stop_gradient(groups.per(shift)))
    return groups.apply(matrix, (wide - groups.per(shift)) - groups.per(low))
