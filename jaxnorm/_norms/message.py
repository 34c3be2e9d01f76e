"""Message normalization: the message that a node gets, at a learned share of the length of the node's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import abs_squared
from .._core.arrays import align_boolean_mask, align_param, as_float_array
from .._core.checks import canonicalize_number
from .._core.explain import explained
from .._core.masks import finite_where_masked
from .._core.platforms import recompute
from .._core.types import Features
from .._ops.length import normalize_length
from .._ops.written import unit_of
from .base import Spec
from .declare import S, function_of, spec

Array = jax.Array


class MessageNormParams(NamedTuple):
    """The parameters of `message_norm`."""

    scale: Array | None  # (), one number


@spec
class MessageNorm(Spec):
    """The hyperparameters of `message_norm`. The message is an argument of `apply`, after x.

    Args:
      use_scale: whether `init` makes a scale, one number. Without it the message has the length of x.
      init_scale: the first value of the effective scale.
      epsilon: the least length that the message is divided by; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.MessageNorm()
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[0., 8.]]), np.array([[4., 0.]]))[0].round(3).tolist()
    [[8.0, 0.0]]
    """

    Params: ClassVar[Any] = MessageNormParams
    whole: ClassVar[tuple[str, ...]] = ("scale",)

    init_scale: float = 1.0
    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("MessageNorm", "init_scale", self.init_scale, "1.0")

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[MessageNormParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.full((), self.init_scale - self.scale_offset, self.param_dtype)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, message: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The message at its new length, and the state `()` as it came."""
        return self._applied(params, state, x, message, mask=mask), state


@function_of(MessageNorm)
def message_norm(
    x: ArrayLike,
    message: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    scale_offset,
    dtype,
    implementation,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """MessageNorm: the direction of a message, at the length of the features that it is added to.

        y = |x| message / max(|message|, epsilon) * (scale + scale_offset)

    with lengths over the last axis, all of which lies on one device. The gradient of |x| is 0 where x is 0. A graph
    network then makes `mlp(x + y)`.

    Args:
      x: the features, of shape (..., C). Integers are promoted to float32.
      message: what the neighbours sent, aggregated, of x's shape.
      scale: one number, or of a shape that broadcasts against x; None is 1.
      mask: as in every norm, of x and message alike.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a message of another shape; a bad epsilon or backend; a scale or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.

    Used by DeeperGCN's GENConv. Tier C: it may change in any release.

    Source: Li, Xiong, Thabet, Ghanem, "DeeperGCN: All You Need to Train Deeper GCNs" (2020), arXiv:2006.07739.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.message_norm(np.array([[0., 8.]]), np.array([[4., 0.]])).round(3).tolist()
    [[8.0, 0.0]]
    """
    norm = "message_norm"
    x = as_float_array(norm, x, rank=1, layout="the channels among its own")
    message = as_float_array(norm, message, what="message")
    if message.shape != x.shape:
        raise ValueError(
            f"{norm}: message of shape {message.shape} must have x's shape {x.shape}. "
            "Write the messages' sum or mean over the neighbours of each node."
        )
    axes = (x.ndim - 1,)
    offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    scale = align_param(norm, "scale", scale, x.shape, axes)
    x, keep = align_boolean_mask(norm, x, mask)
    size = recompute(_length, implementation == "lax")(x, keep)
    times = size if scale is None else size * (scale.astype(size.dtype) + offset)
    return normalize_length(
        norm, message, times, axes, epsilon_mode="max", scale_offset=0.0, mask=mask, axis_name=None,
        axis_index_groups=None, dtype=x.dtype if dtype is None else dtype, implementation=implementation, **options,
    )  # fmt: skip


def _length(x: Array, keep: Array | None) -> Array:
    """The length along the last axis of what counts, with a derivative of 0 at 0."""
    wide = finite_where_masked(x, keep)
    wide = wide if keep is None else jnp.where(keep, wide, 0.0)
    unit = unit_of(wide, (-1,))
    square = abs_squared(wide / unit).sum(-1, keepdims=True)
    return unit * jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))
