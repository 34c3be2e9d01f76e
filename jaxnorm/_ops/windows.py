"""Windows of series: the level that a norm takes out of a window, and puts back into the forecast of it.

Legend: a level is a mean and a deviation, with x's rank and size 1 along the axes of a window, in float32 or wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arithmetic import nonzero_divisor, ratio, reciprocal
from .._core.checks import canonicalize_groups, check_axis_name
from .._core.collectives import max_over_devices, psum_grouped
from .._core.masks import finite_padding, finite_where_masked
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.messages import shown
from .._core.over import Over
from .._core.platforms import recompute
from .._core.types import Moments, Reduction, Statistics, WindowStats
from .elementwise import OfElements
from .plan import make_plan
from .so_far import count_so_far, deviation_so_far, mean_so_far, rsqrt_so_far
from .statistics import statistics

Array = jax.Array

MODES = ("inside", "if_zero", "one_below")
TRANSFORMS = (None, "arcsinh")


def as_window_stats(norm: str, stats: Any, ndim: int) -> WindowStats:
    """Two arrays of x's rank: of a lower one it would not be known which axes they have."""
    if not isinstance(stats, tuple) or len(stats) != 2:
        raise TypeError(
            f"{norm}: stats must be a mean and a std, got {shown(stats)}. Write stats=stats, of y, stats = {norm}(x)."
        )
    mean, std = (jnp.asarray(a) for a in stats)
    if mean.ndim != ndim or std.ndim != ndim:
        write = (
            "jax.tree.map(lambda a: jnp.expand_dims(a, 1), stats)" if mean.ndim < ndim else "x with the rank of mean"
        )
        raise ValueError(
            f"{norm}: stats must have x's rank {ndim}, got shapes {mean.shape} and {std.shape}. Write {write}."
        )
    return WindowStats(mean, std)


def inverse_deviation(of: OfElements, epsilon: float, mode: str, carry: Moments | None = None) -> Array:
    """1 / std, and 0 where there is none: for "inside" with epsilon 0, and where nothing was counted.

    "inside": std = sqrt(var + epsilon). "if_zero": epsilon in place of a std of 0. "one_below": 1 in place of a std
    below epsilon.
    """
    r = rsqrt_so_far(of, epsilon if mode == "inside" else 0.0, carry)
    if mode == "inside":
        return r
    floor = {"if_zero": 1.0 / epsilon if epsilon else 0.0, "one_below": 1.0}[mode]
    low = (r == 0.0) | (r * epsilon > 1.0) if mode == "one_below" else r == 0.0
    return jnp.where(count_so_far(of, carry) == 0, 0.0, jnp.where(low, floor, r))


def deviation_from(r: Array, epsilon: float, mode: str) -> Array:
    """std for what `inverse_deviation` gives."""
    least = {"inside": math.sqrt(epsilon), "if_zero": epsilon, "one_below": 1.0}[mode]
    return jnp.where(r == 0.0, least, reciprocal(nonzero_divisor(r)))


def epsilon_inside(epsilon: float, mode: str) -> float:
    """What is added to the variance: the range of the sums of squares is chosen by it."""
    return epsilon if mode == "inside" else 0.0


def window_stats(
    norm: str, x: Array, mask: Array | None, over: Over, *, epsilon: float, mode: str, implementation, stop: bool,
    axis_name=None, axis_index_groups=None, carry: Moments | None = None,
) -> WindowStats:  # fmt: skip
    """The level of each window of x, over `axis_name`'s devices together, and of a carry that came before it."""
    check_axis_name(norm, axis_name)
    names = active_axis_names(axis_name, whole=axis_index_groups is None) or None
    groups = canonicalize_groups(norm, axis_index_groups)
    reduction = Reduction(over, axis_name=names, groups=groups if names else None)
    inside = epsilon_inside(epsilon, mode)
    reduction = make_plan(x, names or (), inside, 0.0, x.dtype, reduction, implementation).reduction
    x = lax.stop_gradient(x) if stop else x

    def level(x: Array, mask: Array | None, carry: Moments | None) -> WindowStats:
        with explain_unbound_axis(norm, axis_name):
            parts = statistics(reduction, finite_padding(x, mask), mask, None)
        of = OfElements(Statistics(*parts), reduction, mask, None, None)
        r = inverse_deviation(of, epsilon, mode, carry)
        return WindowStats(mean_so_far(of, carry), deviation_from(r, epsilon, mode))

    return recompute(level, implementation == "lax")(x, mask, carry)


def last_of(x: Array, mask: Array | None, axes: tuple[int, ...], names: tuple[str, ...] | None) -> Array:
    """The last valid element along `axes`, in the order of memory; 0 where there is none.

    Over devices of `names` that share a window, the first of `axes` is the one that they divide, in their order.
    """
    place = jnp.zeros((1,) * x.ndim, jnp.int32)
    for a in axes:
        place = place * x.shape[a] + lax.broadcasted_iota(
            jnp.int32, tuple(n if b == a else 1 for b, n in enumerate(x.shape)), a
        )
    if names:
        place = place + lax.axis_index(names) * math.prod(x.shape[a] for a in axes)
    valid = place if mask is None else jnp.where(mask, place, -1)
    latest = valid.max(axes, keepdims=True, initial=-1)
    latest = max_over_devices(latest, names, None)
    last = jnp.where((valid == latest) & (valid >= 0), finite_where_masked(x, mask), 0.0).sum(axes, keepdims=True)
    return psum_grouped([last], names, None)[0] if names else last


@dataclass(frozen=True)
class Taken:
    """y of x: the level of the window is taken out, `before` being a carry or the last value in place of the mean."""

    epsilon: float
    mode: str
    transform: str | None
    stop: bool

    def __call__(self, x: Array, of: OfElements, affine, _: float, before: Moments | Array | None = None) -> Array:
        carry = before if isinstance(before, Moments) else None
        r = inverse_deviation(of, self.epsilon, self.mode, carry).astype(x.dtype)
        if before is None or isinstance(before, Moments):
            d = deviation_so_far(x, of, before)
        else:
            d = x - before.astype(x.dtype)
        if of.keep is not None:  # padding comes as the mean of this x: it gives the bias
            d = jnp.where(~of.keep & (x == lax.stop_gradient(of.mean)), 0.0, d)
        if self.stop:
            r, d = lax.stop_gradient(r), lax.stop_gradient(d) + (x - lax.stop_gradient(x))
        return _transformed(affine(of.bounded(d * r)), self.transform)


@dataclass(frozen=True)
class TakenAs:
    """y of x, by a level that is given."""

    scale_offset: float
    transform: str | None

    def __call__(self, x: Array, mean, std, scale, bias) -> Array:
        z = ratio(x - mean.astype(x.dtype), nonzero_divisor(std).astype(x.dtype))
        z = jnp.where(std == 0, 0.0, z)
        z = z if scale is None else z * (scale.astype(z.dtype) + self.scale_offset)
        return _transformed(z if bias is None else z + bias.astype(z.dtype), self.transform)


@dataclass(frozen=True)
class PutBack:
    """x of y: the inverse of both. A scale of 0 has none, and gives the mean."""

    scale_offset: float
    transform: str | None

    def __call__(self, y: Array, mean, std, scale, bias) -> Array:
        z = y if self.transform is None else jnp.sinh(y)
        z = z if bias is None else z - bias.astype(z.dtype)
        if scale is not None:
            scale = scale.astype(z.dtype) + self.scale_offset
            z = jnp.where(scale == 0, 0.0, ratio(z, nonzero_divisor(scale)))
        return z * std.astype(z.dtype) + mean.astype(z.dtype)


def _transformed(z: Array, transform: str | None) -> Array:
    return z if transform is None else jnp.arcsinh(z)
