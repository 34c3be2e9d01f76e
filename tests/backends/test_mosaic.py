"""The Pallas backends without their chips: numbers in interpret mode, programs lowered and compiled for them."""

import functools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import compiled
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm._backends import cpu, registry
from jaxnorm._backends.pallas import gpu as mosaic_gpu
from jaxnorm._backends.pallas import tpu as mosaic_tpu
from jaxnorm._backends.pallas.adapter import Mosaic
from jaxnorm._backends.pallas.rows import Job, rows_of
from jaxnorm._backends.protocol import Support
from jaxnorm._core.arithmetic import prescales

UNIT = 2.0**-40


ON_GPU = jax.default_backend() == "gpu"
WITHOUT_GPU = pytest.mark.skipif(ON_GPU, reason="about a machine without a GPU")
AS_COMPILED = SimpleNamespace(forward=mosaic_gpu.forward, backward=mosaic_gpu.backward, races=lambda: False)
INTERPRETED = SimpleNamespace(
    forward=functools.partial(mosaic_tpu.forward, interpret=True),
    backward=functools.partial(mosaic_tpu.backward, interpret=True),
    races=lambda: False,
)


@pytest.fixture(params=["tpu", "gpu"])
def kernels(request, monkeypatch):
    """The forward and backward kernels of a chip, interpreted; the GPU's with a watch for races of its threads.

    On a machine with a GPU they run on it.
    """
    if request.param == "tpu":
        return pytest.skip("interpreted without a GPU") if ON_GPU else INTERPRETED
    if ON_GPU:
        return AS_COMPILED
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    states = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    whole = mosaic_gpu._plan
    # Every thread of the interpreter is one of Python's: two blocks of two teams, which walk over several rows each.
    monkeypatch.setattr(mosaic_gpu, "_plan", lambda *args, **how: whole(*args, **how)._replace(blocks=2, teams=2))
    how = params.InterpretGPUParams(detect_races=True)
    return SimpleNamespace(
        forward=functools.partial(mosaic_gpu.forward, interpret=how),
        backward=functools.partial(mosaic_gpu.backward, interpret=how),
        races=lambda: states.get_races().races_found,
    )


def truth(how: Job, x, scale, bias, g):
    """y, dx, dscale and dbias in float64; gradients also where there is no scale or bias."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    labels = np.broadcast_to(np.arange(len(x))[:, None], x.shape)
    scale = np.ones((1, how.columns)) if scale is None else scale[None]
    bias = np.zeros((1, how.columns)) if bias is None else bias[None]
    options = dict(epsilon=how.epsilon, centered=how.centered)
    y = oracle.normalize(x, labels, scale, bias, **options).y
    dx, dscale, dbias = oracle.gradients(x, labels, scale, bias, g, **options)
    return y, dx, dscale[0], dbias[0]


def close(found, want, dtype, size=1.0):
    """Within float32 arithmetic and one rounding to `dtype`, in units of the largest."""
    found, want = np.asarray(found, np.float64), np.asarray(want)
    # Half a unit in the last place is at most eps / 2 of a number itself.
    bound = 4e-6 * size * max(np.abs(want).max(), 1e-30) + 0.5 * float(jnp.finfo(dtype).eps) * np.abs(want) * 1.01
    assert found.shape == want.shape
    np.testing.assert_array_less(np.abs(found - want), bound + 1e-30)


CASES = [  # rows, columns, dtype, centered, with scale and bias, dtype of a residual stream
    (7, 512, jnp.float32, True, True, None),
    (3, 384, jnp.bfloat16, False, True, None),
    (1, 128, jnp.bfloat16, True, False, jnp.bfloat16),
    (9, 1024, jnp.bfloat16, True, True, jnp.float32),
]


@pytest.mark.parametrize(("rows", "columns", "dtype", "centered", "affine", "stream"), CASES)
def test_kernels_match_the_oracle(kernels, rows, columns, dtype, centered, affine, stream, rng):
    check(kernels, rng, rows, columns, dtype, centered, affine, stream, lambda shape: rng.normal(1, 2, shape))


def test_a_row_has_the_same_bits_in_every_batch(kernels, rng):
    how = Job(128, 1e-6, centered=True, cast_before_scale=False, prescale=UNIT)
    x, g = (jnp.asarray(rng.normal(size=(3, 128)), jnp.bfloat16) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=128), jnp.float32)

    def of(rows):
        y, *stats = kernels.forward(how, x.dtype, x[rows], scale, None)
        return y, kernels.backward(how, (True, False), x[rows], *stats, scale, g[rows])[0]

    for whole, one in zip(of(slice(0, 3)), of(slice(2, 3)), strict=True):
        np.testing.assert_array_equal(whole[2:], one)


BY_EXAMPLE = [("tpu", False), ("tpu", True), ("gpu", True)]  # the GPU is interpreted slowly


@pytest.mark.parametrize(("kernels", "in_turn"), BY_EXAMPLE, indirect=["kernels"])
def test_each_example_may_have_a_scale_and_a_bias_of_its_own(kernels, in_turn, rng):
    """The bits of an example are those of the kernel with its scale and bias alone; so are the sums, to rounding."""
    examples, rows, columns, dtype = 2, 2, 128, jnp.bfloat16
    how = Job(columns, 1e-6, True, False, UNIT)
    draw = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.normal(1, 2, shape), dtype)
    x, g = (draw(examples * rows, columns, dtype=dtype) for _ in range(2))
    residual, g_stream = (draw(*x.shape) for _ in range(2))
    scale, bias = (draw(examples, columns) for _ in range(2))

    def run(how, part, scale, bias):
        y, *statistics, new = kernels.forward(how, dtype, x[part], scale, bias, residual[part])
        return new, y, *kernels.backward(how, (True, True), new, *statistics, scale, g[part], g_stream[part])

    *whole, dscale, dbias = run(how._replace(examples=examples, in_turn=in_turn), slice(None), scale, bias)
    assert dscale.shape == dbias.shape == (examples, columns)
    assert not kernels.races()
    second = slice(1, None, examples) if in_turn else slice(rows, None)
    *alone, of_scale, of_bias = run(how, second, scale[1], bias[1])
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(a[second], b)
    np.testing.assert_allclose(dscale[1], of_scale, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dbias[1], of_bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_kernels_match_the_oracle_over_random_shapes(seed):
    rng = np.random.default_rng(seed)
    kernels = AS_COMPILED if ON_GPU else INTERPRETED
    rows, columns = int(rng.integers(1, 500)), 128 * int(rng.integers(1, 13))
    dtype = (jnp.float32, jnp.bfloat16)[rng.integers(2)]
    mean = 10.0 ** rng.integers(-2, 3)
    stream = (None, jnp.float32, jnp.bfloat16)[rng.integers(3)]
    check(kernels, rng, rows, columns, dtype, bool(rng.integers(2)), bool(rng.integers(2)), stream,
          lambda shape: rng.normal(mean, 1, shape))  # fmt: skip


def check(kernels, rng, rows, columns, dtype, centered, affine, stream, draw):
    how = Job(columns, 1e-6, centered, False, UNIT)
    x, g = (jnp.asarray(a, dtype) for a in (draw((rows, columns)), rng.normal(size=(rows, columns))))
    scale, bias = (rng.normal(size=columns).astype(np.float32) if affine else None for _ in range(2))
    residual, g_stream = (None if stream is None else jnp.asarray(draw(x.shape), stream) for _ in range(2))
    y, shift, offset, m2, *new = kernels.forward(how, dtype, x, *map(as_array, (scale, bias)), residual)
    if stream is not None:
        x = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(stream)
        assert new[0].dtype == stream
        np.testing.assert_array_equal(new[0], x)
    found = kernels.backward(how, (True, True), x, shift, offset, m2, as_array(scale), g, g_stream)
    y_want, dx, dscale, dbias = truth(how, x, scale, bias, g)
    spread = 1 + np.abs(np.asarray(x, np.float64)).max() / np.asarray(x, np.float64).std()
    close(y, y_want, dtype, spread)
    close(found[0], dx if stream is None else dx + np.asarray(g_stream, np.float64), x.dtype, spread)
    close(found[1], dscale, jnp.float32, spread * max(1, rows / 64))
    close(found[2], dbias, jnp.float32, spread * max(1, rows / 64))
    assert not kernels.races()


def as_array(p):
    return None if p is None else jnp.asarray(p)


@pytest.mark.parametrize(("epsilon", "centered"), [(1e-6, True), (0.0, False)])
def test_kernels_are_exact_at_the_extremes(kernels, epsilon, centered):
    """1e30 does not overflow, 1e-30 is not lost, a constant row is the bias, and a mean of 1e4 costs what it costs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 128))
    x[0] *= 1e30
    x[1] = 12345.678
    x[2] += 1e4
    x[3] = 0.0
    x[4] *= 1e-30
    x = jnp.asarray(x, jnp.float32)
    unit, large = prescales(epsilon, 128, jnp.float32)
    assert (large is None) == (epsilon > 0)
    how = Job(128, epsilon, centered, False, unit, large)
    bias = jnp.full(128, 0.5)
    y, *statistics = kernels.forward(how, jnp.float32, x, None, bias)
    want = truth(how, x, None, np.full(128, 0.5), x)[0]
    error = np.abs(np.asarray(y, np.float64) - want)[[0, 2, 3, 4, 5]]
    assert error.max() < 2e-6 + 1e-7 * 1e4
    assert error[[0, 3, 4]].max() < 2e-6
    np.testing.assert_array_equal(y[1] if centered else y[3], bias)
    np.testing.assert_array_equal(y[3], bias)
    g = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    dx, *sums = kernels.backward(how, (False, True), x, *statistics, None, g)
    assert np.isfinite(dx).all()
    assert len(sums) == 1
    for row in (0, 4, 5):
        true = truth(how, x, None, None, g)[1][row]
        np.testing.assert_allclose(dx[row] / np.abs(true).max(), true / np.abs(true).max(), atol=4e-6)
    assert not kernels.races()


# --- through the seam -------------------------------------------------------------------------------------------------


def both_passes(norm, backend):
    def run(x, scale, g):
        y, vjp = jax.vjp(functools.partial(norm, implementation=backend), x, scale)
        return y, vjp(jax.tree.map(lambda _: g, y))

    return run


BACKENDS = [("mosaic_gpu", "cuda", "mosaic_gpu_v2"), ("mosaic_tpu", "tpu", "tpu_custom_call")]


@pytest.mark.parametrize(("backend", "platform", "target"), BACKENDS)
@pytest.mark.parametrize("norm", [jn.layer_norm, jn.rms_norm, functools.partial(jn.layer_norm, axis=(-2, -1)),
                                  lambda x, scale, **how: jn.add_rms_norm(x, 2 * x, scale, **how)])  # fmt: skip
def test_a_norm_runs_one_kernel_each_way(backend, platform, target, norm):
    x, scale = jax.ShapeDtypeStruct((6, 10, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.float32)
    lowered = jax.jit(both_passes(norm, backend)).trace(x, scale, x).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count(target) == 2
    elsewhere = jax.jit(both_passes(norm, None)).trace(x, scale, x).lower(lowering_platforms=(platform,)).as_text()
    assert ON_GPU or target not in elsewhere


@pytest.mark.parametrize(("backend", "platform", "target"), BACKENDS)
def test_each_platform_has_a_default_of_its_own(backend, platform, target, monkeypatch):
    """A program for several platforms runs on each by that platform's default, and by XLA where that refuses."""
    monkeypatch.setitem(registry.DEFAULTS, platform, backend)
    monkeypatch.setattr(Mosaic, "active", Mosaic.available)  # as on a machine with that chip
    assert jn.backends()[backend].active
    x, odd = jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((64, 1000), jnp.bfloat16)
    lower = lambda x, *platforms: jax.jit(lambda x: jn.layer_norm(x)).trace(x).lower(lowering_platforms=platforms)
    assert lower(x, platform).as_text().count(target) == 1
    assert target not in lower(odd, platform).as_text()
    assert target not in lower(x, "cpu").as_text()
    if cpu.library().loaded:
        assert "jaxnorm_forward" in lower(x, "cpu").as_text()


def test_the_default_on_a_gpu_is_what_was_measured_to_win(monkeypatch):
    """Rows long enough, with no activation or gate; a residual stream is added in the kernel, and on a CPU by XLA."""
    monkeypatch.setattr(Mosaic, "active", Mosaic.available)

    def kernels_of(norm, columns, platform="cuda"):
        x = jax.ShapeDtypeStruct((8, columns), jnp.bfloat16)
        text = jax.jit(both_passes(norm, None)).trace(x, jax.ShapeDtypeStruct((columns,), jnp.float32), x)
        return text.lower(lowering_platforms=(platform,)).as_text().count("mosaic_gpu_v2")

    assert [kernels_of(jn.rms_norm, n) for n in (384, 512, 640)] == [0, 2, 2]
    assert [kernels_of(jn.layer_norm, n) for n in (384, 512, 640)] == [0, 0, 2]
    added = lambda x, scale, **how: jn.add_rms_norm(x, 2 * x, scale, **how)
    assert [kernels_of(added, 1024, platform) for platform in ("cuda", "cpu", "tpu")] == [2, 0, 0]
    assert kernels_of(lambda x, scale, **how: jn.gated_rms_norm(x, x, scale, **how), 1024) == 0
    assert kernels_of(lambda x, scale, **how: jn.rms_norm(x, scale, activation="silu", **how), 1024) == 0


@pytest.mark.parametrize(("device", "reason"), [
    (None, "no NVIDIA GPU"), (SimpleNamespace(compute_capability="8.0"), "measured on Hopper.*has 8.0"),
    (SimpleNamespace(compute_capability="9.0"), "on this machine they fail: "),  # for it is none
])  # fmt: skip
def test_a_machine_without_that_gpu_says_so(device, reason, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_device", lambda: device)
    ok, why = mosaic_gpu.measured_here.__wrapped__()
    assert not ok
    assert re.search(reason, why)


def test_a_refusal_has_a_reason():
    assert not Support.no("it is too small").ok
    with pytest.raises(ValueError, match="needs a reason"):
        Support.no("")


@pytest.mark.parametrize(("backend", "platform", "target"), BACKENDS)
def test_a_modulated_norm_runs_one_kernel_each_way_if_it_is_named(backend, platform, target):
    """A scale and a shift for each example, and their gradients; those of each token are of x's size, and XLA's."""
    x, c = jax.ShapeDtypeStruct((6, 10, 256), jnp.bfloat16), jax.ShapeDtypeStruct((6, 512), jnp.float32)
    lower = lambda f: jax.jit(f).trace(x, c, x).lower(lowering_platforms=(platform,)).as_text().count(target)
    assert lower(both_passes(jn.ada_layer_norm, backend)) == 2
    assert lower(both_passes(functools.partial(jn.ada_rms_norm, parts="scale shift"), backend)) == 2
    assert ON_GPU or lower(both_passes(jn.ada_layer_norm, None)) == 0  # not measured: not a default
    heads, scale = jax.ShapeDtypeStruct((6, 5, 2, 256), jnp.bfloat16), jax.ShapeDtypeStruct((2, 256), jnp.float32)
    traced = jax.jit(both_passes(jn.rms_norm, backend)).trace(heads, scale, heads)
    assert traced.lower(lowering_platforms=(platform,)).as_text().count(target) == 2
    with pytest.raises(ValueError, match="the last axes of x with parameters along them or for each example or head"):
        jn.ada_layer_norm(jnp.ones((6, 10, 256)), jnp.ones((6, 10, 512)), implementation=backend)


@pytest.mark.parametrize(("backend", "platform", "target"), BACKENDS)
def test_vmap_adds_rows_to_one_kernel(backend, platform, target):
    x = jax.ShapeDtypeStruct((5, 8, 256), jnp.bfloat16)
    norm = jax.vmap(functools.partial(jn.layer_norm, implementation=backend))
    assert jax.jit(norm).trace(x).lower(lowering_platforms=(platform,)).as_text().count(target) == 1


@WITHOUT_GPU
@pytest.mark.parametrize(("backend", "platform", "_"), BACKENDS)
def test_a_named_backend_runs_or_says_why_not(backend, platform, _):
    x = jnp.ones((4, 256))
    norm = functools.partial(jn.layer_norm, implementation=backend)
    with pytest.raises(ValueError, match=rf"runs on {platform.upper()}, .* for cpu.*implementation=None"):
        norm(x)
    with pytest.raises(ValueError, match="masks and weights are XLA's"):
        norm(x, mask=jnp.ones((4, 256), bool))
    with pytest.raises(ValueError, match=r"multiple of 128 columns, up to 8192.*got \(4, 200\)"):
        norm(x[:, :200])
    with pytest.raises(ValueError, match="got float64"), jax.enable_x64():
        norm(np.ones((4, 256)))
    with pytest.raises(ValueError, match="for rows, the last axes of x"):
        norm(x, axis=0)
    add = functools.partial(jn.add_layer_norm, implementation=backend)
    with pytest.raises(ValueError, match=r"add_layer_norm: .*got float64.*implementation=None"), jax.enable_x64():
        add(x, np.ones((4, 256)))
    with pytest.raises(ValueError, match=r"add_layer_norm: .*got \(4, 200\)"):
        add(x[:, :200], x[:, :200])
    if backend == "mosaic_tpu":  # what arrives is the kernel's to read, whatever y is to be
        with pytest.raises(ValueError, match="got float16"):
            add(x.astype(jnp.float16), x, dtype=jnp.float32)
    assert not jn.backends()[backend].active
    assert backend in jn.backends()[backend].reason


@WITHOUT_GPU
def test_jit_over_devices_does_not_split_tpu_kernels():
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), P("data"))
    x = jax.ShapeDtypeStruct((16, 256), jnp.float32, sharding=sharding)
    with pytest.raises(ValueError, match=r"jax\.shard_map"):
        jax.jit(functools.partial(jn.rms_norm, implementation="mosaic_tpu")).trace(x).lower(lowering_platforms=("tpu",))


def test_rows_must_be_the_last_axes():
    assert rows_of((4, 1, 8), (2,), frozenset({2})) == (4, 8, 1, (), False)
    assert rows_of((4, 8, 1), (1,), frozenset()) == (4, 8, 1, (), False)
    assert rows_of((4, 8, 2), (1,), frozenset()) is None
    assert rows_of((4, 2, 3, 8), (3,), frozenset({0, 3})) == (24, 8, 4, (0,), False)  # a scale for each example
    assert rows_of((4, 2, 3, 8), (2, 3), frozenset({0})) == (8, 24, 4, (0,), False)
    assert rows_of((4, 2, 3, 8), (3,), frozenset({2, 3})) == (24, 8, 3, (2,), True)  # a scale for each head
    assert rows_of((4, 2, 3, 8), (3,), frozenset({1, 3})) is None  # neither
    assert rows_of((4, 8), (1,), frozenset({0})) is None  # a scale for each row


@pytest.mark.skipif(bool(compiled.missing("cuda")), reason="needs jax[cuda13]")
@pytest.mark.parametrize("columns", [1024, 4096, 8192])
def test_kernels_spill_no_register(columns):
    code = f"""
import jax, jax.numpy as jnp
from helpers import compiled
import jaxnorm as jn
def both(args, *g):
    norm = jn.add_layer_norm if len(g) > 1 else jn.layer_norm
    y, vjp = jax.vjp(lambda *a: norm(*a, implementation="mosaic_gpu"), *args)
    return y, vjp(g if len(g) > 1 else g[0])
p = jax.ShapeDtypeStruct(({columns},), jnp.float32)
half, full = (jax.ShapeDtypeStruct((4096, {columns}), t) for t in (jnp.bfloat16, jnp.float32))
for *args, g in [(half, half), (half, half, (half, half)), (full, full, (full, full))]:
    compiled.compiled(both, "h200", *compiled.placed("h200", ((*args, p, p), *(g if len(args) > 1 else [g]))))
each = jax.ShapeDtypeStruct((16, 1, {columns}), jnp.float32)
tokens = jax.ShapeDtypeStruct((16, 256, {columns}), jnp.bfloat16)
compiled.compiled(both, "h200", *compiled.placed("h200", ((tokens, each, each), tokens)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1",
             "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))},
    )  # fmt: skip
    spills = re.findall(r"(\d+) bytes spill stores", found.stdout + found.stderr)
    assert spills == ["0"] * 8
