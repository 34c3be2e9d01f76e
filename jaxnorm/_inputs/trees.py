"""Trees of arrays with their statistics: which belong together, one update of all, and the map of all.

Legend: a tree is any pytree of arrays. Its state has `SeenStats` in the place of each array.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arrays import align_boolean_mask, as_float_array
from .._core.messages import shown, to_python
from .._core.over import Axes
from .._core.program import as_program
from .._core.types import AxisName
from .._ops.pointwise import normalize_pointwise
from .._ops.seen import Observed, SeenStats, join, see
from .base import Standardized

Array = jax.Array


class Leaf(NamedTuple):
    """One array of a tree, with its statistics."""

    norm: str  # what messages call it: the norm, and where in the tree it is
    x: Array
    seen: SeenStats
    mask: Any

    @property
    def observed(self) -> Observed:
        """x with its statistics' shape and mask, as `see` wants it."""
        x, mask = align_boolean_mask(self.norm, self.x, self.mask)
        lead = x.ndim - self.seen.mean.ndim
        shared = (a for a in range(lead, x.ndim) if self.seen.mean.shape[a - lead] == 1)
        return Observed(x, mask, Axes((*range(lead), *shared)), self.seen.mean.shape)


def empty_like(norm: str, features: Any, count: float) -> Any:
    """The state of a tree: a shape, or a tree of shapes or of arrays that have them, without batch axes."""

    def is_shape(a) -> bool:
        of_ints = isinstance(a, tuple) and not hasattr(a, "_fields") and all(_is_size(n) for n in a)
        return of_ints or _is_size(a) or hasattr(a, "shape")

    def one(a) -> SeenStats:
        shape = to_python(getattr(a, "shape", a))
        if not is_shape(a) or not (_is_size(shape) or all(_is_size(n) for n in shape)):
            raise ValueError(
                f"{norm}.init: needs the shape of one example, an int or a tuple of ints >= 0, or a tree of such, "
                f'got {shown(a)}. Write init(64), or init({{"image": (8, 8, 1)}}).'
            )
        return SeenStats.empty(shape, count)

    return jax.tree.map(one, features, is_leaf=is_shape)


def _is_size(n) -> bool:
    n = to_python(n)
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def is_seen(node: Any) -> bool:
    """Whether this is `SeenStats`, or a dict of the same, as a checkpoint restored without a template has it."""
    return isinstance(node, SeenStats) or (isinstance(node, Mapping) and {*node} == {*SeenStats._fields})


def as_seen(node: Any) -> SeenStats:
    seen = node if isinstance(node, SeenStats) else SeenStats(**node)
    return SeenStats(*map(jnp.asarray, seen))


def in_form_of(node: Any, new: SeenStats) -> Any:
    """New statistics in the form of the old."""
    return new if isinstance(node, SeenStats) else type(node)(**new._asdict())


def leaves_of(norm: str, state: Any, x: Any, mask: Any = None) -> tuple[list[Leaf], list[Any], Any]:
    """The arrays of a tree with their statistics, the states as they were given, and their tree. Raises if none fits.

    A mask is a tree like x, or one array. Of a tree of several arrays that covers the axes of the batch.
    """
    nodes, tree = jax.tree.flatten(state, is_leaf=is_seen)
    if not nodes or not all(map(is_seen, nodes)):
        wrong = next((n for n in nodes if not is_seen(n)), state)
        raise TypeError(
            f"{norm}: state must be statistics, or a tree of them like x; got {shown(wrong)}. "
            "Write params, state = norm.init(features)."
        )
    paths = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_seen)[0]
    names = [f"{norm}: at {jax.tree_util.keystr(path)}" if path else norm for path, _ in paths]
    alone = len(nodes) == 1 and not paths[0][0]
    given = _like_state(norm, "x", tree, x)
    one = hasattr(mask, "ndim") and not alone
    masks = [mask] * len(nodes) if mask is None or one else _like_state(norm, "mask", tree, mask)
    leaves = []
    for name, a, node, m in zip(names, given, nodes, masks, strict=True):
        a, seen = as_float_array(name, a), as_seen(node)
        if jnp.iscomplexobj(a):
            raise TypeError(f"{name}: x must be real, got {a.dtype}. Write jnp.stack([x.real, x.imag], -1).")
        features, lead = seen.mean.shape, a.ndim - seen.mean.ndim
        if lead < 0 or any(f not in (1, n) for f, n in zip(features, a.shape[lead:], strict=True)):
            raise ValueError(
                f"{name}: x of shape {a.shape} must end in the feature shape {features} of the state. "
                f"Write norm.init({a.shape[1:]}) for an x whose first axis is the batch."
            )
        leaves.append(Leaf(name, a, seen, _of_batch(name, m, a, lead) if one else m))
    return leaves, nodes, tree


def _like_state(norm: str, what: str, tree: Any, x: Any) -> list[Any]:
    try:
        return tree.flatten_up_to(x)
    except (ValueError, TypeError) as error:
        raise TypeError(
            f"{norm}: {what} must be a tree like the state, {tree}; got {shown(x)}. "
            f"Write {what} with the same keys, or norm.init of a tree like it."
        ) from error


def _of_batch(norm: str, mask: Any, x: Array, lead: int) -> Array:
    if mask.ndim > lead or mask.shape != x.shape[: mask.ndim]:
        raise ValueError(
            f"{norm}: one mask for a tree covers the batch axes, {x.shape[:lead]}; got shape {mask.shape}. "
            "Write a mask of that shape, or a tree of masks."
        )
    return jnp.asarray(mask).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def gathered(
    state: Any, x: Any, mask: Any, *, norm: str, axis_name: AxisName | None, skip_nonfinite: bool,
    momentum: float | None = None, until: float | None = None,
) -> Any:  # fmt: skip
    """The state after this batch."""
    leaves, nodes, tree = leaves_of(norm, state, x, mask)
    least = 0.0 if momentum is None else 1.0 - momentum
    new = []
    for leaf, batch in zip(leaves, see(norm, [leaf.observed for leaf in leaves], axis_name), strict=True):
        joined = join(leaf.seen, batch, least=least, skip_nonfinite=skip_nonfinite)
        if until is not None:
            joined = SeenStats(
                *(jnp.where(leaf.seen.count < until, n, o) for n, o in zip(joined, leaf.seen, strict=True))
            )
        new.append(joined)
    return jax.tree.unflatten(tree, [in_form_of(node, n) for node, n in zip(nodes, new, strict=True)])


gathered_in_program = as_program(gathered, ("norm", "axis_name", "skip_nonfinite", "until"))


def normalized(norm: str, f: Standardized, state: Any, x: Any, mask: Any, dtype: Any) -> Any:
    """f of a tree by its statistics."""
    leaves, _, tree = leaves_of(norm, state, x, mask)
    return jax.tree.unflatten(tree, [mapped(f, leaf, dtype) for leaf in leaves])


def mapped(f: Standardized, leaf: Leaf, dtype: Any) -> Array:
    """f of x by its statistics, which are constants. Of x's size x alone is kept for the backward pass."""
    seen = lax.stop_gradient(leaf.seen)
    own = {"mean": seen.mean, "mean_low": seen.mean_low, "std": seen.std}
    return normalize_pointwise(
        leaf.norm, f, leaf.x, own, None, None, (), scale_offset=0.0, activation=None, mask=leaf.mask, dtype=dtype,
        implementation=None,
    )  # fmt: skip
