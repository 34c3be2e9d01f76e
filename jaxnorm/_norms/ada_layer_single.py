"""Adaptive layer normalization with one dense layer for all blocks of a model, and a table in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.dtypes import widest
from .._core.types import Features
from .._ops.modulate import gated, modulated
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec
from .modulated import ModulatedSpec

Array = jax.Array


class AdaLayerNormSingleParams(NamedTuple):
    """The parameters of `ada_layer_norm_single`."""

    table: Array  # (P, C), added to the modulation that all blocks share
    scale: Array | None  # feature shape: of the norm itself
    bias: Array | None  # the same
    condition_kernel: Array | None  # (K, P C): of a dense layer, where this norm has one of its own
    condition_bias: Array | None  # (P C,)


@spec
class AdaLayerNormSingle(ModulatedSpec, RowSpec):
    """The hyperparameters of `ada_layer_norm_single`. The shared modulation is an argument of `apply`, after x.

    The table starts from zeros, as in Krea 2. PixArt draws it from a normal distribution over sqrt(C): give a Flax
    layer `table_init=nn.initializers.normal(C**-0.5)`.

    Args:
      axis: the axis normalized over, that of the channels.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AdaLayerNormSingle(parts="shift scale", epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[[1., 3.]]]), np.array([[5., 0., 0., 1.]]))[0].tolist()
    [[[4.0, 2.0]]]
    """

    parts: str = "shift scale gate"
    axis: int = -1
    epsilon: float = 1e-6

    Params: ClassVar[Any] = AdaLayerNormSingleParams
    whole: ClassVar[tuple[str, ...]] = ("table", "condition_kernel", "condition_bias")
    decays: ClassVar[tuple[str, ...]] = ("condition_kernel",)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[AdaLayerNormSingleParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        if name != "table":
            return super().init_param(name, shape)
        return super().init_param("condition_bias", shape).reshape(-1, *shape)


@function_of(AdaLayerNormSingle)
def ada_layer_norm_single(
    x: ArrayLike,
    modulation: ArrayLike,
    table: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    parts,
    modulation_offset,
    scale_offset,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Any:
    """Layer norm with a modulation that all blocks share, and a table of this block's own (AdaLN-single).

        m = c + table;   y = layer_norm(x) (m.scale + 1) + m.shift,   stream = stream + m.gate * branch(y)

    One dense layer on silu(t) makes c for the whole model. A block of two branches has two of these norms; of six parts
    each takes three: `jnp.split(c, 2, -1)`, and of a checkpoint's table of six rows `jnp.split(table, 2)`.

    Args:
      x: array of shape (B, ..., C) with the channels at `axis`. Integers are promoted to float32.
      modulation: c, an array of shape (B, P C), or (B, T, P C) for each token, or (B, P, C) for a dense layer's output
        that was reshaped: the `parts` one after the other.
      table: of shape (P, C).
      scale: of the norm's own, of shape (C,) or of one that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      y, of x's shape; and where `parts` has a gate, that too, in y's dtype and of a shape that broadcasts against x.

    Raises:
      ValueError: a table or modulation that does not have these parts; and what `ada_layer_norm` raises.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Source: Chen et al., "PixArt-alpha" (2023), arXiv:2310.00426, section 2.3. Used by PixArt, Sana, LTX, Wan and Latte.

    >>> import jaxnorm as jn, numpy as np
    >>> x, c, table = np.array([[[1., 3.]]]), np.array([[5., 0., 0., 0.]]), np.array([[0., 0.], [0., 1.]])
    >>> jn.ada_layer_norm_single(x, c, table, parts="shift scale", epsilon=0.).tolist()
    [[[4.0, 2.0]]]
    """
    norm = "ada_layer_norm_single"
    x = as_float_array(norm, x, rank=1, layout="(batch, ..., channels)")
    axes = canonicalize_axes(norm, x.ndim, axis, most=1)
    channels, number = x.shape[axes[0]], len(parts.split())
    table, c = as_float_array(norm, table, what="table"), as_float_array(norm, modulation, what="modulation")
    if table.shape != (number, channels):
        raise ValueError(
            f"{norm}: table must have a row for each of the parts ({parts}), {(number, channels)}; got {table.shape}. "
            f"Write jnp.split(table, {max(table.shape[0] // number, 1) if table.ndim else 1})[0]."
        )
    if c.ndim > 1 and c.shape[-2:] == table.shape:
        c = c.reshape(*c.shape[:-2], number * channels)
    wide = widest(c.dtype, table.dtype)
    if c.ndim and c.shape[-1] == number * channels:
        c = c.astype(wide) + table.astype(wide).reshape((1,) * (c.ndim - 1) + (-1,))
    affine, gate = modulated(norm, c, parts, x.shape, axes[0], scale, bias, scale_offset, modulation_offset)
    return gated(normalize_rows(norm, x, axes=axes, feature_axes=axes, mask=mask, **affine, **options), gate)
