"""Adaptive layer normalization: scale and shift, and a gate for the branch after it, come from a condition."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._ops.modulate import gated, modulated
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec
from .modulated import ModulatedSpec

Array = jax.Array


@spec
class AdaLayerNorm(ModulatedSpec, RowSpec):
    """The hyperparameters of `ada_layer_norm`. The condition is an argument of `apply`, after x.

    Args:
      axis: the axis normalized over, that of the channels.
      epsilon: added to the variance, in units of x squared; >= 0. (Most models of diffusers have 1e-6.)

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AdaLayerNorm(condition_features=3, epsilon=0.)
    >>> params, state = norm.init(2)                   # from zeros: at first it is a layer norm
    >>> params.condition_kernel.shape, norm.apply(params, state, np.array([[[1., 3.]]]), np.ones((1, 3)))[0].tolist()
    ((3, 4), [[[-1.0, 1.0]]])
    """

    axis: int = -1
    epsilon: float = 1e-6


@function_of(AdaLayerNorm)
def ada_layer_norm(
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
    """Layer norm with a scale and a shift that come from a condition (AdaLN).

        y = norm(x) (m.scale + 1) + m.shift,   norm(x) = layer_norm(x) (scale + scale_offset) + bias

    It is one layer norm with a scale and a bias for each example: one kernel forward, and one backward that also gives
    the gradients of m.scale and m.shift.

    Args:
      x: array of shape (B, ..., C) with the channels at `axis`. Integers are promoted to float32.
      modulation: m, a dict of "scale", "shift" and "gate", as `jaxnorm.modulation` makes it; what is absent does
        nothing. Or one array of the `parts`, one after the other on its last axis. A part has shape (B, C), or (B, T,
        C) for each token: x's leading axes and then the channels. One of x's rank broadcasts against x.
      scale: of the norm's own, of shape (C,) or of one that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape; and where the modulation has a gate, that too, in y's dtype and of a shape that broadcasts
      against x: the residual stream is then stream + gate * branch(y).

    Raises:
      ValueError: a modulation, scale, bias or mask that fits x nowhere; a bad axis, epsilon or backend.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Source: Peebles, Xie, "Scalable Diffusion Models with Transformers" (2022), arXiv:2212.09748, after Perez et al.,
    "FiLM" (2017), arXiv:1709.07871. Used by the output layers of DiT, PixArt, SD3 and FLUX, by CogVideoX and OmniGen;
    diffusers' `AdaLayerNorm` and `AdaLayerNormContinuous`, which has a scale and a bias of its own.

    >>> import jaxnorm as jn, numpy as np
    >>> x, m = np.array([[[1., 3.]]]), {"scale": np.array([[0., 1.]]), "shift": np.array([[5., 0.]])}
    >>> jn.ada_layer_norm(x, m, epsilon=0.).tolist()
    [[[4.0, 2.0]]]
    """
    own = (scale, bias, scale_offset, modulation_offset)
    return _normalized("ada_layer_norm", x, modulation, parts, axis, own, mask=mask, **options)


@spec
class AdaLayerNormZero(ModulatedSpec, RowSpec):
    """The hyperparameters of `ada_layer_norm_zero`. The condition is an argument of `apply`, after x.

    Args:
      axis: the axis normalized over, that of the channels.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AdaLayerNormZero(condition_features=3, epsilon=0.)
    >>> params, state = norm.init(2)                   # from zeros: the gate shuts the branch
    >>> (y, gate), state = norm.apply(params, state, np.array([[[1., 3.]]]), np.ones((1, 3)))
    >>> y.tolist(), gate.tolist()
    ([[[-1.0, 1.0]]], [[[0.0, 0.0]]])
    """

    parts: str = "shift scale gate"
    axis: int = -1
    epsilon: float = 1e-6


@function_of(AdaLayerNormZero)
def ada_layer_norm_zero(
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
    """Layer norm with a scale, a shift and a gate that come from a condition (AdaLN-Zero).

        y = layer_norm(x) (m.scale + 1) + m.shift,   stream = stream + m.gate * branch(y)

    `ada_layer_norm`, with a gate among its parts. A block of two branches has two of these norms: of one dense layer
    with six parts, `jaxnorm.modulation(c, 6, "shift scale gate")` gives a dict for each.

    Args:
      x: array of shape (B, ..., C) with the channels at `axis`. Integers are promoted to float32.
      modulation: m, a dict or an array of parts, as for `ada_layer_norm`.
      scale: of the norm's own; see `ada_layer_norm`.
      bias: the same.

    Returns:
      y, of x's shape, and the gate, in y's dtype and of a shape that broadcasts against x.

    Raises:
      ValueError: no gate; and what `ada_layer_norm` raises.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Source: Peebles, Xie, "Scalable Diffusion Models with Transformers" (2022), arXiv:2212.09748. Used by DiT, SD3,
    FLUX, AuraFlow and Mochi.

    >>> import jaxnorm as jn, numpy as np
    >>> x, c = np.array([[[1., 3.]]]), np.array([[5., 0., 0., 1., .5, .5]])
    >>> y, gate = jn.ada_layer_norm_zero(x, c, epsilon=0.)
    >>> y.tolist(), gate.tolist()
    ([[[4.0, 2.0]]], [[[0.5, 0.5]]])
    """
    own = (scale, bias, scale_offset, modulation_offset)
    found = _normalized("ada_layer_norm_zero", x, modulation, parts, axis, own, mask=mask, **options)
    if not isinstance(found, tuple):
        raise ValueError(
            "ada_layer_norm_zero: the modulation has no gate. Write ada_layer_norm, or name a gate among its parts."
        )
    return found


def _normalized(norm: str, x, modulation, parts, axis, own, **options) -> Any:
    x = as_float_array(norm, x, rank=1, layout="(batch, ..., channels)")
    axes = canonicalize_axes(norm, x.ndim, axis, most=1)
    affine, gate = modulated(norm, modulation, parts, x.shape, axes[0], *own)
    return gated(normalize_rows(norm, x, axes=axes, feature_axes=axes, **affine, **options), gate)
