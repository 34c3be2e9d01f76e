"""Norms without statistics: y = f(x, params), each element alone. For the backward pass x is all that is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.arrays import align_boolean_mask, align_param, canonicalize_dtype
from .._core.checks import canonicalize_number
from .._core.masks import finite_padding, finite_where_masked, zero_where_padding
from .._core.platforms import recompute
from .._core.vma import shard_like, tangent_like
from .activation import activate_output, check_activation, jvp_or_none, widened_to
from .formula import affine
from .plan import refuse_kernels
from .statistics import drop_symbolic_zeros

Array = jax.Array


def normalize_pointwise(
    norm: str, f: Callable[..., Array], x: Array, own: dict[str, Any], scale, bias, axes: tuple[int, ...], *,
    scale_offset, activation, mask, dtype, implementation,
) -> Array:  # fmt: skip
    """y = activation(f(x, *own) (scale + scale_offset) + bias), rounded once.

    `f` is elementwise and gets x in the accumulator's dtype. `own` are its parameters by name: scalars, or arrays of
    the feature shape or of one that broadcasts against x.
    """
    refuse_kernels(norm, implementation)
    given = [align_param(norm, name, p, x.shape, axes) for name, p in {**own, "scale": scale, "bias": bias}.items()]
    params = tuple(None if p is None else shard_like(x, p) for p in given)
    out = canonicalize_dtype(norm, dtype, x, *params)
    check_activation(norm, activation, x.shape, x.dtype)
    x, mask = align_boolean_mask(norm, x, mask)
    static = (f, canonicalize_number(norm, "scale_offset", scale_offset, "1.0"), activation, out)
    return _pointwise(static, implementation == "lax", finite_padding(x, mask), params, mask)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _pointwise(static, plain: bool, x: Array, params: tuple, mask: Array | None) -> Array:
    return _output(static, mask, x, *params)


@functools.partial(_pointwise.defjvp, symbolic_zeros=True)
def _(static, plain, primals, tangents):
    x, params, mask = primals
    dx, *dparams = drop_symbolic_zeros([tangents[0], *jax.tree.leaves(tangents[1])])
    moving = iter(dparams)
    dparams = [None if p is None else next(moving) for p in params]
    y = _pointwise(static, plain, *primals)
    dy = recompute(functools.partial(_tangent, static), plain)(x, params, mask, (dx, *dparams))
    return y, tangent_like(y, dy)


def _output(static, mask: Array | None, x: Array, *params: Array | None) -> Array:
    f, scale_offset, activation, dtype = static
    *own, scale, bias = params
    z = f(finite_where_masked(x, mask), *own)
    if activation is None:
        return affine(z, scale, bias, scale_offset, dtype)
    z = affine(z, scale, bias, scale_offset, widened_to(z, scale, bias))
    return activate_output(activation, z, mask).astype(dtype)


def _tangent(static, x: Array, params: tuple, mask: Array | None, tangents: tuple) -> Array:
    dx, *dparams = tangents
    dx = None if dx is None else zero_where_padding(x, mask, dx)
    dy = jvp_or_none(functools.partial(_output, static, mask), (x, *params), (dx, *dparams))[1]
    return jnp.zeros(x.shape, static[-1]) if dy is None else dy
