"""Programs for elsewhere: `jax.export` with symbolic sizes, and jaxprs of lax operations alone."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import ROWS, by_name, draw
from helpers.native import run_python
from jax.extend.core import Primitive

import jaxnorm as jn
from jaxnorm._backends import cpu

f32 = jnp.float32


def everything(x, params, stats, mask):
    """Every norm and function over one x (batch, height, width, channels), an even number of channels."""
    scale, bias = params
    rows, planes = mask[:, :, :1], mask
    y, new = jn.batch_norm(x, params, stats, train=True, momentum=0.9)
    seen = jn.Moments(*(jnp.zeros_like(scale) for _ in range(3)))
    return {
        "layer": jn.layer_norm(x, scale, bias),
        "layer, planes": jn.layer_norm(x, axis=(1, 2), activation="gelu", mask=planes),
        "layer, adaptive": jn.layer_norm(x, x[:, :1, :1], x[:, :1, :1]),
        "rms": jn.rms_norm(x, scale, cast="before_scale", mask=rows),
        "group": jn.group_norm(x, scale, bias, num_groups=2),
        "group, masked": jn.group_norm(x, scale, bias, group_size=2, mask=planes, activation="silu"),
        "instance": jn.instance_norm(x, scale, bias),
        "batch": (y, new),
        "batch, masked": jn.batch_norm(x, params, stats, train=True, mask=mask),
        "batch, weighted": jn.batch_norm(x, params, stats, train=True, weights=jnp.abs(x[..., :1]))[0],
        "batch, ghosts": jn.batch_norm(x, params, stats, train=True, virtual_batch_size=2),
        "batch, gathered": jn.batch_norm(x, params, seen, train=True)[1],
        "batch, inference": jn.batch_norm(x, params, stats, train=False)[0],
        "gated": jn.gated_rms_norm(x, x[:1], scale, group_size=2, norm_before_gate=False),
        "gated, after": jn.gated_rms_norm(x, x, scale),
        "stream": (jn.add_rms_norm(x, x, scale), jn.add_layer_norm(x, jnp.sin(x), scale, bias)),
        "moments": jn.merge(jn.moments(x, (0, 1, 2), mask=mask), jn.moments(x, (0, 2, 1))),
        "normalize": jn.normalize(x, bias, scale, scale, bias),
    }


def with_gradients(x, params, stats, mask):
    y, vjp = jax.vjp(lambda x, params: everything(x, params, stats, mask), x, params)
    return y, vjp(jax.tree.map(jnp.sin, y))


def arguments(shape, make):
    c, truth = shape[-1:], shape[:3]
    params, stats = jn.Affine(make(c, f32), make(c, f32)), jn.RunningStats(make(c, f32), make(c, f32))
    return make(shape, f32), params, stats, make(truth, jnp.bool_)


def values(rng, shape):
    def make(shape, dtype):
        a = rng.uniform(0.5, 2.0, shape)
        return a > 1.0 if dtype == jnp.bool_ else a.astype(dtype)

    return arguments(shape, make)


@pytest.mark.parametrize("sizes", ["b, 4, 4, 6", "3, h, 4, 2*c", "b, h, w, 2*c"])
def test_any_size_may_be_a_symbol(sizes):
    args = arguments(jax.export.symbolic_shape(sizes), jax.ShapeDtypeStruct)
    program = jax.export.export(jax.jit(with_gradients))(*args)
    assert [str(n) for n in program.in_avals[0].shape] == sizes.split(", ")
    assert any(aval.shape == program.in_avals[0].shape for aval in program.out_avals)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (
            lambda x: jn.layer_norm(x, implementation="native"),
            "layer_norm: .*'native' .*symbolic sizes.*implementation=None",
        ),
        (
            lambda x: jn.group_norm(x, num_groups=4),
            'group_norm: num_groups=4 must divide .* c, .*symbolic_shape\\("4\\*c"\\)',
        ),
    ],
    ids=["native", "group"],
)
def test_an_unsupported_symbolic_size_is_explained(norm, message):
    if "native" in message and not cpu.library().loaded:
        message = "layer_norm: .*'native' cannot run here"
    with pytest.raises(ValueError, match=message):
        jax.export.export(jax.jit(norm))(jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, c"), f32))


# --- another process, which has no jaxnorm ----------------------------------------------------------------------------

READER = """
import collections, pathlib, sys
sys.modules["jaxnorm"] = None
import jax, jax.export, numpy as np
folder = pathlib.Path(FOLDER)
with np.load(folder / "arrays.npz") as arrays:
    given, wanted = ([arrays[n] for n in arrays.files if n.startswith(kind)] for kind in ("given", "wanted"))

# Of plain trees nothing has to be known.
program = jax.export.deserialize(bytearray((folder / "plain").read_bytes()))
for got, want in zip(program.call(given), wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * abs(want).max())

# NamedTuples are read where their fields are registered by name.
for name, fields in (("Affine", "scale bias"), ("RunningStats", "mean var count"), ("Moments", "count mean m2")):
    kind = collections.namedtuple(name, fields)
    jax.export.register_namedtuple_serialization(kind, serialized_name=f"jaxnorm.{name}")
program = jax.export.deserialize(bytearray((folder / "named").read_bytes()))
args, _ = jax.tree.unflatten(program.in_tree, [np.ones(a.shape, a.dtype) for a in program.in_avals])
y, stats, seen = program.call(*args)
print(type(stats).__name__, stats._fields, stats.count, seen.m2.tolist())
"""


def test_a_process_without_jaxnorm_runs_the_program(tmp_path, rng):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    everywhere = ("cpu", "cuda", "tpu")
    args = arguments(jax.export.symbolic_shape("b, h, w, 2*c"), jax.ShapeDtypeStruct)
    leaves, tree = jax.tree.flatten(args)
    plain = jax.jit(lambda leaves: jax.tree.leaves(with_gradients(*jax.tree.unflatten(tree, leaves))))
    norm = jn.BatchNorm()

    def named(params, stats, seen, x):
        y, stats = norm.apply(params, stats, x, train=True)
        return y, stats, norm.apply(params, seen, x, train=True)[1]

    fixed = (*norm.init(3), jn.Moments.empty(3), jnp.ones((8, 128, 3)))
    for name, f, args in (("plain", plain, (leaves,)), ("named", jax.jit(named), fixed)):
        program = jax.export.export(f, platforms=everywhere)(*args)
        assert program.platforms == everywhere
        assert "custom_call @jaxnorm" not in program.mlir_module()
        (tmp_path / name).write_bytes(program.serialize())
    given = jax.tree.leaves(values(rng, (5, 4, 3, 6)))
    wanted = plain(given)
    arrays = {f"given{i}": a for i, a in enumerate(given)}
    arrays |= {f"wanted{i}": a for i, a in enumerate(wanted)}
    np.savez(tmp_path / "arrays.npz", **arrays)
    said = run_python(READER.replace("FOLDER", repr(str(tmp_path))))
    assert said == "RunningStats ('mean', 'var', 'count') None [1.0, 1.0, 1.0]"


def test_every_named_tuple_of_arrays_can_be_serialized():
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    kinds = {k for k in vars(jn).values() if isinstance(k, type) and issubclass(k, tuple) and k is not jn.Backend}
    assert kinds >= {jn.Affine, jn.RunningStats, jn.Moments}
    tree = [kind(*(jnp.ones(2) for _ in kind._fields)) for kind in kinds]
    program = jax.export.export(jax.jit(lambda tree: tree))(tree)
    back = jax.export.deserialize(program.serialize())
    assert (back.in_tree, back.out_tree) == (program.in_tree, program.out_tree)


# --- lax alone --------------------------------------------------------------------------------------------------------

LAX = {p.name for p in vars(jax.lax).values() if isinstance(p, Primitive)} - {"optimization_barrier"}
CALLS = {"jit", "pjit", "custom_jvp_call"}


def primitives(jaxpr) -> set[str]:
    """Those of a jaxpr, and of all jaxprs in it."""
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(sub, "eqns"):
                found |= primitives(getattr(sub, "jaxpr", sub))
    return found


FUNCTIONS = {
    "batch, inference": lambda x, p, **how: jn.batch_norm(x, p, jn.RunningStats(*p), train=False, **how)[0],
    "batch, weighted": lambda x, p, **how: jn.batch_norm(
        x, p, jn.RunningStats(*p), train=True, weights=jnp.abs(x), epsilon=0.0, **how
    ),
    "layer, rows out": lambda x, p, **how: jn.layer_norm(x, *p, mask=x[:, :1] > 0, epsilon=0.0, **how),
    "rms, masked": lambda x, p, **how: jn.rms_norm(x, p.scale, mask=x > 0, **how),
    "gated": lambda x, p, **how: jn.gated_rms_norm(x, x, p.scale, mask=x[:, :1] > 0, **how),
    "stream": lambda x, p, **how: (jn.add_rms_norm(x, x, p.scale, **how), jn.add_layer_norm(x, x, *p, **how)),
    "moments": lambda x, p, **how: jn.merge(jn.moments(x, 0, **how), jn.moments(x, 0, mask=x > 0, **how)),
    "normalize": lambda x, p, **how: jn.normalize(x, *p, *p, activation="silu", **how),
}


@pytest.mark.parametrize("name", [*map(str, ROWS), *FUNCTIONS])
def test_implementation_lax_traces_lax_operations_alone(name, rng):
    """Forward and gradient. JAX's own sums of cotangents are a primitive too."""
    row = by_name.get(name)
    if row is None:
        x, params = draw(rng, (6, 32), 1.0), jn.Affine(*jnp.asarray(rng.uniform(1, 2, (2, 32)), f32))
        f = functools.partial(FUNCTIONS[name], implementation="lax")
    else:
        x, params = draw(rng, row.shape, 1.0), row.params(rng)
        lax = dataclasses.replace(row, spec=dataclasses.replace(row.spec, implementation="lax"))
        state = row.state()
        f = lambda x, p: lax.call(p, state, x, train=True)
    forward = jax.make_jaxpr(f)(x, params)
    assert primitives(forward.jaxpr) <= LAX | CALLS
    both = jax.make_jaxpr(lambda *args: (lambda y, vjp: vjp(y))(*jax.vjp(f, *args)))(x, params)
    assert primitives(both.jaxpr) <= LAX | CALLS | {"add_any"}


def test_implementation_lax_matches_xla(rng):
    x, params, _, mask = values(rng, (8, 4, 4, 6))

    def norms(x, params, implementation):
        y = jn.group_norm(x, *params, num_groups=2, activation="gelu", mask=mask, implementation=implementation)
        return jn.layer_norm(y, *params, implementation=implementation)

    def both(implementation):
        y, vjp = jax.vjp(lambda *args: norms(*args, implementation), x, params)
        return y, vjp(y)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, *(jax.jit(both, static_argnums=0)(name) for name in ("lax", "xla")))
    assert not jn.backends()["lax"].active
    with pytest.raises(ValueError, match=r'moments: .*native.* Write "xla", "lax", or None'):
        jn.moments(x, implementation="native")
