"""Feature-wise linear modulation: a scale and a shift of each channel that come from a condition, without a norm."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._ops.activation import Activation
from .._ops.modulate import gated, modulated
from .._ops.pointwise import normalize_pointwise
from .declare import function_of, spec
from .modulated import ModulatedSpec

Array = jax.Array


@spec
class FiLM(ModulatedSpec):
    """The hyperparameters of `film`. The condition is an argument of `apply`, after x.

    Args:
      condition_activation: of the condition, before the dense layer.
      axis: the axis of the channels.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.FiLM(condition_features=3)
    >>> params, state = norm.init(2)                   # from zeros: at first it is the identity
    >>> norm.apply(params, state, np.array([[[1., 3.]]]), np.ones((1, 3)))[0].tolist()
    [[[1.0, 3.0]]]
    """

    condition_activation: Activation | None = None
    axis: int = -1


@function_of(FiLM)
def film(
    x: ArrayLike,
    modulation: Any,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    parts,
    modulation_offset,
    scale_offset,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Any:
    """Feature-wise linear modulation (FiLM).

        y = (x (scale + scale_offset) + bias) (m.scale + modulation_offset) + m.shift

    The paper's gamma is m.scale + 1. Most networks have it after a batch or group norm: `ada_group_norm` and
    `conditional_norm` do both in one. No statistics are taken; for the backward pass only x is kept.

    Args:
      x: array of shape (B, ..., C) with the channels at `axis`. Integers are promoted to float32.
      modulation: m, a dict of "scale" and "shift", or an array of the `parts`, as for `ada_layer_norm`.
      modulation_offset: added to m.scale: 1.0 as in the official code, 0.0 where gamma itself is given.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. A masked-out element that is not
        finite returns the shift and affects no gradient; a finite one is treated like the others.
      implementation: "xla", "lax" or None; there are no kernels, because XLA fuses elementwise functions.

    Returns:
      An array of x's shape; and where the modulation has a gate, that too.

    Raises:
      ValueError: a bad axis or backend; a modulation, scale, bias or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.

    Source: Perez, Strub, de Vries, Dumoulin, Courville, "FiLM: Visual Reasoning with a General Conditioning Layer"
    (2017), arXiv:1709.07871. Used by RT-1, diffusion policies and visual reasoning.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.film(np.array([[1., 3.]]), {"scale": np.array([[0., 1.]]), "shift": np.array([[5., 0.]])}).tolist()
    [[6.0, 6.0]]
    """
    x = as_float_array("film", x, rank=1, layout="(batch, ..., channels)")
    axes = canonicalize_axes("film", x.ndim, axis, most=1)
    affine, gate = modulated("film", modulation, parts, x.shape, axes[0], scale, bias, scale_offset, modulation_offset)
    return gated(normalize_pointwise("film", _same, x, {}, axes=axes, mask=mask, **affine, **options), gate)


def _same(x: Array) -> Array:
    return x
