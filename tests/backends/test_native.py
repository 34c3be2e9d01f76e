"""The native backend: what it takes, what it runs, what it refuses, and what it does when it is misused."""

import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from catalogue import EACH, NOT_NATIVE, ROWS, by_name, draw
from helpers.devices import mesh_of, placed
from helpers.jit import FLAGS, jit_unoptimized
from helpers.memory import kept_bytes
from helpers.native import forced, kernels_in, kernels_of, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm._backends import cpu
from jaxnorm._backends.call import varying_axes
from jaxnorm._core.over import Axes
from jaxnorm._core.types import Reduction

pytestmark = pytest.mark.skipif(not cpu.library().loaded, reason=cpu.library().reason)


def gradients(f):
    return lambda params, x, g: jax.vjp(f, params, x)[1](g)


# --- what runs --------------------------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_native_backend_runs_every_row(row, rng):
    params, x, g = row.params(rng), draw(rng, row.shape, 3.0), draw(rng, row.shape)
    apply = forced(row).apply
    forward, backward = (jax.jit(f).lower(*args).compile() for f, *args in ((apply, params, x),
                         (gradients(apply), params, x, g)))  # fmt: skip
    assert kernels_of(forward) == ["forward"] * row.calls
    assert sorted(kernels_of(backward)) == ["backward"] * row.calls + ["forward"] * row.calls
    np.testing.assert_allclose(forward(params, x), row.truth(params, x).y, rtol=1e-6, atol=2e-6)
    dparams, dx = backward(params, x, g)
    for got, true in zip((dx, *dparams), row.gradients(params, x, g), strict=True):
        if got is not None:
            np.testing.assert_allclose(np.reshape(got, true.shape), true, rtol=1e-5, atol=4e-6 * np.abs(true).max())


@pytest.mark.versions
@pytest.mark.parametrize("row", [row for row in ROWS if NOT_NATIVE in row.exempt], ids=str)
def test_the_native_backend_says_why_it_does_not_run_a_row(row, rng):
    with pytest.raises(ValueError, match=f"implementation='native' cannot run here: .*{row.exempt[NOT_NATIVE]}"):
        forced(row).apply(row.params(rng), draw(rng, row.shape))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (dict(axis_name="d"), "statistics over an axis name are merged by XLA"),
        (dict(dtype=jnp.complex64), "no kernel from float32 to complex64"),
        (dict(axis=0, scale=np.ones((1, 8), np.float32)), None),
        (dict(axis=0, scale=np.ones((4, 1), np.float32)), "no kernel reduces axes"),
    ],
    ids=str,
)
def test_a_refusal_names_the_norm_the_reason_and_the_line_to_write(call, reason, rng):
    run = lambda: jn.layer_norm(draw(rng, (4, 8)), implementation="native", **call)
    if reason is None:
        run()
        return
    with pytest.raises(ValueError, match=f"layer_norm: implementation='native' cannot .*{reason}.*implementation=None"):
        run()


@pytest.fixture
def by_default(monkeypatch):
    """The rule of the default, which these tests otherwise replace."""
    monkeypatch.setattr(cpu, "is_profitable", getattr(cpu.is_profitable, "rule", cpu.is_profitable))
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_small_slabs_stay_with_xla_by_default(by_default, rng):
    """Where an example is small, a kernel's own overhead is the larger part; of rows it is none."""
    group = lambda x: jn.group_norm(x, num_groups=2)
    assert kernels_in(group, draw(rng, (8, 4, 4, 8))) == []
    assert kernels_in(group, draw(rng, (1, 8, 8, 32))) == ["forward"]
    for x in (draw(rng, (1, 16)), draw(rng, (64, 256))):
        assert kernels_in(jn.layer_norm, x) == ["forward"]
        assert kernels_in(lambda x: jn.layer_norm(x, implementation="xla"), x) == []


IN_EVERY_BATCH = {
    "layer": (jn.layer_norm, [(8,), (64,), (300,), (4096,), (3, 128)]),
    "rms": (jn.rms_norm, [(8,), (64,), (300,), (4096,)]),
    "group": (lambda x: jn.group_norm(x, num_groups=4), [(2, 2, 8), (8, 8, 32)]),
    "rms of groups": (lambda x: jn.group_rms_norm(x, group_size=24), [(48,), (96,)]),
    "instance": (jn.instance_norm, [(2, 2, 8), (8, 8, 32)]),
    "batch at inference": (
        lambda x: jn.batch_norm(x, None, jn.BatchNorm().init(x.shape[-1])[1], train=False)[0], [(64,), (4, 4, 16)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", IN_EVERY_BATCH)
def test_an_example_has_the_same_bits_in_every_batch(which, by_default, rng):
    """Law 10, by the default rule: y and dx, in any batch and place, eager or jit, on one device or on eight."""
    norm, shapes = IN_EVERY_BATCH[which]
    both = lambda x, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(norm, x))
    among_others = jax.jit(lambda x, g: (both(x, g), both(-x, g)))
    mesh = mesh_of("auto")
    for shape in shapes:
        x, g = draw(rng, (48, *shape), 1.0), draw(rng, (48, *shape))
        want = jax.jit(both)(x, g)
        same = lambda got, part, want=want: [
            np.testing.assert_array_equal(a, b[part]) for a, b in zip(got, want, strict=True)
        ]
        for first, last in ((0, 1), (47, 48), (8, 11), (1, 33)):
            part = slice(first, last)
            same(jax.jit(both)(x[part], g[part]), part)
            same(both(jnp.asarray(x[part]), jnp.asarray(g[part])), part)
        for part in (slice(47, 48), slice(1, 33)):
            same(among_others(x[part], g[part])[0], part)
        sharded = placed(mesh, (x, P(mesh.axis_names)), (g, P(mesh.axis_names)))
        same(jax.jit(both)(*sharded), slice(None))


MASKED = {
    "rows": (jn.layer_norm, (6, 40, 96), (6, 40, 1)),
    "sequences": (jn.rms_norm, (6, 40, 96), (6, 1, 1)),
    "features": (jn.layer_norm, (6, 40, 96), (6, 40, 96)),
    "images": (lambda x, **given: batch(x, **given), (6, 8, 8, 32), (6, 1, 1, 1)),
    "pixels": (lambda x, **given: jn.group_norm(x, num_groups=4, **given), (6, 8, 8, 32), (6, 8, 8, 1)),
    "planes": (lambda x, **given: jn.instance_norm(x, axis=1, **given), (6, 32, 8, 8), (6, 1, 1, 1)),
}


def batch(x, **given):
    return jn.batch_norm(x, None, jn.BatchNorm().init(x.shape[-1])[1], train=True, **given)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("which", MASKED)
def test_a_mask_is_the_kernels_and_makes_no_copy_of_x(which, dtype, rng):
    """What is kept is x, the mask and row statistics; no array of x's size is computed outside of the kernels."""
    norm, shape, of_mask = MASKED[which]
    x, mask = jnp.asarray(draw(rng, shape), dtype), jnp.asarray(rng.random(of_mask) < 0.6)
    step = lambda x, mask, g: jax.vjp(lambda x: norm(x, mask=mask, implementation="native"), x)[1](g)
    assert kernels_in(step, x, mask, x) == ["forward", "backward"]
    text = jax.jit(step).lower(x, mask, x).compile().as_text()
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    made = {op for sizes, op in found if np.prod([int(n) for n in sizes.split(",")]) == x.size}
    assert made <= {"parameter", "get-tuple-element", "bitcast", "custom-call"}
    statistics = 4 * 4 * x.size // shape[-1]  # at most: of rows
    kept = kept_bytes(lambda x: norm(x, mask=mask, implementation="native"), x)
    assert kept <= x.nbytes + mask.nbytes + statistics


@pytest.mark.parametrize("of_weights", [(6, 1, 1, 1), (6, 8, 8, 1), (6, 8, 8, 32)], ids=str)
def test_weights_are_the_kernels(of_weights, rng):
    """Also where they are differentiated: their own gradient alone is a formula's."""
    x, weights = draw(rng, (6, 8, 8, 32)), rng.uniform(0.0, 2.0, of_weights).astype("f")
    norm = lambda x, weights: batch(x, weights=weights, implementation="native")
    step = lambda x, w, g: jax.vjp(lambda x: norm(x, w), x)[1](g)
    assert kernels_in(step, x, weights, x) == ["forward", "backward"]
    both = lambda x, w, g: jax.vjp(norm, x, w)[1](g)
    assert kernels_in(both, x, weights, x) == ["forward", "backward"]
    want = jax.vjp(lambda x, w: batch(x, weights=w, implementation="xla"), x, weights)[1](x)
    for got, true in zip(jax.jit(both)(x, weights, x), want, strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-4, atol=2e-5)


def test_reductions_of_first_or_last_axes_are_never_transposed(rng):
    nchw = draw(rng, (8, 12, 9, 9))
    state = jn.BatchNorm().init(12)[1]
    for f in (
        lambda x: jn.batch_norm(x, None, state, train=True, axis=1)[0],
        lambda x: jn.group_norm(x, num_groups=3, axis=1),
        lambda x: jn.instance_norm(x, axis=1),
        lambda x: jn.group_norm(x, num_groups=3),
    ):
        text = jax.jit(lambda x, f=f: jax.vjp(f, x)[1](x)).lower(nchw).compile().as_text()
        assert len(re.findall(r'custom_call_target="jaxnorm_', text)) == 2
        assert " transpose(" not in text


@pytest.mark.parametrize("row", EACH, ids=str)
def test_vmap_adds_rows_to_the_same_kernel(row, rng):
    xs, g, params = draw(rng, (3, *row.shape)), draw(rng, (3, *row.shape)), row.params(rng)
    many = jax.vmap(row.apply, (None, 0))
    of_all = lambda params, xs, g: jax.vjp(many, params, xs)[1](g)
    of_each = jax.vmap(gradients(row.apply), (None, 0, 0))
    for f, args in ((many, (params, xs)), (of_all, (params, xs, g)), (of_each, (params, xs, g))):
        assert len(kernels_in(f, *args)) == (1 if f is many else 2)
    want = [gradients(row.apply)(params, x, c) for x, c in zip(xs, g, strict=True)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *want)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, of_each(params, xs, g), stacked)
    dparams, dx = of_all(params, xs, g)
    jax.tree.map(near, dx, stacked[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.sum(0), rtol=1e-5, atol=1e-5), dparams, stacked[0])


PAIRS = [
    (np.float32, np.float32), (np.float32, ml_dtypes.bfloat16), (ml_dtypes.bfloat16, np.float32),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16), (np.float32, np.float16), (np.float16, np.float32),
    (np.float16, np.float16), (np.float64, np.float64),
]  # fmt: skip


@pytest.mark.parametrize(("of_x", "of_y"), PAIRS, ids=lambda d: np.dtype(d).name)
def test_every_pair_of_input_and_output_dtypes_is_exact(of_x, of_y, rng):
    row = by_name["group-nhwc"]
    with jax.enable_x64(of_x == np.float64):
        x, g = draw(rng, row.shape, 2.0, of_x), draw(rng, row.shape, dtype=of_y)
        scale, bias = row.params(rng)
        f = lambda x: jn.group_norm(x, scale, bias, num_groups=3, dtype=of_y, implementation="native")
        y, vjp = jax.vjp(f, x)
        (dx,) = vjp(jnp.asarray(g))
        assert (y.dtype, dx.dtype) == (of_y, of_x)
        eps = lambda d: float(ml_dtypes.finfo(d).eps)
        params = jn.Affine(scale, bias)
        truth, dx_true = row.truth(params, x).y, row.gradients(params, x, np.asarray(g, np.float64))[0]
        np.testing.assert_allclose(np.float64(y), truth, rtol=0.51 * eps(of_y), atol=3e-6)
        np.testing.assert_allclose(np.float64(dx), dx_true, rtol=0.51 * eps(of_x), atol=6e-6)


# --- odd inputs -------------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129])


@settings(max_examples=80, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=5), st.data())
def test_any_shape_may_be_reduced_over_any_axes(shape, data):
    """The view is right or there is none: against the XLA backend, which knows no views."""
    while np.prod(shape) > 60_000:
        shape[int(np.argmax(shape))] = 2
    axes = tuple(data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)))
    varying = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    param = tuple(n if a in varying else 1 for a, n in enumerate(shape))
    rng = np.random.default_rng(len(shape) + sum(shape))
    x, g = draw(rng, shape, 1.0), draw(rng, shape)
    scale = draw(rng, param)
    view = cpu.view_of(tuple(shape), tuple(sorted(axes)), varying_axes(scale))
    if view is None:
        return
    assert np.prod(view.sizes) == np.prod(shape)

    @jit_unoptimized
    def run(x, scale, g):
        def of(backend):
            norm = lambda x, s: jn.layer_norm(x, s, s, axis=axes, epsilon=0.01, implementation=backend)
            y, vjp = jax.vjp(norm, x, scale)
            return y, vjp(g)

        return of("native"), of("xla")

    ours, want = jax.tree.map(np.asarray, run(x, scale, g))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(b).max(initial=0))))


@pytest.mark.parametrize("shape", [(1, 300_001), (3, 70_001), (5, 1), (1, 1), (0, 7), (7, 0), (3, 2, 0, 4)], ids=str)
def test_huge_rows_single_elements_and_empty_rows_are_exact(shape, rng):
    x, g = draw(rng, shape, 5.0), draw(rng, shape)
    y, vjp = jax.vjp(lambda x: jn.layer_norm(x, implementation="native"), x)
    truth = oracle.normalize(x, np.cumsum(np.ones(shape), 0, dtype=int) - 1, None, None, epsilon=1e-6)
    if x.size and len(shape) == 2:
        np.testing.assert_allclose(y, truth.y, atol=2e-6)
    assert vjp(jnp.asarray(g))[0].shape == y.shape == shape


@pytest.mark.parametrize("name", ["avx512", "baseline"])
def test_long_sums_of_terms_that_round_alike_do_not_drift(name):
    """Of 16-bit numbers of few values every addition of a chain rounds the same way: along rows, down few columns."""
    code = """
import jax, jaxnorm as jn, numpy as np
x = np.random.default_rng(0).normal(0, 1e-6, (2, 262144)).astype(np.float16)
wide = lambda a: np.asarray(a, np.float64)
row = lambda x: jn.layer_norm(x, epsilon=1e-20, dtype=np.float32, implementation="native")
y, back = jax.vjp(row, x)
column = jn.BatchNorm(epsilon=1e-20, dtype=np.float32, implementation="native")
z, _ = column.apply(*column.init(2), x.T, train=True)
print(abs((wide(y)**2).mean(-1) - 1).max(), abs((wide(z)**2).mean(0) - 1).max())
g = np.asarray(y)  # so that dx is 0, but for sums that drift
r = 1 / wide(x).std(-1, keepdims=True)
print(abs(wide(back(g)[0]) / r).max())
"""
    assert max(map(float, run_python(code, JAXNORM_ISA=name).split())) < 4e-6


def test_nonfinite_values_stay_in_their_row(rng):
    x, g = draw(rng, (9, 100)), draw(rng, (9, 100))
    poisoned = x.copy()
    poisoned[2, 5], poisoned[4, 99], poisoned[6, 0] = np.nan, np.inf, -np.inf
    clean = np.array([0, 1, 3, 5, 7, 8])
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):

        def both(x, dtype=dtype):
            y, vjp = jax.vjp(lambda x: jn.layer_norm(x, implementation="native"), jnp.asarray(x, dtype))
            return y, *vjp(jnp.asarray(g, dtype))

        for a, b in zip(both(poisoned), both(x), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[clean], np.asarray(b)[clean])
        assert not np.any(np.isfinite(np.float32(both(poisoned)[0][2])))


@pytest.mark.parametrize("magnitude", [1e-42, 1e-38, 1e28], ids=str)
def test_denormals_and_the_largest_numbers_are_exact(magnitude, rng):
    x = (rng.uniform(-1, 1, (4, 200)) * magnitude).astype(np.float32)
    y = jn.layer_norm(x, implementation="native")
    np.testing.assert_allclose(y, jn.layer_norm(x, implementation="xla"), atol=1e-5)
    assert np.all(np.isfinite(y))


def test_a_shift_far_from_the_mean_is_corrected(rng):
    """Where the sample that the sums are taken about is no sample at all: a border of zeros around data far from 0."""
    image = draw(rng, (2, 40, 40, 8), 1e4)
    image[:, ::4] = 0.0
    image[:, 1::4] = 1e4
    norm = jn.BatchNorm(implementation="native")
    y = norm.apply(*norm.init(8), image, train=True)[0]
    truth = oracle.normalize(image, np.indices(image.shape)[3], None, None, epsilon=1e-5)
    np.testing.assert_allclose(y, truth.y, rtol=1e-6, atol=2e-6)
    rows = np.concatenate([np.zeros((6, 64), np.float32), draw(rng, (6, 1000), 1e4)], -1)
    truth = oracle.normalize(rows, np.indices(rows.shape)[0], None, None, epsilon=1e-6)
    np.testing.assert_allclose(jn.layer_norm(rows, implementation="native"), truth.y, rtol=1e-6, atol=2e-6)


# --- safety -----------------------------------------------------------------------------------------------------------


def test_equal_inputs_give_equal_bits_in_concurrent_calls(rng):
    x, g = draw(rng, (64, 31, 17, 40), 1.0), draw(rng, (64, 31, 17, 40))
    f = jax.jit(lambda x, g: jax.vjp(lambda x: jn.group_norm(x, num_groups=4, implementation="native"), x)[1](g)[0])
    want = np.asarray(f(x, g))
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: np.asarray(f(x, g)), range(24)):
            np.testing.assert_array_equal(got, want)


def misuse(target="forward", **changes):
    """One call of a handler behind the binding's back."""
    x = jnp.ones((4, 8))
    view = cpu.view_of((4, 8), (1,), frozenset())
    static = cpu.Static(view, 8.0, 1e-6, 1.0, True)._replace(**changes.pop("static", {}))
    args = [x, jnp.zeros(0), jnp.zeros(0)]
    results = [((4, 8), jnp.float32), *[((4, 1), jnp.float32)] * 3]
    args, results = changes.get("args", args), changes.get("results", results)
    return jax.jit(lambda *args: cpu._call(target, static, results, *args))(*args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(args=[jnp.ones((4, 9)), jnp.zeros(0), jnp.zeros(0)]), "x and dx have the view's size"),
        (dict(args=[jnp.ones((4, 8)), jnp.ones(3), jnp.zeros(0)]), "a parameter has a value for each of"),
        (dict(args=[jnp.ones((4, 8)), jnp.zeros(0, jnp.bfloat16), jnp.zeros(0)]), "of the accumulator's type|has the"),
        (dict(args=[jnp.ones((4, 8), jnp.int32), jnp.zeros(0), jnp.zeros(0)]), "not float16, bfloat16, float32"),
        (dict(results=[((4, 7), jnp.float32), *[((4, 1), jnp.float32)] * 3]), "y and its cotangent have the view's"),
        (dict(results=[((4, 8), jnp.float32), *[((5, 1), jnp.float32)] * 3]), "a statistic has a value for each"),
        (dict(results=[((4, 8), jnp.complex64), *[((4, 1), jnp.float32)] * 3]), "not float16, bfloat16, float32"),
        (dict(static=dict(view=cpu.View((1, 4, 1, 1, 1, -8), ()))), "a size is out of range"),
        (dict(static=dict(view=cpu.View((2**40, 2**40, 1, 1, 1, 8), ()))), "a size is out of range"),
        (dict(static=dict(view=cpu.View((4, 8), ()))), "a view has six sizes"),
    ],
)
def test_misuse_raises_and_the_process_survives(changes, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(misuse(**changes))
    assert np.all(np.isfinite(misuse()[0]))


@pytest.mark.parametrize("name", ["avx512bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set_computes_the_same(name):
    code = """
import jax, jax.numpy as jnp, jaxnorm as jn, numpy as np
set_in_use = jn.backends()["native"].reason.split()[-1]
worst = 0.0
for shape, axis in (((40, 37), 1), ((40, 64), 1), ((9, 5, 5, 33), (0, 1, 2)), ((9, 33, 70), (0, 2))):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x, g = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in (0, 1))
        def both(backend, x, g):
            y, vjp = jax.vjp(lambda x: jn.layer_norm(x, axis=axis, implementation=backend), x)
            return jnp.stack([y, vjp(g)[0]]).astype(jnp.float32)
        unit = float(jnp.finfo(dtype).eps)
        ours, want = (np.asarray(jax.jit(both, static_argnums=0)(backend, x, g)) for backend in ("native", "xla"))
        error = np.abs(ours - want) / (unit * (1 + np.abs(want)))
        worst = max(worst, float(error.max()) * (1 if unit > 1e-5 else 0.1))
print(set_in_use, worst)
"""
    in_use, worst = run_python(code, JAXNORM_ISA=name, XLA_FLAGS=FLAGS).split()
    assert in_use == name
    assert float(worst) <= 1.0  # one unit in the last place of a half-precision result; ten of float32


def test_without_the_extension_everything_else_works():
    code = """
import jaxnorm as jn, numpy as np
backend = jn.backends()["native"]
assert not backend.active
print(backend.reason)
x = np.arange(2048.0, dtype="f").reshape(8, 256)
assert np.isfinite(jn.layer_norm(x)).all()
try:
    jn.layer_norm(x, implementation="native")
except ValueError as error:
    print(error)
"""
    reason, error = run_python(code, JAXNORM_NATIVE="0").splitlines()
    assert "JAXNORM_NATIVE=0" in reason
    assert reason in error
    assert "Write implementation=None" in error


# --- programs ---------------------------------------------------------------------------------------------------------


def test_exported_programs_contain_no_kernels(rng):
    """An exported program may run where this library is not."""
    x = draw(rng, (64, 256))
    exported = jax.export.export(jax.jit(lambda x: jax.vjp(jn.layer_norm, x)[1](x)[0]))(x)
    assert "jaxnorm_" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x), jax.vjp(jn.layer_norm, x)[1](x)[0], atol=1e-5)


def test_on_another_platform_the_named_backend_says_so():
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    run = jax.jit(lambda x: jn.layer_norm(x, implementation="native"))
    with pytest.raises(ValueError, match=r"implementation='native' runs on CPU.*Write implementation=None"):
        jax.export.export(run, platforms=["cuda"])(x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["layer", "rms-per-head", "group-nhwc", "batch-nhwc", "instance-nchw"])
def test_each_device_runs_the_kernel_on_its_own_part(name, kind, rng):
    row = by_name[name]
    shape = (16, *row.shape[1:])
    params, x, g = row.params(rng), draw(rng, shape), draw(rng, shape)
    step = gradients(forced(row).apply)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        put = lambda tree, spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)
        text = jax.jit(step).lower(put(params, P()), put(x, P("data")), put(g, P("data"))).compile().as_text()
    split = name == "batch-nhwc"  # statistics are over all devices: in two halves, with a merge between them
    want = ["moments", "normalize", "gradient_sums", "gradient"] if split else ["forward", "backward"]
    found = re.findall(r'custom_call_target="jaxnorm_(\w+)"', text)
    assert set(found) <= set(want)
    assert found[-1] == want[-1]
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    local = np.prod(shape) // 8
    for sizes in re.findall(r"view = (?:array<i64: |dense<\[)([\d, ]+)", text):
        assert np.prod([int(n) for n in sizes.split(",")]) == local


@pytest.mark.versions
@pytest.mark.parametrize("where", ["auto", "explicit", "pmap"])
@pytest.mark.parametrize("row", EACH, ids=str)
def test_shard_map_runs_the_kernel_on_each_device(row, where, rng):
    """shard_map with check_vma on: gradients of replicated parameters are summed over the devices."""
    shape = (16, *row.shape[1:])
    params, x, g = row.params(rng), draw(rng, shape, 2.0), draw(rng, shape)
    step = lambda params, x, g: (row.apply(params, x), gradients(row.apply)(params, x, g))
    parts = [step(params, *part) for part in zip(np.split(x, 8), np.split(g, 8), strict=True)]
    want_y, (want_p, want_x) = jax.tree.map(lambda *a: np.stack(a), *parts)
    if where == "pmap":
        split = lambda a: a.reshape(8, 2, *a.shape[1:])
        y, (dparams, dx) = jax.pmap(step, in_axes=(None, 0, 0))(params, split(x), split(g))
        dparams = jax.tree.map(lambda a: a.sum(0), dparams)
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(AxisType, where.capitalize()),))
        data = P("data")
        run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), data, data), out_specs=(data, (P(), data))))
        put = lambda tree, spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)
        args = put(params, P()), put(x, data), put(g, data)
        assert kernels_in(run, *args) == ["forward", "backward"]
        y, (dparams, dx) = run(*args)
    near = lambda a, b: np.testing.assert_allclose(np.reshape(a, b.shape), b, rtol=1e-5, atol=2e-5)
    near(y, want_y)
    near(dx, want_x)
    jax.tree.map(lambda a, b: near(a, b.sum(0)), dparams, want_p)


def test_shard_map_over_some_axes_runs_the_kernel(rng):
    x, scale = draw(rng, (8, 6, 32), 2.0), draw(rng, 32)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    f = lambda x, s: jn.layer_norm(x, s)
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"}))
    put = jax.device_put(x, NamedSharding(mesh, P("a", None, "b")))
    np.testing.assert_allclose(run(put, scale), f(x, scale), atol=2e-6)


def test_each_reduction_has_its_view():
    """Rows before slabs, planes where they are long, parameters for each example only where they are."""
    view = lambda shape, axes, varying: cpu.view_of(shape, axes, frozenset(varying)).sizes
    assert view((8, 64), (1,), {1}) == (1, 8, 1, 1, 64, 1)
    assert view((8, 64), (1,), {}) == (1, 8, 1, 1, 1, 64)
    assert view((8, 7, 7, 32), (0, 1, 2), {3}) == (1, 1, 392, 32, 1, 1)
    assert view((8, 32, 9, 9), (0, 2, 3), {1}) == (1, 1, 8, 32, 1, 81)
    assert view((8, 32, 3, 3), (0, 2, 3), {1}) == (1, 1, 8, 32, 9, 1)
    assert view((8, 7, 7, 4, 8), (1, 2, 4), {3, 4}) == (1, 8, 49, 4, 8, 1)
    assert view((8, 4, 8, 7, 7), (2, 3, 4), {1, 2}) == (1, 8, 1, 4, 8, 49)
    assert view((8, 5, 64), (2,), {0, 2}) == (8, 5, 1, 1, 64, 1)
    assert cpu.view_of((8, 32, 9), (1,), frozenset({1})) is None
    assert Reduction(Axes((1,))).axes == (1,)


# --- segments ---------------------------------------------------------------------------------------------------------

OF_SEGMENTS = {
    "rms": lambda x, ids, s, b, **call: jn.segment_norm(x, ids, s, kind="rms", **call),
    "group": lambda x, ids, s, b, **call: jn.segment_norm(x, ids, s, b, kind="group", num_groups=3, **call),
    "instance": lambda x, ids, s, b, **call: jn.segment_norm(x, ids, s, b, kind="instance", **call),
    "graph": lambda x, ids, s, b, **call: jn.graph_norm(x, ids, s, b, 0.5 * b, **call),
}


@pytest.mark.parametrize("kind", OF_SEGMENTS)
def test_segments_of_any_order_and_length_match_xla(kind, rng):
    """Long ones, one of a single row, one without rows, and absent rows that hold poison; in one piece each, or not."""
    dtype = ml_dtypes.bfloat16 if kind == "group" else np.float32
    lengths = [3000, 1, 0, 200, 7, 40]
    ids = np.repeat([0, 1, 2, 3, 4, 9], lengths)
    size = np.array([1.0, 1e-3, 1e15, 30.0] * 6 if kind == "instance" else [1.0] * 24, "f")
    x, g = ((draw(rng, (len(ids), 24), 3.0) * size).astype(dtype), draw(rng, (len(ids), 24)).astype(dtype))
    scale, bias = draw(rng, (2, 24))
    x[ids == 9] = np.nan

    def both(x, g, ids, scale, bias, implementation=None):
        norm = lambda *a: OF_SEGMENTS[kind](a[0], ids, *a[1:], num_segments=5, implementation=implementation)
        y, vjp = jax.vjp(norm, x, scale, bias)
        return y, vjp(g)

    xla = jax.jit(lambda *a: both(*a, implementation="xla"))
    ours = jax.jit(both).lower(x, g, ids, scale, bias).compile()
    names = re.findall(r'custom_call_target="jaxnorm_segment_(\w+)"', ours.as_text())
    of_tables = ["gradient", "gradient_sums", "moments", "normalize"]
    assert sorted(names) == (of_tables if kind == "graph" else ["backward", "forward"])
    close = 2e-5 if dtype == np.float32 else 1e-2
    for order in (np.arange(len(ids)), rng.permutation(len(ids))):
        args = x[order], g[order], ids[order], scale, bias
        (y, (dx, *sums)), (y_, (dx_, *sums_)) = ours(*args), xla(*args)
        np.testing.assert_allclose(np.float64(y), np.float64(y_), rtol=close, atol=close)
        unit = np.where(ids[order, None] == 1, 1.0, size)  # alone a row is its mean, and dx what rounding leaves
        np.testing.assert_allclose(np.float64(dx) * unit, np.float64(dx_) * unit, rtol=close, atol=close)
        for got, want in zip(sums, sums_, strict=True):
            np.testing.assert_allclose(got, want, rtol=close, atol=close * np.abs(want).max())
