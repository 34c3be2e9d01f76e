"""How a norm declares itself: a spec, the function of a spec, and parameters in the forms that users have them in."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

from .._core.docstrings import described, joined, listed, sections
from .._core.explain import explained
from .._core.messages import shown
from .._core.program import as_program
from .._core.types import Affine, RunningStats

S = TypeVar("S")

T = TypeVar("T")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make a class a spec: a frozen, keyword-only dataclass whose constructor explains a wrong call.

    A field is an option, declared and described here alone; `function_of` gives it to the function. Its docstring says
    what its own fields mean under "Args:", and gets what the base classes say of theirs.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.__init__ = explained("spec")(cls.__init__)
    parts = sections(cls)
    cls.described = described(cls)  # pyright: ignore[reportAttributeAccessIssue]
    parts["Args"] = listed([f.name for f in dataclasses.fields(cls)], _described(cls))  # pyright: ignore
    cls.__doc__ = joined(parts)
    return cls


def function_of(spec: Any, inline: bool = False) -> Callable[[F], F]:
    """Make a function that of a spec: it takes the spec's options by keyword, with the defaults of the spec.

    The function names those that it uses itself, and hands the others on. `inspect.signature` and `help` show all.
    `inline` is that of `as_program`.
    """

    def decorate(f: F) -> F:
        options = {o.name: o for o in dataclasses.fields(spec) if not o.name.startswith(ABOUT_PARAMS)}
        of_all = {
            o.name for base in spec.__mro__[1:] if dataclasses.is_dataclass(base) for o in dataclasses.fields(base)
        }
        options = dict(sorted(options.items(), key=lambda item: item[0] in of_all))  # its own come first
        own = [p for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD]
        first = [p for p in own if p.name not in options and (p.kind is not p.KEYWORD_ONLY or p.default is p.empty)]
        last = [p for p in own if p.name not in options and p not in first]
        keyword = lambda o: inspect.Parameter(
            o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.type
        )
        shown = [*first, *map(keyword, options.values()), *last]
        named: Any = f
        named.__signature__ = inspect.signature(f).replace(parameters=shown)
        parts = sections(f)
        parts["Args"] = listed([p.name for p in shown], _described(spec) | described(f))
        named.__doc__ = joined(parts)
        program = as_program(f, static=options.keys() - {"momentum"}, inline=inline)
        function = explained("function", {name: o.default for name, o in options.items()})(program)
        spec.function = staticmethod(function)
        return function

    return decorate


# Fields that say how parameters are made, or what is made of them before the norm. No function takes them.
ABOUT_PARAMS = ("use_", "init_", "condition_", "param_dtype")


def _described(cls: type) -> dict[str, str]:
    """What a spec's docstring, and those of its base classes, say of the fields."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= vars(base).get("described", {})
    return texts


def as_params(norm: str, params: Any, kind: Any = Affine, paths: Mapping[str, str] | None = None) -> Any:
    """Return params as `kind`, the NamedTuple that a norm declares: given as one, as a dict of its names, or None.

    `paths` say where a layer keeps them, as "q_norm/scale": a dict may be that of the layer.
    """
    if type(params) is kind:
        return params
    if paths and isinstance(params, Mapping) and {*params} & {path.partition("/")[0] for path in paths.values()}:
        params = _flat(params, {path: name for name, path in paths.items()})
    if params is None:
        return kind(*(None for _ in kind._fields))
    if type(params) is tuple and len(params) == len(kind._fields):
        return kind(*params)
    if isinstance(params, Mapping) and {*params} <= {*kind._fields}:
        return kind(**{name: params.get(name) for name in kind._fields})
    names = params if isinstance(params, Mapping) else getattr(params, "_fields", ())
    if isinstance(params, (RunningStats, Mapping)) and "mean" in names:
        raise TypeError(
            f"{norm}: params and state are swapped: got running statistics as params. Write {_order(norm)}."
        )
    write = f"{'jaxnorm.Affine' if kind is Affine else kind.__qualname__}({', '.join(kind._fields)})"
    raise TypeError(
        f"{norm}: params must be {write}, a dict of the same names, or None; got {shown(params)}. Write {_order(norm)}."
    )


def _flat(params: Mapping[str, Any], names: dict[str, str], path: str = "") -> dict[str, Any]:
    """The parameters of a nested dict, by the names that belong to their paths."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        found |= _flat(value, names, f"{path}{key}/") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return found if path else {names.get(key, key): value for key, value in found.items()}


def refuse_params_as_state(norm: str, state: Any, kind: Any = Affine) -> None:
    if type(state) is kind or (isinstance(state, Mapping) and {*state} & {*kind._fields}):
        raise TypeError(f"{norm}: params and state are swapped: got parameters as state. Write {_order(norm)}.")


def _order(norm: str) -> str:
    if norm == "batch_norm":
        return "batch_norm(x, params, state, train=True)"
    return "norm.as_affine(params, state)" if norm.endswith("as_affine") else "norm.apply(params, state, x)"
