"""Dynamic erf: no statistics, but an error function whose slope and shift are learned."""

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


class DynamicErfParams(NamedTuple):
    """The parameters of `dynamic_erf`."""

    alpha: Array  # (), one number
    shift: Array  # (), one number
    scale: Array | None  # feature shape
    bias: Array | None  # the same


@spec
class DynamicErf(Spec):
    """The hyperparameters of `dynamic_erf`.

    Args:
      init_alpha: the first value of alpha.
      axis: the axis or axes that scale and bias belong to.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.DynamicErf(use_bias=False)
    >>> params, state = norm.init(1)
    >>> float(params.alpha), float(params.shift), norm.apply(params, state, np.array([[2.]]))[0].round(3).tolist()
    (0.5, 0.0, [[0.843000054359436]])
    """

    Params: ClassVar[Any] = DynamicErfParams

    use_bias: bool = True
    init_alpha: float = 0.5
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("DynamicErf", "init_alpha", self.init_alpha, "0.5")

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[DynamicErfParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        if name in ("alpha", "shift"):
            return jnp.full((), self.init_alpha if name == "alpha" else 0.0, self.param_dtype)
        return super().init_param(name, shape)


@function_of(DynamicErf)
def dynamic_erf(
    x: ArrayLike,
    alpha: ArrayLike,
    shift: ArrayLike = 0.0,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Dynamic erf (Derf), in the place of a layer norm or an RMS norm.

        y = erf(alpha x + shift) * (scale + scale_offset) + bias

    No statistics are taken, so nothing is shared between elements or devices, and no epsilon is needed. For the
    backward pass only x is kept.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      alpha: the slope, one number for all of x in the paper; or of the feature shape.
      shift: added before erf, like alpha.
      scale: of the shape of x along `axis`, or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. A masked-out element that is not
        finite counts as 0 and affects no gradient; a finite one is treated like the others.
      implementation: "xla", "lax" or None; there are no kernels, because XLA fuses elementwise functions.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis or backend; an alpha, shift, scale, bias or mask that fits x nowhere.
      TypeError: a complex x; alpha or shift is None; a dtype that cannot hold the result.

    Used by x-transformers and streaming audio codecs.

    Source: Chen et al., "Stronger Normalization-Free Transformers" (2025), arXiv:2512.10938.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.dynamic_erf(np.array([0., 2., 100.]), 0.5).round(3).tolist()
    [0.0, 0.843000054359436, 1.0]
    """
    norm = "dynamic_erf"
    if alpha is None or shift is None:
        raise TypeError(f"{norm}: alpha and shift must be arrays or numbers, got None. Write {norm}(x, 0.5, 0.0).")
    x = as_float_array(norm, x, rank=1, layout="the axis of scale and bias among its own")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: erf is for real values, got {x.dtype}. Write x.real.")
    axes = canonicalize_axes(norm, x.ndim, axis)
    own = {"alpha": alpha, "shift": shift}
    return normalize_pointwise(norm, _erf, x, own, scale, bias, axes, mask=mask, **options)


def _erf(x: Array, alpha: Array, shift: Array) -> Array:
    return jax.scipy.special.erf(alpha.astype(x.dtype) * x + shift.astype(x.dtype))
