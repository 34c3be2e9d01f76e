"""What the backward pass keeps."""

import jax
import jax.numpy as jnp


def kept_bytes(f, *args) -> int:
    """The bytes of every array that the vjp of f keeps, each counted once."""
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))
    return sum(a.size * a.dtype.itemsize for a in kept)


def limit(dtype) -> float:
    return jnp.dtype(dtype).itemsize + 0.1
