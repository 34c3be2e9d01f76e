"""A norm with a gate, as state-space and linear-attention models have it at the end of a mixer.

Legend: C channels, G groups of them, f the activation of the gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
from jax.typing import ArrayLike

from .._core.arrays import align_gate, as_float_array, canonicalize_axes
from .._core.channels import canonicalize_group_count, spans_devices, split_channels
from .._core.checks import canonicalize_flags, check_cast
from .._core.explain import explained
from .._core.messages import shown, to_python
from .._core.types import Features
from .._ops.activation import Activation
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import S, function_of, spec

Array = jax.Array


class GatedParams(NamedTuple):
    """The parameters of `gated_rms_norm`."""

    scale: Array | None  # of the size of x's `axis`


@spec
class GatedRMSNorm(RowSpec):
    """The hyperparameters of `gated_rms_norm`. The gate is an argument of `apply`, after x.

    Args:
      axis: the axis normalized over.
      group_size: C / G: normalize each run of `group_size` channels on its own, as tensor parallel models
        need (Mamba-2: d_inner // ngroups). None is all of them.
      norm_before_gate: whether the gate multiplies what comes out of the norm, or what goes in.
      activation: f: "silu", "sigmoid" (Kimi Delta Attention), another name or elementwise function; see `layer_norm`.
      epsilon: added to the mean square, in units of x squared; >= 0. (mamba_ssm has 1e-5.)
      cast: as for `rms_norm`; "before_scale" rounds to the output's dtype also before the scale and before the gate.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.GatedRMSNorm(epsilon=0., activation="sigmoid")
    >>> params, state = norm.init(2)
    >>> y, state = norm.apply(params, state, np.array([[3., -3.]]), np.array([[0., 1.]]))
    >>> y.round(3).tolist()
    [[0.5, -0.7310000061988831]]
    """

    Params: ClassVar[Any] = GatedParams

    axis: int = -1
    group_size: int | None = None
    norm_before_gate: bool = True
    activation: Activation = "silu"
    epsilon: float = 1e-6
    cast: str = "after_scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cast("GatedRMSNorm", self.cast)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[GatedParams, tuple[()]]: ...

    @explained("apply")
    def apply(
        self, params: Any, state: S, x: ArrayLike, gate: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The normalized and gated x, and the state `()` as it came."""
        return self._applied(params, state, x, gate, mask=mask), state


@function_of(GatedRMSNorm)
def gated_rms_norm(
    x: ArrayLike,
    gate: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis,
    group_size,
    norm_before_gate,
    activation,
    cast,
    axis_name,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """RMS norm and a gate.

        norm_before_gate=True:   y = rms_norm(x) * scale * f(gate)     gated DeltaNet, RetNet, Qwen3-Next
        norm_before_gate=False:  y = rms_norm(x * f(gate)) * scale     Mamba-2 as it is trained

    mamba_ssm's `RMSNormGated` has the first as its default, and its `Mamba2` asks for the second. All of it is in
    float32 or wider and rounded once; the backward pass keeps x and the gate, each in its own dtype.

    Args:
      x: array of any shape of rank 1 or more, the channels at `axis`. Integers are promoted to float32.
      gate: of x's shape, or of one that broadcasts to it (per head: (B, T, H, 1)).
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a gate, scale or mask that fits x nowhere; a group size that does not divide C; a bad axis, epsilon,
        cast, activation, or backend.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by Mamba-2 (gate first), Qwen3-Next and RetNet (norm first).

    Source: Dao, Gu, "Transformers are SSMs" (2024), arXiv:2405.21060, section 7; for the norm before the gate Sun et
    al., "Retentive Network" (2023), arXiv:2307.08621.

    >>> import jaxnorm as jn, numpy as np
    >>> x, gate = np.array([[3., -3.]]), np.array([[0., 1.]])
    >>> jn.gated_rms_norm(x, gate, epsilon=0., activation="sigmoid").round(3).tolist()
    [[0.5, -0.7310000061988831]]
    """
    norm = "gated_rms_norm"
    check_cast(norm, cast)
    x = as_float_array(norm, x, rank=1, layout="the normalized axis among its own")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    (norm_before_gate,) = canonicalize_flags(norm, norm_before_gate=norm_before_gate)
    if activation is None:
        write = 'Write activation="silu", or rms_norm(x) * gate.'
        raise ValueError(f"{norm}: activation=None leaves nothing to gate with. {write}")
    groups = 1 if group_size is None else canonicalize_group_count(norm, x.shape[channel], None, group_size)
    if groups != 1 and axis_name is not None:
        raise ValueError(
            f"{norm}: group_size={to_python(group_size)} makes {groups} groups on each device, and "
            f"axis_name={shown(axis_name)} would merge them with those of others. Write axis_name=None."
        )
    one = groups == 1  # then x is seen as it is
    return normalize_rows(
        norm, x, scale, None, (channel if one else channel + 1,), (channel,),
        activation=activation, mask=mask, axis_name=axis_name, **options,
        centered=False, cast_before_scale=cast == "before_scale",
        gate=align_gate(norm, gate, x), gate_where="after" if norm_before_gate else "before",
        view=lambda a: a if one else split_channels(a, x.shape, channel, groups),
        spans_devices=not one and spans_devices(x, channel, groups),
    )  # fmt: skip
