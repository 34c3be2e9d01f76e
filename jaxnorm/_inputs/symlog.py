"""The symmetric logarithm and its inverse."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array
from .._core.explain import explained
from .._core.program import as_program
from .._ops.pointwise import normalize_pointwise

Array = jax.Array


@explained("function")
@as_program
def symlog(x: ArrayLike) -> Array:
    """The symmetric logarithm: large values of either sign are compressed, values near 0 stay.

        y = sign(x) log(1 + |x|);   dy/dx = 1 / (1 + |x|), also at 0

    Args:
      x: array of any shape. Integers are promoted to float32; arithmetic is in float32 or wider, with one rounding.

    Used by DreamerV3 and TD-MPC2, for observations, rewards and values.

    Source: Hafner et al., "Mastering Diverse Domains through World Models" (2023), arXiv:2301.04104.

    >>> from jaxnorm import inputs
    >>> import jax, numpy as np
    >>> inputs.symlog(np.array([-1000., 0., 1000.])).round().tolist(), float(jax.grad(inputs.symlog)(0.))
    ([-7.0, 0.0, 7.0], 1.0)
    """
    return _elementwise("symlog", _symlog, x)


@explained("function")
@as_program
def symexp(x: ArrayLike) -> Array:
    """The inverse of `symlog`.

        y = sign(x) (exp(|x|) - 1);   dy/dx = exp(|x|), also at 0

    Args:
      x: array of any shape. Integers are promoted to float32; arithmetic is in float32 or wider, with one rounding.

    Used by DreamerV3 and TD-MPC2.

    Source: Hafner et al., "Mastering Diverse Domains through World Models" (2023), arXiv:2301.04104.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> inputs.symexp(inputs.symlog(np.array([-1000., 0., 1.]))).round(2).tolist()
    [-1000.0, 0.0, 1.0]
    """
    return _elementwise("symexp", _symexp, x)


def _elementwise(norm: str, f, x: ArrayLike) -> Array:
    x = as_float_array(norm, x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: x must be real, got {x.dtype}. Write x.real.")
    return normalize_pointwise(
        norm, f, x, {}, None, None, (), scale_offset=0.0, activation=None, mask=None, dtype=None, implementation=None
    )


@jax.custom_jvp
def _symlog(x: Array) -> Array:
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


@_symlog.defjvp
def _(primals, tangents):  # that of the formula is 0 at 0
    (x,), (dx,) = primals, tangents
    return _symlog(x), dx / (1.0 + jnp.abs(x))


@jax.custom_jvp
def _symexp(x: Array) -> Array:
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


@_symexp.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    most = math.log(float(jnp.finfo(x.dtype).max)) - 1e-3  # an infinity would make NaN of a cotangent of 0
    return _symexp(x), dx * jnp.exp(jnp.minimum(jnp.abs(x), most))
