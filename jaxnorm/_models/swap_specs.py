"""Surgery on trees of specs, with their parameters and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from .._core.messages import shown
from .._core.paths import path_of
from .._norms.base import Spec
from .._norms.declare import as_params
from .._ops.states import as_stats, is_stats
from .carry import carry, features_of, first_of
from .outcome import Outcome
from .rules import Rules
from .surgery import Swap, row_of
from .trees import get, put


def swap_specs(tool: str, specs: Any, rules: Rules, variables: Any) -> Swap:
    """A new tree of specs, and (params, state) of it. Without variables the specs alone."""
    if variables is not None and not (type(variables) is tuple and len(variables) == 2):
        raise TypeError(
            f"{tool}: the variables of specs are (params, state), got {shown(variables)}. Write "
            f"{tool}(specs, rules, (params, state))."
        )
    params, state = (None, None) if variables is None else variables
    leaves, tree = jax.tree_util.tree_flatten_with_path(specs)
    norms = {path_of(keys): (keys, spec) for keys, spec in leaves if isinstance(spec, Spec)}
    rules.check([(path, spec, None) for path, (_, spec) in norms.items()])
    kept = {path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    rows, made = [], []
    for keys, old in leaves:
        path = path_of(keys)
        new = (rules(path, old) or old) if isinstance(old, Spec) else old
        made.append(new)
        if not isinstance(old, Spec):
            continue
        why = None if new == old else ""
        if new != old and variables is not None:
            own, later, fresh, why = _converted(tool, path, old, new, get(params, keys), get(state, keys))
            params = put(params, keys, own)
            state = put(state, keys, later) if later != () or get(state, keys) is not None else state
            kept -= {"/".join(filter(None, (path, name))) for name in fresh}
        rows.append(row_of(rules, path, old, new, why))
    after = None if variables is None else (params, state)
    return Swap(jax.tree.unflatten(tree, made), after, Outcome(tool, rows), frozenset(kept))


def _converted(tool: str, path: str, old: Any, new: Any, params: Any, state: Any) -> tuple[Any, Any, set[str], str]:
    """Parameters and state in the form that they came in, the names that are not kept, and what was kept."""
    where = f"{tool}: at {path!r}"
    if is_stats(state):
        stats: Any = as_stats(state)._asdict()
    else:
        stats = dict(state) if isinstance(state, Mapping) else state._asdict() if hasattr(state, "_fields") else {}
    given = as_params(where, params, old.Params, old.paths)._asdict()
    features, lead = features_of(old, given, stats)
    if features is None and any(like is not None for like in first_of(new, (1,)).values()):
        raise ValueError(
            f"{where}: {type(old).__name__} has no array that says how many features there are, and "
            f"{type(new).__name__} has some. Write its params and state yourself: {type(new).__name__}(...).init(64)."
        )
    carried = carry(old, new, given, stats, features or (), lead)
    made = new.Params(**{**dict.fromkeys(new.Params._fields), **carried.params})
    later = new.State(**{**dict.fromkeys(new.State._fields), **carried.state}) if carried.state else ()
    if isinstance(params, Mapping):  # as a checkpoint has them
        made = dict(carried.params) or ()
    if isinstance(state, Mapping) or (isinstance(params, Mapping) and later != ()):
        later = dict(carried.state) or ()
    fresh = {name for name in {*given, *carried.params} if name not in carried.kept}
    return made, later, fresh, carried.why
