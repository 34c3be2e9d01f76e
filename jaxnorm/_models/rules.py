"""Which norm of a model is replaced by which: rules by path, by kind, or by a predicate."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._core.messages import shown
from .._core.paths import matches
from .._norms.base import Spec

Key = str | type | Callable[[str, Any], bool]
Value = Spec | type[Spec] | Callable[[Any], Any] | None
_WRITE = 'Write {"**": jaxnorm.GroupNorm(num_groups=8)}.'


@dataclasses.dataclass(frozen=True)
class Rules:
    """An ordered mapping from paths, kinds or predicates to specs. The first key that fits a norm decides.

    It is called with the path, the spec and the layer of a norm, and returns the spec that replaces it; None leaves it.
    """

    tool: str
    rules: tuple[tuple[Key, Value], ...]

    @classmethod
    def of(cls, tool: str, rules: Any) -> Rules:
        """From a mapping. Raises on a key or a value that is none."""
        if isinstance(rules, Rules):
            return rules
        if not isinstance(rules, Mapping) or not rules:
            raise TypeError(f"{tool}: rules must map paths, kinds or predicates to specs, got {shown(rules)}. {_WRITE}")
        for key, value in rules.items():
            if not (isinstance(key, str) or callable(key)):
                raise TypeError(
                    f"{tool}: {shown(key)} is no pattern of paths, no class, and no function of path and spec. {_WRITE}"
                )
            if isinstance(value, type) and not issubclass(value, Spec):
                raise TypeError(
                    f"{tool}: {value.__name__} is a class, but no spec. Write jaxnorm.{value.__name__}, if there is "
                    "such a spec: layers are made of specs."
                )
            if not (value is None or isinstance(value, Spec) or callable(value)):
                raise TypeError(
                    f"{tool}: the value of {shown(key)} must be a spec, a class of specs, a function of the old spec, "
                    f"or None, got {shown(value)}. {_WRITE}"
                )
        return cls(tool, tuple(rules.items()))

    def __call__(self, path: str, spec: Any, layer: Any = None) -> Any:
        for key, value in self.rules:
            if fits(self.tool, key, path, spec, layer):
                return None if value is None else self._new(path, spec, value)
        return None

    def _new(self, path: str, old: Any, value: Any) -> Any:
        if isinstance(value, type):
            return as_kind(value, old)
        new = value if isinstance(value, Spec) else value(old)
        if not (new is None or isinstance(new, Spec)):
            raise TypeError(
                f"{self.tool}: the function of the old spec returned {shown(new)} at {path!r}. Return a spec, or None."
            )
        return new

    def check(self, norms: Iterable[tuple[str, Any, Any]]) -> None:
        """Raise if a key fits none of a model's norms, each given as path, spec and layer."""
        norms = list(norms)
        for key, _ in self.rules:
            if not any(fits(self.tool, key, *norm) for norm in norms):
                there = [f"{path or '(the model)'}: {type(spec).__name__}" for path, spec, _ in norms]
                listed = ", ".join(there[:12]) + (f", and {len(there) - 12} more" if len(there) > 12 else "")
                what = f'the pattern "{key}"' if isinstance(key, str) else shown(key)
                raise ValueError(
                    f"{self.tool}: {what} fits no norm of the model. There are {listed or 'none'}. Leave it out, or "
                    'write a pattern such as "**/norm".'
                )

    def reason(self, path: str, spec: Any, layer: Any = None) -> str:
        """Why a norm was left as it is."""
        if any(fits(self.tool, key, path, spec, layer) for key, _ in self.rules):
            return "a rule leaves it, or it is so already"
        return "no rule fits it"


def fits(tool: str, key: Any, path: str, spec: Any, layer: Any) -> bool:
    """Whether the key of a rule fits a norm."""
    if isinstance(key, str):
        return matches(key, path)
    if isinstance(key, type):
        return isinstance(spec, key) or isinstance(layer, key)
    decided = key(path, spec)
    if not isinstance(decided, bool):
        raise TypeError(f"{tool}: the predicate returned {shown(decided)} at {path!r}. Return True or False.")
    return decided


def as_kind(kind: type[Spec], old: Any) -> Spec:
    """The spec of another kind with the options of the old one that both have."""
    shared = {f.name for f in dataclasses.fields(kind)}
    options = {f.name: getattr(old, f.name) for f in dataclasses.fields(old) if f.name in shared}
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in options.items() if name in known})


def difference(old: Any, new: Any) -> str:
    """What distinguishes two specs, in a few words."""
    if old == new:
        return f"Flax's {type(old).__name__} -> jaxnorm's"
    if type(old) is not type(new):
        return f"{type(old).__name__} -> {type(new).__name__}"
    changed = [f.name for f in dataclasses.fields(old) if getattr(old, f.name) != getattr(new, f.name)]
    one = lambda value: repr(value) if isinstance(value, (str, int, float, type(None))) else shown(value)
    said = [f"{name}={one(getattr(old, name))} -> {one(getattr(new, name))}" for name in changed]
    return f"{type(old).__name__}: {', '.join(said)}"
