"""Adaptive instance normalization: a content takes on the mean and the deviation of a style."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_epsilon
from .._core.dtypes import accumulator, widest
from .._core.explain import explained
from .._core.types import Params
from .._ops.modulate import modulated
from .._ops.moments import moments
from .._ops.rows import normalize_rows
from .base import Spec
from .declare import S, as_params, function_of, refuse_params_as_state, spec

Array = jax.Array


@spec
class AdaIN(Spec):
    """The hyperparameters of `ada_instance_norm`. The style is an argument of `apply`, after x.

    Args:
      use_scale: whether `init` makes a scale of the norm's own; the paper has none.
      use_bias: whether `init` makes a bias of the norm's own; the paper has none.
      axis: the channel axis of x, and of the style.
      epsilon: added to both variances, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AdaIN(epsilon=0.)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[[1.], [3.]]]), np.array([[[10.], [20.], [10.], [20.]]]))[0].tolist()
    [[[10.0], [20.0]]]
    """

    use_scale: bool = False
    use_bias: bool = False
    axis: int = -1
    epsilon: float = 1e-5

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, style: ArrayLike, *,
        train: Any = None, mask: Any = None, style_mask: Any = None,
    ) -> tuple[Array, S]:  # fmt: skip
        """x with the style's statistics, and the state `()` as it came."""
        refuse_params_as_state("AdaIN", state, self.Params)
        given = as_params("AdaIN", params, self.Params)
        return ada_instance_norm(x, style, *given, mask=mask, style_mask=style_mask, **self.options()), state


@function_of(AdaIN)
def ada_instance_norm(
    x: ArrayLike,
    style: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    epsilon,
    scale_offset,
    implementation,
    mask: ArrayLike | None = None,
    style_mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Instance norm with the statistics of a style in the place of scale and bias (AdaIN).

        y = deviation(style) (norm(x) (scale + scale_offset) + bias) + mean(style),   norm(x) = instance_norm(x)

    with mean and deviation = sqrt(var + epsilon) over every axis but the batch axis and the channels. Gradients flow
    into both. StyleGAN's norm of this name has a dense layer make scale and shift: `ada_group_norm` with group_size=1.
    The variance is the biased one; the authors' code, and pytorch-AdaIN, has the unbiased.

    Args:
      x: the content, an array of shape (N, ..., C) with the channels at `axis`. Integers are promoted to float32.
      style: of shape (N, ..., C), or (1, ..., C) for all; its space may have another size and rank than x's.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      style_mask: the mask of the style.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a style of other examples or channels; a bad axis, epsilon or backend; a scale, bias or mask that fits
        nowhere.
      TypeError: a dtype that cannot hold the result.

    Source: Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization" (2017),
    arXiv:1703.06868. Used by style transfer and voice conversion.

    >>> import jaxnorm as jn, numpy as np
    >>> content, style = np.array([[[1.], [3.]]]), np.array([[[10.], [20.], [10.], [20.]]])
    >>> jn.ada_instance_norm(content, style, epsilon=0.).tolist()
    [[[10.0], [20.0]]]
    """
    norm = "ada_instance_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    style = as_float_array(norm, style, rank=2, layout="(batch, ..., channels)", what="style")
    epsilon = canonicalize_epsilon(norm, epsilon)
    (channel,), (of_style,) = (canonicalize_axes(norm, a.ndim, axis, most=1) for a in (x, style))
    if channel == 0 or of_style == 0:
        raise ValueError(f"{norm}: axis={axis} is the batch axis 0 of x {x.shape}. Write axis=-1 for channels.")
    if style.shape[0] not in (1, x.shape[0]) or style.shape[of_style] != x.shape[channel]:
        raise ValueError(
            f"{norm}: style must have x's {x.shape[0]} examples, or one, and x's {x.shape[channel]} channels, got "
            f"{style.shape}. Write style of shape {(x.shape[0], 'H', 'W', x.shape[channel])}."
        )
    axes = tuple(a for a in range(1, style.ndim) if a != of_style)
    if accumulator(style) != (wide := widest(accumulator(style), accumulator(x))):
        style = style.astype(wide)
    m = moments(style, axes, mask=style_mask, implementation="lax" if implementation == "lax" else None)
    var = m.var + epsilon
    still = var == 0.0  # where the root has no derivative
    deviation = jnp.where(still, 0.0, jnp.sqrt(jnp.where(still, 1.0, var)))
    named = {"scale": deviation, "shift": m.mean}
    affine, _ = modulated(norm, named, "scale shift", x.shape, channel, scale, bias, scale_offset, 0.0)
    reduced = tuple(a for a in range(1, x.ndim) if a != channel)
    return normalize_rows(
        norm, x, axes=reduced, feature_axes=(channel,), epsilon=epsilon, mask=mask, implementation=implementation,
        axis_name=None, axis_index_groups=None, **affine, **options,
    )  # fmt: skip
