"""How a layer follows a spec: its fields, its call, its parameters and its state.

A `Form` holds this for one kind of layer, for linen and nnx alike. A layer that Flax does not have is `Form(spec)`. The
table in `drop_in` says how Flax's own five layers differ from their specs.

Legend: a layer is a linen or an nnx module. Its feature axes are those of its parameters; its width is their sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import typing
from collections.abc import Callable, Mapping
from typing import Any, Optional

import jax
import numpy as np
from jax.nn import initializers

from .._core.arrays import sizes_along
from .._core.checks import refuse_array
from .._core.intercept import from_layer, watched
from .._core.messages import shown
from .._norms.base import Spec
from . import flax_rules
from .document import document_call
from .flax_rules import Initializer, Shape

Array = jax.Array
_KEYWORD, _POSITIONAL = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
_ALONE = {"axis_name": None, "axis_index_groups": None, "sync": "global", "share": None}  # without other devices


class Form:
    """What a layer has from its spec.

    Args:
      spec: the class of the spec.
      names: the layer's name of a field of the spec, if it is another one: Flax has `reduction_axes` for `axis`.
      features: the layer's field that holds the feature axes. None is the one for `axis`.
      rank: the least rank of x. An x with one axis less is a single example: it is normalized as a batch of one.
      aliases: a second name for a field, by the first. Both cannot be given.
      check: called with the layer, x's shape and the feature axes. It may raise.
      build: called with the arguments of an nnx constructor, which it may change. It may raise.
      settle: called with the options of the layer's spec, which it may change.
    """

    def __init__(
        self, spec: Any, names: Mapping[str, str] | None = None, *, features: str | None = None, rank: int = 0,
        aliases: Mapping[str, str] | None = None,
        check: Callable[[Any, Shape, tuple[int, ...]], None] = lambda layer, shape, axes: None,
        build: Callable[[dict[str, Any]], None] = lambda given: None,
        settle: Callable[[dict[str, Any]], None] = lambda options: None,
    ):  # fmt: skip
        self.spec, self.rank, self.aliases = spec, rank, aliases or {}
        self.check, self.build, self.settle = check, build, settle
        self.options = {f.name: (names or {}).get(f.name, f.name) for f in dataclasses.fields(spec)}
        self.features = features or self.options.get("axis")
        self.params: tuple[str, ...] = spec.Params._fields
        self.whole: tuple[str, ...] = spec.whole  # of these, those that a layer hands on in their own shape
        self.state: tuple[str, ...] = getattr(spec.State, "_fields", ())
        self.operands, self.call = _arguments(spec)
        self.holder: str | None = None  # the layer's attribute that holds the options; None: the layer does
        self._values = operator.attrgetter(*self.options.values())
        hints = typing.get_type_hints(spec)
        optional = getattr(spec.State, "_field_defaults", {})
        self.fields = {self.options[f.name]: (hints[f.name], f.default) for f in dataclasses.fields(spec)}
        for name in (*self.params, *(s for s in self.state if s not in optional)):
            self.fields[f"{name}_init"] = (Optional[Initializer], None)  # noqa: UP045
        if self.state:
            self.fields["use_running_average"] = (bool | None, None)
        self.fields |= {"param_names": (Mapping[str, str] | None, None), "cast_params": (bool, False)}
        self.fields |= {alias: (self.fields[field][0] | None, None) for field, alias in self.aliases.items()}

    def width(self, layer, shape: Shape) -> tuple[tuple[int, ...], Shape]:
        """The feature axes of an x of this shape, and its sizes along them."""
        axes = self.first(layer).feature_axes() if self.features is None else self.aliased(layer, self.features)
        axes = flax_rules.canonical(layer, self.features or "axis", len(shape), axes)
        self.check(layer, shape, axes)
        return axes, sizes_along(shape, axes)

    def first(self, layer) -> Any:
        """The spec that makes the layer's first parameters and state."""
        options = self._options(layer)
        of_x = ("axis", "reduction_axes") if {*self.params} - {*self.whole} else ()
        for name in (*of_x, *_ALONE):
            options.pop(name, None)
        return _spec(self.spec, options)

    def source(self, layer) -> Any:
        """What holds the options."""
        return layer if self.holder is None else getattr(layer, self.holder)

    def aliased(self, layer, field: str) -> Any:
        """The value of a field, by this name or by its second one."""
        value = getattr(self.source(layer), field)
        alias = self.aliases.get(field)
        if alias is None or (other := getattr(layer, alias)) is None:
            return value
        if value != self.fields[field][1]:
            raise ValueError(
                f"{type(layer).__name__}: {alias} is {field} by jaxnorm's name, got {alias}={shown(other)} and "
                f"{field}={shown(value)}. Write {alias}={shown(other)} alone."
            )
        return other

    def _options(self, layer) -> dict[str, Any]:
        """The options of the layer's spec, as the layer has them."""
        options = dict(zip(self.options, self._values(self.source(layer)), strict=True))
        for name, field in self.options.items() if self.aliases else ():
            options[name] = self.aliased(layer, field)
        return options

    def spec_of(self, layer, shape: Shape, dtype, initializing: bool) -> Any:
        """The spec that the layer is at an x of this shape. Equal specs are one object."""
        options = self._options(layer)
        flax_rules.check_epsilon(layer, options.get("epsilon"))
        for name in ("axis", "reduction_axes"):
            if options.get(name) is not None:
                options[name] = flax_rules.canonical(layer, self.options[name], len(shape), options[name])
        if initializing:  # no axis name is touched
            options |= {name: default for name, default in _ALONE.items() if name in options}
        elif options.get("axis_name") is None and "axis_index_groups" in options:
            options["axis_index_groups"] = None
        if layer.cast_params and "scale_offset" in options:
            options["scale_offset"] = 0.0  # `flax_rules.cast` has added it
        if "dtype" in options:
            options["dtype"] = dtype
        if initializing and isinstance(inner := options.get("inner"), Spec):
            options["inner"] = dataclasses.replace(inner, **{k: v for k, v in _ALONE.items() if hasattr(inner, k)})
        self.settle(options)
        return _spec(self.spec, options)

    def path(self, layer, name: str) -> tuple[str, ...]:
        """Where the layer keeps a parameter: its name, after those of what it is in."""
        return tuple((layer.param_names or {}).get(name, self.spec.paths.get(name, name)).split("/"))

    def aligned(self, layer, name: str, value, shape: Shape, axes: tuple[int, ...], learned: bool) -> Array | None:
        """A parameter as the spec takes it: with x's rank, unless the function says itself what fits."""
        if name in self.whole:
            return value
        return flax_rules.broadcast_param(layer, name, value, shape, axes, learned)

    def initial(self, layer, name: str, own: Initializer | None, width: Shape) -> Initializer:
        """The initializer of a parameter or a statistic: the layer's own, else the spec's first value."""
        offset = getattr(self.source(layer), "scale_offset", 0.0)
        if own is not None and not (name in self.spec.scales and offset and own is initializers.ones):
            return own
        return functools.partial(_first_value, self.first(layer), name, width)

    def apply(
        self, layer, x: Array, params: dict[str, Array | None], state: Any, call: dict[str, Any], *, train, dtype,
        initializing: bool = False,
    ) -> tuple[Array, Any]:  # fmt: skip
        """x normalized, and the new state. The state is in x's feature shape; learned parameters have x's rank."""
        spec = self.spec_of(layer, x.shape, dtype, initializing)
        for name in ("mask", "weights"):
            if call.get(name) is not None:
                call[name] = flax_rules.align_mask_like_flax(call[name], x.shape)
        if layer.cast_params:
            offset = getattr(self.source(layer), "scale_offset", 0.0)
            params = flax_rules.cast(params, dtype, offset, self.spec.scales)
        single = x.ndim == self.rank - 1
        if single:
            spec = dataclasses.replace(spec, axis=1, reduction_axes=None)
            x, params = x[None], {name: p if p is None else p[None] for name, p in params.items()}
            call["mask"] = None if call.get("mask") is None else call["mask"][None]
        operands = [call.pop(name) for name in self.operands]
        apply = spec.apply if watched.get() is None else from_layer(layer, spec.apply)
        y, new = apply(self.spec.Params(**params), state, x, *operands, train=train, **call)
        if state and train is not False and call.get("update_stats", True):
            flax_rules.check_replicated(layer, state, new)
        return y[0] if single else y, new

    def given(self, positional: tuple[str, ...], args: tuple, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call after x, by name, with their defaults. A wrong call is a TypeError."""
        names = (*self.operands, *positional)
        given = {**self.call, **dict(zip(names, args, strict=False)), **call}
        unknown = given.keys() - {*names, *self.call, *self.params}
        if len(args) > len(names) or unknown or {*names[: len(args)]} & call.keys() or {*self.operands} - given.keys():
            raise TypeError("the arguments do not fit the layer's call")
        return given

    def call_signature(self, positional: tuple[str, ...]) -> inspect.Signature:
        """The signature of the layer's `__call__`: x, the operands, what else is positional, and keywords."""
        of = lambda name, kind, **default: inspect.Parameter(name, kind, **default)
        defaults = {"use_running_average": None, **self.call}
        keywords = {**{k: v for k, v in self.call.items() if k not in positional}, **dict.fromkeys(self.params)}
        return inspect.Signature([
            *(of(name, _POSITIONAL) for name in ("self", "x", *self.operands)),
            *(of(name, _POSITIONAL, default=defaults[name]) for name in positional),
            *(of(name, _KEYWORD, default=default) for name, default in keywords.items()),
        ], return_annotation=Array)  # fmt: skip

    def call_doc(self, statistics: str) -> str:
        """The docstring of the layer's `__call__`."""
        return document_call(self, statistics)

    def refuse_arrays(self, layer, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            if isinstance(value, (np.ndarray, jax.Array)):
                refuse_array(type(layer).__name__, name, value, self.fields.get(name, (None, None))[1])


@functools.lru_cache
def wrapped(spec: type) -> Form:
    """The form of `Norm(spec)`: the options are those of the spec that the layer holds."""
    if not (dataclasses.is_dataclass(spec) and hasattr(spec, "Params") and hasattr(spec, "State")):
        raise TypeError(f"Norm: spec must be a spec, got {shown(spec)}. Write Norm(jaxnorm.LayerNorm()).")
    form = Form(spec)
    form.holder = "spec"
    return form


def _arguments(spec: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What `spec.apply` takes after x: the names of the operands, and the keywords with their defaults."""
    after_x = [*inspect.signature(spec.apply).parameters.values()][4:]
    operands = tuple(p.name for p in after_x if p.kind is _POSITIONAL)
    return operands, {p.name: p.default for p in after_x if p.kind is _KEYWORD and p.name != "train"}


def _spec(kind: type, options: dict[str, Any]) -> Any:
    """kind(**options), made once where the options are hashable."""
    try:
        return _known_spec(kind, tuple(options), *options.values())
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return kind(**options)


@functools.lru_cache(maxsize=4096, typed=True)  # typed: 1 and True are equal
def _known_spec(kind: type, names: tuple[str, ...], *values) -> Any:
    return kind(**dict(zip(names, values, strict=True)))


@functools.lru_cache(maxsize=4096)
def first_shapes(spec: Any, width: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes and dtypes of the first parameters and state, by name; without those that are None."""
    params, state = jax.eval_shape(lambda: (spec.init_params(width), spec.init_state(width)))
    present = lambda fields: {name: value for name, value in fields.items() if value is not None}
    return present(params._asdict()), present(state._asdict()) if state else {}


def _first_value(spec: Any, name: str, width: Shape, key, shape: Shape, dtype) -> Array:
    """From the key on an initializer's signature; only what is drawn needs it. The shape is what the spec makes."""
    if name in spec.drawn:
        return spec.draw_param(name, width, key).astype(dtype)
    made = spec.init_params(width) if name in spec.Params._fields else spec.init_state(width)
    return getattr(made, name).astype(dtype)
