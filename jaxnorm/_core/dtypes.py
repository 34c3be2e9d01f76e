"""Dtypes: the one that statistics and arithmetic accumulate in, and one rounding to the dtype of the output."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def are_static(*sizes) -> bool:
    """Whether sizes are numbers. Under `jax.export` some may be symbols, which can be multiplied but not compared."""
    return all([isinstance(n, int) for n in sizes])


def widest(*dtypes):
    """The dtype that holds all of these, whatever the user's own setting for implicit promotion.

    Floats of 8 bits and fewer, which JAX promotes to nothing, count as float32.
    """
    for d in dtypes:
        if jnp.dtype(d).itemsize == 1:
            dtypes = [jnp.float32 if is_narrow(t) else t for t in dtypes]
            break
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def is_narrow(dtype) -> bool:
    """Whether this is a float of 8 bits or fewer."""
    return jnp.dtype(dtype).itemsize == 1 and jnp.issubdtype(dtype, jnp.floating)


def accumulator(x: Array):
    """The dtype for statistics and for the affine arithmetic: x's own, but float32 at least."""
    return widest(x.dtype, jnp.float32)


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
