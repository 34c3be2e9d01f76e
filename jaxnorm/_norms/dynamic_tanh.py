"""Dynamic tanh: no statistics, but a tanh whose slope is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import tanh
from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_number
from .._core.types import Features
from .._ops.pointwise import normalize_pointwise
from .base import Spec
from .declare import function_of, spec

Array = jax.Array


class DynamicTanhParams(NamedTuple):
    """The parameters of `dynamic_tanh`."""

    alpha: Array  # (), one number
    scale: Array | None  # feature shape
    bias: Array | None  # the same


@spec
class DynamicTanh(Spec):
    """The hyperparameters of `dynamic_tanh`.

    Args:
      init_alpha: the first value of alpha. The paper has 0.5, and other values for large language models: a larger one
        before attention, a smaller one for a wider model.
      axis: the axis or axes that scale and bias belong to.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.DynamicTanh(use_bias=False)
    >>> params, state = norm.init(1)
    >>> float(params.alpha), params.bias, norm.apply(params, state, np.array([[1.]]))[0].round(3).tolist()
    (0.5, None, [[0.4620000123977661]])
    """

    Params: ClassVar[Any] = DynamicTanhParams

    use_bias: bool = True
    init_alpha: float = 0.5
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("DynamicTanh", "init_alpha", self.init_alpha, "0.5")

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[DynamicTanhParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.full((), self.init_alpha, self.param_dtype) if name == "alpha" else super().init_param(name, shape)


@function_of(DynamicTanh)
def dynamic_tanh(
    x: ArrayLike,
    alpha: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Dynamic tanh (DyT), in the place of a layer norm or an RMS norm.

        y = tanh(alpha x) * (scale + scale_offset) + bias

    No statistics are taken, so nothing is shared between elements or devices, and no epsilon is needed. For the
    backward pass only x is kept.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      alpha: the slope at 0, one number for all of x in the paper; or of the feature shape.
      scale: of the shape of x along `axis`, or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. A masked-out element that is not
        finite returns the bias and affects no gradient; a finite one is treated like the others.
      implementation: "xla", "lax" or None; there are no kernels, because XLA fuses elementwise functions.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis or backend; an alpha, scale, bias or mask that fits x nowhere.
      TypeError: alpha is None; a dtype that cannot hold the result.

    Used by DyT's vision, language and diffusion transformers, Liger and x-transformers.

    Source: Zhu, Chen, He, LeCun, Liu, "Transformers without Normalization" (2025), arXiv:2503.10622.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.dynamic_tanh(np.array([0., 1., 100.]), 0.5).round(3).tolist()
    [0.0, 0.4620000123977661, 1.0]
    """
    if alpha is None:
        raise TypeError("dynamic_tanh: alpha must be an array or a number, got None. Write dynamic_tanh(x, 0.5).")
    x = as_float_array("dynamic_tanh", x, rank=1, layout="the axis of scale and bias among its own")
    return normalize_pointwise(
        "dynamic_tanh", _tanh, x, {"alpha": alpha}, scale, bias, canonicalize_axes("dynamic_tanh", x.ndim, axis),
        mask=mask, **options,
    )  # fmt: skip


def _tanh(x: Array, alpha: Array) -> Array:
    return tanh(alpha.astype(x.dtype) * x)
