"""What programs do on GPUs and TPUs, compiled for them by XLA's own compilers, which need none: counted and bounded."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import compiled
from helpers.compiled import AXIS, TARGETS, cases, hlo, placed, targets
from helpers.devices import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from benchmarks import peers
from benchmarks.harness import weights
from benchmarks.harness.case import least
from benchmarks.harness.family import ROWS, FamilyCase

pytestmark = pytest.mark.compiled


def needs(target: str) -> str:
    reason = compiled.missing(TARGETS[target].platform)
    if reason is not None:
        pytest.skip(reason)
    return target


def norm_of(which, backend="xla"):
    """A norm of a backend, and the shapes of its arguments."""

    def norm(x, *params):
        options = {"num_groups": 32} if which == "group" else {}
        if which == "batch":
            _, state = jn.BatchNorm().init(x.shape[-1])
            return jn.batch_norm(x, jn.Affine(*params), state, train=True, implementation=backend)[0]
        return getattr(jn, f"{which}_norm")(x, *params, implementation=backend, **options)

    x = jax.ShapeDtypeStruct(cases.NORMS[which], jnp.bfloat16)
    return norm, x, [jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32)] * (1 if which == "rms" else 2)


@pytest.mark.parametrize("target", ["h200", "v5e"])
@pytest.mark.parametrize("which", ["layer", "rms", "batch"])
def test_training_moves_no_more_bytes_than_expected(which, target):
    """In units of x: 3 forward, where statistics are a read of their own, and 5 backward."""
    norm, x, params = norm_of(which)
    found = compiled.passes(norm, needs(target), x, *params, which=["forward", "backward", "forward+backward"])
    assert found["forward"].traffic <= 3.05
    assert found["backward"].traffic <= 5.1
    assert found["forward+backward"].traffic <= 7.1  # in one program the two share a read
    assert found["forward"].temp < 0.1 > found["backward"].temp


@pytest.mark.parametrize("target", ["h200", "v5e"])
@pytest.mark.parametrize("which", ["layer", "batch"])
def test_what_the_statistics_are_taken_about_costs_no_read(which, target):
    """Who counts every operand of a kernel as a whole finds one read more: the kernel that slices a sample of x."""
    norm, x, params = norm_of(which)
    training = lambda *args: jax.vjp(norm, *args)[0]
    program = compiled.compiled(training, needs(target), *placed(target, (x, *params)))
    entry, computations = hlo.parsed(program.as_text())
    around, unit = computations[entry], 2 * x.size
    fusions = [it for it in around.values() if it.opcode == "fusion"]
    read = {it.name: hlo.fused_bytes(it, around, computations) / unit for it in fusions}
    whole = {it.name: (it.bytes + sum(around[o].bytes for o in it.operands)) / unit for it in fusions}
    apart = [name for name in read if whole[name] > read[name] + 1e-3]
    assert len(apart) == 1
    assert whole[apart[0]] == pytest.approx(1.0, abs=0.01)
    assert read[apart[0]] < 2e-3


@pytest.mark.parametrize("width", [300, 4096, 16384])
@pytest.mark.parametrize("which", ["layer", "rms"])
def test_rows_at_inference_are_one_kernel_on_a_gpu(which, width):
    norm, _, params = norm_of(which)
    x = jax.ShapeDtypeStruct(((1 << 25) // width, width), jnp.bfloat16)
    params = [jax.ShapeDtypeStruct((width,), a.dtype) for a in params]
    found = compiled.passes(norm, needs("h200"), x, *params, which=["inference"])["inference"]
    assert found.kernels == 1
    assert found.traffic <= 2.05


# In units of x: a read for statistics and the largest values, one for data, which is half a unit, and on a TPU one
# more. Of blocks XLA for TPU makes a copy in another layout. The norm and then a quantizer take 5.5.
QUANTIZED = {
    ("row", "h200"): 2.51, ("tensor", "h200"): 2.51, ("block", "h200"): 2.6, ("mx", "h200"): 2.8,
    ("nv", "h200"): 3.8, ("row", "v5e"): 3.51, ("tensor", "v5e"): 2.51,
}  # fmt: skip
FORMATS = {"row": jn.Fp8(per="row"), "tensor": jn.Fp8(scale=0.1), "block": jn.Fp8(per="block"), "mx": jn.MxFp8(),
           "nv": jn.NvFp4(scale=0.01)}  # fmt: skip


@pytest.mark.parametrize(("which", "target"), QUANTIZED, ids=map("-".join, QUANTIZED))
def test_a_quantized_output_takes_no_pass_over_y(which, target):
    x = jax.ShapeDtypeStruct((32768, 4096), jnp.bfloat16)
    norm = lambda x, scale: jn.rms_norm(x, scale, quantize=FORMATS[which])
    found = compiled.report(norm, needs(target), *placed(target, (x, norm_of("rms")[2][0])), unit=2 * x.size)
    assert found.traffic <= QUANTIZED[which, target]
    assert found.temp < 0.15  # y is nowhere in memory; scales of blocks may be


@pytest.mark.parametrize("which", ["group", "instance"])
def test_groups_and_instances_read_x_once_for_their_statistics(which):
    norm, x, params = norm_of(which)
    for target in ("h200", "v5e"):
        found = compiled.passes(norm, needs(target), x, *params, which=["inference", "backward"])
        assert found["inference"].traffic <= 3.2  # 3, and on a GPU partial sums
        assert found["inference"].temp < 0.1
        if target == "h200":
            assert found["backward"].traffic <= 5.2
            assert found["backward"].temp < 0.1


@pytest.mark.parametrize("target", ["h200", "v5e"])
@pytest.mark.parametrize("which", ["ada_layer", "qk", "rms_add", "dyt"])
@jax.numpy_dtype_promotion("standard")  # for what people write
@jax.numpy_rank_promotion("allow")
def test_the_family_moves_no_more_than_the_norm_it_is_made_of(which, target):
    """Arrays of its own once each, and like every norm x once for its statistics, x and g once more for those sums."""
    case = FamilyCase(which, ROWS[which][0][0], "bfloat16")
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for part in case.data()[1:] for a in part]
    norm, whole = peers.make("jaxnorm-xla").call(which), 1.25 if which == "qk" else 1.0  # and k, of a quarter
    found = compiled.passes(norm, needs(target), *args, which=["forward", "backward"])
    for_statistics = 0 if which == "dyt" else whole
    assert found["forward"].traffic <= 2 * least(which, "forward") + for_statistics + 0.3
    again = 2 + 2 * (which == "rms_add")  # and the residual's gradient, which the program returns beside x's
    assert found["backward"].traffic <= 2 * least(which, "backward") + (again + 0.4) * whole


@pytest.mark.parametrize(("which", "most"), [
    ("WeightNorm", 2.1), ('Standardize(like="big_vision")', 2.1), ("SpectralNorm, training", 3.1), ("DoRA", 3.1),
])  # fmt: skip
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_a_layer_reads_its_weight_once_more_for_a_norm_of_it(which, most):
    """The effective weight is made on the way into the product, and written nowhere. Power iteration reads w twice;
    DoRA writes w + a b, which XLA cannot make on the way, and reads it for its length and for the product."""
    found = weights.moved_in_a_layer(which, needs("v5e"), (8192, 16384), ["forward"])
    assert found["forward"] <= most


@pytest.mark.parametrize("which", cases.NORMS)
def test_compiled_programs_save_only_x(which):
    norm, x, params = norm_of(which)
    assert compiled.residuals(norm, x, *params).bytes <= 1.05 * 2 * x.size


@pytest.mark.parametrize("target", ["h200x8", "v5ex8", "v5ex256"])
def test_a_sharded_batch_is_merged_at_once(target):
    """One all-reduce forward and one backward, of few bytes, and the traffic of one device."""
    norm, x, params = norm_of("batch", None)
    n = TARGETS[needs(target)].devices
    x = jax.ShapeDtypeStruct((n * x.shape[0], *x.shape[1:]), x.dtype)
    found = compiled.passes(norm, target, x, *params, which=["inference", "forward+backward"])
    assert found["inference"].collectives == {"all-reduce": 1}
    assert found["forward+backward"].collectives == {"all-reduce": 2}
    assert found["forward+backward"].collective_bytes["all-reduce"] <= 1 << 20
    assert found["inference"].traffic <= 3.05


@pytest.mark.parametrize("target", ["h200x8", "v5ex8"])
def test_sums_by_parts_are_whole_before_they_cross_devices(target):
    """Of 16x16 planes a device sums parts of a channel first; what travels is two sums a channel, not two a part."""
    n, channels = TARGETS[needs(target)].devices, 1024
    norm = jn.BatchNorm(axis_name=AXIS)

    def step(x, g, params, state):
        return jax.vjp(lambda x, p: norm.apply(p, state, x, train=True)[0], x, params)[1](g)

    x = jax.ShapeDtypeStruct((8 * n, 16, 16, channels), jnp.bfloat16)
    parts = (P(AXIS), P(AXIS), P(), P()), (P(AXIS), P())
    mesh = compiled.targets.mesh(target)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=parts[0], out_specs=parts[1])
    x, state = placed(target, x, P(AXIS)), placed(target, jax.eval_shape(lambda: norm.init(channels)))
    found = compiled.report(sharded, target, x, x, *state, unit=1)
    assert found.collectives == {"all-reduce": 2}
    assert found.collective_bytes["all-reduce"] == 4 * channels * (4 * n + 2)  # a slot for each device; two sums


@pytest.mark.parametrize("target", ["h200", "v5p"])
@jax.numpy_dtype_promotion("standard")  # for jax.nn and flax
@jax.numpy_rank_promotion("allow")
def test_a_scan_of_blocks_takes_less_temporary_memory_than_flax(target, monkeypatch):
    for name, small in dict(WIDTH=256, HEADS=4, TOKENS=(8, 128)).items():  # compiled in a sixth of the time
        monkeypatch.setattr(cases, name, small)
    used = {}
    for name, module in cases.MODULES.items():
        f, args = cases.scan(module)
        used[name] = compiled.report(f, needs(target), *placed(target, args), unit=1).temp_bytes
    assert used["jaxnorm"] <= 0.6 * used["flax.linen"]


@pytest.mark.parametrize("target", ["cpu", "v5ex8"])
@pytest.mark.parametrize("kind", ["layer", "graph"])
def test_segments_gather_rows_of_statistics_and_never_x(kind, target):
    """Over eight devices, each way: what is gathered are tables of the segments, and what travels are sums of them."""
    mesh = mesh_of("auto", names=(AXIS,)) if target == "cpu" else targets.mesh(needs(target))
    at = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(AXIS)))
    x, ids, number = at((1 << 15, 64), jnp.bfloat16), at((1 << 15,), jnp.int32), 8

    def norm(x, ids):
        if kind == "graph":
            return jn.graph_norm(x, ids, mean_scale=jnp.full(64, 0.5), num_segments=number)
        return jn.segment_norm(x, ids, num_segments=number)

    def both(x, ids, g):
        y, vjp = jax.vjp(lambda x: norm(x, ids), x)
        return y, vjp(g)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(x, ids, x).compile().as_text()
    tables = []
    for computation in hlo.parsed(text)[1].values():
        tables += [computation[it.operands[0]].type for it in computation.values() if it.opcode == "gather"]
    rows = [int(re.match(r"\w+\[(\d+)", table)[1]) for table in tables]
    most = 64 * (number + 2)  # blocks of the slots that sums are in
    assert 0 < max(rows) <= most < x.shape[0] // 8
    assert {each.kind for each in hlo.collectives(text)} <= {"all-reduce"}
    assert all(each.bytes <= 4 * 4 * most * 64 for each in hlo.collectives(text))


# --- the counting itself, on programs whose cost is known -------------------------------------------------------------


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_a_known_program_is_counted_right(target):
    x = placed(needs(target), jax.ShapeDtypeStruct((1 << 14, 1 << 14), jnp.bfloat16))
    unit = 2 * x.size
    double = compiled.report(lambda x: x * 2, target, x, unit=unit)
    assert (double.kernels, double.traffic) == (1, 2.0)
    rolled = lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jnp.roll(x, 1, 0), x)
    turns = compiled.report(rolled, target, x, unit=unit)
    assert turns.traffic >= 5 * 2.0
    assert turns.endless == 0
    part = compiled.report(lambda x: jax.lax.dynamic_slice(x, (64, 0), (64, 1 << 14)) * 2, target, x, unit=unit)
    assert part.traffic == pytest.approx(2 * 64 / (1 << 14), rel=0.01)


@pytest.mark.parametrize("target", ["h200x8", "v5ex8"])
def test_a_known_collective_is_counted_right(target):
    x = placed(needs(target), jax.ShapeDtypeStruct((8, 1024), jnp.float32), P(AXIS))
    found = compiled.report(lambda x: x.sum(0), target, x, unit=1)
    assert found.collectives == {"all-reduce": 1}
    assert found.collective_bytes == {"all-reduce": 4096}


def test_vector_memory_costs_nothing():
    assert hlo.main_memory_bytes("(f32[8,128]{1,0:T(8,128)}, bf16[64]{0:T(256)S(1)})") == 4096


@pytest.mark.parametrize("target", ["h200", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize("which", ["layer", "rms"])
def test_kernels_read_every_array_once(which, target):
    """Forward x and y, backward x, g and dx; the rest is statistics, and the sums for scale and bias.

    With a residual stream also that, and the new one; backward the cotangent of the new one.
    """
    backend = f"mosaic_{'gpu' if target == 'h200' else 'tpu'}"
    norm, x, params = norm_of(which, backend)
    adds = functools.partial(getattr(jn, f"add_{which}_norm"), implementation=backend)
    for f, args, forward, backward in ((norm, params, 2.05, 3.15), (adds, [x, *params], 4.05, 4.15)):
        found = compiled.passes(f, needs(target), x, *args, which=["forward", "backward"])
        assert found["forward"].traffic <= forward
        assert found["backward"].traffic <= backward
        assert found["forward"].temp < 0.1 > found["backward"].temp


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_kernels_read_a_modulated_array_once(target):
    """With a scale and a shift for each example, and their gradients, as without."""
    norm = functools.partial(jn.ada_layer_norm, implementation=f"mosaic_{'gpu' if target == 'h200' else 'tpu'}")
    x, c = jax.ShapeDtypeStruct((32, 256, 1152), jnp.bfloat16), jax.ShapeDtypeStruct((32, 1, 1152), jnp.float32)
    run = lambda x, scale, shift: norm(x, {"scale": scale, "shift": shift})
    found = compiled.passes(run, needs(target), x, c, c, which=["forward", "backward"])
    assert found["forward"].traffic <= 2.05
    assert found["backward"].traffic <= 3.16
    assert found["forward"].temp < 0.1 > found["backward"].temp


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_kernels_read_an_array_of_heads_once(target):
    """With a scale and a bias for each head."""
    norm = functools.partial(jn.layer_norm, implementation=f"mosaic_{'gpu' if target == 'h200' else 'tpu'}")
    x, c = jax.ShapeDtypeStruct((4096, 16, 256), jnp.bfloat16), jax.ShapeDtypeStruct((16, 256), jnp.float32)
    found = compiled.passes(norm, needs(target), x, c, c, which=["forward", "backward"])
    assert found["forward"].traffic <= 2.1  # three statistics of 4 bytes for 256 elements of 2; for 8 rows on a TPU
    assert found["backward"].traffic <= 3.2


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_kernels_stay_with_their_rows(explicit):
    """Rows spread over GPUs by jit are moved by nothing: the gradient of scale is summed, and that is all."""
    mesh = targets.mesh(needs("h200x8"), explicit)
    at = lambda shape, spec, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    x, scale = at((8192, 1024), P(AXIS), jnp.bfloat16), at((1024,), P(), jnp.float32)

    def both(g, *args):
        y, vjp = jax.vjp(lambda *args: jn.add_rms_norm(*args, implementation="mosaic_gpu"), *args)
        return y, vjp(g)

    with jax.set_mesh(mesh):
        text = jax.jit(both).lower((x, x), x, x, scale).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 2
    assert hlo.cost(text).collectives == {"all-reduce": 1}
