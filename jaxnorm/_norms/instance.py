"""Instance normalization: every example and channel by its own mean and variance over space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import warn_if_single
from .._core.messages import shown, to_python
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


@spec
class InstanceNorm(RowSpec):
    """The hyperparameters of `instance_norm`.

    Args:
      axis: the channel axis, or axes, at any position but 0.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.InstanceNorm(use_scale=False, use_bias=False)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[[1., 10.], [3., 30.]]]))[0].round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    peers: ClassVar[Any] = {
        "torch": {"axis": 1, "epsilon": 1e-5, "use_scale": False, "use_bias": False},
        "flax": {},
        "haiku": {"epsilon": 1e-5},
    }

    use_bias: bool = True
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6


@function_of(InstanceNorm)
def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    axis_name,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Instance normalization.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var over every axis but the batch axis 0 and the channel axis.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x (per sample: (N, 1, 1, C)); None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis, epsilon, or backend; a scale, bias or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by style transfer and image-to-image translation.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016), arXiv:1607.08022.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.instance_norm(np.array([[[1., 10.], [3., 30.]]])).round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    x = as_float_array("instance_norm", x, rank=2, layout="(batch, ..., channels)")
    channels = canonicalize_axes("instance_norm", x.ndim, axis)
    if 0 in channels:
        raise ValueError(
            f"instance_norm: axis={shown(to_python(axis))} is the batch axis 0 of x {x.shape}. "
            "Write axis=-1 for channels."
        )
    axes = tuple(a for a in range(1, x.ndim) if a not in channels)
    if axis_name is None:
        warn_if_single("instance_norm", x, axes, "instance and channel")
    return normalize_rows(
        "instance_norm", x, scale, bias, axes, channels, mask=mask, axis_name=axis_name, **options,
    )  # fmt: skip
