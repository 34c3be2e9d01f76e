"""LayerScale: a learned factor of each channel, for a branch before it is added to the residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_number
from .._core.types import Features
from .._ops.pointwise import normalize_pointwise
from .base import Spec
from .declare import function_of, spec

Array = jax.Array


class LayerScaleParams(NamedTuple):
    """The parameters of `layer_scale`."""

    gamma: Array  # feature shape


@spec
class LayerScale(Spec):
    """The hyperparameters of `layer_scale`. `LayerScale(axis=(), init_gamma=0.0)` is ReZero: one number, from 0.

    Args:
      use_scale: without effect here: there always is a gamma.
      scale_offset: added to gamma in float32.
      init_gamma: the first value of gamma + scale_offset. CaiT has 0.1, 1e-5 or 1e-6 by depth; ConvNeXt has 1e-6.
      axis: the axis or axes that gamma belongs to; () for one number.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.LayerScale(init_gamma=0.5)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[2., -4.]]))[0].tolist()
    [[1.0, -2.0]]
    """

    Params: ClassVar[Any] = LayerScaleParams
    scales: ClassVar[tuple[str, ...]] = ("gamma",)

    init_gamma: float = 1e-5
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("LayerScale", "init_gamma", self.init_gamma, "1e-5")

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[LayerScaleParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.full(shape, self.init_gamma - self.scale_offset, self.param_dtype)


@function_of(LayerScale)
def layer_scale(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """LayerScale: a branch times a learned factor of each channel, before it is added to the residual.

        y = x * (gamma + scale_offset)

    The sum with the residual and the next norm in one call, with one rounding, is `branch_scale=gamma` of
    `add_rms_norm` and `add_layer_norm`.

    Args:
      x: array of any shape. Integers are promoted to float32.
      gamma: of the shape of x along `axis`, or of a shape that broadcasts against x; None is 1.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. A masked-out element that is not
        finite counts as 0 and affects no gradient; a finite one is treated like the others.
      implementation: "xla", "lax" or None; there are no kernels, because XLA fuses elementwise functions.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis or backend; a gamma or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.

    Used by CaiT, ConvNeXt, BEiT, DINOv2 and DINOv3; as one number by ReZero and SkipInit.

    Source: Touvron et al., "Going deeper with Image Transformers" (2021), arXiv:2103.17239.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.layer_scale(np.array([[2., -4.]]), np.array([0.5, 0.25])).tolist()
    [[1.0, -1.0]]
    """
    norm = "layer_scale"
    x = as_float_array(norm, x)
    axes = canonicalize_axes(norm, x.ndim, axis)
    return normalize_pointwise(norm, _same, x, {}, gamma, None, axes, mask=mask, **options)


def _same(x: Array) -> Array:
    return x
