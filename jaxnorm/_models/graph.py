"""A traced program as one list of steps: who makes each value, and who reads it. Calls of programs are inlined."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.extend.core import Literal

CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
         "custom_vjp_call", "custom_vjp_call_jaxpr"}  # fmt: skip


@dataclasses.dataclass(eq=False)
class Value:
    """One array of a program. `leaf` is its number among the variables, `constant` what is known beforehand."""

    shape: tuple[int, ...]
    dtype: Any
    made: Step | None = None
    read: list[Step] = dataclasses.field(default_factory=list)
    leaf: int | None = None
    constant: Any = None
    returned: bool = False

    @property
    def only_reader(self) -> Step | None:
        """The one step that reads it; None where there are several, or none, or where the program returns it."""
        return self.read[0] if len(self.read) == 1 and not self.returned else None


@dataclasses.dataclass(eq=False)
class Step:
    """One operation."""

    name: str
    eqn: Any
    ins: list[Value]
    outs: list[Value]

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @functools.cached_property
    def inside(self) -> str:
        """The text of the programs that it runs, such as the body of a loop."""
        has = jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr
        programs = [p for p in jax.tree.leaves(self.params, is_leaf=lambda p: isinstance(p, has)) if isinstance(p, has)]
        return "\n".join(map(str, programs))


class Graph:
    """`f(leaves, inputs)` traced. A compiled function whose name begins with `opaque` stays one step."""

    def __init__(self, f: Callable[..., Any], leaves: list[Any], inputs: list[Any], opaque: str):
        closed = jax.make_jaxpr(f)(leaves, inputs)
        self.opaque: str = opaque
        self.steps: list[Step] = []
        ins = [_value(v.aval) for v in closed.jaxpr.invars]
        for n, value in enumerate(ins[: len(leaves)]):
            value.leaf = n
        outs = self._inline(closed.jaxpr, closed.consts, ins)
        for value in outs:
            value.returned = True
        self._link(outs)

    def _inline(self, jaxpr: Any, consts: Any, ins: list[Value]) -> list[Value]:
        at: dict[Any, Value] = dict(zip(jaxpr.invars, ins, strict=True))
        for v, const in zip(jaxpr.constvars, consts, strict=True):
            at[v] = dataclasses.replace(_value(v.aval), constant=const)
        get = lambda v: dataclasses.replace(_value(v.aval), constant=v.val) if isinstance(v, Literal) else at[v]
        for eqn in jaxpr.eqns:
            name, given = eqn.primitive.name, [get(v) for v in eqn.invars]
            inner = _program_of(eqn) if name in CALLS and not self._is_opaque(eqn) else None
            if inner is None:
                made = [_value(v.aval) for v in eqn.outvars]
                self.steps.append(Step(name, eqn, given, made))
            else:
                made = self._inline(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), given)
            at.update(zip(eqn.outvars, made, strict=True))
        return [get(v) for v in jaxpr.outvars]

    def _is_opaque(self, eqn: Any) -> bool:
        return str(eqn.params.get("name", "")).startswith(self.opaque)

    def _link(self, outs: list[Value]) -> None:
        """Who reads what, among the steps that the outputs depend on."""
        needed, live = {id(v) for v in outs}, []
        for step in reversed(self.steps):
            if any(id(v) in needed for v in step.outs) or step.eqn.effects:
                needed.update(id(v) for v in step.ins)
                live.append(step)
        self.steps = live[::-1]
        for step in self.steps:
            for value in step.outs:
                value.made = step
            for value in step.ins:
                value.read.append(step)


def known(value: Value, leaves: list[Any]) -> np.ndarray | None:
    """What a value is, if it depends on the variables alone; else None."""
    if value.constant is not None:
        return np.asarray(value.constant)
    if value.leaf is not None:
        return np.asarray(leaves[value.leaf])
    step = value.made
    if step is None:
        return None
    ins = [known(v, leaves) for v in step.ins]
    if any(a is None for a in ins):
        return None
    made = step.eqn.primitive.bind(*map(jax.numpy.asarray, ins), **step.params)
    return np.asarray(made[step.outs.index(value)] if step.eqn.primitive.multiple_results else made)


def _value(aval: Any) -> Value:
    return Value(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None))


def _program_of(eqn: Any) -> Any:
    return next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)
