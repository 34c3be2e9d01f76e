"""RMS normalization: every example by its own root mean square over the features, without a mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import check_cast
from .._ops.rows import normalize_scaled
from .base import QuantizableSpec
from .declare import function_of, spec

Array = jax.Array


@spec
class RMSNorm(QuantizableSpec):
    """The hyperparameters of `rms_norm`. There is no bias unless `use_bias=True`.

    Args:
      axis: the axis or axes normalized over.
      epsilon: added to the mean square, in units of x squared; >= 0.
      output_scale: a number that multiplies the output in float32: l**-0.5 for block l is LayerNorm Scaling.
      cast: "after_scale" rounds once, at the end (Gemma); "before_scale" rounds x / rms to the output's dtype and again
        after the scale (Llama). They differ in the last bit of a half-precision output.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.RMSNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[3., -3.]]))[0].round(3).tolist()
    [[1.0, -1.0]]
    """

    use_bias: bool = False
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6
    output_scale: float = 1.0
    cast: str = "after_scale"

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)
    peers: ClassVar[Any] = {
        "torch": {"epsilon": 2.0**-23},  # eps=None: that of float32, for half precision too
        "flax": {},
        "keras": {},
        "haiku": {"epsilon": 1e-5},
        "equinox": {"epsilon": 1e-5, "use_bias": True},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cast("rms_norm", self.cast)


@function_of(RMSNorm)
def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    cast,
    mask: ArrayLike | None = None,
    quantize_scale: ArrayLike | None = None,
    **options,
) -> Array:
    """Root mean square layer normalization.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale + scale_offset) + bias,   mean over `axis`

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      scale: of the shape of the normalized axes, or of a shape that broadcasts against x (per head: (H, D)); None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape; with `quantize` a `jaxnorm.Quantized`.

    Raises:
      ValueError: a bad axis, epsilon, output_scale, cast, or backend; a scale, bias or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by Llama, Mistral, Qwen, Gemma, DeepSeek, OLMo, T5: see `jaxnorm.presets`.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467; `output_scale`: Sun et
    al., "The Curse of Depth in Large Language Models" (2025), arXiv:2502.05795.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.rms_norm(np.array([[2., -2.]]), bias=np.array([0., 1.]), epsilon=0.).round(3).tolist()
    [[1.0, 0.0]]
    """
    check_cast("rms_norm", cast)
    x = as_float_array("rms_norm", x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes("rms_norm", x.ndim, axis)
    return normalize_scaled(
        "rms_norm", x, scale, bias, axes, mask=mask, quantize_scale=quantize_scale, **options,
        centered=False, cast_before_scale=cast == "before_scale",
    )  # fmt: skip
