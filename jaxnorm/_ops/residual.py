"""The residual stream: a sum that is rounded to its own dtype, and an array of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arrays import as_float_array
from .._core.dtypes import accumulator, round_to, widest
from .._core.platforms import recompute
from .._core.vma import pvary_all, shard_alike, tangent_like
from .statistics import drop_symbolic_zeros

Array = jax.Array


def as_residual(norm: str, x: Array, residual) -> Array:
    """The residual as an array of x's shape whose dtype can hold the sum."""
    residual = as_float_array(norm, residual, what="residual")
    if residual.shape != x.shape:
        raise ValueError(
            f"{norm}: residual must have x's shape {x.shape}, got {residual.shape}. "
            f"Write jnp.broadcast_to(residual, {x.shape}), or check what is added to the stream."
        )
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(residual):
        raise TypeError(
            f"{norm}: a residual of {residual.dtype} cannot hold the sum with a complex x. "
            f"Write residual.astype({x.dtype})."
        )
    return residual


def match_types(x: Array, residual: Array) -> tuple[Array, Array]:
    """Both with what the types of shard_map and of Explicit meshes say of their sum."""
    return shard_alike(*pvary_all(x, residual))


def _rounded(plain: bool, total: Array, dtype) -> Array:
    """A sum as the stream of this dtype.

    A barrier follows: without it XLA would read both terms, in place of their sum, in every pass of the next norm.
    `plain` leaves it out.
    """
    # Rounded by an instruction: XLA may drop a cast there and back, and what follows would see another stream.
    new = round_to(total, dtype).astype(dtype)
    return new if plain else lax.optimization_barrier(new)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def add_rounded(plain: bool, x: Array, residual: Array) -> Array:
    """x + residual in float32 or wider, rounded once to residual's dtype. Their types match: see `match_types`."""
    wide = widest(accumulator(x), accumulator(residual))
    return _rounded(plain, x.astype(wide) + residual.astype(wide), residual.dtype)


def _add_rounded_jvp(plain, primals, tangents):
    new = add_rounded(plain, *primals)
    tangent = add_rounded_tangent(new.dtype, *drop_symbolic_zeros(tangents))
    return new, jnp.zeros_like(new) if tangent is None else tangent


add_rounded.defjvp(_add_rounded_jvp, symbolic_zeros=True)


def add_rounded_tangent(dtype, dx: Array | None, dresidual: Array | None) -> Array | None:
    """The tangent of a stream of this dtype; None is a tangent of zero.

    If the dtypes match, add without casting: both cotangents are then the same array and are written once.
    """
    if dx is None or dresidual is None:
        one = dresidual if dx is None else dx
        return None if one is None else one.astype(dtype)
    if dx.dtype == dresidual.dtype:
        return dx + dresidual
    wide = widest(accumulator(dx), accumulator(dresidual))
    return (dx.astype(wide) + dresidual.astype(wide)).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def add_scaled(plain: bool, factor: float, x: Array, residual: Array) -> Array:
    """x + factor * residual, with the arithmetic, the rounding and the barrier of `add_rounded`."""
    wide = widest(accumulator(x), accumulator(residual))
    return _rounded(plain, x.astype(wide) + factor * residual.astype(wide), residual.dtype)


def _add_scaled_jvp(plain, factor, primals, tangents):
    new = add_scaled(plain, factor, *primals)
    dx, dresidual = drop_symbolic_zeros(tangents)
    dresidual = None if dresidual is None else factor * dresidual.astype(accumulator(dresidual))
    tangent = add_rounded_tangent(new.dtype, dx, dresidual)
    return new, jnp.zeros_like(new) if tangent is None else tangent


add_scaled.defjvp(_add_scaled_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def add_times(plain: bool, factor: Array, x: Array, residual: Array) -> Array:
    """factor * x + residual, with the arithmetic, the rounding and the barrier of `add_rounded`."""
    wide = widest(accumulator(x), accumulator(residual))
    return _rounded(plain, factor.astype(wide) * x.astype(wide) + residual.astype(wide), residual.dtype)


def _add_times_jvp(plain, primals, tangents):
    new = add_times(plain, *primals)
    moving = drop_symbolic_zeros(tangents)
    if all(t is None for t in moving):
        return new, jnp.zeros_like(new)
    # Of what the map keeps, x alone has x's size.
    dnew = recompute(functools.partial(_add_times_tangent, new.dtype), plain)(*primals[:2], moving)
    return new, tangent_like(new, dnew)


def _add_times_tangent(dtype, factor: Array, x: Array, tangents) -> Array:
    dfactor, dx, dresidual = tangents
    wide = widest(accumulator(x), dtype)
    products = [a.astype(wide) * b.astype(wide) for a, b in ((x, dfactor), (factor, dx)) if b is not None]
    return sum(products, start=0.0 if dresidual is None else dresidual.astype(wide)).astype(dtype)  # pyright: ignore


add_times.defjvp(_add_times_jvp, symbolic_zeros=True)
