"""Layer normalization: every example by its own mean and variance over the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._ops.rows import normalize_scaled
from .base import QuantizableSpec
from .declare import function_of, spec

Array = jax.Array


@spec
class LayerNorm(QuantizableSpec):
    """The hyperparameters of `layer_norm`. See `jaxnorm.Norm` for what a spec does.

    Args:
      axis: the axis or axes normalized over.
      epsilon: added to the variance, in units of x squared; >= 0.
      output_scale: a number that multiplies the output in float32: l**-0.5 for block l is LayerNorm Scaling.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.LayerNorm(epsilon=1e-5, use_bias=False)
    >>> params, state = norm.init(2)
    >>> y, state = norm.apply(params, state, np.array([[1., 3.]]))
    >>> y.round(3).tolist(), state
    ([[-1.0, 1.0]], ())
    """

    use_bias: bool = True
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6
    output_scale: float = 1.0

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)
    peers: ClassVar[Any] = {
        "torch": {"epsilon": 1e-5},
        "flax": {},
        "keras": {"epsilon": 1e-3},
        "haiku": {"epsilon": 1e-5},
        "equinox": {"epsilon": 1e-5},
    }


@function_of(LayerNorm)
def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    quantize_scale: ArrayLike | None = None,
    **options,
) -> Array:
    """Layer normalization.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias,   mean and var over `axis`

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      scale: of the shape of the normalized axes, or of a shape that broadcasts against x (adaLN: (B, 1, C)); None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape; with `quantize` a `jaxnorm.Quantized`.

    Raises:
      ValueError: a bad axis, epsilon, output_scale, or backend; a scale, bias or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by GPT-2, BERT, ViT and most transformers before Llama.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450; `output_scale`: Sun et al., "The Curse of
    Depth in Large Language Models" (2025), arXiv:2502.05795.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.layer_norm(np.array([[1., 3.], [5., 5.]]), bias=np.array([0., 1.])).round(3).tolist()
    [[-1.0, 2.0], [0.0, 1.0]]
    """
    x = as_float_array("layer_norm", x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes("layer_norm", x.ndim, axis)
    return normalize_scaled(
        "layer_norm", x, scale, bias, axes, mask=mask, quantize_scale=quantize_scale, **options,
    )  # fmt: skip
