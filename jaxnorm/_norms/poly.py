"""PolyNorm: an activation made of the RMS norms of the first powers of x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_epsilon
from .._core.types import Features
from .._ops.written import mean_of_kept, normalize_written, unit_of
from .base import Spec
from .declare import function_of, spec

Array = jax.Array


class PolyNormParams(NamedTuple):
    """The parameters of `poly_norm`."""

    weight: Array  # (K,): of the highest power first
    bias: Array | None  # (), one number


@spec
class PolyNorm(Spec):
    """The hyperparameters of `poly_norm`.

    Args:
      use_scale: without effect here: the weights of the powers are the scale.
      scale_offset: without effect here.
      init_order: the highest power, K. The first weights are 1 / K each.
      axis: the axis or axes normalized over.
      epsilon: added to the mean square of each power; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.PolyNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[2., -2.]]))[0].round(3).tolist()
    [[1.0, -0.3330000042915344]]
    """

    Params: ClassVar[Any] = PolyNormParams
    whole: ClassVar[tuple[str, ...]] = ("weight", "bias")

    use_bias: bool = True
    init_order: int = 3
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[PolyNormParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        order = self.init_order
        return (
            jnp.full((order,), 1.0 / order, self.param_dtype) if name == "weight" else jnp.zeros((), self.param_dtype)
        )


@function_of(PolyNorm)
def poly_norm(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    axis,
    epsilon,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """PolyNorm, in the place of an activation.

        y = w_0 n(x^3) + w_1 n(x^2) + w_2 n(x) + bias,   n(u) = u / sqrt(mean(u^2) + epsilon),   mean over `axis`

    The first weight belongs to the highest power, which is the number of weights. Powers are those of x over its
    largest value, so that they stay in range: in float32 x^6 would leave it from 2e6 on.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      weight: of shape (K,), one for each power, the highest first.
      bias: one number; None is 0. (Liger starts it at 1, the authors and vLLM at 0.)
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. What is masked out counts as 0,
        and gives the bias.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: weights that are not of shape (K,); a bias of a shape; a bad axis, epsilon or backend; a mask that
        fits x nowhere.
      TypeError: a complex x; a dtype that cannot hold the result.

    Used by Motif-2.6B, with kernels in vLLM and Liger.

    Source: Zhuo et al., "Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models" (2024),
    arXiv:2411.03884.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.poly_norm(np.array([[2., -2.]]), np.array([0., 1., 0.]), epsilon=0.).round(3).tolist()
    [[1.0, 1.0]]
    """
    norm = "poly_norm"
    x = as_float_array(norm, x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes(norm, x.ndim, axis)
    epsilon = canonicalize_epsilon(norm, epsilon)
    weight = as_float_array(norm, weight, what="weight")
    if weight.ndim != 1 or weight.size == 0:
        raise ValueError(
            f"{norm}: weight must be of shape (K,), one for each power, got {weight.shape}. Write jnp.full(3, 1 / 3)."
        )
    bias = None if bias is None else as_float_array(norm, bias, what="bias")
    if bias is not None and bias.size != 1:
        raise ValueError(f"{norm}: bias must be one number, got shape {bias.shape}. Write jnp.zeros(()).")

    def f(x: Array, keep: Array | None, affine, weight: Array, bias: Array | None) -> Array:
        order = weight.shape[0]
        m = unit_of(x, axes, epsilon ** (0.5 / order))
        unit, z = x / m, jnp.zeros_like(x)
        for power in range(1, order + 1):
            u = unit**power
            v = mean_of_kept(lax.square(u), keep, axes) + (epsilon ** (0.5 / power) / m) ** (2 * power)
            r = jnp.where(v == 0, 0.0, lax.rsqrt(jnp.where(v == 0, 1.0, v)))
            z = z + weight[order - power].astype(x.dtype) * (u * r)
        return z if bias is None else z + bias.reshape(()).astype(x.dtype)

    options = dict(options, scale_offset=0.0)
    return normalize_written(norm, f, x, (weight, bias), None, None, axes, mask=mask, **options)
