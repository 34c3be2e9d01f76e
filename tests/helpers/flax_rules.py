"""What the tests of linen and of nnx layers share: inputs, initializers, and Flax's climate."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

DTYPES = functools.partial(jax.tree.map, lambda a: a.dtype)


def by_key(key, shape, dtype):
    """An initializer that tells keys apart, and costs nothing to compile."""
    return jnp.full(shape, (jax.random.key_data(key)[-1] % 64).astype(jnp.float32) / 64 + 0.25, dtype)


def randn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def as_flax(f):
    """Flax promotes dtypes and ranks as it likes."""

    @functools.wraps(f)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return f(*args, **kwargs)

    return call


def assert_one_rounding(got, truth, theirs=None, noise=1e-5):
    """Within half a unit in the last place of the truth, plus float32 noise; and no further from it than Flax."""
    got_wide, truth = np.asarray(got).astype(np.float64), np.asarray(truth)
    eps = float(ml_dtypes.finfo(got.dtype).eps)
    noise = noise * max(1.0, float(np.abs(truth).max(initial=0.0)))
    error = np.abs(got_wide - truth)
    assert (error <= eps / 2 * np.abs(truth) + noise).all(), error.max()
    if theirs is not None:
        their_error = np.abs(np.asarray(theirs).astype(np.float64) - truth)
        assert error.max(initial=0.0) <= their_error.max(initial=0.0) + noise
