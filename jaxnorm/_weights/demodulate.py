"""Weight demodulation: a style scales the inputs of a weight, and each output's length is divided out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import as_float_array, canonicalize_axes
from .._core.collectives import max_over_devices, psum_grouped, slots_over_devices
from .._core.dtypes import accumulator, widest
from .._core.types import AxisName
from .base import BY_LIKE, Reparametrization, bound_names

Array = jax.Array


def demodulation_scales(
    w: ArrayLike, style: ArrayLike, *, axis: int = -1, in_axis: int = -2, epsilon: float = 1e-8,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """The form of `demodulate` on activations: two factors around one convolution for the whole batch.

        conv(x * in_scale, w) * out_scale  ==  conv of each example by its own weight

    The styles are divided by their largest, exactly undone by out_scale, so that float16 holds x * in_scale.

    Args:
      w: the weight, such as (..., in, out).
      style: (N, in).
      axis: the output axis.
      in_axis: the input axis.
      epsilon: inside of the root.
      axis_name: inside `shard_map`, the mesh axes over which inputs or space are split. Under jit, leave it out.

    Returns:
      in_scale (N, in) and out_scale (N, out), in float32 or wider. Put axes of size 1 between for space.

    Source: Karras, Laine, Aittala, Hellsten, Lehtinen, Aila, "Analyzing and Improving the Image Quality of StyleGAN"
    (2019), arXiv:1912.04958, section 2.2.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> in_scale, out_scale = weights.demodulation_scales(np.array([[3.], [4.]]), np.array([[2., 2.]]))
    >>> in_scale.tolist(), out_scale.round(3).tolist()
    ([[1.0, 1.0]], [[0.20000000298023224]])
    """
    w, style, kept, inner, rest = _checked(w, style, axis, in_axis)
    wide = accumulator(w)
    style = style.astype(widest(wide, style.dtype))
    largest = lax.stop_gradient(jnp.abs(style).max(1, keepdims=True, initial=0.0))
    most = lax.stop_gradient(jnp.abs(w).max(initial=0.0)).astype(wide).reshape(1, 1)
    unit, whole = nonzero_divisor(largest), nonzero_divisor(most)
    squares = jnp.square(w.astype(wide) / whole.reshape(())).sum(rest)  # the order of the two axes is kept
    squares = squares if inner < kept else squares.T
    total = jnp.matmul(jnp.square(style / unit), squares, precision=lax.Precision.HIGHEST)
    if names := bound_names(axis_name):
        total, largest, most = _merged(total, largest, most, names)
        unit, whole = nonzero_divisor(largest), nonzero_divisor(most)
    return style / unit, lax.rsqrt(total + epsilon / whole / whole / unit / unit) / whole


def _merged(total: Array, largest: Array, most: Array, names: tuple[str, ...]) -> tuple[Array, Array, Array]:
    """The sum of squares of all devices, each in units of its own two largest, in those of all: one all-reduce."""

    def share(largest, most, unit, whole) -> Array:
        return jnp.square(largest / nonzero_divisor(unit) * (most / nonzero_divisor(whole)))

    slots = slots_over_devices([total, largest, most], names)
    if slots is None:  # too large for a slot each: two all-reduces
        unit, whole = (max_over_devices(a, names, None) for a in (largest, most))
        return psum_grouped([total * share(largest, most, unit, whole)], names, None)[0], unit, whole
    total, largest, most = slots[0], *map(lax.stop_gradient, slots[1:])
    unit, whole = largest.max(0, keepdims=True), most.max(0, keepdims=True)
    return (total * share(largest, most, unit, whole)).sum(0), unit[0], whole[0]


def demodulate(
    w: ArrayLike, style: ArrayLike, *, axis: int = -1, in_axis: int = -2, epsilon: float = 1e-8,
    axis_name: AxisName | None = None, dtype: DTypeLike | None = None,
) -> Array:  # fmt: skip
    """A demodulated weight for each example.

        w_n = w style_n,      w_n / sqrt(sum(w_n^2) + epsilon), sum over inputs and space

    It has the size of w for each example, for a grouped convolution. `demodulation_scales` needs one convolution.

    Args:
      w: the weight, such as (..., in, out).
      style: (N, in).
      axis: the output axis.
      in_axis: the input axis.
      epsilon: inside of the root.
      axis_name: inside `shard_map`, the mesh axes over which inputs or space are split. Under jit, leave it out.
      dtype: of the result; None is w's.

    Returns:
      An array of shape (N, *w.shape).

    Raises:
      ValueError: a style whose shape does not fit w.

    Used by StyleGAN 2 and 3 and GigaGAN.

    Source: Karras et al. (2019), arXiv:1912.04958, section 2.2.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.demodulate(np.array([[3.], [4.]]), np.array([[2., 2.]])).round(3).tolist()
    [[[0.6000000238418579], [0.800000011920929]]]
    """
    w, style, kept, inner, _ = _checked(w, style, axis, in_axis)
    in_scale, out_scale = demodulation_scales(w, style, axis=kept, in_axis=inner, epsilon=epsilon, axis_name=axis_name)
    spread = lambda a, at: a.reshape(a.shape[0], *(a.shape[1] if i == at else 1 for i in range(w.ndim)))
    y = w.astype(in_scale.dtype)[None] * spread(in_scale, inner) * spread(out_scale, kept)
    return y.astype(dtype or w.dtype)


def _checked(w, style, axis: int, in_axis: int) -> tuple[Array, Array, int, int, tuple[int, ...]]:
    norm = "demodulate"
    w, style = as_float_array(norm, w, rank=2, layout="(..., in, out)", what="w"), as_float_array(norm, style)
    (kept,) = canonicalize_axes(norm, w.ndim, axis, most=1)
    (inner,) = canonicalize_axes(norm, w.ndim, in_axis, what="in_axis", most=1)
    if style.ndim != 2 or style.shape[1] != w.shape[inner] or kept == inner:
        raise ValueError(
            f"{norm}: style of shape {style.shape} must be (examples, {w.shape[inner]}) for w of shape {w.shape} with "
            f"in_axis={in_axis} and axis={axis}. Write style of shape (N, {w.shape[inner]})."
        )
    return w, style, kept, inner, tuple(a for a in range(w.ndim) if a not in (kept, inner))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demodulate(Reparametrization):
    """The hyperparameters of `demodulate`. The parameter is w itself, and `apply` takes the style.

    Args:
      axis, in_axis, epsilon, axis_name, dtype: of `demodulate`.
      like: "torch" is axis=0, in_axis=1.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> w, state = weights.Demodulate().init(np.array([[3.], [4.]], "f"))
    >>> weights.Demodulate().apply(w, style=np.ones((5, 2), "f"))[0].shape
    (5, 2, 1)
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {
        None: {"axis": -1, "in_axis": -2},
        "torch": {"axis": 0, "in_axis": 1},
    }

    axis: int = BY_LIKE
    in_axis: int = BY_LIKE
    epsilon: float = 1e-8
    axis_name: AxisName | None = None
    dtype: DTypeLike | None = None

    def apply(self, params: Any, state: Any = (), style: Any = None, *, train: bool = False) -> tuple[Array, Any]:
        if style is None:
            raise TypeError("Demodulate: apply needs a style of shape (N, in). Write spec.apply(w, style=style).")
        w = demodulate(
            params, style, axis=self.axis, in_axis=self.in_axis, epsilon=self.epsilon, axis_name=self.axis_name,
            dtype=self.dtype,
        )  # fmt: skip
        return w, state
