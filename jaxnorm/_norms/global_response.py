"""Global response norm: the channels of an example compete by their energy over space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_epsilon
from .._core.types import Affine, Features
from .._ops.written import normalize_written, unit_of
from .base import Spec
from .declare import function_of, spec

Array = jax.Array


@spec
class GlobalResponseNorm(Spec):
    """The hyperparameters of `global_response_norm`.

    Args:
      use_scale: whether `init` makes a scale. It starts at 0, less scale_offset: then y is x.
      axis: the channel axis, at any position but 0.
      epsilon: added to the mean length of the channels, in units of x; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.GlobalResponseNorm()
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[[3.], [-3.]]]))[0].tolist()
    [[[3.0], [-3.0]]]
    """

    use_bias: bool = True
    axis: int = -1
    epsilon: float = 1e-6

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.full(shape, 0.0 - self.scale_offset if name == "scale" else 0.0, self.param_dtype)


@function_of(GlobalResponseNorm)
def global_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    epsilon,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Global response normalization (GRN).

        y = x + x * G / (mean(G) + epsilon) * (scale + scale_offset) + bias,   G = sqrt(sum(x^2))

    with the sum over every axis but the batch axis 0 and the channel axis, and the mean over channels. A channel of
    zeros has gradients of 0 through its G.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. What is masked out counts as 0,
        and gives the bias. A channel that is masked out as a whole does not count in the mean.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: the batch axis as channel axis; a bad axis, epsilon or backend; a scale, bias or mask that fits x
        nowhere.
      TypeError: a complex x; a dtype that cannot hold the result.

    Used by ConvNeXt V2, and by UViT and Stable Cascade in diffusers.

    Source: Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (2023),
    arXiv:2301.00808.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.global_response_norm(np.array([[[3., 1.], [-4., 0.]]]), epsilon=0.).round(3).tolist()
    [[[8.0, 1.3330000638961792], [-10.667000770568848, 0.0]]]
    """
    norm = "global_response_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    epsilon = canonicalize_epsilon(norm, epsilon)
    if channel == 0:
        raise ValueError(
            f"{norm}: axis={axis} is the batch axis of x {x.shape}, whose examples are normalized apart. "
            "Write axis=-1 for channels last, or axis=1."
        )
    space = tuple(a for a in range(1, x.ndim) if a != channel)

    def f(x: Array, keep: Array | None, affine) -> Array:
        m = unit_of(x, (*space, channel), epsilon)
        energy = jnp.sum(jnp.square(x / m), space, keepdims=True)
        dead = energy == 0  # the root of 0 has no gradient
        length = jnp.where(dead, 0.0, jnp.sqrt(jnp.where(dead, 1.0, energy)))
        some = jnp.ones_like(length) if keep is None else jnp.broadcast_to(keep, x.shape).any(space, keepdims=True)
        n = jnp.sum(some.astype(x.dtype), channel, keepdims=True)
        mean = jnp.sum(length, channel, keepdims=True) / nonzero_divisor(n)
        return x + affine(x * (length / nonzero_divisor(mean + epsilon / m)))

    return normalize_written(norm, f, x, (), scale, bias, (channel,), mask=mask, **options)
