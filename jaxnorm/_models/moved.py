"""A factor for each channel, moved through the operations that rearrange an array: back to their input, or on to it.

A factor is a float64 NumPy array of the rank of the value that it belongs to, and broadcasts to it. `back` and `on`
return None where no factor of the other side is equal to it.
"""

from __future__ import annotations

import math

import numpy as np

from .graph import Step, Value

SAME = {"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint", "name"}
REARRANGE = SAME | {"reshape", "transpose", "squeeze", "expand_dims", "rev", "broadcast_in_dim"}


def back(step: Step, factor: np.ndarray) -> np.ndarray | None:
    """The factor of the input of a step that rearranges, from that of its output."""
    before, after = step.ins[0].shape, step.outs[0].shape
    if step.name in SAME:
        return factor if step.outs[0].dtype.itemsize > 1 and np.dtype(step.outs[0].dtype).kind not in "iu" else None
    if step.name in ("reshape", "squeeze", "expand_dims"):
        return _regrouped(factor, after, before) if _plain(step) else None
    if step.name == "transpose":
        return factor.transpose(np.argsort(step.params["permutation"]))
    if step.name == "rev":
        return _reversed(step, factor)
    if step.name == "broadcast_in_dim":
        to = step.params["broadcast_dimensions"]
        sizes = [before[to.index(a)] if a in to else 1 for a in range(len(after))]
        fitting = fit(factor, tuple(sizes))
        return None if fitting is None else fitting.reshape([fitting.shape[a] for a in to])
    if step.name == "slice":
        return fit(factor, tuple(n if n == m else 1 for n, m in zip(before, after, strict=True)))
    return None


def on(step: Step, factor: np.ndarray) -> np.ndarray | None:
    """The factor of the output of a step that rearranges its first input, from that of the input."""
    before, after = step.ins[0].shape, step.outs[0].shape
    if step.name in SAME:
        return factor if step.outs[0].dtype.itemsize > 1 and np.dtype(step.outs[0].dtype).kind not in "iu" else None
    if step.name in ("reshape", "squeeze", "expand_dims"):
        return _regrouped(factor, before, after) if _plain(step) else None
    if step.name == "transpose":
        return factor.transpose(step.params["permutation"])
    if step.name == "rev":
        return _reversed(step, factor)
    if step.name == "broadcast_in_dim":
        sizes = [1] * len(after)
        for a, n in zip(step.params["broadcast_dimensions"], factor.shape, strict=True):
            sizes[a] = n
        return factor.reshape(sizes)
    if step.name == "slice":
        start, stop = step.params["start_indices"], step.params["limit_indices"]
        by = step.params["strides"] or (1,) * len(before)
        cut = lambda a: slice(start[a], stop[a], by[a]) if factor.shape[a] > 1 else slice(None)
        return factor[tuple(map(cut, range(factor.ndim)))]
    if step.name == "pad":
        still = [config == (0, 0, 0) for config in step.params["padding_config"]]
        return fit(factor, tuple(n if s else 1 for n, s in zip(before, still, strict=True)))
    if step.name in ("dynamic_slice", "split"):
        return fit(factor, tuple(n if n == m else 1 for n, m in zip(before, after, strict=True)))
    return None


def fit(factor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The factor, if it broadcasts to this shape once the axes along which it is constant have size 1."""
    factor = collapsed(factor)
    if not shape:
        return factor.reshape(()) if factor.size == 1 else None
    return factor if all(n in (1, m) for n, m in zip(factor.shape, shape, strict=True)) else None


def chain(value: Value, may_return: bool = False) -> list[Step] | None:
    """The steps from a variable to this value, last one first, if all rearrange and nothing else reads. Else None.

    A state that the program returns too is one with `may_return`.
    """
    steps = []
    while len(value.read) == 1 and (may_return or not value.returned):
        if value.made is None:
            return steps if value.leaf is not None else None
        if value.made.name not in REARRANGE:
            return None
        steps.append(value.made)
        value = value.made.ins[0]
    return None


def origin(value: Value) -> int | None:
    """The number of the variable that a value is a rearrangement of."""
    while value.made is not None and value.made.name in REARRANGE:
        value = value.made.ins[0]
    return value.leaf


def leaf_of(value: Value, steps: list[Step]) -> int:
    """The number of the variable at the end of a chain."""
    leaf = (steps[-1].ins[0] if steps else value).leaf
    assert leaf is not None
    return leaf


def through(steps: list[Step], factor: np.ndarray | None) -> np.ndarray | None:
    """`back` through a chain."""
    for step in steps:
        factor = None if factor is None else back(step, factor)
    return factor


def rearranged(steps: list[Step], a: np.ndarray) -> np.ndarray:
    """What a chain makes of an array: it is not rounded."""
    for step in reversed(steps):
        moved = on(step, a)
        assert moved is not None
        a = np.broadcast_to(moved, step.outs[0].shape)
    return a


def _plain(step: Step) -> bool:
    return step.params.get("dimensions") is None or step.name != "reshape"


def _reversed(step: Step, factor: np.ndarray) -> np.ndarray:
    return np.flip(factor, tuple(a for a in step.params["dimensions"] if factor.shape[a] > 1))


def collapsed(factor: np.ndarray) -> np.ndarray:
    """With size 1 along the axes where it is constant."""
    for axis in range(factor.ndim):
        first = factor.take([0], axis) if factor.shape[axis] > 1 else factor
        if factor.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, factor.shape), factor):
            factor = first
    return factor


def _regrouped(factor: np.ndarray, before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray | None:
    """Through a reshape: runs of axes of equal size become each other, and a factor stays small along the others."""
    if 0 in before or 0 in after:
        return None
    sizes: list[int] = []
    shape: list[int] = []
    for left, right in _runs(before, after):
        own = factor.shape[left.start : left.stop]
        whole = math.prod(own) > 1
        sizes += before[left.start : left.stop] if whole else own
        shape += after[right.start : right.stop] if whole else [1] * len(right)
    return collapsed(np.broadcast_to(factor, sizes).reshape(shape))


def _runs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[range, range]]:
    """The shortest runs of axes of two shapes that hold equally many elements."""
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        a, b, n, m = i, j, 1, 1
        while True:
            if n <= m and i < len(before):
                n, i = n * before[i], i + 1
            elif j < len(after):
                m, j = m * after[j], j + 1
            else:
                n, i = n * before[i], i + 1
            if n == m:
                break
        runs.append((range(a, i), range(b, j)))
    return runs
