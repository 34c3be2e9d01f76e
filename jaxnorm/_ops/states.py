"""Running statistics in the forms that users have them in: NamedTuples, Flax's dicts, and trees of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._core.arrays import axis_that_fits, sizes_along
from .._core.messages import shown
from .._core.types import Moments, RunningStats

Array = jax.Array


def map_stats(name: str, f: Callable, state, *others) -> Any:
    """f of every `RunningStats` in a tree, in whichever form, and of what the other trees have in the same place."""
    nodes, treedef = jax.tree.flatten(state, is_leaf=is_stats)
    beside = [jax.tree.leaves(other, is_leaf=is_stats) for other in others]
    if any(len(other) != len(nodes) for other in beside):
        counts = [len(nodes), *map(len, beside)]
        raise TypeError(
            f"{name}: the trees hold {counts} running statistics, which must match. Write one for each in the state."
        )
    return jax.tree.unflatten(treedef, [_map_one(name, f, *parts) for parts in zip(nodes, *beside, strict=True)])


def _map_one(name: str, f: Callable, node, *others):
    """f of one node, put back in its own form."""
    return as_given(node, f(*(_stats(name, part) for part in (node, *others))))


def _stats(name: str, node) -> RunningStats | Moments:
    if not is_stats(node):
        raise TypeError(
            f"{name}: the tree holds {type(node).__name__}, which is no running statistic. Write the state alone: "
            "RunningStats, or the batch_stats of a Flax model."
        )
    return as_stats(node)


def is_stats(node) -> bool:
    if isinstance(node, (RunningStats, Moments)):
        return True
    names = {*node} if isinstance(node, Mapping) else set()
    return {"mean", "var"} <= names <= {"mean", "var", "count"} or names == {"mean", "m2", "count"}


def refuse_moments(name: str, state, write: str) -> None:
    if isinstance(state, Moments):
        raise TypeError(f"{name}: state must be running statistics, got Moments. Write {write}.")


def as_stats(node) -> RunningStats | Moments:
    """Return running statistics or moments, given as NamedTuples or mappings, as NamedTuples."""
    named = {_name(path): jnp.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(node)}
    return Moments(**named) if "m2" in named else RunningStats(**named)


def as_given(node, new: RunningStats | Moments) -> Any:
    """Return new statistics in the form of the old: as the tree that `node` is."""
    if type(node) is type(new):
        return new
    order = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(node)]
    return jax.tree.unflatten(jax.tree.structure(node), [getattr(new, key) for key in order])


def _name(path) -> str:
    """What a leaf of such a node is called there: by key in a mapping, by attribute in a NamedTuple."""
    return getattr(path[0], "name", None) or path[0].key


def checked_state(
    norm: str, state, channels: tuple[int, ...], x: Array, needs_count: bool, lead: tuple[int, ...] = ()
) -> Any:
    """The state of a batch norm of x as a NamedTuple of arrays. Raises if it does not fit x.

    `lead` are the sizes of the axes that it has before those of the features.
    """
    features = lead + sizes_along(x.shape, channels)
    if not isinstance(state, (RunningStats, Moments)):
        if not is_stats(state):
            several = isinstance(state, (tuple, list)) and len(state) in (2, 3)
            write = f"params, state = jaxnorm.BatchNorm().init({features})"
            write = "state=jaxnorm.RunningStats(*state)" if several else write
            raise TypeError(
                f"{norm}: state must be a jaxnorm.RunningStats, or a dict of mean and var (and count); "
                f"got {shown(state)}. Write {write}."
            )
        state = as_stats(state)
    state = jax.tree.map(jnp.asarray, state)
    for what, a in state._asdict().items():
        if a is not None and a.shape != features:
            axis = axis_that_fits(a.shape, x.shape, channels)
            write = f"jaxnorm.BatchNorm(...).init({features}), or set axis= to the channel axis"
            write = write if axis is None else f"axis={axis}, where x has {x.shape[axis]}"
            raise ValueError(
                f"{norm}: state.{what} of shape {a.shape} does not fit the {features} features of x {x.shape}. "
                f"Write {write}."
            )
    if needs_count and state.count is None:
        raise ValueError(
            f"{norm}: momentum=None and zero_debias=True need state.count, which is None. "
            f"Write state._replace(count=jnp.zeros({features}))."
        )
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"{norm}: a complex x needs a complex running mean, got {state.mean.dtype}. "
            "Write state._replace(mean=state.mean.astype(jnp.complex64))."
        )
    return state
