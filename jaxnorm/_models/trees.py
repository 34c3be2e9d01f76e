"""Trees of parameters by path: what kind of model they are of, and parts of them read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from .._core.loaded import is_a
from .._core.messages import shown
from .._norms.base import Spec

Keys = tuple[Any, ...]


def kind_of(tool: str, model: Any) -> str:
    """Whether a model is "linen", "nnx", or a tree of "specs". Raises on anything else."""
    for kind in ("linen", "nnx"):
        if is_a(model, f"flax.{kind}"):
            return kind
    if any(isinstance(leaf, Spec) for leaf in jax.tree.leaves(model)):
        return "specs"
    raise TypeError(
        f"{tool}: the model must be a linen or nnx module, or a tree of specs, got {shown(model)}. Write "
        f"{tool}(model, ...) with the model itself, not its variables."
    )


def child(tree: Any, key: Any, default: Any = None) -> Any:
    """What a tree has under one key: of a mapping, a sequence or a NamedTuple."""
    name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
    if isinstance(tree, Mapping):
        return tree.get(name, default)
    if isinstance(tree, (tuple, list)) and isinstance(name, int):
        return tree[name] if name < len(tree) else default
    return getattr(tree, name, default) if isinstance(name, str) else default


def get(tree: Any, keys: Keys, default: Any = None) -> Any:
    """What a tree has under a path of keys."""
    for key in keys:
        tree = child(tree, key, default)
        if tree is default:
            return default
    return tree


def put(tree: Any, keys: Keys, value: Any) -> Any:
    """The tree with another value under a path. Mappings on the way are made, and where nothing is left, taken away."""
    if not keys:
        return value
    key, *rest = keys
    name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
    inside = put(child(tree, key), tuple(rest), value)
    if isinstance(tree, Mapping) or tree is None:
        own = dict(tree or {})
        own.pop(name, None) if _nothing(inside) else own.update({name: inside})
        order = {k: own[k] for k in [*(tree or {}), *own] if k in own}
        mapping: Any = dict if tree is None else type(tree)
        return order if mapping is dict else mapping(order)
    if hasattr(tree, "_fields"):
        return tree._replace(**{name: inside})
    if isinstance(tree, (tuple, list)):
        kind: Any = type(tree)
        return kind([*tree[:name], inside, *tree[name + 1 :]])
    raise TypeError(f"cannot write into {shown(tree)} of a tree. Write dicts, lists, tuples or NamedTuples.")


def _nothing(tree: Any) -> bool:
    return tree is None or (isinstance(tree, Mapping) and not tree)
