"""Law 5 where parameters, masks, gates and states are sharded over axes that x is not.

Each case is one mechanism, found by a random search over the shardings of all operands (mesh 2 x 4). On Explicit meshes
types say how an array is sharded: y has x's sharding, a gradient that of its operand, a new state that of the old one.
Everything equals one device, in first and in second derivatives, and of x's size nothing moves that need not.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from helpers.devices import close, mesh_of, moved
from helpers.jit import jit_unoptimized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

SHAPE = (8, 8, 16)
FEATURES, PER_SAMPLE = (16,), (8, 1, 16)


@dataclasses.dataclass(frozen=True)
class Case:
    """A norm as a function of its arrays by name; the shape and the sharding of each."""

    norm: object  # (arrays by name, implementation) -> y, or (y, new state or stream)
    arrays: dict  # name -> (shape, spec)
    y: P | jn.Moments | None = None  # the output's sharding, where it is not x's
    second: bool = False  # second derivatives too
    kernels: bool = False  # on the default implementation and on "xla"
    moves_x: bool = False  # something of x's size has to move: an array of that size has another sharding

    def draw(self, rng):
        made = {name: draw(rng, shape) for name, (shape, _) in self.arrays.items()}
        for name in made.keys() & {"weights", "var"}:
            made[name] = np.abs(made[name]) + np.float32(0.5)
        if "mask" in made:
            made["mask"] = made["mask"] > -0.6
        return jax.tree.map(jnp.asarray, made)


def rows(function, **options):
    def norm(a, implementation):
        params = [a.get(name) for name in ("scale", "bias")]
        return function(a["x"], *params, mask=a.get("mask"), implementation=implementation, **options)

    return norm


def adding(function):
    def norm(a, implementation):
        params = [a.get(name) for name in ("scale", "bias")]
        return function(a["x"], a["residual"], *params, mask=a.get("mask"), implementation=implementation)

    return norm


def gated(**options):
    return lambda a, implementation: jn.gated_rms_norm(
        a["x"], a["gate"], a.get("scale"), mask=a.get("mask"), implementation=implementation, **options
    )


def batch(state=lambda a: jn.RunningStats(a["mean"], a["var"]), train=True, **options):
    def norm(a, implementation):
        params = jn.Affine(a.get("scale"), a.get("bias"))
        call = dict(train=train, mask=a.get("mask"), weights=a.get("weights"), implementation=implementation)
        y, new = jn.batch_norm(a["x"], params, state(a), **call, **options)
        return (y, new) if train is True else y

    return norm


moments = lambda a: jn.Moments(a["count"], a["mean"], a["var"])
counted = lambda a: jn.RunningStats(a["mean"], a["var"], a["count"])


def of(x, **arrays):
    return {"x": (SHAPE, x), **arrays}


BATCH = P("d", None, None)
CASES = {
    "params-over-another-axis": Case(
        rows(jn.instance_norm),
        of(BATCH, scale=(FEATURES, P("m")), bias=(FEATURES, P(("m", "d")))),
        kernels=True,
        second=True,
    ),
    "params-over-the-batch-axis": Case(
        rows(jn.layer_norm), of(BATCH, scale=(FEATURES, P("d")), bias=(FEATURES, P(None))), kernels=True, second=True
    ),
    "per-sample": Case(
        rows(jn.rms_norm),
        of(P(None, "m", "d"), scale=(PER_SAMPLE, P("d", None, "m")), bias=(PER_SAMPLE, P("m", None, None))),
        kernels=True,
    ),
    "mask": Case(
        rows(jn.layer_norm, axis=(1, 2)),
        of(P("d", None, "m"), scale=((8, 16), P("m", "d")), mask=(SHAPE, P(None, ("m", "d"), None))),
        second=True,
    ),
    "mask-of-rows": Case(
        rows(jn.rms_norm, activation="gelu"),
        of(P("m", None, None), scale=(FEATURES, P("d")), mask=((8, 8), P("d", None))),
    ),
    "groups": Case(
        rows(jn.group_norm, num_groups=8),
        of(BATCH, scale=(FEATURES, P("m")), bias=(PER_SAMPLE, P(None, None, "d"))),
        kernels=True,
        second=True,
    ),
    "groups-on-several-devices": Case(
        rows(jn.group_norm, num_groups=2),
        of(P(None, None, "m"), scale=(FEATURES, P("d")), mask=(SHAPE, P(None, ("m", "d"), None))),
        second=True,
    ),
    "gate": Case(
        gated(), of(BATCH, gate=(SHAPE, P("m", None, "d")), scale=(FEATURES, P(("m", "d")))), second=True, moves_x=True
    ),
    "gate-of-groups-on-several-devices": Case(
        gated(group_size=8, norm_before_gate=False),
        of(P(None, "d", "m"), gate=((8, 8, 1), P("m", "d", None)), mask=((8, 1, 1), P(("m", "d"), None, None))),
    ),
    "gate-of-all-rows": Case(
        gated(), of(P(None, "m", None), gate=((1, 1, 16), P(None, None, None)), scale=(FEATURES, P("d")))
    ),
    "residual-merges": Case(
        adding(jn.add_rms_norm),
        of(BATCH, residual=(SHAPE, P(None, None, "m")), scale=(FEATURES, P("d"))),
        y=P("d", None, "m"),
        kernels=True,
        moves_x=True,
    ),
    "residual-conflicts": Case(
        adding(jn.add_layer_norm),
        of(BATCH, residual=(SHAPE, P("m", "d", None)), scale=(FEATURES, P("d"))),
        y=P("m", "d", None),
        second=True,
        moves_x=True,
    ),
    "batch": Case(
        batch(),
        of(
            BATCH,
            scale=(FEATURES, P("d")),
            bias=(FEATURES, P("m")),
            mean=(FEATURES, P("m")),
            var=(FEATURES, P(("m", "d"))),
        ),
        kernels=True,
        second=True,
    ),
    "weights": Case(
        batch(),
        of(
            P("m", None, "d"),
            weights=((8, 8, 1), P("d", "m", None)),
            mask=((8, 8), P(None, "d")),
            mean=(FEATURES, P(("d", "m"))),
            var=(FEATURES, P(None)),
        ),
        second=True,
    ),
    "moments-alone": Case(
        lambda a, _: jn.moments(a["x"], (0, 1), mask=a["mask"], weights=a["weights"]),
        of(P("m", None, "d"), weights=((8, 8, 1), P("d", "m", None)), mask=((8, 8), P(None, "d"))),
        y=jn.Moments(P("d"), P("d"), P("d")),
    ),
    "moments": Case(
        batch(moments),
        of(P("m", None, None), count=(FEATURES, P(None)), mean=(FEATURES, P("d")), var=(FEATURES, P("m"))),
    ),
    "cumulative": Case(
        batch(counted, momentum=None),
        of(P("m", None, None), count=(FEATURES, P("m")), mean=(FEATURES, P("d")), var=(FEATURES, P(None))),
    ),
    "ghost-batches-on-several-devices": Case(
        batch(virtual_batch_size=4),
        of(
            P("m", None, None),
            scale=(PER_SAMPLE, P("d", None, None)),
            mask=((1, 1, 16), P(None, None, "d")),
            mean=(FEATURES, P("m")),
            var=(FEATURES, P("d")),
        ),
    ),
    "inference": Case(
        batch(train=False),
        of(
            P("d", None, None),
            scale=(FEATURES, P("d")),
            mask=((8, 8), P(None, "d")),
            weights=((8, 8, 1), P("m", None, None)),
            mean=(FEATURES, P("m")),
            var=(FEATURES, P(("d", "m"))),
        ),
    ),
}


def differentiable(arrays):
    return {k: a for k, a in arrays.items() if k in ("x", "scale", "bias", "gate", "residual", "weights")}


def derivatives(case: Case, implementation, arrays, cotangents):
    """The outputs, the gradients, and the derivative of the gradients along a direction, forward and backward."""

    def gradients(at):
        out, vjp = jax.vjp(lambda at: case.norm({**arrays, **at}, implementation), at)
        return out, vjp(cotangents)[0]

    at = differentiable(arrays)
    if not case.second:
        return gradients(at)
    along = jax.tree.map(jnp.cos, at)
    (out, found), (_, forward) = jax.jvp(gradients, (at,), (along,))
    backward = jax.vjp(lambda at: gradients(at)[1], at)[1](along)[0]
    return out, found, forward, backward


def specs_of(case: Case, out):
    """The shardings that the outputs have to have."""
    if isinstance(case.y, jn.Moments):
        return case.y
    spec = lambda name: case.arrays[name][1]
    states = {
        jn.RunningStats: lambda s: jn.RunningStats(
            spec("mean"), spec("var"), None if s.count is None else spec("count")
        ),
        jn.Moments: lambda s: jn.Moments(spec("count"), spec("mean"), spec("var")),
    }
    if type(out) in states:
        return states[type(out)](out)
    return tuple(specs_of(case, part) for part in out) if isinstance(out, tuple) else case.y or spec("x")


VERSIONS = {"batch", "groups-on-several-devices", "mask"}  # run on other releases of JAX, whose types differ
RUNS = [(name, "auto", None) for name in CASES]
RUNS += [
    pytest.param(name, "explicit", None, marks=[pytest.mark.versions] if name in VERSIONS else []) for name in CASES
]
RUNS += [(name, "explicit", "xla") for name, case in CASES.items() if case.kernels]


@pytest.mark.parametrize(("name", "kind", "implementation"), RUNS)
def test_explicit_meshes_match_one_device(name, kind, implementation, rng):
    case = CASES[name]
    if kind == "auto" or implementation == "xla":  # second derivatives are made of the same parts there
        case = dataclasses.replace(case, second=False)
    arrays = case.draw(rng)
    out = jax.eval_shape(lambda arrays: case.norm(arrays, implementation), arrays)
    cotangents = jax.tree.map(lambda a: jnp.asarray(draw(rng, a.shape)), out)
    run = jit_unoptimized(lambda *args: derivatives(case, implementation, *args))
    want = run(arrays, cotangents)
    mesh = mesh_of(kind, (2, 4), ("d", "m"))
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        sharded = {name: put(a, case.arrays[name][1]) for name, a in arrays.items()}
        compiled = run.lower(sharded, jax.tree.map(put, cotangents, specs_of(case, out))).compile()
        got = compiled(sharded, jax.tree.map(put, cotangents, specs_of(case, out)))
        close(got, want, rtol=1e-4, atol=1e-4)
        if kind == "explicit":
            typed = lambda a, spec: (jax.typeof(a).sharding.spec, spec)
            found = [*jax.tree.leaves(jax.tree.map(typed, got[0], specs_of(case, out)), is_leaf=_is_pair)]
            found += [typed(g, case.arrays[k][1]) for k, g in got[1].items()]
            assert all(is_ == wanted for is_, wanted in found), found
    if case.moves_x or case.second or (kind == "auto" and not case.kernels):
        return
    largest = max(math.prod(shape) for k, (shape, _) in case.arrays.items() if shape != SHAPE)
    for kind_of, size in moved(compiled.as_text()):
        assert kind_of == "all-reduce" or size <= 2 * largest < math.prod(SHAPE) // 2, (kind_of, size)


def _is_pair(a) -> bool:
    return isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], P)


@pytest.mark.parametrize("name", ["params-over-another-axis", "batch"])
def test_eager_calls_on_an_explicit_mesh_match_one_device(name, rng):
    """An operation at a time under `jax.set_mesh`, each of which has the types that JAX asks for."""
    case = dataclasses.replace(CASES[name], second=False)
    arrays = case.draw(rng)
    out = jax.eval_shape(lambda arrays: case.norm(arrays, None), arrays)
    cotangents = jax.tree.map(lambda a: jnp.asarray(draw(rng, a.shape)), out)
    want = jit_unoptimized(lambda *args: derivatives(case, None, *args))(arrays, cotangents)
    mesh = mesh_of("explicit", (2, 4), ("d", "m"))
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        sharded = {name: put(a, case.arrays[name][1]) for name, a in arrays.items()}
        got = derivatives(case, None, sharded, jax.tree.map(put, cotangents, specs_of(case, cotangents)))
    close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0), (1, None)], ids=str)
def test_vmap_over_a_sharded_axis_matches_one_device(axes, rng):
    """The new axis is sharded where the mapped ones are, on the kernels too: also of an x that is not mapped."""
    of_x, of_scale = axes
    x, scale = draw(rng, SHAPE if of_x is not None else SHAPE[1:]), draw(rng, (8, 16) if of_scale == 0 else (16,))
    specs = {0: P("d", None, "m"), 1: P("m", "d", None), None: P(None, "m")}[of_x], P(*["d"] * (of_scale == 0), "m")
    out = P("d", None, "m") if of_x is None else P("d", "m", None) if of_x == 1 else specs[0]
    g = draw(rng, SHAPE)

    def run(x, scale, g):
        y, vjp = jax.vjp(jax.vmap(lambda x, scale: jn.layer_norm(x, scale), axes), x, scale)
        return y, vjp(g)

    want = jit_unoptimized(run)(x, scale, g)
    mesh = mesh_of("explicit", (2, 4), ("d", "m"))
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        got = jit_unoptimized(run)(put(x, specs[0]), put(scale, specs[1]), put(g, out))
    close(got, want, rtol=5e-5, atol=5e-5)
    assert [jax.typeof(a).sharding.spec for a in jax.tree.leaves(got)] == [out, *specs]
