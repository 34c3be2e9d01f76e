"""One norm: from another library's layer into a spec, parameters and state, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from .._core.messages import shown
from .._norms import SPECS
from .._norms.base import Spec
from .leaf import Leaf, Specs, Store, module_name
from .plan import Options, move
from .report import ConversionError, Report, Row

_FIELDS = {"weight": "scale", "bias": "bias", "mean": "mean", "var": "var", "count": "count"}


def refuse(name: str, path: str, reason: str) -> NoReturn:
    raise ConversionError(name, [(path, reason)])


@dataclasses.dataclass
class Read:
    """A layer of another library: which norm it is, with which options, and its arrays.

    `caveats` are reasons to refuse it, by the options that a user may give to be understood nevertheless.
    """

    library: str
    kind: str
    options: dict[str, Any]
    features: tuple[int, ...]
    store: Store
    caveats: Mapping[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    given: Spec | None = None  # where it is known already

    def spec(self, **given: Any) -> Spec:
        if self.given is not None:
            return dataclasses.replace(self.given, **given)
        options = {k: v for k, v in self.options.items() if v is not None} | given
        axis = options.get("axis")
        if isinstance(axis, (tuple, list)) and len(axis) == 1:
            options["axis"] = axis[0]
        return SPECS[self.kind].like(self.library, **options)


def read_arrays(name: str, spec: Spec, store: Store) -> Read:
    """A norm whose spec is known, and whose arrays are in a tree of another library."""
    leaf = next((leaf for leaf in store.leaves if leaf.role in ("weight", "bias", "mean", "var")), None)
    if leaf is None:
        refuse(name, store.library, f"there are no arrays of a norm: {shown([leaf.path for leaf in store.leaves])}.")
    axes = spec.feature_axes()
    whole = len(axes) > 1 and len(leaf.shape) >= len(axes)
    features = leaf.shape[-len(axes) :] if whole else (math.prod(leaf.shape),)
    return Read(store.library, type(spec).__name__, {}, features, store, given=spec)


def add_spec(specs: Specs, keys: tuple[str, ...], layer: Any, read: Callable[[Any], Read | None]) -> None:
    """Note the spec of a layer, and whether it is a layer of jaxnorm, under the name of its module, if it is a norm."""
    try:
        found = read(layer)
        if found is not None:
            specs[module_name(keys)] = found.spec(), found.given is not None
    except ValueError:  # a layer that has no spec, such as torch's batch norm with momentum=None
        return


class Own:
    """The parameters and the state of a spec, as a tree of named arrays."""

    library = "jaxnorm"

    def __init__(self, params: Any, state: Any):
        self.specs: Specs = {}
        self.params, self.state = params, state
        fields = [*zip(params._fields, params, strict=True)]
        fields += [*zip(state._fields, state, strict=True)] if state != () else []
        counted = (("counter", lambda n: n, "the updates"),)
        self.leaves = [
            Leaf(name, (name,), value, "vector", otherwise=counted if name == "count" else ())
            for name, value in fields
            if value is not None
        ]

    def write(self, values: dict[str, np.ndarray]) -> tuple[Any, Any]:
        new = {name: jnp.asarray(value) for name, value in values.items()}
        of = lambda kind: kind._replace(**{name: new[name] for name in kind._fields if name in new})
        return of(self.params), self.state if self.state == () else of(self.state)


def from_layer(name: str, read: Read, options: Mapping[str, Any], cast: bool) -> tuple[Any, Any, Any, Report]:
    """(spec, params, state, report) of a layer of another library."""
    for answers, reason in read.caveats.items():
        if not {*answers} & {*options}:
            refuse(name, read.kind, reason)
    spec = read.spec(**options)
    own = Own(*jax.eval_shape(lambda: spec.init(read.features)))
    values, report = move(read.store, own, Options(name, cast=cast))
    shifted = _shifted(values, -spec.scale_offset)
    params, state = own.write(shifted)
    return spec, params, state, Report(_said(row, spec) for row in report)


def to_layer(name: str, spec: Any, params: Any, state: Any, read: Read, cast: bool) -> tuple[Any, Report]:
    """(the layer with the arrays of a norm, report). The layer's hyperparameters must be the spec's."""
    check_spec(name, spec)
    there = read.spec()
    if type(spec) is not type(there):
        refuse(name, read.library, f"the layer is a {type(there).__name__}, and the spec a {type(spec).__name__}.")
    features = read.features
    mine, theirs = numbers(spec, features), numbers(there, features)
    differ = [
        (option, f"it is {shown(mine[option])} in jaxnorm and {shown(theirs[option])} in {read.library}. Make the "
         "layer for it, or write dataclasses.replace(spec, ...).")
        for option in mine
        if not _alike(mine[option], theirs[option])
    ]  # fmt: skip
    if differ:
        raise ConversionError(name, differ)
    params = _as(spec.Params, params)
    state = () if spec.State is tuple else _as(spec.State, state)
    if spec.scale_offset and params.scale is not None:
        params = params._replace(scale=params.scale + jnp.asarray(spec.scale_offset, params.scale.dtype))
    values, report = move(Own(params, state), read.store, Options(name, cast=cast))
    return read.store.write(values), Report(_said(row, spec) for row in report)


def check_spec(name: str, spec: Any) -> None:
    if not isinstance(spec, Spec):
        raise TypeError(f"{name}: spec must be a spec of jaxnorm, got {shown(spec)}. Write jaxnorm.LayerNorm().")


def numbers(spec: Any, features: tuple[int, ...]) -> dict[str, Any]:
    """What makes the numbers of a norm, in one spelling."""
    found = {}
    for option in ("epsilon", "activation", "output_scale", "cast", "spread", "virtual_batch_size"):
        if hasattr(spec, option):
            found[option] = getattr(spec, option)
    if hasattr(spec, "num_groups"):
        found["num_groups"] = spec.num_groups or math.prod(features) // spec.group_size
    if hasattr(spec, "_running") and not spec.frozen:
        policy = spec._running()
        found |= {"momentum": policy.momentum, "zero_debias": policy.debias, "unbiased_running_var": policy.unbiased}
    return found


def _alike(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6))


def _as(kind: Any, given: Any) -> Any:
    fields = given if isinstance(given, Mapping) else dict(zip(kind._fields, given or (), strict=False))
    return kind(**{name: None if (a := fields.get(name)) is None else jnp.asarray(a) for name in kind._fields})


def _shifted(values: dict[str, np.ndarray], offset: float) -> dict[str, np.ndarray]:
    if offset and "scale" in values:
        values = values | {"scale": (values["scale"].astype(np.float64) + offset).astype(values["scale"].dtype)}
    return values


def _said(row: Row, spec: Any) -> Row:
    """The row, with what the layers' conventions add to it."""
    leaf = (row.target if row.target in _FIELDS.values() else row.source).rpartition(".")[2]
    if leaf == "scale" and spec.scale_offset:
        return row._replace(how=f"{row.how}, scale_offset={spec.scale_offset:g}")
    if leaf == "var" and getattr(spec, "unbiased_running_var", False):
        return row._replace(how=f"{row.how}, divides by n - 1")
    return row
