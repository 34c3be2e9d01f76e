"""Surgery on linen models: the variables of replaced layers, made from the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from .._core.intercept import setting, traced_anew
from .._core.messages import shown
from .._core.paths import path_of
from .carry import carry, first_of, param_paths
from .outcome import Outcome
from .rules import Rules
from .surgery import Swap, row_of
from .trees import get, put


def swap_linen(tool: str, model: Any, rules: Rules, variables: Any, args: tuple, kwargs: dict[str, Any]) -> Swap:
    """A model of a subclass, and its variables."""
    from .._layers.swapped import swapped

    if not isinstance(variables, Mapping) or any(not isinstance(v, Mapping) for v in variables.values()):
        raise TypeError(
            f"{tool}: a linen model needs its variables and the arguments of its call, got {shown(variables)}. Write "
            f"{tool}(model, ..., variables, x), or models.Swapped(model, rules) for a model without variables."
        )
    new_model = swapped(model, rules)
    try:
        shapes, seen = traced(new_model, args, kwargs)
    except TypeError as error:
        if args or kwargs or "missing" not in str(error):
            raise
        raise TypeError(
            f"{tool}: the model's call needs arguments ({error}). Write {tool}(model, ..., variables, x)."
        ) from error
    rules.check([(path, norm.specs[-2], norm.layer) for path, norm in seen.items()])
    kept = {path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(variables.get("params", {}))[0]}
    rows, made = [], variables
    for path, norm in seen.items():
        old, new = norm.specs[-2:]
        why = None
        if norm.replaced:
            made, fresh, why = _converted(tool, path, norm, made, shapes)
            kept -= fresh
        rows.append(row_of(rules, path, old, new, why, norm.layer))
    return Swap(new_model, made, Outcome(tool, rows), frozenset(kept))


def traced(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The shapes of the variables that a model makes, and the norms that it calls, by path."""
    from .._layers.swapped import seen

    leaves, tree = jax.tree.flatten((args, kwargs))
    array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def init(key, arrays):
        arrays = iter(arrays)
        given = [next(arrays) if traced else leaf for traced, leaf in zip(array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, given)
        return model.init(key, *args, **kwargs)

    found: list[Any] = []
    with setting(seen, found), traced_anew(object()):  # all layers are called
        shapes = jax.eval_shape(init, jax.random.key(0), [a for a, of in zip(leaves, array, strict=True) if of])
    return shapes, {norm.path: norm for norm in found}


def _converted(tool: str, path: str, norm: Any, variables: Any, shapes: Any) -> tuple[Any, set[str], str]:
    """The variables with those of one norm replaced, the parameters that are not kept, and what was kept."""
    from flax.core import meta

    old, new = norm.specs[-2:]
    keys = tuple(path.split("/")) if path else ()
    names = getattr(norm.layer, "param_names", None) or {}
    own, later = param_paths(old, names), param_paths(new, names)
    state_of = lambda spec: {name: (name,) for name in getattr(spec.State, "_fields", ())}
    read = lambda of, at: {name: get(variables, (of, *keys, *to)) for name, to in at.items()}
    boxed = {**read("params", own), **read("batch_stats", state_of(old))}
    first = first_of(old, norm.features)
    missing = [name for name, like in first.items() if like is not None and boxed.get(name) is None]
    if missing:
        raise ValueError(
            f"{tool}: the variables lack {missing[0]!r} of {type(old).__name__} at {path!r}. Write the variables of "
            "this model, with all their collections: {'params': ..., 'batch_stats': ...}."
        )
    given = {name: meta.unbox(value) for name, value in boxed.items()}
    places = {**{n: ("params", *keys, *to) for n, to in later.items()}}
    places |= {n: ("batch_stats", *keys, *to) for n, to in state_of(new).items()}
    lead = ()
    for name, like in first_of(new, norm.features).items():
        if like is not None:
            shape = meta.unbox(get(shapes, places[name])).shape
            lead = shape[: len(shape) - len(like.shape)]
    of = lambda spec_names: {name: given.get(name) for name in spec_names}
    carried = carry(old, new, of(own), of(state_of(old)), norm.features, lead)
    for to in own.values():
        variables = put(variables, ("params", *keys, *to), None)
    for name in state_of(old):
        variables = put(variables, ("batch_stats", *keys, name), None)
    for name, value in {**carried.params, **carried.state}.items():
        was = boxed.get(name)
        if isinstance(was, meta.AxisMetadata) and value.shape == given[name].shape and name in carried.kept:
            value = was.replace_boxed(value)
        variables = put(variables, places[name], value)
    fresh = {"/".join((*keys, *to)) for name, to in {**own, **later}.items() if name not in carried.kept}
    return variables, fresh, carried.why
