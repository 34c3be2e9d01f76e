"""Gated norm: RMS norm, and a gate of low rank that is made of the normalized row itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_param, as_float_array, canonicalize_axes
from .._core.checks import canonicalize_number
from .._core.messages import shown, to_python
from .._core.types import Features
from .._core.vma import shard_like
from .._ops.activation import Activation, activate, check_activation_name
from .._ops.rows import normalize_rows
from .._ops.written import normalize_written
from .base import Spec
from .declare import function_of, spec

Array = jax.Array


class GatedNormParams(NamedTuple):
    """The parameters of `gated_norm`."""

    scale: Array | None  # feature shape (C,)
    down: Array  # (C, R)
    up: Array  # (R, C)
    pre_scale: Array | None  # feature shape (C,): of x before it is normalized


@spec
class GatedNorm(Spec):
    """The hyperparameters of `gated_norm`.

    `init` makes `up` of zeros: the gate is then 1/2 everywhere, and for gate_scale=2 the norm starts as RMS norm.
    `down` starts normal with deviation C**-0.5: from a key that is always the same, and in a Flax layer from the
    layer's.

    Args:
      use_pre_scale: whether `init` makes a pre_scale, of ones.
      init_rank: R, the rank of the gate: 16, or 128 in Marin.
      gate_scale: c, what multiplies the gate.
      gate_activation: f, between the two matrices: a name or an elementwise function.
      axis: the channel axis, which is normalized over.
      epsilon: added to the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.GatedNorm(gate_scale=2., epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[3., -3.]]))[0].round(3).tolist()
    [[1.0, -1.0]]
    """

    Params: ClassVar[Any] = GatedNormParams
    whole: ClassVar[tuple[str, ...]] = ("down", "up")
    decays: ClassVar[tuple[str, ...]] = ("down", "up")
    drawn: ClassVar[tuple[str, ...]] = ("down",)

    use_pre_scale: bool = False
    init_rank: int = 16
    gate_scale: float = 1.0
    gate_activation: Activation = "silu"
    axis: int = -1
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = to_python(self.init_rank)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"GatedNorm: init_rank must be an int >= 1, got {shown(rank)}. Write init_rank=16.")
        canonicalize_number("GatedNorm", "gate_scale", self.gate_scale, "1.0")
        _check_gate("GatedNorm", self.gate_activation)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[GatedNormParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        if name == "up":
            return jnp.zeros((self.init_rank, shape[-1] if shape else 1), self.param_dtype)
        return jnp.ones(shape, self.param_dtype) if name == "pre_scale" else super().init_param(name, shape)

    def draw_param(self, name: str, shape: tuple[int, ...], key: Array) -> Array:
        channels = shape[-1] if shape else 1
        normal = jax.random.normal(key, (channels, self.init_rank), jnp.float32)
        return (normal * max(channels, 1) ** -0.5).astype(self.param_dtype)


def _check_gate(norm: str, activation: Any) -> None:
    if activation is None:
        raise ValueError(f'{norm}: gate_activation must be a name or a function, got None. Write "silu".')
    check_activation_name(norm, activation)


@function_of(GatedNorm)
def gated_norm(
    x: ArrayLike,
    scale: ArrayLike | None,
    down: ArrayLike,
    up: ArrayLike,
    pre_scale: ArrayLike | None = None,
    *,
    gate_scale,
    gate_activation,
    axis,
    epsilon,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """RMS norm with a gate made of its own output. The gate of `gated_rms_norm` comes from outside.

        y = c h sigmoid(f(h down) up),   h = z / sqrt(mean(z^2) + epsilon) * (scale + scale_offset),   z = pre_scale x

    with the mean over `axis`. It rescales outlier features where a norm and an attention sink would make them, and so
    does pre_scale, also without a gate: `rms_norm(pre_scale * x)`. h and the gate are in float32 or wider; Marin has
    the gate in a module of its own, with c = 1, and rounds h before it.

    Args:
      x: array of any shape of rank 1 or more, the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      down: of shape (C, R).
      up: of shape (R, C).
      pre_scale: as scale. The paper calls it lambda. None is 1.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. What is masked out counts as 0,
        and gives 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: matrices of other shapes; a bad axis, epsilon, gate_scale, gate_activation or backend; a scale,
        pre_scale or mask that fits x nowhere.
      TypeError: a complex x; a dtype that cannot hold the result.

    Used by the Qwen team's experiments, and by Marin's GrugMoE.

    Source: Qiu et al., "A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling is Essential for
    Transformer Training" (2026), arXiv:2601.22966.

    >>> import jaxnorm as jn, numpy as np
    >>> x, down, up = np.array([[3., -3.]]), np.array([[1.], [0.]]), np.array([[0., 9.]])
    >>> jn.gated_norm(x, None, down, up, epsilon=0.).round(3).tolist()
    [[0.5, -0.999000072479248]]
    """
    norm = "gated_norm"
    x = as_float_array(norm, x, rank=1, layout="the channel axis among its own")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    gate_scale = canonicalize_number(norm, "gate_scale", gate_scale, "1.0")
    _check_gate(norm, gate_activation)
    down, up = as_float_array(norm, down, what="down"), as_float_array(norm, up, what="up")
    channels = x.shape[channel]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != channels or up.shape != down.shape[::-1]:
        raise ValueError(
            f"{norm}: down and up must be of shapes ({channels}, R) and (R, {channels}), got {down.shape} and "
            f"{up.shape}. Write down.reshape({channels}, -1), up.reshape(-1, {channels})."
        )
    plain, before = options["implementation"], align_param(norm, "pre_scale", pre_scale, x.shape, (channel,))
    before = None if before is None else shard_like(x, before)

    def f(x: Array, keep: Array | None, affine, down: Array, up: Array, before: Array | None) -> Array:
        x = x if before is None else x * before.astype(x.dtype)
        h = affine(normalize_rows(
            norm, x, None, None, (channel,), (channel,), epsilon=epsilon, scale_offset=0.0, mask=keep, axis_name=None,
            axis_index_groups=None, dtype=None, implementation=plain, centered=False,
        ))  # fmt: skip
        rows = jnp.moveaxis(h, channel, -1)
        inner = activate(gate_activation, jnp.matmul(rows, down.astype(h.dtype), precision="highest"))
        gate = jax.nn.sigmoid(jnp.matmul(inner, up.astype(h.dtype), precision="highest"))
        return gate_scale * h * jnp.moveaxis(gate, -1, channel)

    return normalize_written(norm, f, x, (down, up, before), scale, None, (channel,), mask=mask, **options)
