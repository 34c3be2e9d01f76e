"""Compile the passes of a function for a target, and count: inference, forward, backward, both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import PartitionSpec as P

from .hlo import Cost, cost
from .targets import AXIS, TARGETS, compiled, placed

PASSES = ("inference", "forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Report:
    """The counts of one program, for each device."""

    kernels: int
    traffic: float  # bytes read from and written to main memory, over the bytes of x on this device
    temp: float  # bytes of temporary memory, over the same
    temp_bytes: int
    collectives: dict[str, int]  # by kind
    collective_bytes: dict[str, int]  # of their operands
    endless: int  # loops counted once, because the compiler does not know their trip count

    asdict = asdict


def report(f: Callable, target: str, *args, unit: int, **jit) -> Report:
    """Compile f for a target and count. Traffic is in units of `unit` bytes."""
    program = compiled(f, target, *args, **jit)
    found: Cost = cost(program.as_text())
    temp = program.memory_analysis().temp_size_in_bytes
    return Report(
        found.kernels, found.bytes / unit, temp / unit, temp, dict(found.collectives), dict(found.collective_bytes),
        found.endless,
    )  # fmt: skip


def passes(f: Callable, target: str, x, *params, which: Iterable[str] = PASSES) -> dict[str, Report]:
    """The passes of y = f(x, *params). x and y are sharded along their first axis, parameters are replicated.

    inference: y alone. forward: y and the residuals of jax.vjp that are neither arguments nor y. backward: residuals
    and a cotangent to the gradients of all arguments. forward+backward: y and the gradients in one program.
    """
    unit = x.size * x.dtype.itemsize // TARGETS[target].devices
    kept = residuals(f, x, *params)
    spread = lambda a: placed(target, a, P(AXIS) if a.shape[:1] == x.shape[:1] and a.size >= x.shape[0] else P())
    args = [placed(target, x, P(AXIS)), *placed(target, params)]
    g = jax.tree.map(lambda a: placed(target, a, P(AXIS)), kept.y)

    def both(g, *args):
        y, backward = jax.vjp(f, *args)
        return y, _each_once(backward(g))

    made = {
        "inference": lambda: report(f, target, *args, unit=unit),
        "forward": lambda: report(kept.forward, target, *args, unit=unit),
        "backward": lambda: report(kept.backward, target, [spread(a) for a in kept.all], g, unit=unit),
        "forward+backward": lambda: report(both, target, g, *args, unit=unit),
    }
    return {name: made[name]() for name in which}


@dataclass(frozen=True)
class Residuals:
    """The residuals of jax.vjp(f, *args), each array once."""

    y: Any
    all: list[Any]  # shapes and dtypes
    forward: Callable  # *args -> y and the residuals that are neither arguments nor y
    backward: Callable  # all, g -> gradients

    @property
    def bytes(self) -> int:
        return sum(a.size * a.dtype.itemsize for a in self.all)


def residuals(f: Callable, *args) -> Residuals:
    """Find the residuals that f stores for its backward pass. Nothing is compiled."""
    structure: list[Any] = []

    def everything(*args):
        y, backward = jax.vjp(f, *args)
        leaves, tree = jax.tree.flatten(backward)
        unique = list({id(a): a for a in leaves}.values())
        place = {id(a): i for i, a in enumerate(unique)}
        structure[:] = tree, [place[id(a)] for a in leaves]
        return y, unique

    jaxpr, (y, unique) = jax.make_jaxpr(everything, return_shape=True)(*args)
    tree, places = structure
    own, outs = _views_of_arguments(jaxpr.jaxpr), len(jax.tree.leaves(y))
    own.update(var for var in jaxpr.jaxpr.outvars[:outs] if not isinstance(var, Literal))
    news = [isinstance(var, Literal) or var not in own for var in jaxpr.jaxpr.outvars[outs:]]

    def forward(*args):
        y, unique = everything(*args)
        return y, [a for a, new in zip(unique, news, strict=True) if new]

    def backward(unique, g):
        return _each_once(jax.tree.unflatten(tree, [unique[i] for i in places])(g))

    return Residuals(y, unique, forward, backward)


def _each_once(arrays) -> list:
    """Each array once, because a program that returns an array twice copies it."""
    return list({id(a): a for a in jax.tree.leaves(arrays)}.values())


def _views_of_arguments(jaxpr) -> set:
    """The variables of a program that are its arguments or views of them. Storing those moves no bytes."""
    views = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        moves_nothing = equation.primitive.name in ("reshape", "squeeze", "expand_dims", "pvary", "pcast")
        if moves_nothing and all(not isinstance(v, Literal) and v in views for v in equation.invars):
            views.update(equation.outvars)
    return views
