"""Layers in the place of others: how they are called, and a linen model in which norms are replaced.

A linen model is code, so its layers are replaced when they are called: an interceptor makes the new layer in the scope
of the old one. The class of such a model is a subclass of the model's, with its fields, methods and name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, cast

import jax.numpy as jnp
from flax import linen as nn

from .._core.intercept import CONTEXTS, setting, traced_anew
from .._core.passing import passed
from .._norms.base import same_param
from . import linen
from . import nnx as nnx_layers
from .derive import Form, wrapped
from .known import form_of, is_of_flax, positional_of, refuse_two_axes, spec_of

# What replaces a norm: the new spec by path, spec and layer. None leaves it as it is. Hashable, compared by value.
Choice = Callable[[str, Any, Any], Any]


class Seen(NamedTuple):
    """A norm of a model, as a call of it was traced."""

    path: str
    specs: tuple[Any, ...]  # that of the layer, and after each choice
    replaced: bool  # whether the last choice puts another layer there
    features: tuple[int, ...]  # those of the last spec
    layer: Any


seen: ContextVar[list[Seen] | None] = ContextVar("seen", default=None)  # where set, gathers all norms that are called


def given_to(names: tuple[str, ...], args: tuple, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's call after x, by name, without those that are None."""
    if len(args) > len(names) or {*names[: len(args)]} & call.keys():
        raise TypeError(f"swap: the layer takes {names} by position after x, got {len(args)} arguments.")
    given = {**dict(zip(names, args, strict=False)), **call}
    return {name: value for name, value in given.items() if value is not None}


def fitted(spec: Any, given: dict[str, Any], own: Any = None) -> dict[str, Any]:
    """The arguments of a call as the new norm takes them. Operands that it lacks come from `passing`.

    `own` is the layer's use_running_average, for a norm with a state.
    """
    form: Form = wrapped(type(spec))
    of_state = "use_running_average"
    known = {*form.operands, *form.call, *form.params} | ({of_state} if form.state else set())
    outside = passed.get()
    call = {name: value for name, value in given.items() if name in known}
    call |= {name: value for name, value in outside.items() if name in known and name not in call}
    name = type(spec).__name__
    lost = given.keys() - known - {of_state}
    if lost:
        raise TypeError(f"swap: the model calls this layer with {sorted(lost)}, which {name} does not take.")
    missing = [operand for operand in form.operands if operand not in call]
    if form.state and of_state not in call and not getattr(spec, "frozen", False):
        if own is None:
            missing.append(of_state)
        else:
            call[of_state] = own
    if missing:
        raise TypeError(
            f"swap: {name} needs {missing[0]}, which the model does not give this layer. Write "
            f"with models.passing({missing[0]}=...): around the call of the model, inside of jit."
        )
    return call


class Replaced(linen.Norm):
    """A norm in the place of another layer. `scale` and `bias` start as the other's where they mean the same."""

    scale_init: Any = None
    bias_init: Any = None


class ReplacedInNnx(nnx_layers.Norm):
    """A norm in the place of another layer, called as that one is: it takes what the other takes by position."""

    def __init__(self, spec: Any, num_features: Any, *, called: tuple[str, ...] = (), **options: Any):
        super().__init__(spec, num_features, **options)
        self.called = called

    def __call__(self, x: Any, *args: Any, **call: Any) -> Any:
        """The normalized x. Takes what the layer took that this one replaces, and what the norm needs."""
        return super().__call__(x, **fitted(self.spec, given_to(self.called, args, call), self.use_running_average))


def takes_the_same(old: Any, new: ReplacedInNnx) -> bool:
    """Whether each call of one nnx layer is a call of the new norm, so that none needs to be fitted."""
    before, after = form_of(old), new._form()
    assert before is not None
    named = lambda form: {*form.operands, *form.call, *form.params, *(["use_running_average"] if form.state else [])}
    needed = {*after.operands} - {*before.operands}
    return (
        positional_of(new)[: len(new.called)] == new.called
        and not isinstance(old, ReplacedInNnx)
        and named(before) <= named(after)
        and not needed
    )


def _replacement(layer: nn.Module, old: Any, new: Any, features: tuple[int, ...]) -> Replaced:
    """The layer of the new spec, in the scope of the old layer."""
    first, scope = layer, cast(Any, layer.scope)
    names = getattr(layer, "param_names", None) or {}
    inits = {
        f"{n}_init": getattr(first, f"{n}_init", None) for n in ("scale", "bias") if same_param(old, new, n, features)
    }
    return Replaced(
        spec=new, param_names={k: v for k, v in names.items() if k in new.Params._fields} or None,
        cast_params=getattr(layer, "cast_params", False), parent=scope, **inits,
    )  # fmt: skip


@contextlib.contextmanager
def _swapping(model: Any) -> Iterator[None]:
    """Within the context, norms of the model that are called are replaced."""
    key = (model.scope.path, model.norm_swaps)
    if key in _active.get():  # a method of the model calls another one
        yield
        return
    root: int = len(model.scope.path)
    made: dict[int, tuple[Any, Replaced]] = {}

    def intercept(call: Any, args: tuple, options: dict[str, Any], context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__" or isinstance(layer, Replaced) or form_of(layer) is None:
            return call(*args, **options)
        given, path, old = dict(options), "/".join(layer.path[root:]), spec_of(layer)
        x = args[0] if args else given.pop("x")
        specs, of_flax, replaced = [old], is_of_flax(layer), False
        for choice in model.norm_swaps:
            chosen = choice(path, specs[-1], layer)
            replaced = chosen is not None and (of_flax or chosen != specs[-1])
            of_flax = of_flax and not replaced
            specs.append(specs[-1] if chosen is None else chosen)
        new = specs[-1]
        features = new.features(jnp.shape(x))
        if (found := seen.get()) is not None:
            found.append(Seen(path, tuple(specs), replaced, features, layer))
        if new == old and of_flax == is_of_flax(layer):
            return call(*args, **options)
        if id(layer) not in made:
            refuse_two_axes(path, layer)
            made[id(layer)] = layer, _replacement(layer, old, new, features)
        given = given_to(positional_of(layer), args[1:], given)
        return made[id(layer)][1](x, **fitted(new, given, getattr(layer, "use_running_average", None)))

    anew = traced_anew(model.norm_swaps) if CONTEXTS else contextlib.nullcontext()
    with setting(_active, _active.get() | {key}), anew, nn.intercept_methods(intercept):
        yield


_active: ContextVar[frozenset[Any]] = ContextVar("active", default=frozenset())


def swapped(model: nn.Module, choice: Choice) -> nn.Module:
    """A model like this one, with its fields, methods and variables, in which norms are replaced as `choice` says."""
    if model.scope is not None:
        raise ValueError(
            f"swap: {type(model).__name__} is bound to variables. Write swap(model, ...) with the model as it was made."
        )
    kind: Any = type(model)
    of, before = (kind.__mro__[1], kind.norm_swaps) if is_swapped(model) else (kind, ())
    swaps = (*before, choice)
    try:
        kind = _subclass(of, swaps)
    except TypeError as error:
        if "unhashable" not in str(error):  # as a spec with an array is
            raise
        kind = _subclass.__wrapped__(of, swaps)
    return kind(**_fields(model), parent=None)


def is_swapped(model: Any) -> bool:
    """Whether a linen model is one of these."""
    return getattr(type(model), "norm_swaps", None) is not None


@functools.cache
def _subclass(kind: type[nn.Module], swaps: tuple[Choice, ...]) -> type[nn.Module]:
    """A subclass of a model's class, whose methods replace norms. It has the name of the class, as its layers have.

    One for equal choices, so that models are equal. They are no field: transforms of Flax hand on fields to the class
    that they transform.
    """
    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    names = {name for base in own for name, value in vars(base).items() if _is_method(name, value)}
    names -= {field.name for field in dataclasses.fields(kind)}
    body: dict[str, Any] = {name: _within(kind, name) for name in names}
    body |= {name: _by_own_method(kind, name) for name in ("apply", "init", "init_with_output")}
    body |= {
        "__annotations__": {"norm_swaps": ClassVar[Any]}, "norm_swaps": swaps, "__doc__": kind.__doc__,
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce__": nn.nowrap(_reduce),
    }  # fmt: skip
    return types.new_class(kind.__name__, (kind,), {}, lambda of: of.update(body))


def _is_method(name: str, value: Any) -> bool:
    outside = name == "__call__" or not (name.startswith("__") or name == "setup")
    return inspect.isfunction(value) and outside and not hasattr(value, "nowrap")


def _within(kind: type[nn.Module], name: str):
    method: Any = getattr(kind, name)

    @functools.wraps(method, updated=())
    def call(self, *args, **options):
        with contextlib.nullcontext() if self.scope is None else _swapping(self):
            return method(self, *args, **options)

    return nn.nowrap(call)


def _by_own_method(kind: type[nn.Module], name: str):
    """`apply` and others, whose `method=` may be a function of the original class."""
    run: Any = getattr(kind, name)

    @functools.wraps(run, updated=())
    def call(self, *args, method=None, **options):
        of = getattr(method, "__name__", "")
        return run(self, *args, method=of if method is getattr(kind, of, None) is not None else method, **options)

    return nn.nowrap(call)


def _fields(model: nn.Module) -> dict[str, Any]:
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init and f.name != "parent"}


def _reduce(self):
    return _rebuilt, (type(self).__mro__[1], type(self).norm_swaps, _fields(self))


def _rebuilt(kind: type[nn.Module], swaps: tuple[Choice, ...], fields: dict[str, Any]) -> nn.Module:
    return _subclass(kind, swaps)(**fields, parent=None)
