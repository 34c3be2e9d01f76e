"""Surgery on nnx models: modules replaced in a copy, or in place."""

from __future__ import annotations

import functools
from typing import Any

import jax

from .carry import carry, first_of, param_paths
from .outcome import Outcome
from .rules import Rules
from .surgery import Swap, row_of


def swap_nnx(tool: str, model: Any, rules: Rules, in_place: bool) -> Swap:
    """The model, or a copy of it, with other modules in the place of norms."""
    from flax import nnx

    from .._layers.known import is_of_flax

    norms = norms_of(model)
    rules.check([(path, spec, layer) for path, (layer, spec) in norms.items()])
    choices = {path: rules(path, spec, layer) for path, (layer, spec) in norms.items()}
    if not in_place:
        model = nnx.clone(model)
        norms = norms_of(model)
    kept = {path for path, value in _variables(model).items() if isinstance(value, nnx.Param)}
    rows, layers = [], {}
    for path, (layer, old) in norms.items():
        new, why = choices[path], None
        if new is None:
            new = old
        elif new != old or is_of_flax(layer):
            layers[id(layer)], names, why = _converted(tool, path, layer, old, new)
            kept -= {"/".join(filter(None, (path, *to))) for to in names}
        rows.append(row_of(rules, path, old, new, why, layer))
    swapped = layers.get(id(model), model)
    if in_place and swapped is not model:
        raise ValueError(f"{tool}: the model is itself the norm, so nothing holds it. Write model = {tool}(...).model.")
    if swapped is model:
        replaced_in(model, layers)
    return Swap(swapped, None, Outcome(tool, rows), frozenset(kept))


def norms_of(model: Any) -> dict[str, tuple[Any, Any]]:
    """The norms of a model, each with its spec, by path."""
    from flax import nnx

    from .._layers.known import spec_of

    found = {}
    for path, node in nnx.iter_graph(model):
        spec = spec_of(node) if isinstance(node, nnx.Module) else None
        if spec is not None:
            found["/".join(map(str, path))] = node, spec
    return dict(sorted(found.items()))


def _variables(model: Any) -> dict[str, Any]:
    from flax import nnx

    found = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    return {path: node for path, node in found.items() if isinstance(node, nnx.Variable)}


def _converted(tool: str, path: str, layer: Any, old: Any, new: Any) -> tuple[Any, list[tuple[str, ...]], str]:
    """The new layer, with variables of the old one, and the paths inside of it of parameters that are not kept."""
    from flax import nnx

    from .._layers.known import positional_of, refuse_two_axes
    from .._layers.nnx import Norm
    from .._layers.swapped import ReplacedInNnx, takes_the_same

    refuse_two_axes(path, layer)
    names = getattr(layer, "param_names", None) or {}
    own, later = param_paths(old, names), param_paths(new, names)
    states = getattr(old.State, "_fields", ())
    at = lambda to: functools.reduce(lambda node, name: getattr(node, name, None), to, layer)
    variables = {name: at(to) for name, to in {**own, **{name: (name,) for name in states}}.items()}
    given = {name: None if variable is None else variable[...] for name, variable in variables.items()}
    features = layer.num_features if hasattr(layer, "num_features") else layer.num_groups * layer.group_size
    width = features if isinstance(features, tuple) else (features,)
    carried_from = {name: given[name] for name in own}, {name: given[name] for name in states}
    lead = ()
    for name, like in first_of(old, width).items():
        if like is not None and (value := given[name]) is not None:
            lead = value.shape[: value.ndim - len(like.shape)]
    carried = carry(old, new, *carried_from, width, lead)
    options: dict[str, Any] = dict(
        use_running_average=getattr(layer, "use_running_average", False),
        param_names={k: v for k, v in names.items() if k in new.Params._fields} or None,
        cast_params=getattr(layer, "cast_params", False), rngs=nnx.Rngs(0),
    )  # fmt: skip
    if hasattr(layer, "promote_dtype"):
        options["promote_dtype"] = layer.promote_dtype
    called = getattr(layer, "called", positional_of(layer))
    made = ReplacedInNnx(new, features, called=called, **options)
    if takes_the_same(layer, made):
        made = Norm(new, features, **options)
    for name, value in {**carried.params, **carried.state}.items():
        to = later.get(name, (name,))
        holder = functools.reduce(getattr, to[:-1], made)
        variable = variables.get(name) if name in carried.kept else None
        if variable is None:
            variable = getattr(holder, to[-1])
            variable.set_value(value)
        elif variable[...] is not value:
            variable = variable.replace(value)
        setattr(holder, to[-1], variable)
    fresh = [to for name, to in {**own, **later}.items() if name not in carried.kept]
    return made, fresh, carried.why


def replaced_in(model: Any, layers: dict[int, Any]) -> None:
    """Put layers in the place of others, wherever a module of the model holds them. `layers` are by old identity."""
    from flax import nnx

    def new(value: Any) -> Any:
        if id(value) in layers:
            return layers[id(value)]
        if isinstance(value, nnx.Variable | jax.Array):
            return value
        if isinstance(value, list):
            value[:] = map(new, value)
        elif isinstance(value, dict):
            value.update({key: new(inside) for key, inside in value.items()})
        elif isinstance(value, tuple):
            inside = [new(v) for v in value]
            if any(a is not b for a, b in zip(inside, value, strict=True)):
                return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
        return value

    for _, node in list(nnx.iter_graph(model)):
        if not isinstance(node, nnx.Module):
            continue
        for name, value in list(vars(node).items()):
            if not name.startswith("_pytree__") and (other := new(value)) is not value:
                setattr(node, name, other)
