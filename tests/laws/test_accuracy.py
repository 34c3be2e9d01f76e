"""Law 1: within 2e-6 of the truth whatever the mean, the magnitude and epsilon; constants exact."""

import math
import re
from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from catalogue import BATCH_NORMS, EACH, ROWS, by_name, draw
from helpers.devices import mesh_of

import jaxnorm as jn
from jaxnorm._core import collectives
from jaxnorm._core.arithmetic import prescales
from jaxnorm._core.formulas import one_pass, one_pass_by_parts, two_pass, welford
from jaxnorm._core.fused import fused_two_pass
from jaxnorm._core.masks import count_valid
from jaxnorm._core.over import Axes
from jaxnorm._core.types import Reduction, Statistics
from jaxnorm._ops import plan
from jaxnorm._ops.formula import rsqrt, rsqrt_of_root
from jaxnorm._ops.statistics import statistics

NCHW = [by_name[name] for name in ("layer-nchw", "group-nchw", "instance-nchw", "batch-nchw")]
MAGNITUDES = (1e-30, 1e-20, 1e-13, 1.0, 1e19, 1e30)
MEANS = (0.0, 1.0, 1e2, 1e4)


@pytest.mark.versions
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_output_and_gradients_are_exact_at_every_mean(row, rng):
    params, g = row.params(rng), draw(rng, row.shape)

    @jax.jit
    def both(params, x):
        y, vjp = jax.vjp(row.apply, params, x)
        return y, *vjp(jnp.asarray(g))

    for mean in MEANS:
        x = draw(rng, row.shape, mean)
        y, dparams, dx = both(params, x)
        # The goal of the law, flat in the mean (its limit is 2e-6 + 1e-7 |m|); larger only as the output is.
        truth = row.truth(params, x)
        np.testing.assert_allclose(y, truth.y, rtol=1e-6, atol=2e-6, err_msg=f"mean {mean}")
        dx_true, *dparams_true = row.gradients(params, x, g)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=4e-6 * max(1, np.abs(b).max()))
        close(dx, dx_true)
        for got, true in zip(dparams, dparams_true, strict=True):
            if got is not None:
                close(np.reshape(got, true.shape), true)
    x = draw(rng, row.shape) * np.float32(1e20)  # beyond the squares that float32 holds
    _, dparams, dx = both(params, x)
    for got, true in zip((dx, *dparams), row.gradients(params, x, g), strict=True):
        if got is not None and (largest := np.abs(true).max()) > 2.0**-102:
            np.testing.assert_allclose(np.reshape(got, true.shape), true, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_constant_gives_the_bias(row, rng):
    params = row.params(rng)
    bias = row.truth(params, np.zeros(row.shape)).y
    for constant in (0.0, 1.0, -3.3, 1e4 / 3, 1e20, 1e-20):
        x = np.full(row.shape, constant, np.float32)
        true, rtol, atol = (bias, 1e-7, 1e-6) if row.centered else (row.truth(params, x).y, 1e-6, 2e-6)
        np.testing.assert_allclose(row.apply(params, x), true, rtol=rtol, atol=atol, err_msg=f"constant {constant}")


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, None], ids=str)
@pytest.mark.parametrize("row", [*EACH, *NCHW], ids=str)
def test_output_and_gradients_are_exact_at_every_magnitude_and_epsilon(row, epsilon, rng):
    implementations = [None, "xla"] if epsilon == 0 else [None]
    for implementation in implementations:
        own = row.spec.epsilon if epsilon is None else epsilon
        spec = replace(row.spec, epsilon=own, implementation=implementation)
        check_magnitudes(replace(row, spec=spec), np.float32, rng)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_output_and_gradients_are_exact_at_every_magnitude_in_bfloat16(row, rng):
    check_magnitudes(replace(row, spec=replace(row.spec, epsilon=0.0)), jnp.bfloat16, rng)


def check_magnitudes(row, dtype, rng):
    """Output and gradients, in one program for all magnitudes."""
    params, g = row.params(rng), draw(rng, row.shape, dtype=dtype)

    @jax.jit
    def both(params, x, g):
        y, vjp = jax.vjp(row.apply, params, x)
        return y, *vjp(g)

    one_rounding = 0.51 * float(jnp.finfo(dtype).eps) if dtype == jnp.bfloat16 else 1e-6
    for magnitude in MAGNITUDES:
        x = (draw(rng, row.shape, 1.0) * np.float32(magnitude)).astype(dtype)
        y, (dscale, _), dx = both(params, x, g)
        true = row.gradients(params, x, g)
        message = f"magnitude {magnitude}"
        np.testing.assert_allclose(np.float64(y), row.truth(params, x).y, rtol=one_rounding, atol=2e-6, err_msg=message)
        for got, want, rounding in ((dx, true[0], one_rounding), (dscale, true[1], 1e-6)):
            got, want = np.reshape(np.float64(got), np.shape(want)), np.float64(want)
            size = np.abs(want).max()
            np.testing.assert_allclose(got / size, want / size, rtol=rounding, atol=4e-6, err_msg=message)


@pytest.mark.parametrize("how", ["slots", "two sums", "jit", "ghosts"])
def test_devices_merge_statistics_of_any_magnitude(how, rng, monkeypatch):
    """Also where each device has another: 8 of them, or of the parts of a batch."""
    if how == "two sums":
        monkeypatch.setattr(collectives, "SLOT_BYTES", 0)
    norm = jn.BatchNorm(epsilon=0.0, axis_name="d" if how in ("slots", "two sums") else None)
    norm = replace(norm, virtual_batch_size=4) if how == "ghosts" else norm
    params, state = norm.init(5)
    run = lambda x: norm.apply(params, state, x, train=True)[0]
    if norm.axis_name:
        each = jax.vmap(run, axis_name="d")
        run = lambda x: each(x.reshape(8, 4, 5)).reshape(x.shape)
    run = jax.jit(run)
    mesh = mesh_of("auto", names=("d",))
    spec = jax.sharding.PartitionSpec("d" if how == "jit" else None)
    for magnitudes in ([1e-30] * 8, [1e30] * 8, [1.0] * 8, [1e-30, 1e-5, 1e30, 1e20] * 2, [1e-30] * 7 + [1e-20]):
        x = (draw(rng, (8, 4, 5), 1.0) * np.array(magnitudes)[:, None, None]).astype(np.float32).reshape(32, 5)
        labels = np.indices(x.shape)[1] + (5 * (np.indices(x.shape)[0] // 4) if how == "ghosts" else 0)
        true = oracle.normalize(x, labels, None, None, epsilon=0.0).y
        y = run(jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)))
        np.testing.assert_allclose(y, true, rtol=1e-6, atol=2e-6, err_msg=str(magnitudes))
    if how == "ghosts":  # the running variance is that of the whole batch
        x = draw(rng, (32, 5)) * np.float32(1e-15)
        var = replace(norm, momentum=0.0).apply(params, state, x, train=True)[1].var
        np.testing.assert_allclose(var, x.var(0, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_values_too_large_for_float32_statistics_give_nan(row, rng):
    """Squares of the largest floats are in no unit's range: the output is NaN, not 0."""
    x = np.where(draw(rng, row.shape) > 0, 3e38, -3e38).astype(np.float32)
    for epsilon in (row.spec.epsilon, 0.0):
        of = replace(row, spec=replace(row.spec, epsilon=epsilon))
        if of.name == "rms" and epsilon and not kernels_run(None):
            continue  # in XLA's formula for rows it is 0 beyond some 1e30: to see it would cost a GPU a pass over x
        assert np.all(np.isnan(of.apply(of.params(rng), x)))
    state = jn.RunningStats(jnp.zeros(3), jnp.full(3, jnp.inf))
    assert np.all(np.isnan(jn.batch_norm(np.ones((2, 3), "f"), None, state, train=False)[0]))


def test_prescales_keep_sums_of_squares_finite_and_precise():
    """A sum of n squares neither overflows, nor loses what counts beside epsilon, in the one unit or the two."""
    largest, smallest = math.log2(2e30), -126  # of x - shift, and of what is not flushed to 0
    for n in (1, 2, 40, 300, 512, 4096, 1 << 14, 10**5, 1 << 18, 1 << 20, 1 << 24, 1 << 28):
        for epsilon in (0.0, 1e-30, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1.0):
            small, large = prescales(epsilon, n, np.float32)
            top = small if large is None else large
            assert math.log2(n) + 2 * (largest + math.log2(top)) < 128
            assert all(math.frexp(unit)[0] == 0.5 for unit in (small, large or small))
            if epsilon and (large is None or epsilon > 1e-20):  # the relative error of r
                assert smallest - 2 * math.log2(small) - math.log2(epsilon) - 1 <= math.log2(2e-6)
            if large is not None:
                # Where the small unit overflows, what each element loses in the large one is 2**-22 of the sum.
                sums = 127 - 2 * math.log2(small)
                assert math.log2(n) + smallest - 2 * math.log2(large) <= sums - 22
                assert n > 1 << 16 or epsilon or math.log2(small) + math.log2(1e-37) > -63
    assert prescales(1e-6, 26_000, np.float32)[1] is None  # default epsilons, and sizes that are common
    assert prescales(1e-5, 100_000, np.float32)[1] is None
    assert prescales(0.0, 512, np.float64)[1] is None


@pytest.mark.parametrize("values", [{}, {"weights": True}], ids=["plain", "weights"])
def test_two_prescales_have_the_derivatives_of_one(values, rng, monkeypatch):
    """Of every order, also where x is constant, whose spread has no derivative."""
    x, scale = draw(rng, (2, 3, 8), 1.0), draw(rng, 8)
    x[0] = 0.75
    along, weights = (draw(rng, x.shape) for _ in range(2))
    weights = np.abs(weights) if values else None
    state = jn.BatchNorm().init(3)[1]

    def norm(x, scale, w):
        if w is not None:  # of each of the two parts, so that one of them is constant
            f = lambda x, w: jn.batch_norm(x.T, jn.Affine(scale[:3], None), state, train=True, weights=w.T)[0]
            return jax.vmap(f)(x, w)
        return jn.layer_norm(x, scale, epsilon=1e-2, implementation="xla")

    def derivatives():
        f = lambda t, scale, w: norm(x + t * along, scale, w)
        third = f
        for _ in range(3):
            third = lambda t, *args, f=third: jax.jvp(lambda t: f(t, *args), (t,), (jnp.ones(()),))[1]
        second = jax.grad(lambda *args: jnp.sum(jax.jvp(lambda t: f(t, *args[1:]), args[:1], (jnp.ones(()),))[1] ** 2),
                          argnums=(0, 1) if w is None else (0, 1, 2))  # fmt: skip
        t = jnp.zeros(())
        return jax.jit(lambda t, scale, w: (f(t, scale, w), third(t, scale, w), second(t, scale, w)))(t, scale, w)

    w = weights
    want = derivatives()
    monkeypatch.setattr(plan, "prescales", lambda *args: (2.0**-45, 2.0**-50))
    for got, true in zip(jax.tree.leaves(derivatives()), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(true).max()))


def test_add_norm_sums_in_the_range_of_the_residual_dtype(rng):
    """The sum of a float64 x and a float32 residual is float32, whose squares need two prescales here."""
    with jax.enable_x64(True):
        x, residual = rng.normal(size=(6, 8)) * 1e-16, (rng.normal(size=(6, 8)) * 1e-16).astype(np.float32)
        y, new = jn.add_rms_norm(x, residual, epsilon=0.0)
    true = np.float64(new) / np.sqrt(np.square(np.float64(new)).mean(1, keepdims=True))
    np.testing.assert_allclose(y, true, rtol=2e-6)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_long_columns_keep_their_accuracy(implementation, rng):
    norm = jn.BatchNorm(implementation=implementation)
    x, g = draw(rng, (1 << 19, 16), 100.0), draw(rng, (1 << 19, 16), 1.0)
    params, state = norm.init(16)
    y, vjp = jax.vjp(jax.jit(lambda p, x: norm.apply(p, state, x, train=True)[0]), params, x)
    true = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    true /= np.sqrt(np.square(true).mean(0) + norm.epsilon)
    assert np.abs(y - true).max() <= (1.5e-6 if jax.default_backend() == "gpu" else 1.3e-6)
    (dscale, dbias), _ = vjp(jnp.asarray(g))
    np.testing.assert_allclose(dbias, g.sum(0, dtype=np.float64), rtol=2e-7 if kernels_run(implementation) else 1e-6)
    np.testing.assert_allclose(dscale, (g * true).sum(0), rtol=1e-5, atol=2e-7 * len(x))


def kernels_run(implementation) -> bool:
    return implementation is None and jn.backends()["native"].active


def test_a_batch_mask_is_exact_at_a_mean_of_many_deviations(rng):
    """The mean that differences are taken to is the one that is returned, to the bit, however XLA divides."""
    x, mask = draw(rng, (1 << 14, 8), 1e6), rng.uniform(size=(1 << 14, 1)) < 0.7
    y = jax.jit(lambda x, m: jn.group_norm(x, num_groups=2, mask=m, reduction_axes=(0, 1)))(x, mask)
    labels = np.broadcast_to(np.arange(8) // 4, x.shape)
    true = oracle.normalize(x, labels, None, None, epsilon=1e-6, mask=mask).y
    np.testing.assert_allclose(y, true, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1009, 67, 64, 17, 2])
def test_a_batch_of_any_size_has_exact_statistics(size, rng):
    """Sizes without divisors have no evenly spaced sample to start from; the first example is no substitute for one."""
    norm = jn.BatchNorm()
    params, state = norm.init(5)
    x = draw(rng, (size, 5), 1e4)
    x[0] += 300.0
    labels = np.broadcast_to(np.arange(5), x.shape)
    truth = oracle.normalize(x, labels, None, None, epsilon=norm.epsilon)
    np.testing.assert_allclose(norm.apply(params, state, x, train=True)[0], truth.y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("row", BATCH_NORMS, ids=str)
def test_an_outlier_in_the_sample_mean_costs_no_accuracy(row, rng):
    x = draw(rng, row.shape, 3.0)
    x[0] = 1e5
    params = row.params(rng)
    np.testing.assert_allclose(row.apply(params, x), row.truth(params, x).y, rtol=1e-5, atol=5e-6)


def test_epsilon_zero_gives_zero_for_a_constant_row(rng):
    x = np.stack([np.full(8, 3.0, np.float32), draw(rng, 8)])
    y = jn.layer_norm(x, epsilon=0.0)
    assert np.all(y[0] == 0)
    np.testing.assert_allclose(
        y[1], oracle.normalize(x, np.indices(x.shape)[0], None, None, epsilon=0.0).y[1], atol=1e-6
    )
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(jn.layer_norm(x, epsilon=0.0))))(x)))


@pytest.mark.parametrize("formula", [two_pass, welford])
@pytest.mark.parametrize("mean", MEANS)
def test_the_formulas_of_each_platform_agree(formula, mean, rng):
    """What runs on GPU and TPU only is run here by name."""
    x = draw(rng, (16, 7, 300), mean)
    for axes in ((2,), (1, 2), (0, 2)):
        n = count_valid(x, None, None, Axes(axes))
        shift, offset, m2 = jax.jit(lambda x, n, axes=axes: formula(x, None, None, n, Reduction(Axes(axes))))(x, n)
        true = x.astype(np.float64)
        got = np.float64(shift) + np.float64(offset)
        np.testing.assert_allclose(
            got, true.mean(axes, keepdims=True), rtol=1e-13, atol=5e-6
        )  # one chain on CPU; a tree on GPU
        np.testing.assert_allclose(m2 / n, true.var(axes, keepdims=True), rtol=4e-6)
        unit = 2.0**-40  # times 1e-30 that is no normal float, and the mean keeps its digits
        how = Reduction(Axes(axes), prescale=unit)
        shift, offset, _ = jax.jit(formula, static_argnums=4)(x * np.float32(1e-30), None, None, n, how)
        got = np.float64(shift) + np.float64(offset)
        np.testing.assert_allclose(got, 1e-30 * true.mean(axes, keepdims=True), rtol=1e-5, atol=5e-36)


def in_kernel(x, keep, weights, n, how):
    return fused_two_pass(x, n, how)


def merged_parts(x, keep, weights, n, how):
    return statistics(replace(how, one_pass=True, num_shards=8), x, keep, weights)[1:]


BRANCHES = {  # and the error of each, where nothing is constant
    "two_pass": (two_pass, ((2,), (1, 2), (0, 1)), 2e-6),  # CPU
    # TPU, and on a GPU the statistics of rows that are kept; one chain of sums on CPU, a tree there
    "welford": (welford, ((2,), (0,)), 6e-6),
    "in_kernel": (in_kernel, ((2,), (1, 2)), 2e-6),  # on a GPU the statistics of rows that y is made of
    "in_one_pass": (one_pass, ((0, 1), (0,)), 2e-6),  # batch norm
    "in_one_pass_by_parts": (one_pass_by_parts, ((0, 1), (0,)), 2e-6),  # on a GPU, and there what is no row
    "merged_parts": (merged_parts, ((0, 1), (0,)), 2e-6),  # batch norm of a batch that jit spreads over devices
}
EXTREMES = {
    "constant 1": lambda rng, shape: np.ones(shape),
    "constant 1e4 / 3": lambda rng, shape: np.full(shape, 1e4 / 3),
    "constant 1e20": lambda rng, shape: np.full(shape, 1e20),
    "constant 1e30 / 3": lambda rng, shape: np.full(shape, 1e30 / 3),
    "constant 1e-20": lambda rng, shape: np.full(shape, 1e-20),
    "1e20": lambda rng, shape: rng.normal(size=shape) * 1e20,
    "1e30": lambda rng, shape: rng.normal(size=shape) * 1e30,
    "1e28": lambda rng, shape: (rng.normal(size=shape) + 1.0) * 1e28,
    "1e-30": lambda rng, shape: rng.normal(size=shape) * 1e-30,
    "1e-13": lambda rng, shape: (rng.normal(size=shape) + 1.0) * 1e-13,
    "mean 1e4": lambda rng, shape: rng.normal(size=shape) + 1e4,
    "an outlier": lambda rng, shape: np.where(np.arange(shape[2]) == 0, 1e5, 3.0) + rng.normal(size=shape),
}


@pytest.mark.parametrize("epsilon", [1e-6, 1e-12, 0.0])  # one unit; two; and for columns one for each column
@pytest.mark.parametrize("branch", BRANCHES)
def test_each_platform_s_formula_holds_at_the_extremes(branch, epsilon, rng):
    """The output that each branch leads to, run here whatever platform would choose it."""
    formula, kinds_of_axes, error = BRANCHES[branch]
    for axes in kinds_of_axes:
        # Of the sizes that sums are over, and few of those that they are not.
        shape = tuple(n if a in axes else few for a, (n, few) in enumerate([(64, 8), (32, 6), (300, 20)]))
        unit, large = prescales(epsilon, math.prod(shape[a] for a in axes), np.float32)
        how = Reduction(Axes(axes), prescale=unit, large_prescale=large)

        @jax.jit
        def output(x, how=how):
            n = count_valid(x, None, None, how.over)
            stats = Statistics(n, *formula(x, None, None, n, how))
            one = how.large_prescale is None
            r = rsqrt(stats.m2, n, how.prescale, epsilon) if one else rsqrt_of_root(stats.m2, n, epsilon)
            return ((x - stats.mean_hi) - stats.mean_lo) * r

        labels = np.arange(math.prod(shape)).reshape(shape)
        labels = np.broadcast_to(labels.min(axes, keepdims=True), shape)
        labels = np.unique(labels, return_inverse=True)[1].reshape(shape)
        for values, draw_values in EXTREMES.items():
            x = draw_values(rng, shape).astype(np.float32)
            true = oracle.normalize(x, labels, None, None, epsilon=epsilon).y
            atol = 1e-6 if "constant" in values else error * (2.5 if values == "an outlier" else 1.0)
            true = np.zeros(shape) if "constant" in values else true
            np.testing.assert_allclose(output(x), true, rtol=1e-5, atol=atol, err_msg=values)


@pytest.mark.parametrize("epsilon", [1e-12, 0.0])
def test_rows_of_rms_norm_on_a_gpu_hold_at_the_extremes(epsilon, rng):
    unit, large = prescales(epsilon, 300, np.float32)
    how = Reduction(Axes((1,)), centered=False, prescale=unit, large_prescale=large)

    @jax.jit
    def output(x):
        shift, offset, root = fused_two_pass(x, jnp.full((1, 1), 300.0), how)
        return ((x - shift) - offset) * rsqrt_of_root(root, jnp.full((1, 1), 300.0), epsilon)

    for magnitude in MAGNITUDES:
        x = draw(rng, (8, 300), 1.0) * np.float32(magnitude)
        labels = np.indices(x.shape)[0]
        true = oracle.normalize(x, labels, None, None, epsilon=epsilon, centered=False).y
        np.testing.assert_allclose(output(x), true, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("mean", MEANS)
def test_moments_match_float64(mean, rng):
    x = draw(rng, (40, 6, 9), mean)
    w = rng.uniform(0, 2, x.shape).astype(np.float32)
    for axes in ((0,), (0, 2), (0, 1, 2)):
        count, got, m2 = jn.moments(x, axes, weights=w)
        true, w64 = x.astype(np.float64), w.astype(np.float64)
        n = w64.sum(axes)
        true_mean = (w64 * true).sum(axes, keepdims=True) / w64.sum(axes, keepdims=True)
        np.testing.assert_allclose(count, n, rtol=1e-6)
        np.testing.assert_allclose(got, true_mean.squeeze(), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(m2, (w64 * (true - true_mean) ** 2).sum(axes), rtol=5e-6)


@pytest.mark.parametrize("name", ["layer", "group-nhwc", "batch-nhwc", "instance-nhwc", "rms"])
def test_complex_outputs_and_derivatives_match_the_formula(name, rng):
    row = by_name[name]
    x = (draw(rng, row.shape, 2.0) + 1j * draw(rng, row.shape, -1.0)).astype(np.complex64)
    params = row.params(rng)
    state = row.state()
    state = state._replace(mean=state.mean.astype(jnp.complex64)) if row.batch else state
    apply = jax.jit(lambda params, x: row.spec.apply(params, state, x, train=True)[0])
    y = apply(params, x)
    assert y.dtype == np.complex64
    np.testing.assert_allclose(y, row.truth(params, x).y, rtol=1e-5, atol=3e-6)

    # The derivative, against the same function of real and imaginary parts written plainly.
    labels = row.labels.ravel()

    @jax.jit
    def plain(params, x):
        total = lambda a: jax.ops.segment_sum(a.ravel(), labels, int(labels.max()) + 1)[labels].reshape(a.shape)
        n = total(jnp.ones(x.shape))
        mean = total(x) / n.astype(x.dtype) if row.centered else jnp.zeros_like(x)
        var = total(jnp.square((x - mean).real) + jnp.square((x - mean).imag)) / n
        y = (x - mean) * jax.lax.rsqrt(var + row.spec.epsilon).astype(x.dtype)
        scale, bias = (
            0.0 if p is None else jnp.broadcast_to(p.reshape(row.param), x.shape).astype(x.dtype) for p in params
        )
        return y * scale + bias

    g = (draw(rng, row.shape) + 1j * draw(rng, row.shape)).astype(np.complex64)
    got, want = (jax.vjp(f, params, x)[1](jnp.asarray(g)) for f in (apply, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)
    got, want = (jax.jvp(f, (params, x), (params, g))[1] for f in (apply, plain))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("platform", "reads"), [("cpu", False), ("cuda", True), ("rocm", True), ("tpu", True)])
def test_the_formula_for_rows_is_chosen_at_lowering(platform, reads):
    """Lowered for a GPU or TPU, on this machine that has none, the statistics kept are one reduction of three arrays.

    Those that a GPU's y is made of are three reductions, which XLA puts into one kernel with it.
    """
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    lowered = lambda f: jax.export.export(jax.jit(f), platforms=[platform])(x).mlir_module()
    at_once = lambda text: bool(re.search(r"stablehlo\.reduce\(.*\), \(.*\), \(", text))
    assert at_once(lowered(lambda x: jax.vjp(jn.layer_norm, x)[1](x))) == reads
    assert at_once(lowered(jn.layer_norm)) == (platform == "tpu")
    if platform == "cpu":
        assert "conditional" not in jax.jit(jn.layer_norm).lower(x).compile().as_text()
