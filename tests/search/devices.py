"""The same over eight host devices: layouts of x under jit, and who shares statistics, in every way to run on devices.

Results are those of one device, to the same tolerances against the same truth, and nothing of x's size is gathered.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers.devices import mesh_of, moved, placed
from jax.sharding import PartitionSpec as P

from . import run
from .case import Case, operands
from .expected import of_one

Shape = tuple[int, ...]
NAMES = "abc"


@dataclass(frozen=True)
class Layout:
    """A configuration of one device (`Case`), and how it lies on a mesh of eight."""

    case: Case
    mesh: Shape  # sizes, of axes named "a", "b", "c"
    spec: tuple[tuple[str, ...], ...]  # for each axis of x the mesh axes that it is spread over
    kind: str = "auto"  # "explicit"
    way: str = "jit"  # "shard_map", "vmap", "pmap"
    sync: Any = "global"  # batch norm
    named: bool = False  # axis_name is given
    params: str = "like"  # sharded as x is along the same axes; "whole"
    backend: str | None = None

    @property
    def names(self) -> str:
        return NAMES[: len(self.mesh)]

    def shards(self, axis: int) -> int:
        return math.prod(self.mesh[NAMES.index(n)] for n in self.spec[axis])

    @property
    def batch(self) -> int:
        """The axis whose parts share statistics or not."""
        return next(a for a in range(len(self.case.shape)) if a not in self.case.axes)

    def over(self) -> tuple[str, ...]:
        """The mesh axes that a statistic runs over; groups of channels are whole on their device."""
        labels = self.case.labels()
        if self.case.norm == "batch":
            return self.spec[self.batch]
        differs = lambda a: (np.take(labels, [0], a) != np.take(labels, [-1], a)).all()
        return tuple(n for a, s in enumerate(self.spec) for n in s if labels.shape[a] > 1 and not differs(a))

    def labels(self) -> np.ndarray:
        """Of each element's statistic, among those that are shared as `sync` says."""
        labels = self.case.labels()
        if self.case.norm != "batch" or self.sync == "global":
            return labels
        number = math.prod(self.mesh) if self.way in ("vmap", "pmap") else self.shards(self.batch)
        part = np.indices(self.case.shape)[self.batch] // (self.case.shape[self.batch] // number)
        if self.sync != "local":
            groups = self.sync if isinstance(self.sync, tuple) else _runs(number, self.sync)
            table = np.zeros(number, int)
            for i, members in enumerate(groups):
                table[list(members)] = i
            part = table[part]
        return np.unique(labels * number + part, return_inverse=True)[1].reshape(labels.shape)


def _runs(number: int, size: int):
    return [range(i, i + size) for i in range(0, number, size)]


def check(layout: Layout) -> None:
    wrong = failures(layout)
    assert not wrong, "\n".join([repr(layout), *wrong])


def failures(layout: Layout) -> list[str]:
    case = layout.case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        o, _, mask, state, g, _ = run._data(case)
        g = {k: a[0] for k, a in g.items()}
        want = _truth(layout, o, mask, state, g)
        try:
            got, text = _on_devices(layout, o, mask, state, g)
        except Exception as error:
            return [f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"]
    return run._compared(jax.tree.map(np.asarray, got), want) + _gathered(layout, text, o)


def _truth(layout: Layout, o, mask, state, g) -> dict:
    """As of one device, with the labels of this layout."""
    case = dataclasses.replace(layout.case, transform="vjp")
    shared = _Shared(**{f.name: getattr(case, f.name) for f in dataclasses.fields(Case)})
    object.__setattr__(shared, "shared", layout.labels())
    return {k: v for k, v in of_one(shared, o, mask, state, g, {}).items() if not k.startswith(("tang", "sec"))}


class _Shared(Case):
    """A case whose labels are given."""

    def labels(self):
        return self.shared


def _on_devices(layout: Layout, o: dict, mask, state, g: dict):
    """The results by name, and the text of the compiled program where there is one for all devices."""
    case, mesh = layout.case, mesh_of(layout.kind, layout.mesh, tuple(layout.names))
    name: Any = None
    if case.norm == "batch" and layout.named:
        name = layout.spec[layout.batch] if layout.way in ("jit", "shard_map") else ("a",)
    elif layout.way == "shard_map":
        name = layout.over() or None
    name = name[0] if name is not None and len(name) == 1 else name
    if layout.way == "shard_map" and case.norm == "group":  # in whole groups, each device its own
        case = dataclasses.replace(case, groups=case.groups // layout.shards(case.channel))

    def train(o, mask, g, state=state):
        y, pull, new = jax.vjp(lambda o: _norm(case, name, layout, o, mask, state), o, has_aux=True)
        return {**y, **run._as_dict(new)}, pull(g)[0]

    if layout.way in ("vmap", "pmap"):
        return _mapped(layout, train, o, mask, g), ""
    of_x = P(*(s if len(s) > 1 else s[0] if s else None for s in layout.spec))
    like = lambda shape: P(*(None if n == 1 else s for n, s in zip(shape, of_x, strict=True)))
    whole = layout.params == "whole" and layout.way == "jit"
    put = lambda a: P() if whole and a.shape != case.shape else like(a.shape)
    specs = ({k: put(a) for k, a in o.items()}, None if mask is None else like(mask.shape), dict.fromkeys(g, of_x))
    of_state = P(*(of_x[a] for a in case.axes))
    f = train
    if layout.way == "shard_map":
        outs = {**dict.fromkeys(g, of_x), **dict.fromkeys(run._as_dict(state), of_state)}
        f = jax.shard_map(train, mesh=mesh, in_specs=(*specs, of_state), out_specs=(outs, specs[0]))
    with jax.set_mesh(mesh):
        sharded = lambda tree, specs: {k: placed(mesh, (a, specs[k]))[0] for k, a in tree.items()}
        args = sharded(o, specs[0]), None if mask is None else placed(mesh, (mask, specs[1]))[0], sharded(g, specs[2])
        args = (*args, *placed(mesh, (state, of_state)))
        compiled = jax.jit(f).lower(*args).compile()
        results, gradients = compiled(*args)
    return {**results, **{f"d_{k}": a for k, a in gradients.items()}}, compiled.as_text()


def _norm(case: Case, name, layout: Layout, o, mask, state):
    sync = dict(sync=layout.sync) if case.norm == "batch" and name is not None else {}
    return run._norm(case, layout.backend, o, mask, state, axis_name=name, **sync)


def _mapped(layout: Layout, train, o, mask, g):
    """By vmap or pmap over the parts of the batch; what has no part in it is summed, as data-parallel training does."""
    case, batch, n = layout.case, layout.batch, math.prod(layout.mesh)
    full = case.shape[batch]
    parts = lambda a: jnp.moveaxis(jnp.reshape(a, (*a.shape[:batch], n, full // n, *a.shape[batch + 1 :])), batch, 0)
    split = lambda a: a is not None and a.ndim == len(case.shape) and a.shape[batch] == full
    axes = jax.tree.map(lambda a: 0 if split(a) else None, (o, mask, g))
    args = jax.tree.map(lambda a: parts(a) if split(a) else a, (o, mask, g))
    wrap = jax.vmap if layout.way == "vmap" else jax.pmap
    results, gradients = wrap(train, axis_name="a", in_axes=axes)(*args)
    join = lambda a: jnp.moveaxis(a, 0, batch).reshape(*a.shape[1 : batch + 1], full, *a.shape[batch + 2 :])
    out = {k: join(a) if k in g else a[0] for k, a in results.items()}
    return {**out, **{f"d_{k}": join(a) if split(o[k]) else a.sum(0) for k, a in gradients.items()}}


def _gathered(layout: Layout, text: str, o: dict) -> list[str]:
    """Collectives other than sums that move a device's part of x: more than all parameters and its statistics have."""
    local = tuple(n // layout.shards(a) for a, n in enumerate(layout.case.shape))
    statistics = len(np.unique(layout.labels()[tuple(map(slice, local))]))
    small = sum(a.size for a in o.values() if a.shape != layout.case.shape) + 4 * statistics
    most = max(math.prod(local) - 1, small)
    return [f"{name} moves {n} elements" for name, n in moved(text) if name != "all-reduce" and n > most]


# --- drawing ----------------------------------------------------------------------------------------------------------

SHAPES: tuple[Shape, ...] = ((8, 6, 12, 24), (16, 8, 24), (32, 5, 6), (8, 8), (4, 2), (16, 4, 4, 8), (8, 1), (24, 40))
MESHES: tuple[Shape, ...] = ((8,), (2, 4), (4, 2), (2, 2, 2))


def drawn(seed: int, index: int) -> Layout:
    """Configuration number `index`."""
    rng = np.random.default_rng((seed, index, 2))
    pick = lambda *values: values[int(rng.integers(len(values)))]
    chance = lambda p: bool(rng.random() < p)
    norm = pick("layer", "rms", "group", "instance", "batch", "batch", "batch", "gated", "add_rms")
    shape, mesh = pick(*SHAPES), pick(*MESHES)
    rank = len(shape)
    axes: Shape = pick((rank - 1,), (rank - 1,), (int(rng.integers(rank)),))
    if norm == "instance" and axes == (0,):
        axes = (rank - 1,)
    spread = lambda s: tuple(1 if chance(0.5) else n for n in s)
    along = tuple(n if a in axes else 1 for a, n in enumerate(shape))
    more: dict[str, Any] = {}
    way = pick("jit", "jit", "shard_map") if norm != "batch" else pick("jit", "jit", "shard_map", "vmap", "pmap")
    sync: Any = "global"
    named = norm == "batch" and (way != "jit" or chance(0.6))
    batch = next((a for a in range(rank) if a not in axes), 0)
    spec: list[tuple[str, ...]] = [() for _ in shape]
    sizes = dict(zip(NAMES, mesh, strict=False))
    for name in rng.permutation(list(sizes)):
        free = [a for a in range(rank) if shape[a] % (math.prod(sizes[n] for n in spec[a]) * sizes[name]) == 0]
        if norm == "batch" and (named or way != "jit"):
            free = [a for a in free if a in (batch, *axes)]
            free += [batch] * (batch in free) * 3
        if way in ("vmap", "pmap"):
            free = []
        if free and chance(0.85):
            a = pick(*free)
            spec[a] = (*spec[a], str(name))
    if way in ("vmap", "pmap") and shape[batch] % 8:
        way, named = "jit", False
    shards = math.prod(sizes[n] for n in spec[batch]) if way in ("jit", "shard_map") else 8
    if named and not (spec[batch] or way in ("vmap", "pmap")):
        way, named = "jit", False
    if named:
        crossed = tuple((i, shards - 1 - i) for i in range(shards // 2))
        sync = pick(
            "global", "local", *(k for k in (1, 2, 4, 8) if shards % k == 0), crossed if shards > 1 else "local"
        )
    if norm in ("group", "gated"):
        size, split = shape[axes[0]], math.prod(sizes[n] for n in spec[axes[0]])
        counts = [d for d in range(1, size + 1) if size % d == 0 and (d % split == 0 or split % d == 0)]
        if way == "shard_map":
            counts = [d for d in counts if d % split == 0] or [size]
        more["groups"] = pick(*counts)
        if norm == "gated" and (more["groups"] == 1 or way == "shard_map"):
            more["groups"] = None
    if norm == "gated":
        more |= dict(gate=pick(shape, shape, spread(shape)), norm_before_gate=chance(0.5), activation="silu")
    if chance(0.3) and norm != "gated":
        more["activation"] = pick("relu", "gelu", "tanh")
    mask = pick(None, None, shape, spread(shape), shape[:1] + (1,) * (rank - 1))
    if norm == "batch":
        more["state"] = pick((("momentum", 0.9),), (("momentum", None),), (("unbiased_running_var", True),))
    case = Case(
        norm, shape, axes, scale=pick(along, along, None, spread(shape)), mask=mask, transform="vjp",
        bias=None if norm == "gated" else pick(along, None),
        mean=pick(0.0, 1.0, 30.0), seed=int(rng.integers(1 << 30)), density=pick(0.7, 0.3), **more,
    )  # fmt: skip
    case = dataclasses.replace(case, wrt=tuple(operands(case)[0]))
    return Layout(
        case, mesh, tuple(spec), pick("auto", "explicit"), way, sync, named, pick("like", "whole"),
        pick(None, "xla"),
    )  # fmt: skip


def shrunk(layout: Layout) -> Layout:
    """A simpler layout that fails too."""
    plain = dict(mask=None, scale=None, bias=None, activation=None, mean=0.0, state=())
    changed = True
    while changed:
        changed = False
        tried = [
            (k, v)
            for k, v in plain.items()
            if getattr(layout.case, k) != v and (k, layout.case.norm) != ("activation", "gated")
        ]
        candidates = [dataclasses.replace(layout, case=dataclasses.replace(layout.case, **{k: v})) for k, v in tried]
        candidates += [
            dataclasses.replace(layout, **{k: v})
            for k, v in (("kind", "auto"), ("params", "like"))
            if getattr(layout, k) != v
        ]
        for candidate in candidates:
            case = dataclasses.replace(candidate.case, wrt=tuple(operands(candidate.case)[0]))
            candidate = dataclasses.replace(candidate, case=case)
            try:
                failing = bool(failures(candidate))
            except Exception:  # not a configuration
                continue
            if failing:
                layout, changed = candidate, True
                break
    return layout
