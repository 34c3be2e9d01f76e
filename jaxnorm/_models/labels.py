"""What each parameter of a model is: of which norm or which reparametrized weight, or of neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from .._core.messages import shown
from .._core.paths import path_of
from .._norms.base import Spec
from .trees import get, kind_of

LABELS = ("norm", "norm_weight", "gain", "undecayed", "fixed", "other")
DECAYED = ("norm_weight", "other")


class Owner(NamedTuple):
    """What a parameter belongs to, and its label. A norm has a path and a spec."""

    label: str
    path: str | None = None
    spec: Any = None
    layer: Any = None


def owners(tool: str, model: Any, params: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Owner]]:
    """The tree of parameters, and the owner of each, by its path; without those that have none."""
    if params is None and not _is_nnx(model):
        return model, _of_tuples(tool, model)
    kind = kind_of(tool, model)
    if (args or kwargs) and kind != "linen":
        raise TypeError(f"{tool}: only linen models take arguments of their call, got {shown([*args, *kwargs])}.")
    if kind == "nnx":
        if params is not None:
            raise TypeError(f"{tool}: an nnx model has its parameters, got {shown(params)}. Write {tool}(model).")
        return _of_nnx(model)
    if kind == "specs":
        return params, _of_specs(tool, model, params)
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        params = params["params"]
    return params, _of_linen(tool, model, params, args, kwargs)


def _is_nnx(model: Any) -> bool:
    try:
        return kind_of("", model) == "nnx"
    except TypeError:
        return False


def _label(spec: Any, name: str) -> str:
    return "norm_weight" if name in spec.decays else "norm"


def _label_of_weight(spec: Any, name: str) -> str:
    """The label of a parameter of a reparametrization. The first is the weight; the others are gains."""
    label = spec.labels.get(name, "decayed" if spec.Params is None or name == spec.Params._fields[0] else "gain")
    return "other" if label == "decayed" else label


# --- params alone, and specs ------------------------------------------------------------------------------------------


def _subclasses(kind: type) -> list[type]:
    return [kind, *(inside for sub in kind.__subclasses__() for inside in _subclasses(sub))]


def _labels_of_tuples() -> dict[type, dict[str, str]]:
    """The labels of the fields of all NamedTuples that hold parameters."""
    from .._weights.base import Reparametrization

    found: dict[type, dict[str, str]] = {}
    for spec in _subclasses(Spec):
        labels = found.setdefault(spec.Params, {})
        for name in spec.Params._fields:
            labels[name] = max(labels.get(name, "norm"), _label(spec, name))
    for spec in _subclasses(Reparametrization):
        if spec.Params is not None:
            found[spec.Params] = {name: _label_of_weight(spec, name) for name in spec.Params._fields}
    return found


def _of_tuples(tool: str, params: Any) -> dict[str, Owner]:
    kinds = _labels_of_tuples()
    found = {}
    for keys, node in jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: type(node) in kinds)[0]:
        for name, label in kinds.get(type(node), {}).items():
            if getattr(node, name) is not None:
                found[_joined(path_of(keys), name)] = Owner(label)
    if not found:
        raise ValueError(
            f"{tool}: parameters in plain dicts do not say which belong to norms, got {shown(params)}. Write "
            f"{tool}(model, variables, x) for a linen model, {tool}(model) for nnx, or {tool}(specs, params)."
        )
    return found


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _of_specs(tool: str, specs: Any, params: Any) -> dict[str, Owner]:
    from .._weights.base import Reparametrization

    found = {}
    for keys, spec in jax.tree_util.tree_flatten_with_path(specs)[0]:
        own = get(params, keys)
        if own is None or not isinstance(spec, Spec | Reparametrization):
            continue
        path = path_of(keys)
        inside = {path: name for name, path in spec.paths.items()} if isinstance(spec, Spec) else {}
        for keys_inside, _ in jax.tree_util.tree_flatten_with_path(own)[0]:
            name = inside.get(path_of(keys_inside), path_of(keys_inside))
            if isinstance(spec, Spec) and name not in spec.Params._fields:
                raise ValueError(
                    f"{tool}: {type(spec).__name__} at {path!r} has no parameter {name!r}. Write its params there, "
                    f"as spec.init(features)[0] makes them: {', '.join(spec.Params._fields)}."
                )
            owner = (
                Owner(_label(spec, name), path, spec) if isinstance(spec, Spec) else Owner(_label_of_weight(spec, name))
            )
            found[_joined(path, path_of(keys_inside))] = owner
    try:
        return {**_of_tuples(tool, params), **found}
    except ValueError:  # none is a NamedTuple
        return found


# --- nnx --------------------------------------------------------------------------------------------------------------


def _of_nnx(model: Any) -> tuple[Any, dict[str, Owner]]:
    from flax import nnx

    from .._layers import weights_nnx
    from .._layers.known import form_of, paths_of
    from .swap_nnx import norms_of

    by_variable: dict[int, Owner] = {}
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    norms = norms_of(model)
    for path, node in nodes.items():
        if not isinstance(node, nnx.Module):
            continue
        if isinstance(node, weights_nnx.Reparametrized):
            chosen = weights_nnx._params(node.layer_instance, node.variable_filter)
            first = (node.spec.Params._fields if node.spec.Params else ("w",))[0]
            by_variable |= {id(weight): Owner(_label_of_weight(node.spec, first)) for weight in chosen.values()}
            for keys, variable in node.added.items():
                by_variable[id(variable)] = Owner(_label_of_weight(node.spec, keys[-1]))
        elif isinstance(node, weights_nnx._WEIGHT_NORM) and type(node) is not nnx.Module and hasattr(node, "scales"):
            by_variable |= {id(leaf): Owner("gain") for leaf in _variables(getattr(node, "scales"))}  # noqa: B009
        elif (form := form_of(node)) is not None:
            for name, to in paths_of(node).items():
                holder: Any = node
                for part in to:
                    holder = getattr(holder, part, None)
                if holder is not None:
                    spec = norms[path][1]
                    by_variable[id(holder)] = Owner(_label(form.spec, name), path, spec, node)
    found = {path: by_variable[id(node)] for path, node in nodes.items() if id(node) in by_variable}
    return nnx.state(model, nnx.Param), found


def _variables(tree: Any) -> list[Any]:
    from flax import nnx

    return [
        v for v in jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, nnx.Variable)) if isinstance(v, nnx.Variable)
    ]


# --- linen ------------------------------------------------------------------------------------------------------------


def _of_linen(tool: str, model: Any, params: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Owner]:
    """By one abstract trace of `model.init`, which calls the layers."""
    from flax import linen as nn

    from .._layers.known import form_of, paths_of, spec_of
    from .._layers.weights_linen import Reparametrized
    from .swap_linen import traced

    layers: dict[tuple[str, ...], Any] = {}
    wrapped: dict[tuple[str, ...], tuple[str, ...]] = {}  # of a wrapper, the path of its layer

    def look(call, args, kwargs, context):
        layer = context.module
        known = form_of(layer) is not None or isinstance(layer, Reparametrized | nn.WeightNorm)
        if context.method_name == "__call__" and known:
            layers[layer.path] = layer  # first, as a norm in its place comes later
        y = call(*args, **kwargs)
        if layers.get(layer.path) is layer and isinstance(layer, Reparametrized | nn.WeightNorm):
            wrapped[layer.path] = layer.layer_instance.path
        return y

    if not isinstance(params, Mapping):
        raise TypeError(
            f"{tool}: a linen model needs its variables, got {shown(params)}. Write {tool}(model, variables, x)."
        )
    with nn.intercept_methods(look):
        shapes, _ = traced(model, args, kwargs)
    made = {path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(shapes.get("params", {}))[0]}
    given = [path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    beyond = [path for path in given if path not in made]
    if beyond:
        raise ValueError(
            f"{tool}: the call that was traced does not reach {beyond[0]!r}, so what it is is unknown. Write arguments "
            f"with which model.init makes all parameters, such as {tool}(model, variables, x, method=...)."
        )
    found: dict[str, Owner] = {}
    for path, layer in layers.items():
        if isinstance(layer, Reparametrized | nn.WeightNorm):
            for key in get(params, path) or {}:
                weight, _, name = key.rpartition("/")
                if not weight:
                    continue
                spec = layer.spec if isinstance(layer, Reparametrized) else None
                found[_joined(*path, key)] = Owner(_label_of_weight(spec, name) if spec is not None else "gain")
                if spec is not None:
                    inside = weight.partition("/")[2]
                    found[_joined(*wrapped[path], inside)] = Owner(_label_of_weight(spec, spec.Params._fields[0]))
            continue
        form: Any = form_of(layer)
        for name, to in paths_of(layer).items():
            found[_joined(*path, *to)] = Owner(_label(form.spec, name), _joined(*path), spec_of(layer), layer)
    return found
