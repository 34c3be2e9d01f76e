"""Compressed RMS norm: layer norm of a vector whose mean is zero, and whose last element is not stored."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._ops.elementwise import OfElements, normalize_by_statistics
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


@spec
class CRMSNorm(RowSpec):
    """The hyperparameters of `crms_norm`.

    Args:
      axis: the axis or axes normalized over.
      epsilon: added to the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.CRMSNorm(epsilon=0.)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[3.]]))[0].tolist()
    [[1.0]]
    """

    use_bias: bool = True
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6


@function_of(CRMSNorm)
def crms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Compressed RMS norm (CRMSNorm).

        y = x / sqrt((sum(|x|^2) + |sum(x)|^2) / (n + 1) + epsilon) * (scale + scale_offset) + bias,   sums over `axis`

    of n elements. It is layer norm of the n + 1 elements x and -sum(x), without the last one.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      scale: of the shape of the normalized axes, or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis, epsilon or backend; a scale, bias or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by Pre-LN transformers that are converted to Pre-CRMSNorm ones. Tier C: it may change in any release.

    Source: Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN
    Transformers" (2023), arXiv:2305.14858.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.crms_norm(np.array([[1., 3.]])).round(3).tolist()
    [[0.3400000035762787, 1.0190000534057617]]
    >>> jn.layer_norm(np.array([[1., 3., -4.]])).round(3).tolist()
    [[0.3400000035762787, 1.0190000534057617, -1.3590000867843628]]
    """
    norm = "crms_norm"
    x = as_float_array(norm, x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes(norm, x.ndim, axis)
    return normalize_by_statistics(norm, _compressed, x, {}, scale, bias, axes, axes, mask=mask, **options)


def _compressed(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    n = of.count  # (sum |x|^2 + |sum x|^2) / (n + 1) = var n / (n + 1) + n |mean|^2
    r = of.rsqrt(epsilon, n / (n + 1.0), of.mean * jnp.sqrt(n).astype(of.mean.dtype))
    r = jnp.where(n == 0, 0.0, r)
    return affine(of.bounded(x * r.astype(x.dtype)))
