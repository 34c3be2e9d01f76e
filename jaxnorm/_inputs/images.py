"""Images standardized by their own statistics."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import as_float_array, canonicalize_axes
from .._core.explain import explained
from .._core.program import as_program
from .._ops.elementwise import OfElements, normalize_by_statistics

Array = jax.Array


@explained("function")
@lambda f: as_program(f, static=("axis", "axis_name", "dtype"))
def standardize_images(
    x: ArrayLike, *, axis: int | Sequence[int] = (-3, -2, -1), mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None, dtype: DTypeLike | None = None,
) -> Array:  # fmt: skip
    """Standardize each image by its own mean and deviation.

        y = (x - mean) / max(std, 1 / sqrt(n)),   over the n elements of an image

    The floor keeps an image of one value at 0, and its gradient finite. Statistics have gradients.

    Args:
      x: images (..., H, W, C) or (..., C, H, W). Integers are promoted to float32, and keep their values 0 to 255.
      axis: the axes of an image. (-3, -2) of channels last is each channel by itself.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes.
      axis_name: a mapped axis, or several, over which the axes of an image are sharded.
      dtype: of the output; None is x's. Statistics and arithmetic are in float32 or wider, with one rounding.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis; a mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by CIFAR and other image pipelines; `tf.image.per_image_standardization` is it. torch's `x.std()` is the
    unbiased one, which is sqrt(n / (n - 1)) times as large.

    Source: TensorFlow, `tf.image.per_image_standardization`.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> inputs.standardize_images(np.array([[[0], [2]], [[2], [0]]], np.uint8)).ravel().tolist()
    [-1.0, 1.0, 1.0, -1.0]
    """
    norm = "standardize_images"
    x = as_float_array(norm, x, rank=3, layout="an image and any axes before it")
    axes = canonicalize_axes(norm, x.ndim, axis)
    return normalize_by_statistics(
        norm, _standardized, x, {}, None, None, axes, axes, epsilon=0.0, scale_offset=0.0, activation=None, mask=mask,
        axis_name=axis_name, axis_index_groups=None, dtype=dtype, implementation=None,
    )  # fmt: skip


def _standardized(x: Array, of: OfElements, affine, _: float) -> Array:
    most = lax.sqrt(nonzero_divisor(jnp.asarray(of.count))).astype(of.parts.m2.dtype)
    r = of.rsqrt(0.0)
    return affine(of.bounded(of.deviation(x) * jnp.where((r == 0.0) | (r > most), most, r).astype(x.dtype)))
