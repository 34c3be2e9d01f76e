"""What the wrappers of weights in `jaxnorm.linen` and `jaxnorm.nnx` share: Flax's arguments, mapped onto functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from .._core.messages import shown
from .._weights.base import Reparametrization, divided, length, split_axes
from .._weights.operator import Matrix
from .._weights.spectral_norm import SpectralNormState, bounded, iterate
from .._weights.weight_norm import weight_norm

Array = jax.Array


def scale_of(value: Array, feature_axes: Any, init: Any, key: Any, dtype: Any) -> Array:
    """The first scale of weight norm, from an initializer and `key()`; None is the norm of the weight."""
    kept, reduced = split_axes("WeightNorm", value, feature_axes)
    shape = tuple(value.shape[a] for a in kept)
    return length(value, reduced).reshape(shape).astype(dtype) if init is None else init(key(), shape, dtype)


def with_weight_norm(value: Array, scale: Array | None, feature_axes: Any, epsilon: float, dtype: Any) -> Array:
    dtype = canonicalize_dtype(*[a for a in (value, scale) if a is not None], dtype=dtype)
    return weight_norm(value, scale, axis=feature_axes, epsilon=epsilon, dtype=dtype)


def with_spectral_norm(
    value: Array, u: Array, n_steps: int, epsilon: float, bound: float | None, dtype: Any
) -> tuple[Array, Array, Array]:
    """The effective weight, u (1, out) and sigma, of the matrix of all axes by the last."""
    of = Matrix.of("SpectralNorm", value, -1, None, None)
    old = SpectralNormState(u[0], jnp.zeros(value.shape[:-1], u.dtype))
    new, sigma = iterate(of, value, old, n_steps, "v", epsilon, "inside")
    effective = divided(value, bounded(sigma, bound), canonicalize_dtype(value, u, dtype=dtype))
    return effective, new.u[None].astype(u.dtype), jax.lax.stop_gradient(sigma).astype(u.dtype)


def check_spec(spec: Any) -> None:
    if not isinstance(spec, Reparametrization):
        raise TypeError(
            f"Reparametrized: spec must be of jaxnorm.weights, got {shown(spec)}. Write weights.Standardize()."
        )


def own_names(spec: Reparametrization) -> tuple[str, ...]:
    """The names of the parameters that a spec adds to the weight, which is the first."""
    return spec.Params._fields[1:] if spec.Params else ()


def params_of(spec: Reparametrization, value: Array, own: Any) -> Any:
    """The parameters of a spec, from the weight and what it adds, by name."""
    return spec.Params(value, **own) if spec.Params else value
