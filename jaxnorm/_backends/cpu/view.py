"""A norm as the shape that the CPU kernels know: (B, N, S, G, D, P), as in view.h."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from ..._core.dtypes import are_static


class View(NamedTuple):
    """x's axes grouped into (B, N, S, G, D, P): sizes, and which of them a scale or a bias is spread over."""

    sizes: tuple[int, ...]
    parameters: tuple[int, ...]  # x's rank: the sizes of the axes that belong to B, G and D, 1 elsewhere
    slots: tuple[int, ...] = ()  # x's rank: which of the six each axis belongs to, -1 for those of size 1
    shape: tuple[int, ...] = ()  # x's

    def spread(self, shape: tuple[int, ...], slots: tuple[int, ...]) -> tuple[int, ...] | None:
        """What an array of this shape, which broadcasts to x, is spread to so that it covers these slots alone.

        None where it varies along others.
        """
        if any(n != 1 and slot not in slots for n, slot in zip(shape, self.slots, strict=True)):
            return None
        return tuple(n if slot in slots else 1 for n, slot in zip(self.shape, self.slots, strict=True))

    @property
    def has_rows(self) -> bool:
        """Whether an example is rows, each with its statistic, and no slab of lines."""
        return self.sizes[_S] == 1

    @property
    def elements(self) -> int:
        """The number of elements of one statistic."""
        return math.prod(self.sizes[slot] for slot in _REDUCED)


_B, _N, _S, _G, _D, _P = range(6)
OF_ROWS, OF_LINES = (_B, _N, _G), (_B, _N, _S)  # the slots that weights of whole rows, and of whole lines, cover
_REDUCED = (_S, _D, _P)
_VARIES = (_B, _G, _D)  # slots that parameters have an axis for
_RUN = 64  # pixels of a plane from which a loop over it is better than one over columns


def view_of(shape: tuple[int, ...], axes: tuple[int, ...], varying: frozenset[int]) -> View | None:
    """The view of an x of this shape, reduced over `axes`, with parameters along the axes `varying`; None without one.

    >>> view_of((8, 7, 7, 64), (0, 1, 2), frozenset({3})).sizes     # batch norm, channels last
    (1, 1, 392, 64, 1, 1)
    """
    return _view_of(shape, axes, varying) if are_static(*shape) else None


@functools.lru_cache(maxsize=4096)  # a search, asked for several times in each call of a norm
def _view_of(shape: tuple[int, ...], axes: tuple[int, ...], varying: frozenset[int]) -> View | None:
    runs: list[tuple[bool, bool, list[int]]] = []  # neighbouring axes of one kind, those of size 1 left out
    for axis, size in enumerate(shape):
        kind = (axis in axes, axis in varying)
        if size == 1:
            continue
        if runs and runs[-1][:2] == kind:
            runs[-1][2].append(axis)
        else:
            runs.append((*kind, [axis]))

    def fits(slots) -> bool:
        return all(
            (slot in _REDUCED) == reduced and (not varies or slot in _VARIES)
            for slot, (reduced, varies, _) in zip(slots, runs, strict=True)
        )

    def cost(slots) -> tuple:
        sizes = dict(zip(slots, (math.prod(shape[a] for a in run) for *_, run in runs), strict=True))
        short = _P in sizes and _S in sizes and sizes[_P] < _RUN
        # Parameters for each example only where they are; rows before slabs; planes where they are long enough.
        return (_B in slots, _S in slots, short, _P not in slots)

    fitting = [slots for slots in itertools.combinations(range(6), len(runs)) if fits(slots)]
    if not fitting:
        return None
    sizes, parameters, of_axis = [1] * 6, [1] * len(shape), [-1] * len(shape)
    for slot, (*_, run) in zip(min(fitting, key=cost), runs, strict=True):
        sizes[slot] = math.prod(shape[a] for a in run)
        for axis in run:
            of_axis[axis] = slot
            parameters[axis] = shape[axis] if slot in _VARIES else 1
    return View(tuple(sizes), tuple(parameters), tuple(of_axis), shape)
