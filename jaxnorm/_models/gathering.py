"""The moments of what each norm with running statistics is given, from one call of a model.

They come out of the model the way that running statistics do, with the state that a call returns. So they pass through
`jax.jit`, `shard_map`, scans and Flax's lifted transforms. `Seen` travels beside the state of a norm: in an entry
"seen" of a dict, as linen has them; with a `RunningStats` in a `StateThatGathers`; as variables of an nnx layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._core.dtypes import widest
from .._core.intercept import Call, intercept, setting, watched
from .._core.paths import path_of
from .._core.types import Moments, RunningStats
from .._norms.batch import BatchNorm
from .._norms.batch_renorm import BatchRenorm
from .._norms.modulated import NestedSpec
from .._norms.rep_batch import RepBatchNorm
from .._ops.moments import merge
from .._ops.policy import Running, running_policy
from .._ops.states import as_stats, is_stats

Apply = Callable[[Any, Any], Any]
_FLAT = ("momentum", "min_count", "skip_nonfinite", "zero_debias", "unbiased_running_var")
_COUNTED = ("seen_count", "seen_mean", "seen_m2")  # the variables of an nnx layer
_PATH = "seen_path"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """The moments of what a norm was given so far, and the path of its state."""

    moments: Moments
    path: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateThatGathers:
    """What stands in place of a `RunningStats` while moments are gathered. `spec.apply` takes it; nothing else does."""

    stats: RunningStats
    seen: Seen


class Known(NamedTuple):
    """What is known of the norm that a state belongs to."""

    spec: Any
    reason: str | None  # why it is left alone; None: it is not


def policy_of(spec: Any) -> Running:
    """How a spec updates its running statistics."""
    spec = spec.inner if isinstance(spec, NestedSpec) else spec
    flat = {name: getattr(spec, name, False) for name in _FLAT if name != "min_count"}
    return running_policy(type(spec).__name__, spec.running, **flat, min_count=spec.min_count)


def reason_to_leave(spec: Any) -> str | None:
    """Why the statistics of a norm are not recomputed; None where they are."""
    spec = spec.inner if isinstance(spec, NestedSpec) else spec
    name = type(spec).__name__
    if not all(hasattr(spec, field) for field in ("running", "frozen", "skip_nonfinite")):
        return f"{name} does not say how it updates its statistics"
    if spec.frozen:
        return f"{name} is frozen"
    if getattr(spec, "spread", "std") == "l1":
        return 'moments hold no spread="l1"'
    return None


def counts_updates(spec: Any) -> bool:
    """Whether schedules are functions of the state's count, whatever the policy."""
    return isinstance(spec, (BatchRenorm, RepBatchNorm))


def that_gathers(spec: Any) -> Any:
    """The norm whose state, from a count of zero, is the count, mean and biased variance of x."""
    if isinstance(spec, NestedSpec):
        return dataclasses.replace(spec, inner=that_gathers(spec.inner))
    if counts_updates(spec):
        same = ("axis", "share", "axis_name", "axis_index_groups", "sync")
        return BatchNorm(
            **{name: getattr(spec, name) for name in same}, momentum=None, skip_nonfinite=policy_of(spec).skip_nonfinite
        )
    exact = dict(running=None, momentum=None, min_count=None, zero_debias=False, unbiased_running_var=False)
    return dataclasses.replace(spec, **exact, skip_nonfinite=policy_of(spec).skip_nonfinite)


@contextlib.contextmanager
def gathering(by_batch: bool, known: dict[str, Known], quiet: bool) -> Iterator[None]:
    """Within the context norms add what they are given to the `Seen` beside their state, and leave the state.

    `by_batch`: they normalize by the statistics of the batch; else by those of their state, whatever `train` says.
    `quiet`: a batch of one element needs no warning, since its output is not used.
    """

    def hook(call: Call, run: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        slot = _slot(call)
        if slot is None:
            return run()
        state, seen, put = slot
        reason = reason_to_leave(call.spec)
        known[seen.path] = Known(call.spec, reason)
        with setting(watched, None):
            if reason is not None:
                y, _ = call.spec.apply(call.params, state, call.x, *call.operands, **call.options | {"train": False})
                return y, call.state
            y, moments = _moments(call, state, by_batch, quiet)
        if call.options.get("update_stats", True) is not False:
            seen = Seen(_merged(seen.moments, moments), seen.path)
        return y, put(seen)

    with intercept(hook):
        yield


def _moments(call: Call, state: RunningStats, by_batch: bool, quiet: bool) -> tuple[Any, Moments]:
    """y, and the moments of x."""
    spec, options = that_gathers(call.spec), dict(call.options, train=True)
    if "update_stats" in options:
        options["update_stats"] = True
    first = jax.tree.map(lambda a: jnp.zeros_like(a, dtype=widest(a.dtype, jnp.float32)), state)
    first = RunningStats(first.mean, first.var, jnp.zeros_like(first.var))
    params, operands = call.params, call.operands
    with warnings.catch_warnings():
        if quiet:
            warnings.filterwarnings("ignore", ".* has one element per ", UserWarning)
        if type(spec) is type(call.spec):
            y, new = spec.apply(params, first, call.x, *operands, **options)
        else:
            of_batch = {name: options[name] for name in ("mask", "weights") if name in options}
            _, new = spec.apply(None, first, call.x, train=True, **of_batch)
            # Corrected by nothing, it is normalized by the batch, whatever the running statistics are.
            own = {"r_max": 1.0, "d_max": 0.0} if isinstance(call.spec, BatchRenorm) else {}
            y = None
            if by_batch:
                y, _ = dataclasses.replace(call.spec, **own).apply(params, state, call.x, *operands, **options)
    if not by_batch:
        y, _ = call.spec.apply(params, state, call.x, *operands, **call.options | {"train": False})
    return y, Moments(new.count, new.mean, new.var * new.count)


def _merged(seen: Moments, new: Moments) -> Moments:
    """In the shape that is stored, which in Flax may be another than x has."""
    together = merge(Moments(*(a.reshape(b.shape) for a, b in zip(seen, new, strict=True))), new)
    return Moments(*(a.reshape(b.shape).astype(b.dtype) for a, b in zip(together, seen, strict=True)))


def _slot(call: Call) -> tuple[RunningStats, Seen, Callable[[Seen], Any]] | None:
    """The running statistics of a call, what it has seen, and how to put that. It returns the state to return."""
    state, layer = call.state, call.layer
    if isinstance(state, StateThatGathers):
        return state.stats, state.seen, lambda seen: StateThatGathers(state.stats, seen)
    if layer is None:
        if not isinstance(state, Mapping) or "seen" not in state:
            return None
        stats: Any = as_stats({name: a for name, a in state.items() if name != "seen"})
        return stats, state["seen"], lambda seen: {**state, "seen": seen}
    if getattr(layer, "scope", None) is not None:
        if not layer.has_variable("batch_stats", "seen"):
            return None
        if not layer.is_mutable_collection("batch_stats"):
            raise TypeError(
                "recompute_stats: apply must return the batch_stats, which are not mutable. Write lambda variables, x: "
                'model.apply(variables, x, mutable=["batch_stats"]).'
            )

        def put(seen: Seen) -> Any:
            layer.put_variable("batch_stats", "seen", seen)
            return state

        return state, layer.get_variable("batch_stats", "seen"), put
    if not hasattr(layer, _PATH):
        return None

    def put_nnx(seen: Seen) -> Any:
        for name, a in zip(_COUNTED, seen.moments, strict=True):
            getattr(layer, name)[...] = a
        return state

    return state, Seen(Moments(*(getattr(layer, name)[...] for name in _COUNTED)), getattr(layer, _PATH)), put_nnx


def nothing_seen(stats: RunningStats) -> Moments:
    """Made of the statistics, so that it is sharded as they are."""
    zero = lambda a: jnp.zeros_like(a, dtype=widest(a.dtype, jnp.float32))
    return Moments(zero(stats.var), zero(stats.mean), zero(stats.var))


# --- the models that hold the states ----------------------------------------------------------------------------------


class Tree:
    """Variables as a tree: those of linen, or any tree that holds states of norms.

    `states` has each state by its path, and `arrays` the others. `call` is a program of both.
    """

    def __init__(self, variables: Any):
        nodes, self.treedef = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_running)
        self.nodes = [node for _, node in nodes]
        paths = [path_of(keys).removeprefix("batch_stats/") if _is_running(node) else None for keys, node in nodes]
        self.paths: list[str | None] = paths
        self.states = {path: node for path, node in zip(paths, self.nodes, strict=True) if path is not None}
        self.unknown: tuple[str, ...] = ()
        # Functions, strings and numbers may be leaves of a tree. They are no arguments of a program.
        is_array = lambda node: isinstance(node, (jax.Array, np.ndarray))
        self.arrays = [node if is_array(node) else None for node in self.nodes]

    def call(self, apply: Apply, arrays: Any, states: Mapping[str, RunningStats], batch: Any) -> dict[str, Moments]:
        given = [node if a is None else a for node, a in zip(self.nodes, arrays, strict=True)]
        of = zip(given, self.paths, strict=True)
        given = [node if path is None else _with_seen(node, path, states[path]) for node, path in of]
        result = apply(jax.tree.unflatten(self.treedef, given), batch)
        leaves = jax.tree.leaves(result, is_leaf=lambda node: isinstance(node, Seen))
        return {leaf.path: leaf.moments for leaf in leaves if isinstance(leaf, Seen)}

    def result(self, states: Mapping[str, Any]) -> Any:
        of = zip(self.nodes, self.paths, strict=True)
        return jax.tree.unflatten(self.treedef, [node if path is None else states[path] for node, path in of])


def _is_running(node: Any) -> bool:
    return is_stats(node) and not isinstance(node, Moments) and "m2" not in (node if isinstance(node, Mapping) else ())


def _with_seen(node: Any, path: str, stats: RunningStats) -> Any:
    seen = Seen(nothing_seen(stats), path)
    if isinstance(node, RunningStats):
        return StateThatGathers(stats, seen)
    return {**{name: getattr(stats, name) for name in node}, "seen": seen}


class Module:
    """An nnx module. `states` are those of the library's layers in it, `unknown` the paths of other statistics."""

    def __init__(self, model: Any):
        from flax import nnx

        self.nnx, self.kept = nnx, nnx.state(model, nnx.BatchStat)
        self.states: dict[str, Any] = {}
        copy = nnx.clone(model)
        for path, node in list(nnx.iter_graph(copy)):
            if isinstance(node, nnx.Module) and hasattr(node, "_form") and getattr(node, "var", None) is not None:
                name, layer = "/".join(map(str, path)), node
                value: Any = lambda of, layer=layer: None if getattr(layer, of) is None else getattr(layer, of)[...]
                self.states[name] = RunningStats(*map(value, RunningStats._fields))
                setattr(layer, _PATH, name)
                for of, a in zip(_COUNTED, nothing_seen(self.states[name]), strict=True):
                    setattr(layer, of, nnx.BatchStat(a))
        places = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(self.kept)}
        self.unknown = tuple(sorted(places - self.states.keys()))
        self.graph, self.arrays = nnx.split(copy)

    def call(self, apply: Apply, arrays: Any, states: Mapping[str, RunningStats], batch: Any) -> dict[str, Moments]:
        model = self.nnx.merge(self.graph, arrays)
        layers = {getattr(node, _PATH): node for _, node in self.nnx.iter_graph(model) if hasattr(node, _PATH)}
        for path, layer in layers.items():
            for name, a in states[path]._asdict().items():
                if a is not None:
                    getattr(layer, name)[...] = a
        apply(model, batch)
        return {path: Moments(*(getattr(layer, name)[...] for name in _COUNTED)) for path, layer in layers.items()}

    def result(self, states: Mapping[str, Any]) -> Any:
        """The statistics alone, as a state for `nnx.update`."""
        flat = []
        for path, variable in self.nnx.to_flat_state(self.kept):
            *at, name = map(str, path)
            stats = states.get("/".join(at))
            flat.append((path, variable if stats is None else variable.replace(getattr(stats, name))))
        return self.nnx.from_flat_state(flat)
