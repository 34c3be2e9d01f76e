"""Norms that are folded: what one is at inference, what its variables become, and what its neighbours become."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.arrays import align_param, canonicalize_axes
from .._core.intercept import Call
from .._core.paths import path_of
from .graph import Graph, Step, known
from .kinds import Kind, Way, normalizes_the_batch
from .moved import chain, fit, leaf_of, origin, through
from .pairs import Edits, Left, after, before

MARK = "jaxnorm_folded_"
LAST_IS_AFFINE = {"LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "DynamicTanh", "DynamicErf"}
GIVEN = {"mask", "weights"}  # what makes elements differ


@dataclasses.dataclass
class Norm:
    """One call of a norm, as it was traced. `form` is the tree of its parameters and state, `names` are its leaves'."""

    path: str
    spec: Any
    form: Any
    names: list[str]
    shape: tuple[int, ...]
    returns: Any  # the dtype of the output; None if that is not one array like x
    refusal: str
    layer: type  # of the layer that calls it; NoneType if none does

    @classmethod
    def of(cls, path: str, call: Call, y: Any) -> Norm:
        found, form = jax.tree_util.tree_flatten_with_path((call.params, call.state))
        names = [path_of(keys).rpartition("/")[2] for keys, _ in found]
        alike = isinstance(y, jax.ShapeDtypeStruct) and y.shape == jnp.shape(call.x)
        returns = y.dtype if alike and jnp.issubdtype(y.dtype, jnp.inexact) else None
        return cls(path, call.spec, form, names, jnp.shape(call.x), returns, _refusal(call, returns), type(call.layer))

    @property
    def by_turn(self) -> bool:
        """Whether its path is one of a norm that is known by its turn alone, unless a variable has this path."""
        return self.path.rpartition("_")[0] == type(self.spec).__name__ and not hasattr(self.layer, "scope")

    @property
    def keys(self) -> tuple[Any, ...]:
        """What two traces of one call have in common, and paths that are taken from turns have not."""
        return self.path, (self.spec, self.shape, self.layer)

    @property
    def affine(self) -> bool:
        """Whether all of it is x * scale + bias at inference."""
        return hasattr(self.spec, "as_affine") or type(self.spec).__name__ == "LayerScale"


def _refusal(call: Call, returns: Any) -> str:
    spec, kind = call.spec, type(call.spec).__name__
    if not (hasattr(spec, "as_affine") or kind in LAST_IS_AFFINE or kind == "LayerScale"):
        return f"{kind} does not end with a scale and a bias of its channels"
    if returns is None:
        return "it returns more than one array like x"
    if getattr(spec, "activation", None) is not None:
        return "it has an activation"
    if call.operands:
        return "it takes another operand than x"
    if given := [name for name in GIVEN if call.options.get(name) is not None]:
        return f"it has a {given[0]}"
    if normalizes_the_batch(call):
        return "it normalizes by the statistics of the batch: write train=False, or model.eval()"
    return ""


class Work:
    """The variables of a model while its norms are folded one after another, in float64."""

    def __init__(self, graph: Graph, leaves: list[Any], paths: list[str], kind: Kind):
        self.graph, self.leaves, self.paths, self.kind = graph, leaves, paths, kind
        self.changed: dict[int, np.ndarray] = {}
        self.made: dict[int, np.ndarray] = {}

    def seen(self, norms: list[Norm]) -> list[tuple[int, Norm]]:
        """The norms, by number, without calls that JAX has traced more than once and kept once."""
        kept = [n for n in range(len(norms)) if self._steps(n) or self._around(n)]
        known = {key for n in kept for key in norms[n].keys}
        return [(n, norm) for n, norm in enumerate(norms) if n in kept or not known.intersection(norm.keys)]

    def place(self, number: int, norm: Norm) -> str:
        """The path of a norm in the model."""
        step = next(iter(self._steps(number)), None)
        leaves = [] if step is None else [leaf for v in step.ins[1:] if (leaf := origin(v)) is not None]
        return self.kind.place(norm.path, [self.paths[leaf] for leaf in leaves])

    def _steps(self, number: int) -> list[Step]:
        return [step for step in self.graph.steps if step.params.get("name") == f"{MARK}{number}_"]

    def _around(self, number: int) -> str | None:
        """The loop or the like that a norm runs inside of."""
        return next((step.name for step in self.graph.steps if f"{MARK}{number}_" in step.inside), None)

    def step_of(self, number: int, seen: list[tuple[int, Norm]]) -> Step:
        """The step that stands for a norm."""
        norm, steps = dict(seen)[number], self._steps(number)
        if norm.refusal:
            raise Left(norm.refusal)
        if not steps:
            around = self._around(number)
            raise Left(f"it runs inside of `{around}`" if around else "the model's output does not depend on it")
        if len(steps) > 1 or [n.path for _, n in seen].count(norm.path) > 1:
            raise Left("it is called more than once")
        if steps[0].ins[0].shape != norm.shape:
            raise Left("it runs inside of `vmap`")
        if refusal := self.kind.refusal(self.place(number, norm), norm.layer):
            raise Left(refusal)
        return steps[0]

    def fold(self, norm: Norm, step: Step) -> tuple[Way, str]:
        """What takes the place of a norm, and what was done. Nothing is changed where it raises."""
        held = dict(zip(norm.names, step.ins[1:], strict=True))
        chains = {name: chain(value, may_return=True) for name, value in held.items() if name != "count"}
        aligned = self._values(norm, step, chains)
        factor, shift = _affine(norm, aligned)
        if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
            raise Left("its scale or its statistics are not finite")
        edits = self._neighbours(norm, step, factor, shift)
        new, made = self._after(edits)
        neighbours = [self.paths[leaf] for leaf in new]
        for name, value in _identity(norm, held, edits.over).items():
            steps = chains[name]
            assert steps is not None
            shape = aligned[norm.names.index(name)].shape
            fitting = fit(np.ones((1,) * len(shape)) * value, shape)
            own = None if fitting is None else through(steps, np.broadcast_to(fitting, shape).reshape(held[name].shape))
            leaf = leaf_of(held[name], steps)
            if own is None:
                raise Left(f"its shift does not fit its {name}")
            new[leaf] = np.broadcast_to(own, self.leaves[leaf].shape)
        self._check(new)
        self.changed.update(new)
        self.made.update(made)
        neighbours += [self.paths[leaf].removesuffix("kernel") + "bias (new)" for leaf in made]
        what = "folded into " + ", ".join(neighbours) + ("" if edits.over is None else "; its shift stays")
        way = Way("bare" if not norm.affine else "same", norm.returns, edits.over)
        return way, what

    def _values(self, norm: Norm, step: Step, chains: dict[str, list[Step] | None]) -> list[np.ndarray]:
        """The parameters and the state, of x's rank."""
        axes, aligned = canonicalize_axes("fold", len(norm.shape), norm.spec.feature_axes()), []
        for name, value in zip(norm.names, step.ins[1:], strict=True):
            a = known(value, self.leaves)
            if a is None:
                raise Left(f"its {name} does not come from the variables alone")
            if chains.get(name, []) is None:
                raise Left(f"its {name} is not a variable that it alone reads")
            placed: Any = align_param("fold", "", a, norm.shape, axes)
            aligned.append(_wide_array(a).reshape(placed.shape))
        return aligned

    def _neighbours(self, norm: Norm, step: Step, factor: np.ndarray, shift: np.ndarray) -> Edits:
        reasons = []
        if norm.affine:
            try:
                return before(step, factor, shift, self._can_make)
            except Left as reason:
                reasons.append(str(reason))
        try:
            return after(self.graph, step, factor, shift, self._of, self._can_make)
        except Left as reason:
            reasons.append(str(reason))
        raise Left("; ".join(reasons))

    def _can_make(self, leaf: int) -> bool:
        return self.kind.can_make_bias(self.paths[leaf])

    def _of(self, leaf: int) -> np.ndarray:
        if leaf in self.changed:
            return self.changed[leaf]
        if not jnp.issubdtype(self.leaves[leaf].dtype, jnp.inexact):
            raise Left(f"{self.paths[leaf]} is of {self.leaves[leaf].dtype}")
        return _wide_array(np.asarray(self.leaves[leaf]))

    def _after(self, edits: Edits) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        new, made = {}, {}
        with np.errstate(all="ignore"):
            for leaf, factor, shift in edits.changes:
                a = new.get(leaf, self._of(leaf))
                new[leaf] = (a if factor is None else a * factor) + (0.0 if shift is None else shift)
            for leaf, (factor, shift) in edits.made.items():
                old = self.made.get(leaf)
                if old is not None or shift.any():
                    old = np.zeros(()) if old is None else old
                    made[leaf] = (old if factor is None else old * factor) + shift
        return new, made

    def _check(self, new: dict[int, np.ndarray]) -> None:
        for leaf, a in new.items():
            if np.iscomplexobj(a) and not np.iscomplexobj(self._of(leaf)):
                raise Left(f"{self.paths[leaf]} would be complex")
            with np.errstate(all="ignore"):
                lost = np.abs(a.astype(self.leaves[leaf].dtype).astype(a.dtype) - a)
            if np.isfinite(self._of(leaf)).all() and not np.all(lost <= np.abs(a).max(initial=0.0) / 8):  # or NaN
                raise Left(f"{self.paths[leaf]} would overflow or vanish in {self.leaves[leaf].dtype}")

    def finished(self) -> list[Any]:
        """All variables, rounded once, where they were."""
        return [_stored(self.changed[n], leaf) if n in self.changed else leaf for n, leaf in enumerate(self.leaves)]

    def biases(self) -> dict[str, np.ndarray]:
        """The new biases, by the path of the weights that they follow."""
        return {self.paths[leaf]: bias.astype(self.leaves[leaf].dtype) for leaf, bias in self.made.items()}


def _wide_array(a: np.ndarray) -> np.ndarray:
    return a.astype(complex if np.iscomplexobj(a) else float)


def _stored(a: np.ndarray, like: Any) -> Any:
    a = a.astype(like.dtype)
    if not isinstance(like, jax.Array):
        return a
    return jax.device_put(a, like.sharding) if like.committed else jnp.asarray(a)


def _affine(norm: Norm, values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The factor and the shift, of x's rank, that can be folded."""
    ones, held = np.ones((1,) * len(norm.shape)), dict(zip(norm.names, values, strict=True))
    offset = norm.spec.scale_offset
    if hasattr(norm.spec, "as_affine"):
        with _wide():
            affine = norm.spec.as_affine(*jax.tree.unflatten(norm.form, values))
            return ones * np.asarray(affine.scale), ones * np.asarray(affine.bias)
    if not {"scale", "bias", "gamma"} & set(norm.names):
        raise Left("it has no scale and no bias")
    scale = held.get("gamma", held.get("scale"))
    bias = held.get("bias", np.zeros(())) * getattr(norm.spec, "output_scale", 1.0)
    return ones * (1.0 if scale is None else scale + offset), ones * bias


def _identity(norm: Norm, held: dict[str, Any], over: np.ndarray | None) -> dict[str, Any]:
    """Of the norm's own variables, those that make it the identity, and what is over as its shift."""
    offset, kept = norm.spec.scale_offset, 0.0 if over is None else over
    values = {"scale": 1.0 - offset, "gamma": 1.0 - offset, "bias": kept, "eta": 0.0}
    if norm.affine:
        values |= {"mean": 0.0 if "bias" in held else -kept, "var": 1.0 - getattr(norm.spec, "epsilon", 0.0)}
    return {name: value for name, value in values.items() if name in held}


def _wide() -> contextlib.AbstractContextManager[Any]:
    if hasattr(jax, "enable_x64"):  # from JAX 0.8 on
        return jax.enable_x64(True)
    from jax import experimental

    return experimental.enable_x64()  # pyright: ignore
