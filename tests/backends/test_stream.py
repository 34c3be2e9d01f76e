"""A residual stream in a backend that adds to it itself: the TPU's kernels, interpreted, as a backend of this CPU."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from catalogue import draw
from helpers.devices import collectives, mesh_of, placed
from helpers.jit import jit_unoptimized
from helpers.memory import kept_bytes
from helpers.transforms import compare, modes
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm._backends import registry
from jaxnorm._backends.pallas import adapter as mosaic
from jaxnorm._backends.pallas import tpu as mosaic_tpu
from jaxnorm._backends.primitives import Fused
from jaxnorm._backends.protocol import Support
from jaxnorm._ops import by_kernel

ADDED = {"rms": jn.add_rms_norm, "layer": jn.add_layer_norm}
f32, bf16 = np.float32, ml_dtypes.bfloat16


@pytest.fixture
def run(monkeypatch) -> list[str]:
    """The kernels that programs of the backend "interpreted" have asked for. What those do not take, formulas do."""
    asked = []

    def counted(name, kernel, place):
        def run(*args):
            asked.append(name + ", sum" * (args[place] is not None))
            return kernel(*args, interpret=True)

        return run

    kernels = ModuleType("interpreted")
    kernels.unsupported_reason = mosaic_tpu.unsupported_reason
    kernels.forward = counted("forward", mosaic_tpu.forward, 5)
    kernels.backward = counted("backward", mosaic_tpu.backward, 8)
    monkeypatch.setattr(mosaic, "_loaded", lambda module: kernels)
    monkeypatch.setattr(mosaic.Mosaic, "supports", lambda backend, request: Support.yes())
    monkeypatch.setitem(registry.BACKENDS, "interpreted", mosaic.Mosaic("interpreted", "cpu", partitions=True))
    was = by_kernel.primitives
    formulas = was._output, was._tangent, was._add, was._quantized
    monkeypatch.setattr(by_kernel, "primitives", Fused(*formulas, was._collectives))
    return asked


def of(name):
    return functools.partial(ADDED[name], implementation="interpreted")


def both_passes(f):
    def run(args, g):
        y, vjp = jax.vjp(f, *args)
        return y, vjp(g)

    return jit_unoptimized(run)


def close(a, b, eps=0.0):
    np.testing.assert_allclose(np.float64(a), b, rtol=1e-5 + eps, atol=(1e-5 + eps) * max(1, np.abs(b).max()))


STREAMS = [("layer", f32, f32), ("rms", bf16, f32), ("layer", bf16, bf16)]


@pytest.mark.parametrize(("name", "of_x", "of_stream"), STREAMS)
def test_add_norm_runs_one_kernel_each_way(run, name, of_x, of_stream, rng):
    shape = (6, 10, 256)
    x, g = (draw(rng, shape, dtype=of_x) for _ in range(2))
    residual, h = (draw(rng, shape, dtype=of_stream) for _ in range(2))
    scale = draw(rng, 256)
    new = (np.float32(x) + np.float32(residual)).astype(of_stream)
    how = dict(epsilon=1e-6, centered=name == "layer")
    labels = np.arange(60).repeat(256).reshape(shape)
    stream = np.float64(new)
    y = oracle.normalize(stream, labels, scale[None, None], None, **how).y
    through, of_scale, _ = oracle.gradients(stream, labels, scale[None, None], None, g, **how)
    eps = float(jnp.finfo(of_x).eps)
    for pick, cotangent, dnew, dscale, kernels in (
        (lambda out: out, (g, h), through + np.float64(h), of_scale, ["forward, sum", "backward, sum"]),
        (lambda out: out[0], g, through, of_scale, ["forward, sum", "backward"]),
        (lambda out: out[1], h, np.float64(h), 0.0 * of_scale, ["forward, sum"]),
    ):
        run.clear()
        f = lambda *args, pick=pick: pick(of(name)(*args))
        out, (dx, dresidual, ds) = both_passes(f)((x, residual, scale), cotangent)
        assert run == kernels
        np.testing.assert_array_equal(dx, np.asarray(dresidual).astype(of_x))
        assert (dx.dtype, dresidual.dtype) == (of_x, of_stream)
        close(dresidual, dnew, float(jnp.finfo(of_stream).eps))
        close(ds, dscale[0, 0])
        if isinstance(out, tuple):
            close(out[0], y, eps)
            np.testing.assert_array_equal(out[1], new)


def test_every_transformation_of_add_norm_matches_the_reference(run, rng):
    """In float64, where the backend runs its formulas, both outputs through one array."""
    with jax.enable_x64(True):
        join = lambda y, new: jnp.concatenate([y, new], 1)
        f = lambda params, x: join(*of("layer")(x, params[0], params[1]))
        reference = lambda params, x: join(jn.layer_norm(x + params[0], params[1], implementation="xla"), x + params[0])
        x, v, r, dr = jnp.asarray(rng.normal(size=(4, 3, 4)))
        scale, dscale = jnp.asarray(rng.normal(size=(2, 4)))
        g = jnp.asarray(rng.normal(size=(3, 8)))
        names = [n for n in modes(None, *[None] * 5) if n != "scan"]  # its carry has x's shape
        compare(f, reference, names, (r, scale), x, v, (dr, dscale), g, rtol=1e-6, atol=1e-8)
    assert not run


def test_transformations_of_add_norm_run_kernels(run, rng):
    x, v, r, dr, g = jnp.asarray(rng.normal(size=(5, 3, 128)), f32)
    scale, dscale = jnp.asarray(rng.normal(size=(2, 128)), f32)
    mixed = lambda y, new: jnp.sin(y) + new * y
    f = lambda params, x: mixed(*of("rms")(x, params[0], params[1]))
    reference = lambda params, x: mixed(jn.rms_norm(x + params[0], params[1], implementation="xla"), x + params[0])
    names = ("jvp", "vjp", "vmap", "vmap of params", "vmap of grad", "reverse over reverse", "remat", "scan")
    compare(f, reference, names, (r, scale), x, v, (dr, dscale), g, rtol=2e-3, atol=5e-4)
    assert {"forward, sum", "backward, sum"} == set(run)


@pytest.mark.parametrize("where", ["auto", "explicit", "shard_map"])
def test_fused_add_norm_over_devices_matches_one_device(run, where, rng):
    """Rows stay where they are, with their stream and its cotangent; the gradient of scale is summed."""
    x, r, g, h, scale = (draw(rng, s) for s in (*[(16, 128)] * 4, (128,)))
    step = lambda x, r, scale, g, h: (lambda y, vjp: (y, vjp((g, h))))(*jax.vjp(of("layer"), x, r, scale))
    want = step(x, r, scale, g, h)
    mesh, rows = mesh_of("explicit" if where == "explicit" else "auto"), P("data")
    specs = rows, rows, P(), rows, rows
    with jax.set_mesh(mesh):
        args = placed(mesh, *zip((x, r, scale, g, h), specs, strict=True))
        found = step
        if where == "shard_map":
            found = jax.shard_map(step, in_specs=specs, out_specs=((rows, rows), specs[:3]))
        run.clear()
        jax.tree.map(lambda a, b: close(a, b), jax.jit(found)(*args), want)
        assert {"forward, sum", "backward, sum"} <= set(run)
        assert collectives(jax.jit(found), *args) == ["all-reduce"]
        if where == "explicit":  # a stream that is not sharded as x is goes where their sum does
            mixed = placed(mesh, (r, P())), *args[2:]
            found = jax.jit(step)(args[0], mixed[0][0], *args[2:])
            jax.tree.map(lambda a, b: close(a, b), found, want)
            assert found[1][1].sharding.is_fully_replicated


@pytest.mark.parametrize("name", ADDED)
def test_fused_add_norm_saves_only_the_new_residual(run, name):
    x, scale = jax.ShapeDtypeStruct((64, 512), bf16), jax.ShapeDtypeStruct((512,), f32)
    assert kept_bytes(of(name), x, x, scale) / x.size <= 2.2


def test_rows_that_are_masked_out_are_zeros_to_a_backend_without_masks(run, rng):
    x, g, scale, mask = draw(rng, (8, 128)), draw(rng, (8, 128)), draw(rng, 128), np.arange(8)[:, None] % 3 > 0
    bad = np.where(mask, x, np.float32(np.nan))

    def step(backend):
        y, pull = jax.vjp(lambda x, s: jn.layer_norm(x, s, mask=mask, implementation=backend), bad, scale)
        return y, *pull(g)

    for got, want in zip(jax.jit(lambda: step("interpreted"))(), jax.jit(lambda: step("xla"))(), strict=True):
        close(got, want)
    assert run == ["forward", "backward"]


def test_unsupported_add_norm_falls_back_to_separate_add(run, rng):
    x, r, scale = draw(rng, (8, 128)), draw(rng, (8, 128)), draw(rng, 128)
    for options in (dict(mask=np.arange(8)[:, None] < 5), dict(activation="silu")):
        run.clear()
        y, new = jax.jit(lambda *args, o=options: of("rms")(*args, **o))(x, r, scale)
        want = jn.add_rms_norm(x, r, scale, implementation="xla", **options)
        close(y, want[0])
        np.testing.assert_array_equal(new, want[1])
        assert run == ["forward"]
    # The stream would vary over devices as scale does, and it does not.
    run.clear()
    mesh = mesh_of("auto")
    f = jax.shard_map(of("rms"), mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P("data"), P()))
    y, new = jax.jit(f)(x, r, np.tile(scale, 8))
    np.testing.assert_array_equal(new, x + r)
    close(y[8:16], jn.rms_norm(x + r, scale, implementation="xla"))
