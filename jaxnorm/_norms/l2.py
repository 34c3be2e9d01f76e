"""L2 normalization: every example brought to unit length.

Legend: n the number of elements normalized together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import as_float_array, canonicalize_axes, refuse_a_shape, sizes_along
from .._core.checks import canonicalize_epsilon, canonicalize_number
from .._core.dtypes import accumulator, are_static
from .._core.messages import shown
from .._core.types import Features
from .._ops.elementwise import OfElements, normalize_by_statistics
from .._ops.formula import effective_scale
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


class L2Params(NamedTuple):
    """The parameters of `l2_norm`."""

    scale: Array | None  # feature shape


@spec
class L2Norm(RowSpec):
    """The hyperparameters of `l2_norm`. There is no scale unless `use_scale=True`.

    Args:
      axis: the axis or axes whose elements make one vector.
      epsilon: in units of x squared where it is "inside", of x where it is "max" (1e-12 in torch's F.normalize); >= 0.
      epsilon_mode: "inside" of the root, as in fla, TransformerEngine and Qwen3-Next; or "max", the least length that
        x is divided by, as in torch and Keras.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.L2Norm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[3., -4.]]))[0].round(3).tolist()
    [[0.6000000238418579, -0.800000011920929]]
    """

    Params: ClassVar[Any] = L2Params

    use_scale: bool = False
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6
    epsilon_mode: str = "inside"

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_mode("L2Norm", self.epsilon_mode)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[L2Params, tuple[()]]: ...


@function_of(L2Norm)
def l2_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis,
    epsilon,
    epsilon_mode,
    scale_offset,
    axis_name,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """L2 normalization: x over its length.

        "inside":  y = x / sqrt(sum(|x|^2) + epsilon) * (scale + scale_offset),       sum over `axis`
        "max":     y = x / max(sqrt(sum(|x|^2)), epsilon) * (scale + scale_offset)

    A vector of zeros gives zeros. In Megatron, MaxText and Llama 4 a class named L2Norm is `rms_norm` without a scale.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      scale: of the shape of the normalized axes, or of one that broadcasts against x, such as one number; None is 1.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis, epsilon, epsilon_mode, or backend; a scale or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by gated DeltaNet, Qwen3-Next and Kimi Delta Attention for queries and keys, nGPT, and retrieval heads.

    Source: Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
    (2024), arXiv:2406.06484, section 3.3.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.l2_norm(np.array([[3., -4.]]), epsilon=10., epsilon_mode="max").round(3).tolist()
    [[0.30000001192092896, -0.4000000059604645]]
    """
    norm = "l2_norm"
    _check_mode(norm, epsilon_mode)
    refuse_a_shape(norm, "scale", scale)
    x = as_float_array(norm, x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes(norm, x.ndim, axis)
    given: dict[str, Any] = dict(options, mask=mask, axis_name=axis_name, centered=False)
    sizes = sizes_along(x.shape, axes)
    if epsilon_mode == "max" or mask is not None or axis_name is not None or not are_static(*sizes) or 0 in sizes:
        of: Callable[..., Array] = _at_least if epsilon_mode == "max" else _inside
        return normalize_by_statistics(
            norm, of, x, {}, scale, None, axes, axes, epsilon=epsilon, scale_offset=scale_offset, **given
        )
    # Here n is known: it is an RMS norm, for which there are kernels.
    n = math.prod(sizes)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    unit = jnp.full((1,) * x.ndim, n**-0.5, accumulator(x))
    scale = None if scale is None else jnp.asarray(scale)
    scale = unit if scale is None else n**-0.5 * effective_scale(scale, scale_offset, unit.dtype)
    epsilon = canonicalize_epsilon(norm, epsilon) / n
    return normalize_rows(norm, x, scale, None, axes, axes, epsilon=epsilon, scale_offset=0.0, **given)


def _check_mode(norm: str, mode: Any) -> None:
    if mode not in ("inside", "max"):
        raise ValueError(f'{norm}: epsilon_mode must be "inside" or "max", got {shown(mode)}. Write "inside".')


def _inside(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    n = nonzero_divisor(of.count)
    return affine(of.standardize(x, epsilon / n) * (1.0 / jnp.sqrt(n)).astype(x.dtype))


def _at_least(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    r = of.rsqrt(0.0) / jnp.sqrt(nonzero_divisor(of.count))
    if epsilon:  # r is 0 where the length is
        empty = of.count == 0
        r = jnp.where((r == 0.0) & ~empty, 1.0 / epsilon, jnp.minimum(r, 1.0 / epsilon))
    return affine(x * r.astype(x.dtype))
