"""Adaptive RMS normalization: scale, shift and gate come from a condition."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import check_cast
from .._ops.activation import Activation
from .._ops.modulate import gated, modulated
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec
from .modulated import ModulatedSpec

Array = jax.Array


@spec
class AdaRMSNorm(ModulatedSpec, RowSpec):
    """The hyperparameters of `ada_rms_norm`. The condition is an argument of `apply`, after x.

    Args:
      condition_activation: of the condition, before the dense layer; openpi has none, Lumina "silu".
      axis: the axis normalized over, that of the channels.
      epsilon: added to the mean square, in units of x squared; >= 0.
      cast: as for `rms_norm`; "before_scale" rounds x / rms to the output's dtype also before the modulation.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AdaRMSNorm(condition_features=3, epsilon=0.)
    >>> params, state = norm.init(2)
    >>> (y, gate), state = norm.apply(params, state, np.array([[[3., -3.]]]), np.ones((1, 3)))
    >>> y.round(3).tolist(), gate.tolist()
    ([[[1.0, -1.0]]], [[[0.0, 0.0]]])
    """

    parts: str = "scale shift gate"
    condition_activation: Activation | None = None
    axis: int = -1
    epsilon: float = 1e-6
    cast: str = "after_scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cast("AdaRMSNorm", self.cast)


@function_of(AdaRMSNorm)
def ada_rms_norm(
    x: ArrayLike,
    modulation: Any,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    parts,
    modulation_offset,
    scale_offset,
    axis,
    cast,
    mask: ArrayLike | None = None,
    **options,
) -> Any:
    """RMS norm with a scale, a shift and a gate that come from a condition (AdaRMS).

        y = norm(x) (m.scale + 1) + m.shift,   norm(x) = rms_norm(x) (scale + scale_offset) + bias

    Args:
      x: array of shape (B, ..., C) with the channels at `axis`. Integers are promoted to float32.
      modulation: m, a dict or an array of parts, as for `ada_layer_norm`. Lumina has parts="scale gate", x-transformers
        and Liger "scale shift" or "scale".
      scale: of the norm's own, of shape (C,) or of one that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      y, of x's shape; and where the modulation has a gate, that too, in y's dtype and of a shape that broadcasts
      against x.

    Raises:
      ValueError: a modulation, scale, bias or mask that fits x nowhere; a bad axis, epsilon, cast or backend.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467, modulated as in Peebles,
    Xie (2022), arXiv:2212.09748. Used by the action expert of pi0.5 (openpi), Lumina and k-diffusion.

    >>> import jaxnorm as jn, numpy as np
    >>> y, gate = jn.ada_rms_norm(np.array([[[2., -2.]]]), np.array([[0., 1., 5., 0., 2., 2.]]), epsilon=0.)
    >>> y.tolist(), gate.tolist()
    ([[[6.0, -2.0]]], [[[2.0, 2.0]]])
    """
    norm = "ada_rms_norm"
    check_cast(norm, cast)
    x = as_float_array(norm, x, rank=1, layout="(batch, ..., channels)")
    axes = canonicalize_axes(norm, x.ndim, axis, most=1)
    affine, gate = modulated(norm, modulation, parts, x.shape, axes[0], scale, bias, scale_offset, modulation_offset)
    y = normalize_rows(
        norm, x, axes=axes, feature_axes=axes, mask=mask, **affine, **options,
        centered=False, cast_before_scale=cast == "before_scale",
    )  # fmt: skip
    return gated(y, gate)
