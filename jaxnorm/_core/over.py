"""What a statistic is taken over, in two verbs: `sum` over its elements, and `spread` back to each of them.

The statistics, their tangents and the norms are written on these two, so a new way to share statistics is a class here.

Legend: x is any shape; statistics have x's rank, and `spread` ones broadcast against x. `ids` are an array operand that
travels with x, None for `Axes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from .dtypes import are_static
from .vma import by_jit, spec_of

Array = jax.Array


class Over(Protocol):
    """Frozen and hashable: part of the static `Reduction`."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of x that are summed whole, non-negative; they keep size 1."""
        ...

    def shape(self, x: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the statistics of an x of this shape."""
        ...

    def size(self, x: tuple[int, ...]) -> int:
        """The most elements that one statistic may be of."""
        ...

    def present(self, mask: Array | None, ids: Array | None) -> Array | None:
        """The mask, without the elements that no statistic is of."""
        ...

    def sum(self, a: Array, ids: Array | None) -> Array:
        """Of an array that broadcasts against x: from x's shape to the statistics' shape."""
        ...

    def spread(self, s: Array, ids: Array | None) -> Array:
        """From the statistics' shape to one that broadcasts against x; 0 for an element that no statistic is of."""
        ...


@dataclass(frozen=True)
class Axes:
    """All elements along some axes."""

    axes: tuple[int, ...]

    def shape(self, x):
        return tuple(1 if a in self.axes else size for a, size in enumerate(x))

    def size(self, x):
        return math.prod(map(x.__getitem__, self.axes))

    def present(self, mask, ids):
        return mask

    def sum(self, a, ids):
        return a.sum(self.axes, keepdims=True)

    def spread(self, s, ids):
        return s


@dataclass(frozen=True)
class Groups:
    """All elements along some axes, of each of a `number` of equal groups of neighbouring channels, the last axis.

    Sums are of channels first. XLA for CPU takes five to fourteen times as long for sums over (..., groups, channels of
    a group) at once, and for elementwise operations on arrays of that shape, whose loops are short.
    """

    axes: tuple[int, ...]  # beside that of channels
    number: int
    channels: int

    @property
    def each(self) -> int:
        """The channels of a group."""
        return self.channels // self.number

    def shape(self, x):
        return (*(1 if a in self.axes else n for a, n in enumerate(x[:-1])), self.number)

    def size(self, x):
        return math.prod(map(x.__getitem__, self.axes)) * self.each

    def present(self, mask, ids):
        return mask

    def sum(self, a, ids):
        a = a.sum(self.axes, keepdims=True)
        if a.shape[-1] == 1:
            return a * self.each
        return a.reshape(*a.shape[:-1], self.number, self.each).sum(-1)

    def spread(self, s, ids):
        if s.shape[-1] == 1 != self.number:
            return s
        return jnp.broadcast_to(s[..., None], (*s.shape[:-1], self.number, self.each)).reshape(*s.shape[:-1], -1)

    def split(self, a: Array) -> Array:
        """a with its channels in groups, an axis more."""
        one = a.shape[-1] == 1 != self.channels
        return a.reshape(*a.shape[:-1], *((1, 1) if one else (self.number, self.each)))

    def joined(self, a: Array) -> Array:
        """What `split` makes of it, made of a."""
        *others, number, each = a.shape
        if number == each == 1:
            return a.reshape(*others, 1)
        return jnp.broadcast_to(a, (*others, self.number, self.each)).reshape(*others, self.channels)


@dataclass(frozen=True)
class Prefix:
    """All elements up to each place of one axis, and all along some others: each place has a statistic of its own."""

    axis: int
    length: int  # of x along it
    axes: tuple[int, ...] = ()  # beside it

    def shape(self, x):
        return Axes(self.axes).shape(x)

    def size(self, x):
        return math.prod(map(x.__getitem__, self.axes)) * self.length

    def present(self, mask, ids):
        return mask

    def sum(self, a, ids):
        a = a.sum(self.axes, keepdims=True) if self.axes else a
        places = (*a.shape[: self.axis], self.length, *a.shape[self.axis + 1 :])
        return lax.cumsum(jnp.broadcast_to(a, places), self.axis)

    def spread(self, s, ids):
        return s


_BLOCKS = 64  # of rows, at most, that are summed each by itself
_BESIDE = 16  # ... as long as all their sums have a 16th of the rows


@dataclass(frozen=True)
class Segments:
    """The rows that carry the same id, and further axes. A row is a place along the first axes of x, which ids cover.

    `ids` are int32 of x's rank, with size 1 beyond the rows' axes. A row whose id is not in 0..num_segments - 1 is
    absent. Statistics have the shape (1, ..., 1, num_segments) along the rows' axes. Ids mean the same on all devices.

    On a TPU a gather is a kernel of its own. Where channels have statistics of their own, each that is spread is of x's
    size, in float32, written and read again: in bfloat16 four passes over x for each.
    """

    num_segments: int
    axes: tuple[int, ...] = ()  # beside those of rows
    rows: int = 1  # how many leading axes rows have
    indices_are_sorted: bool = False  # in the order of rows in memory

    def shape(self, x):
        of_rows = (1,) * (self.rows - 1) + (self.num_segments,)
        return of_rows + tuple(1 if a in self.axes else n for a, n in enumerate(x) if a >= self.rows)

    def size(self, x):
        return math.prod(n for a, n in enumerate(x) if a < self.rows or a in self.axes)

    def present(self, mask, ids):
        present = (ids >= 0) & (ids < self.num_segments)
        return present if mask is None else mask & present

    def sum(self, a, ids):
        a = a.sum(self.axes, keepdims=True) if self.axes else a
        return by_jit(self._sum, (None,) * self.rows + spec_of(a)[self.rows :], a, ids)

    def spread(self, s, ids):
        return by_jit(self._spread, spec_of(ids)[: self.rows] + spec_of(s)[self.rows :], s, ids)

    def _sum(self, a: Array, ids: Array) -> Array:
        a = jnp.broadcast_to(a, ids.shape[: self.rows] + a.shape[self.rows :])
        slots, blocks = self._slots(ids)
        zeros = jnp.zeros((blocks * (self.num_segments + 2), *a.shape[self.rows :]), a.dtype)
        sums = zeros.at[slots].add(a, **self._indexing())
        sums = sums.reshape(blocks, self.num_segments + 2, *sums.shape[1:]).sum(0)
        return sums[1:-1].reshape((1,) * (self.rows - 1) + (self.num_segments, *sums.shape[1:]))

    def _spread(self, s: Array, ids: Array) -> Array:
        slots, blocks = self._slots(ids)
        s = s.reshape(s.shape[self.rows - 1 :])
        s = lax.pad(s, jnp.zeros((), s.dtype), [(1, 1, 0)] + [(0, 0, 0)] * (s.ndim - 1))
        s = jnp.broadcast_to(s, (blocks, *s.shape)).reshape(blocks * s.shape[0], *s.shape[1:])
        return s.at[slots].get(**self._indexing())

    def _slots(self, ids: Array) -> tuple[Array, int]:
        """Where each row is added up, and the number of blocks of rows.

        A block has num_segments + 2 slots of its own, the first and the last for absent rows, in the order of ids. XLA
        for CPU adds a slot's rows up in one chain, whose rounding errors grow with its length: blocks make it shorter.
        """
        ids = ids.reshape(ids.shape[: self.rows])
        slots, number = jnp.clip(ids, -1, self.num_segments) + 1, self.num_segments + 2
        rows = math.prod(ids.shape)
        blocks = min(_BLOCKS, rows // (_BESIDE * number)) if are_static(*ids.shape) else 1
        if blocks < 2:
            return slots, 1
        strides = [math.prod(ids.shape[a + 1 :]) for a in range(self.rows)]
        row = sum(lax.broadcasted_iota(jnp.int32, ids.shape, a) * stride for a, stride in enumerate(strides))
        return slots + number * (row // -(-rows // blocks)), blocks

    def _indexing(self) -> dict:
        return dict(indices_are_sorted=self.indices_are_sorted, mode="promise_in_bounds")
