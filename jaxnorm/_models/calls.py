"""Which norm of a model is called, by its path, in linen models, nnx models and functions of specs alike."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from .._core.intercept import Call, intercept
from .._core.loaded import is_a
from .._core.paths import path_of

Watcher = Callable[[str, Call, Callable[[], tuple[Any, Any]]], tuple[Any, Any]]


@contextlib.contextmanager
def watching(f: Watcher, model: Any = None, trees: tuple[Any, ...] = ()) -> Iterator[None]:
    """Within the context, `f(path, call, run)` stands in place of each call of a norm. `run()` is (y, state).

    The path of a linen layer is its own. That of an nnx layer is its place in `model`, the object that is called. That
    of a spec is the place of its parameters or its state in one of `trees`: the very arrays that the function is given,
    which under `jax.jit` are those inside of it. A call that is none of these is "LayerNorm_0", by its spec and its
    turn. Two calls of one layer have one path.
    """
    places = _places_of_modules(model) | _places_of_arrays(trees)
    turns: collections.Counter[str] = collections.Counter()

    def watch(call: Call, run: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        return f(_path(call, places, turns), call, run)

    with intercept(watch):
        yield


def _path(call: Call, places: dict[int, str], turns: collections.Counter[str]) -> str:
    if call.layer is not None:
        own = getattr(call.layer, "scope", None)  # a linen layer has a scope, and with it a path
        if own is not None:
            return "/".join(call.layer.path)
        if id(call.layer) in places:
            return places[id(call.layer)]
    else:
        for leaf in jax.tree.leaves((call.params, call.state)):
            if id(leaf) in places:
                return places[id(leaf)]
    name = type(call.spec).__name__
    turns[name] += 1
    return f"{name}_{turns[name] - 1}"


def _places_of_modules(model: Any) -> dict[int, str]:
    """The path of each nnx module inside of a model, by its identity."""
    if not is_a(model, "flax.nnx"):
        return {}
    from flax import nnx

    return {id(node): "/".join(map(str, path)) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}


def _places_of_arrays(trees: tuple[Any, ...]) -> dict[int, str]:
    """The path of the norm that each array of the trees belongs to: that of the array, without its own name."""
    places = {}
    for tree in trees:
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            places[id(leaf)] = path_of(keys[:-1])
    return places
