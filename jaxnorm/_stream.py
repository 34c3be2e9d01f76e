"""The residual stream: a sum that is rounded to its own dtype, and an array of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ._kernels.varying import pvary_all, shard_alike
from ._kernels.xla import accumulator, is_narrow, widest
from ._moments import drop_symbolic_zeros

Array = jax.Array


def round_to(y: Array, dtype) -> Array:
    """y in its own dtype with the precision of `dtype`. An instruction, since XLA may drop a cast there and back."""
    if jnp.iscomplexobj(y) or jnp.finfo(dtype).bits >= jnp.finfo(y.dtype).bits:
        return y
    if is_narrow(dtype):  # some of these have a range that their numbers of bits do not tell
        return lax.optimization_barrier(y.astype(dtype)).astype(y.dtype)
    return _round_to(y, jnp.dtype(dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_to(y: Array, dtype) -> Array:
    info = jnp.finfo(dtype)
    normal = lax.reduce_precision(y, info.nexp, info.nmant)
    if info.minexp == jnp.finfo(y.dtype).minexp:
        return normal
    # reduce_precision flushes what is subnormal in `dtype`. Such values are multiples of the smallest one.
    smallest = 2.0 ** (info.minexp - info.nmant)
    return jnp.where(jnp.abs(y) < 2.0**info.minexp, jnp.round(y / smallest) * smallest, normal)


@_round_to.defjvp
def _(dtype, primals, tangents):
    return _round_to(*primals, dtype), tangents[0]


def match_types(x: Array, residual: Array) -> tuple[Array, Array]:
    """Both with what the types of shard_map and of Explicit meshes say of their sum."""
    return shard_alike(*pvary_all(x, residual))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def add_rounded(plain: bool, x: Array, residual: Array) -> Array:
    """x + residual in float32 or wider, rounded once to residual's dtype, and written. They are `together`.

    Behind a barrier: XLA would have every pass of a norm that follows read both terms in place of their sum. `plain`
    leaves it out.
    """
    wide = widest(accumulator(x), accumulator(residual))
    # Rounded by an instruction: XLA may drop a cast there and back, and what follows would see another stream.
    new = round_to(x.astype(wide) + residual.astype(wide), residual.dtype)
    new = new.astype(residual.dtype)
    return new if plain else lax.optimization_barrier(new)


def _add_rounded_jvp(plain, primals, tangents):
    new = add_rounded(plain, *primals)
    tangent = add_rounded_tangent(new.dtype, *drop_symbolic_zeros(tangents))
    return new, jnp.zeros_like(new) if tangent is None else tangent


add_rounded.defjvp(_add_rounded_jvp, symbolic_zeros=True)


def add_rounded_tangent(dtype, dx: Array | None, dresidual: Array | None) -> Array | None:
    """The tangent of a stream of this dtype; None is a tangent of zero.

    Of one dtype are the two added as they are, so that their cotangents are one array, which no program writes twice.
    """
    if dx is None or dresidual is None:
        one = dresidual if dx is None else dx
        return None if one is None else one.astype(dtype)
    if dx.dtype == dresidual.dtype:
        return dx + dresidual
    wide = widest(accumulator(dx), accumulator(dresidual))
    return (dx.astype(wide) + dresidual.astype(wide)).astype(dtype)
