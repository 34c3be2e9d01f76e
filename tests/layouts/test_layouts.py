"""Law 5 for every layout: batch, sequence, space and features over 1-D, 2-D and 3-D meshes, and parameters in shards.

One row of the catalogue for each mechanism runs once in each layout that it has an axis for: under jit on Auto and
Explicit meshes, and in shard_map with check_vma on, where `axis_name` names the mesh axes of what a statistic runs
over. Outputs, gradients of x and of the parameters (random cotangents), and state are those of one device. Nothing of
x's size ever moves, and what the statistics need of other devices is one all-reduce each way, of a few floats for each
of them.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import MECHANISMS, Row, by_name, draw, no_operands
from helpers.devices import close, mesh_of, moved, placed
from helpers.jit import jit_unoptimized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

# The mesh, and what of x lies along which of its axes: batch, middle (a sequence, or space), features.
LAYOUTS = {
    "batch": ((8,), ("data",), ("data", None, None)),
    "middle": ((8,), ("seq",), (None, "seq", None)),
    "features": ((8,), ("model",), (None, None, "model")),
    "batch and middle": ((2, 4), ("data", "seq"), ("data", "seq", None)),
    "batch and features": ((2, 4), ("data", "model"), ("data", None, "model")),
    "hosts, chips": ((2, 4), ("host", "chip"), (("host", "chip"), None, None)),
    "all three": ((2, 2, 2), ("data", "seq", "model"), ("data", "seq", "model")),
}


@dataclasses.dataclass
class Case:
    """A row of the catalogue in a layout: sizes that every mesh divides, and where everything lies."""

    row: Row
    layout: str
    kind: str = "auto"

    def __post_init__(self):
        self.sizes, self.names, (batch, middle, features) = LAYOUTS[self.layout]
        rank, spec = len(self.row.shape), self.row.spec
        self.feature = getattr(spec, "axis", -1)
        self.feature = (self.feature[-1] if isinstance(self.feature, tuple) else self.feature) % rank
        self.middle = next((a for a in range(1, rank) if a != self.feature), None)
        group = isinstance(spec, jn.GroupNorm)
        # Channels in eight whole groups at least, so that each device has some of its own.
        if group:
            size = dict(num_groups=None, group_size=3)
            self.row = dataclasses.replace(self.row, spec=dataclasses.replace(spec, **size),
                                           statistic=_in_groups_of(3, self.feature, spec.reduction_axes))  # fmt: skip
        self.shape = tuple(
            16 if a == 0 else (24 if group else 16) if a == self.feature else 8 if a == self.middle else n
            for a, n in enumerate(self.row.shape)
        )
        where = {0: batch, self.middle: middle, self.feature: features}
        self.spec = P(*(where.get(a) for a in range(rank)))
        self.param = tuple(1 if p == 1 else n for p, n in zip(self.row.param, self.shape, strict=True))

    def mesh(self) -> jax.sharding.Mesh:
        return mesh_of(self.kind, self.sizes, self.names)

    def reduced(self) -> list[int]:
        """The axes that a statistic runs over, found by asking which elements share one."""
        if self.row.statistic is None:
            return []
        corner, out = (0,) * len(self.shape), []
        label = lambda index: tuple(int(v) for v in np.broadcast_arrays(*self.row.statistic(*index)))
        for a, n in enumerate(self.shape):
            last = tuple(n - 1 if i == a else 0 for i in range(len(self.shape)))
            beside = tuple(1 if i == a else 0 for i in range(len(self.shape)))
            if label(last) == label(corner) or label(beside) == label(corner):
                out.append(a)
        return out

    def over(self) -> tuple[str, ...]:
        """The mesh axes over which statistics have to be merged; groups of channels are whole on their device."""
        whole = [self.feature] if isinstance(self.row.spec, jn.GroupNorm) else []
        return tuple(name for a in self.reduced() if a not in whole for name in _names(self.spec[a]))

    def param_spec(self) -> Any:
        """For each parameter: along the axes of x that it has; a number is everywhere."""
        own = P(*(s if p != 1 else None for s, p in zip(self.spec, self.param, strict=True)))
        made = self.row.spec.init(self.shape[self.feature])[0]
        return type(made)(*(None if p is None else own if p.ndim else P() for p in made))

    def arguments(self, rng):
        params = dataclasses.replace(self.row, shape=self.shape, param=self.param).params(rng, x_rank=True)
        state = self.row.spec.init(self.shape[self.feature])[1]
        return params, state, draw(rng, self.shape, 2.0), draw(rng, self.shape)

    def state_spec(self) -> P:
        return P(self.spec[self.feature]) if self.row.batch else P()


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _in_groups_of(size, channel, reduction_axes):
    """The statistics of group norm in groups of `size` channels."""

    def statistic(*index):
        kept = [0] if reduction_axes is None else [a for a in range(len(index)) if a not in reduction_axes]
        return (*(index[a] for a in kept if a != channel), index[channel] // size)

    return statistic


def train(norm, params, state, x, g):
    """Output, state, and gradients for the cotangent g."""
    y, vjp, new = jax.vjp(lambda p, x: norm.apply(p, state, x, train=True), params, x, has_aux=True)
    return y, new, vjp(g)


on_one_device = jit_unoptimized(train, static_argnums=0)  # compiled once for each row, whatever the layouts


def statistics_of_one_device(case: Case) -> int:
    """How many statistics one device has a part in."""
    mesh = dict(zip(case.names, case.sizes, strict=True))
    local = [n // math.prod(mesh[m] for m in _names(s)) for n, s in zip(case.shape, case.spec, strict=True)]
    index = np.indices(local)
    if case.row.statistic is None:
        return 0
    names = np.stack([np.broadcast_to(a, local).ravel() for a in case.row.statistic(*index)], -1)
    return len(np.unique(names, axis=0))


def fits(row, layout) -> bool:
    """Whether the row has an axis for each of the layout's. Two feature axes go by the last.

    Ghost batches have a law of their own in test_sync, and segments one in test_elementwise.
    """
    case = Case(row, layout)
    return case.middle is not None or LAYOUTS[layout][2][1] is None


ROWS = [row for row in map(by_name.get, MECHANISMS) if not row.ghost and row.operands is no_operands]
CASES = [(row, layout) for layout in LAYOUTS for row in ROWS if fits(row, layout)]
ids = lambda v: v if isinstance(v, str) else str(v)


@pytest.mark.parametrize(("row", "layout"), CASES, ids=ids)
def test_jit_matches_one_device_in_every_layout(row, layout, rng):
    """Auto and Explicit meshes in turn; parameters lie as the features do."""
    kind = ("auto", "explicit")[CASES.index((row, layout)) % 2]
    case = Case(row, layout, kind)
    params, state, x, g = case.arguments(rng)
    norm = case.row.spec
    want = on_one_device(norm, params, state, x, g)
    run = jit_unoptimized(lambda *args: train(norm, *args))
    mesh = case.mesh()
    with jax.set_mesh(mesh):
        args = placed(mesh, (params, case.param_spec()), (state, case.state_spec()), (x, case.spec), (g, case.spec))
        compiled = run.lower(*args).compile()
        got = compiled(*args)
        close(got, want, rtol=5e-5, atol=5e-5)
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, case.spec), x.ndim)
    # XLA takes two rounds forward, having no common shift beforehand, and one backward; and where it sums over
    # several mesh axes XLA may do so along one after the other.
    assert_little_moves(case, compiled.as_text(), rounds=3 * len(case.over()))


@pytest.mark.parametrize(("row", "layout"), CASES, ids=ids)
def test_shard_map_matches_one_device_in_every_layout(row, layout, rng):
    """check_vma is on: that the out_specs are accepted proves what is replicated."""
    kind = ("explicit", "auto")[CASES.index((row, layout)) % 2]
    case = Case(row, layout, kind)
    params, state, x, g = case.arguments(rng)
    norm, over = case.row.spec, case.over()
    want = on_one_device(norm, params, state, x, g)
    synced = dataclasses.replace(norm, axis_name=over) if over else norm
    run = jit_unoptimized(jax.shard_map(
        lambda *args: train(synced, *args), mesh=case.mesh(),
        in_specs=(case.param_spec(), case.state_spec(), case.spec, case.spec),
        out_specs=(case.spec, case.state_spec(), (case.param_spec(), case.spec)),
    ))  # fmt: skip
    args = placed(
        case.mesh(), (params, case.param_spec()), (state, case.state_spec()), (x, case.spec), (g, case.spec)
    )
    compiled = run.lower(*args).compile()
    close(compiled(*args), want, rtol=5e-5, atol=5e-5)
    assert_little_moves(case, compiled.as_text(), rounds=2 if over else 0)
    forward = jax.shard_map(
        lambda p, s, x: synced.apply(p, s, x, train=True)[0], mesh=case.mesh(),
        in_specs=(case.param_spec(), case.state_spec(), case.spec), out_specs=case.spec,
    )  # fmt: skip
    lowered = jit_unoptimized(forward).lower(*args[:3])
    if not over:
        assert not re.search("stablehlo.(all|collective|reduce_scatter)", lowered.as_text())
        return
    # One slot for each device, of a count, a mean as a sum of two, and a second moment.
    ((name, size),) = moved(lowered.compile().as_text())
    assert name == "all-reduce"
    assert size <= 4 * math.prod(case.mesh().shape[name] for name in over) * statistics_of_one_device(case)


def assert_little_moves(case: Case, text: str, rounds: int) -> None:
    """Sums alone; each at most of all statistics' few floats in a slot per device, or of the parameters' gradients."""
    ops = moved(text)
    assert {name for name, _ in ops} <= {"all-reduce"}
    devices = math.prod(case.sizes)
    # XLA may join the slots with a sum of the backward pass that is ready as early.
    most = (4 * devices + 2) * statistics_of_one_device(case) + len(case.param_spec()) * math.prod(case.param)
    assert all(size <= most for _, size in ops), ops
    # Those given per example are sums over fewer devices than the statistics, so they come apart.
    parameters = len(case.param_spec()) + 2 * case.row.per_sample
    assert len(ops) <= rounds + parameters, ops


ONE_OF_EACH = [by_name[n] for n in ("layer", "rms", "group-size", "instance-sequence", "batch-nhwc")]


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("row", ONE_OF_EACH, ids=str)
def test_fully_sharded_parameters_are_gathered_and_x_is_not(row, kind, rng):
    """FSDP: the batch and the parameters lie along one axis. The parameters are gathered, x is not."""
    case = Case(row, "batch", kind)
    params, state, x, g = case.arguments(rng)
    norm, mesh = case.row.spec, case.mesh()
    want = on_one_device(norm, params, state, x, g)
    shard = P(*("data" if n != 1 else None for n in case.param))
    with jax.set_mesh(mesh):
        args = placed(mesh, (params, shard), (state, P()), (x, case.spec), (g, case.spec))
        compiled = jit_unoptimized(lambda *args: train(norm, *args)).lower(*args).compile()
        close(compiled(*args), want, rtol=5e-5, atol=5e-5)
    for name, size in moved(compiled.as_text()):
        if name != "all-reduce":
            assert size <= 2 * math.prod(case.param), (name, size)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("layout", ["features", "batch and features", "all three"])
@pytest.mark.parametrize("groups", [1, 2])
def test_channel_groups_may_span_devices_under_jit(groups, layout, kind, rng):
    """A group on two devices or more: its parts are merged, and nothing of x's size moves."""
    row = dataclasses.replace(by_name["group-size"], spec=jn.GroupNorm(num_groups=groups))
    case = Case(row, layout, kind)
    norm = jn.GroupNorm(num_groups=groups)
    params, _, x, g = case.arguments(rng)
    want = on_one_device(norm, params, (), x, g)
    run = jit_unoptimized(lambda *args: train(norm, *args))
    with jax.set_mesh(case.mesh()):
        args = placed(case.mesh(), (params, case.param_spec()), ((), P()), (x, case.spec), (g, case.spec))
        compiled = run.lower(*args).compile()
        close(compiled(*args), want, rtol=5e-5, atol=5e-5)
    ops = moved(compiled.as_text())
    assert {name for name, _ in ops} == {"all-reduce"}, ops
    assert all(size < x.size / 4 for _, size in ops), ops


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_channel_group_may_span_devices_in_shard_map(kind, rng):
    """In shard_map one group of all channels is `num_groups=1` on each part, over the axis."""
    mesh, x, g = mesh_of(kind, names=("model",)), draw(rng, (4, 6, 16), 2.0), draw(rng, (4, 6, 16))
    params = jn.Affine(*(jnp.asarray(p, jnp.float32) for p in rng.normal(size=(2, 16))))
    want = train(jn.GroupNorm(num_groups=1), params, (), x, g)
    data, shard = P(None, None, "model"), P("model")
    norm = jn.GroupNorm(num_groups=1, axis_name="model")
    run = jax.shard_map(
        lambda p, x, g: train(norm, p, (), x, g),
        mesh=mesh, in_specs=(shard, data, data), out_specs=(data, P(), (shard, data)),
    )  # fmt: skip
    args = placed(mesh, (params, shard), (x, data), (g, data))
    compiled = jit_unoptimized(run).lower(*args).compile()
    close(compiled(*args), want, rtol=5e-5, atol=5e-5)
    assert [name for name, _ in moved(compiled.as_text())] == ["all-reduce"] * 2
