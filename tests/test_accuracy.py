"""Law 1: within 2e-6 of the truth whatever the mean, never E[x^2] - E[x]^2, constants exact, 1e20 in range."""

import re
from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from catalogue import BATCH_NORMS, EACH, ROWS, by_name, draw

import jaxnorm as jn
from jaxnorm import _moments
from jaxnorm._kernels import xla
from jaxnorm._normalize import rsqrt

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


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.3, 1e4 / 3, 1e20, 1e-20])
def test_a_constant_gives_the_bias(row, constant, rng):
    params = row.params(rng)
    y = row.apply(params, np.full(row.shape, constant, np.float32))
    if row.centered:
        bias = 0.0 if params.bias is None else np.reshape(params.bias, row.param)
        np.testing.assert_allclose(y, np.broadcast_to(row.activated(bias), row.shape), atol=1e-6)
    else:
        np.testing.assert_allclose(
            y, row.truth(params, np.full(row.shape, np.float32(constant))).y, rtol=1e-6, atol=2e-6
        )


@pytest.mark.parametrize("row", EACH, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-4, 1e10, 1e20, 1e28])
def test_any_magnitude(row, magnitude, rng):
    params, x, g = row.params(rng), draw(rng, row.shape, 1.0) * np.float32(magnitude), draw(rng, row.shape)
    y, vjp = jax.vjp(lambda x: row.apply(params, x), x)
    np.testing.assert_allclose(y, row.truth(params, x).y, rtol=1e-6, atol=2e-6)
    dx = row.gradients(params, x, g)[0]
    if magnitude <= 1e20:
        np.testing.assert_allclose(vjp(jnp.asarray(g))[0], dx, rtol=1e-5, atol=4e-6 * np.abs(dx).max())


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
def test_one_outlier_among_the_samples_of_the_pilot_costs_nothing(row, rng):
    x = draw(rng, row.shape, 3.0)
    x[0] = 1e5
    params = row.params(rng)
    np.testing.assert_allclose(row.apply(params, x), row.truth(params, x).y, rtol=1e-5, atol=5e-6)


def test_no_epsilon_is_allowed_even_where_nothing_varies(rng):
    x = np.stack([np.full(8, 3.0, np.float32), draw(rng, 8)])
    y = jn.layer_norm(x, epsilon=0.0)
    assert np.all(y[0] == 0)
    np.testing.assert_allclose(
        y[1], oracle.normalize(x, np.indices(x.shape)[0], None, None, epsilon=0.0).y[1], atol=1e-6
    )
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(jn.layer_norm(x, epsilon=0.0))))(x)))


@pytest.mark.parametrize("formula", [xla.two_pass, xla.welford])
@pytest.mark.parametrize("mean", MEANS)
def test_the_formulas_of_each_platform_agree(formula, mean, rng):
    """What runs on GPU and TPU only is run here by name."""
    x = draw(rng, (16, 7, 300), mean)
    for axes in ((2,), (1, 2), (0, 2)):
        n = xla.count(x, None, None, axes)
        shift, offset, m2 = jax.jit(lambda x, n, axes=axes: formula(x, None, None, n, xla.Reduction(axes)))(x, n)
        true = x.astype(np.float64)
        got = np.float64(shift) + np.float64(offset)
        np.testing.assert_allclose(
            got, true.mean(axes, keepdims=True), rtol=1e-13, atol=5e-6
        )  # one chain on CPU; a tree on GPU
        np.testing.assert_allclose(m2 / n, true.var(axes, keepdims=True), rtol=4e-6)


def in_kernel(x, keep, weights, n, how):
    return xla.in_kernel(x, n, how)


def merged_parts(x, keep, weights, n, how):
    return _moments.statistics(replace(how, one_pass=True, parts=8), x, keep, weights)[1:]


BRANCHES = {  # and the error of each, where nothing is constant
    "two_pass": (xla.two_pass, ((2,), (1, 2), (0, 1)), 2e-6),  # CPU
    # TPU, and on a GPU the statistics of rows that are kept; one chain of sums on CPU, a tree there
    "welford": (xla.welford, ((2,), (0,)), 6e-6),
    "in_kernel": (in_kernel, ((2,), (1, 2)), 2e-6),  # on a GPU the statistics of rows that y is made of
    "in_one_pass": (xla.in_one_pass, ((0, 1), (0,)), 2e-6),  # batch norm
    "in_one_pass_by_parts": (xla.in_one_pass_by_parts, ((0, 1), (0,)), 2e-6),  # on a GPU, and there what is no row
    "merged_parts": (merged_parts, ((0, 1), (0,)), 2e-6),  # batch norm of a batch that jit spreads over devices
}
UNIT = 2.0**-40
EXTREMES = {
    "constant 1": lambda rng, shape: np.ones(shape),
    "constant 1e4 / 3": lambda rng, shape: np.full(shape, 1e4 / 3),
    "constant 1e20": lambda rng, shape: np.full(shape, 1e20),
    "constant 1e-20": lambda rng, shape: np.full(shape, 1e-20),
    "1e20": lambda rng, shape: rng.normal(size=shape) * 1e20,
    "1e28": lambda rng, shape: (rng.normal(size=shape) + 1.0) * 1e28,
    "1e-30": lambda rng, shape: rng.normal(size=shape) * 1e-30,
    "mean 1e4": lambda rng, shape: rng.normal(size=shape) + 1e4,
    "an outlier": lambda rng, shape: np.where(np.arange(shape[2]) == 0, 1e5, 3.0) + rng.normal(size=shape),
}


@pytest.mark.parametrize("values", EXTREMES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_each_platform_s_formula_holds_at_the_extremes(branch, values, rng):
    """The output that each branch leads to, run here whatever platform would choose it."""
    formula, kinds_of_axes, error = BRANCHES[branch]
    x = EXTREMES[values](rng, (64, 32, 300)).astype(np.float32)
    for axes in kinds_of_axes:

        @jax.jit
        def output(x, axes=axes):
            n = xla.count(x, None, None, axes)
            stats = xla.Statistics(n, *formula(x, None, None, n, xla.Reduction(axes, unit=UNIT)))
            return ((x - stats.shift) - stats.offset) * rsqrt(stats.m2, n, UNIT, 1e-6)

        labels = np.arange(x.size).reshape(x.shape)
        labels = np.broadcast_to(labels.min(axes, keepdims=True), x.shape)
        labels = np.unique(labels, return_inverse=True)[1].reshape(x.shape)
        true = oracle.normalize(x, labels, None, None, epsilon=1e-6).y
        error *= 2.5 if values == "an outlier" else 1.0
        np.testing.assert_allclose(output(x), true, rtol=1e-5, atol=1e-6 if "constant" in values else error)


@pytest.mark.parametrize("mean", MEANS)
def test_moments(mean, rng):
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
def test_complex(name, rng):
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
