"""Which norm a layer is: the spec of a layer of jaxnorm, or of Flax's own, linen or nnx."""

from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
from flax import nnx

from .._core.messages import shown
from . import drop_in, linen
from . import nnx as nnx_layers
from .derive import Form

FORMS = {
    "BatchNorm": drop_in.BATCH_NORM,
    "GroupNorm": drop_in.GROUP_NORM,
    "InstanceNorm": drop_in.INSTANCE_NORM,
    "LayerNorm": drop_in.LAYER_NORM,
    "RMSNorm": drop_in.RMS_NORM,
}


def form_of(layer: Any) -> Form | None:
    """How a layer follows its spec; None for what is no norm, or is called in a way of its own."""
    known = _known(type(layer))
    return known if isinstance(known, Form) else layer._form() if known else None


@functools.cache
def _known(kind: type) -> Form | bool:
    """The form of a kind of layer; True if its layers know it, and False if it is none."""
    caller = next((c for c in kind.__mro__ if "__call__" in vars(c) and "norm_swaps" not in vars(c)), None)
    if caller is None or caller.__module__.partition(".")[0] not in ("flax", "jaxnorm"):
        return False
    if issubclass(kind, (linen.Layer, nnx_layers.Layer)):
        return True
    of_flax = {getattr(of, name, None): form for of in (nn, nnx) for name, form in FORMS.items()}
    return of_flax.get(caller, False)


def spec_of(layer: Any) -> Any:
    """The spec that a layer is, None if it is no norm. The axis of its spec is that of its statistics."""
    form = form_of(layer)
    if form is None:
        return None
    if form.holder is not None:
        return getattr(layer, form.holder)
    options = {}
    for name, field in form.options.items():
        default = form.fields[field][1]
        two_names = field in form.aliases and hasattr(layer, form.aliases[field])
        options[name] = form.aliased(layer, field) if two_names else getattr(layer, field, default)
    if options.get("axis_name") is None and "axis_index_groups" in options:
        options["axis_index_groups"] = None
    form.settle(options)
    return form.spec(**options)


def is_of_flax(layer: Any) -> bool:
    """Whether a norm is a layer of Flax, not of jaxnorm."""
    return not isinstance(layer, (linen.Layer, nnx_layers.Layer))


def refuse_two_axes(path: str, layer: Any) -> None:
    """Raise for a layer that normalizes over other axes than those of its parameters, as no spec does."""
    form = form_of(layer)
    if form is None or form.features != "feature_axes":
        return
    one = lambda axes: frozenset((axes,) if isinstance(axes, int) else axes)
    if one(layer.feature_axes) != one(layer.reduction_axes):
        raise ValueError(
            f"swap: {type(layer).__name__} at {path!r} has feature_axes={shown(layer.feature_axes)} and reduction_axes="
            f"{shown(layer.reduction_axes)}; a spec has one axis for both. Write {{{path!r}: None}} as the first rule."
        )


def paths_of(layer: Any) -> dict[str, tuple[str, ...]]:
    """Where a layer keeps each parameter of its spec."""
    form = form_of(layer)
    assert form is not None
    names = getattr(layer, "param_names", None) or {}
    return {name: tuple(names.get(name, form.spec.paths.get(name, name)).split("/")) for name in form.params}


def positional_of(layer: Any) -> tuple[str, ...]:
    """The names of what a layer takes by position after x."""
    form = form_of(layer)
    assert form is not None
    if form.state:
        return (*form.operands, "use_running_average")
    by_position = isinstance(layer, nnx_layers.Layer) and "mask" in form.call
    return (*form.operands, "mask") if by_position else form.operands
