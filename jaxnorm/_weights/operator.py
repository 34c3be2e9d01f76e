"""The linear maps whose norm is taken: a matrix, or a convolution. Products are in float32 or wider."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arrays import sizes_along
from .._core.dtypes import accumulator
from .._core.messages import shown
from .._core.types import AxisName
from .base import length, split_axes, summed

Array = jax.Array


class Operator(Protocol):
    """v -> W v, and u -> W^T u. v is split over the mesh axes `axis_name`, u over `out_axis_name`."""

    @property
    def axis_name(self) -> AxisName | None: ...
    @property
    def out_axis_name(self) -> AxisName | None: ...
    def out_shape(self, w: Array) -> tuple[int, ...]: ...
    def forward(self, w: Array, v: Array) -> Array: ...
    def adjoint(self, w: Array, u: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Matrix:
    """w with its axes `kept` as rows and the others as columns. Nothing is transposed."""

    kept: tuple[int, ...]
    rest: tuple[int, ...]
    axis_name: AxisName | None
    out_axis_name: AxisName | None

    @classmethod
    def of(
        cls, name: str, w: Array, axis: int | Sequence[int], axis_name: AxisName | None, out_axis_name: AxisName | None
    ) -> Matrix:
        kept, rest = split_axes(name, w, axis)
        if not kept or not rest:
            raise ValueError(
                f"{name}: axis={shown(axis)} leaves no matrix of w, whose shape is {w.shape}. Write axis=-1."
            )
        return cls(kept, rest, axis_name, out_axis_name)

    def out_shape(self, w: Array) -> tuple[int, ...]:
        return sizes_along(w.shape, self.kept)

    def forward(self, w: Array, v: Array) -> Array:
        return summed(_contracted(w, v, self.rest), self.axis_name)

    def adjoint(self, w: Array, u: Array) -> Array:
        return summed(_contracted(w, u, self.kept), self.out_axis_name)


def _contracted(w: Array, vector: Array, axes: tuple[int, ...]) -> Array:
    wide = accumulator(w)
    left, right = w.astype(wide), vector.astype(wide)
    of_left, of_right = axes, tuple(range(len(axes)))
    if 0 in axes:  # XLA for CPU copies the left one, transposed, unless its last axes are contracted
        left, right, of_left, of_right = right, left, of_right, of_left
    return lax.dot_general(left, right, ((of_left, of_right), ((), ())), precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A kernel (..., in, out) over an input (..., in) of known size."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    axis_name: AxisName | None = None
    out_axis_name: AxisName | None = None

    @classmethod
    def of(cls, name: str, w: Array, size: Any, strides: int | Sequence[int], padding: str) -> Convolution:
        size = (size,) if isinstance(size, int) else tuple(size)
        space = w.ndim - 2
        strides = (strides,) * space if isinstance(strides, int) else tuple(strides)
        if len(size) != space or len(strides) != space:
            raise ValueError(
                f"{name}: a kernel of shape {w.shape} has {space} axes in space; got input_size={size}, "
                f"strides={strides}. Write input_size={(32,) * space}."
            )
        return cls(size, strides, padding)

    def out_shape(self, w: Array) -> tuple[int, ...]:
        return jax.eval_shape(self.forward, w, jnp.zeros((*self.size, w.shape[-2]))).shape

    def forward(self, w: Array, v: Array) -> Array:
        space = "DHW"[-len(self.size) :] if len(self.size) <= 3 else ""
        layout = (f"N{space}C", f"{space}IO", f"N{space}C")
        wide = accumulator(w)
        return lax.conv_general_dilated(
            v.astype(wide)[None], w.astype(wide), self.strides, self.padding, dimension_numbers=layout,
            precision=lax.Precision.HIGHEST,
        )[0]  # fmt: skip

    def adjoint(self, w: Array, u: Array) -> Array:
        of_input = jax.ShapeDtypeStruct((*self.size, w.shape[-2]), accumulator(w))
        return jax.linear_transpose(lambda v: self.forward(w, v), of_input)(u.astype(accumulator(w)))[0]


def unit(a: Array, axis_name: AxisName | None, epsilon: float, mode: str) -> tuple[Array, Array]:
    """a over its length, and the inner product of both, which is the length but for epsilon.

    epsilon is "inside" of the root, or the least length ("max"). Zeros stay so.
    """
    whole = length(a, tuple(range(a.ndim)), axis_name)
    least = jnp.maximum(whole, epsilon**0.5 if mode == "inside" else epsilon)
    least = jnp.where(least == 0, 1.0, least)
    scaled = whole / least
    if mode == "inside":
        r = lax.rsqrt(jnp.where(whole == 0, 1.0, jnp.square(scaled) + (epsilon / least) / least))
        return a / least * r, (whole * (scaled * r)).reshape(())
    return a / least, (whole * scaled).reshape(())


def dot(a: Array, b: Array, axis_name: AxisName | None) -> Array:
    return summed((a.astype(b.dtype) * b).sum(), axis_name)
