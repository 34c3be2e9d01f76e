"""Law 3: true counts; what is masked out is removed before any arithmetic; empty rows are finite; weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from catalogue import BATCH_NORMS, EACH, ROWS, by_name, draw
from helpers.jit import jit_unoptimized

import jaxnorm as jn


def masks(row, rng):
    """Every shape a mask may have: x's own, broadcasting, and x's leading axes."""
    full = rng.random(row.shape) < 0.6
    yield "full", full
    yield "broadcasting", full[:1] if row.shape[0] > 1 else full
    yield "leading", full[..., 0].reshape(row.shape[:-1])
    yield "examples", full.reshape(row.shape[0], -1)[:, 0].reshape(row.shape[0], *(1,) * (len(row.shape) - 1))


def in_rank(mask, shape):
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


@functools.partial(jit_unoptimized, static_argnums=0)
def outputs_and_gradients(row, params, x, masks, cotangents):
    """Of the norm under each of the masks, in one program."""

    def one(mask, g):
        y, vjp = jax.vjp(lambda params, x: row.apply(params, x, mask=mask), params, x)
        return y, *vjp(g)

    return [one(mask, g) for mask, g in zip(masks, cotangents, strict=True)]


@pytest.mark.versions
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_masked_outputs_and_gradients_match_true_counts(row, rng):
    params, x, g = row.params(rng), draw(rng, row.shape, 5.0), draw(rng, row.shape)
    kinds, each = zip(*masks(row, rng), strict=True)
    truths = [row.truth(params, x, mask=in_rank(mask, row.shape)) for mask in each]
    # A row of one element has r = 1000 and amplifies rounding; an absent one of an empty row is the bias.
    cotangents = [np.where(truth.n < 3, 0, g).astype(np.float32) for truth in truths]
    found = jax.tree.map(np.asarray, outputs_and_gradients(row, params, x, each, cotangents))
    for kind, mask, truth, g, (y, dparams, dx) in zip(kinds, each, truths, cotangents, found, strict=True):
        full, few = in_rank(mask, row.shape), truth.n < 3
        np.testing.assert_allclose(y[full], truth.y[full], rtol=2e-5, atol=2e-5, err_msg=kind)
        np.testing.assert_allclose(np.where(few, 0, y), np.where(few, 0, truth.y), rtol=2e-5, atol=2e-5, err_msg=kind)
        dx_true, *dparams_true = row.gradients(params, x, g, mask=full)
        np.testing.assert_allclose(dx, dx_true, rtol=1e-3, atol=1e-5 * np.abs(dx_true).max(), err_msg=kind)
        for got, true in zip(dparams, dparams_true, strict=True):
            if got is not None:
                true = true.reshape(got.shape)
                np.testing.assert_allclose(got, true, rtol=1e-3, atol=1e-5 * np.abs(true).max(), err_msg=kind)


@functools.partial(jit_unoptimized, static_argnums=0)
def output_gradients_and_tangent(row, params, x, mask, g, v):
    apply = lambda params, x: row.apply(params, x, mask=mask)
    y, vjp = jax.vjp(apply, params, x)
    return y, vjp(g), jax.jvp(apply, (params, x), (params, v))[1]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_poison_in_the_padding_reaches_no_output_and_no_gradient(row, rng):
    params, x, g = row.params(rng), draw(rng, row.shape), draw(rng, row.shape)
    mask = rng.random(row.shape[:-1]) < 0.7
    full = in_rank(mask, row.shape)
    g = np.where(full, g, 0.0).astype(np.float32)  # the loss looks at valid elements only

    def of(padding):
        holed = np.where(full, x, np.float32(padding))
        return jax.tree.map(np.asarray, output_gradients_and_tangent(row, params, holed, mask, g, x))

    clean, clean_gradients, _ = of(0.0)
    for poison in (np.nan, np.inf, -np.inf, 3e38):
        y, gradients, tangent = of(poison)
        atol = 1e-6 if "segments" in row.name and jax.default_backend() == "gpu" else 0.0  # by atomics, in any order
        np.testing.assert_allclose(y[full], clean[full], rtol=0, atol=atol)
        assert np.all(np.isfinite(y))
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(clean_gradients), strict=True):
            assert np.all(np.isfinite(got))
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        assert np.all(np.isfinite(tangent[full]))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_fully_masked_input_gives_a_constant_and_finite_gradients(row, rng):
    params, x, g = row.params(rng), draw(rng, row.shape, dtype=np.float16), draw(rng, row.shape, dtype=np.float16)
    ((y, *gradients),) = outputs_and_gradients(row, params, x, [np.zeros(row.shape, bool)], [g])
    nothing = row.truth(params, x, mask=np.zeros(row.shape, bool)).y  # of a standardization, the bias
    np.testing.assert_array_equal(y, nothing.astype(np.float16))
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_mask_of_ones_equals_no_mask(row, rng):
    params, x = row.params(rng), draw(rng, row.shape, 3.0)
    np.testing.assert_allclose(
        row.apply(params, x), row.apply(params, x, mask=np.ones(row.shape)), rtol=1e-6, atol=2e-6
    )


@pytest.mark.parametrize("row", BATCH_NORMS, ids=str)
def test_weighted_statistics_and_gradients_match_the_truth(row, rng):
    params, x, g = row.params(rng), draw(rng, row.shape, 2.0), draw(rng, row.shape)
    weights = rng.uniform(0.1, 2.0, row.shape).astype(np.float32)
    weights[rng.random(row.shape) < 0.2] = 0.0

    @jax.jit
    def run(params, x, weights):
        y, vjp = jax.vjp(lambda x, weights: row.apply(params, x, weights=weights), x, weights)
        return y, *vjp(jnp.asarray(g))

    y, dx, dweights = map(np.asarray, run(params, x, weights))
    np.testing.assert_allclose(y, row.truth(params, x, weights=weights).y, rtol=1e-5, atol=1e-5)
    dx_true = row.gradients(params, x, g, weights=weights)[0]
    np.testing.assert_allclose(dx, dx_true, rtol=1e-4, atol=1e-5 * np.abs(dx_true).max())
    # Weights are differentiable: against differences of the float64 truth.
    direction = rng.normal(size=row.shape) * (weights > 0)
    loss = lambda t: np.vdot(row.truth(params, x, weights=weights + t * direction).y, g)
    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.vdot(dweights, direction), slope, rtol=2e-3, atol=1e-3)
    # An element of weight zero is absent, whatever it holds.
    holed = np.where(weights == 0, np.float32(np.nan), x)
    np.testing.assert_array_equal(np.asarray(run(params, holed, weights)[0])[weights > 0], y[weights > 0])


def test_integer_weights_are_repeats_and_combine_with_a_mask(rng):
    norm = jn.BatchNorm(unbiased_running_var=True, momentum=0.0)
    params, state = norm.init(3)
    x, repeats = draw(rng, (10, 3)), rng.integers(1, 4, 10)
    _, once = norm.apply(params, state, np.repeat(x, repeats, 0), train=True)
    _, weighed = norm.apply(params, state, x, train=True, weights=repeats.astype(np.float32)[:, None])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), once, weighed)
    mask = np.arange(10) < 7
    _, cut = norm.apply(params, state, x[:7], train=True, weights=repeats[:7].astype(np.float32)[:, None])
    weights = repeats.astype(np.float32)[:, None]
    _, masked = norm.apply(params, state, x, train=True, weights=weights, mask=mask[:, None])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cut, masked)


def test_merging_moments_of_an_empty_set_changes_nothing(rng):
    x = draw(rng, (5, 3), 7.0)
    empty = jn.moments(x, 0, mask=np.zeros((5, 1), bool))
    assert all(np.all(np.asarray(part) == 0) for part in empty)
    some = jn.moments(x, 0)
    jax.tree.map(np.testing.assert_array_equal, jn.merge(some, empty), some)


# --- padding and derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_weights_that_broadcast_have_a_finite_gradient_beside_poison(poison, rng):
    """Masked out, or of weight 0: the gradient of the weights is that without the poison, as if it were the mean."""
    x, g = draw(rng, (12, 3), 2.0), draw(rng, (12, 3))
    weights, mask = rng.uniform(0.5, 2.0, (12, 1)).astype("f"), np.ones((12, 3), bool)
    mask[2, 1], weights[5] = False, 0.0
    g[2, 1], g[5] = 0.0, 0.0
    bad = x.copy()
    bad[2, 1], bad[5] = poison, poison
    state = jn.BatchNorm().init(3)[1]

    def loss(w, x):
        y, _ = jn.batch_norm(x, None, state, train=True, mask=mask, weights=w)
        return jnp.vdot(y, g) + sum(jnp.sum(jnp.sin(a)) for a in jn.moments(x, 0, mask=mask, weights=w))

    got, dx = jax.grad(loss, (0, 1))(weights, bad)
    want, dx_want = jax.grad(loss, (0, 1))(weights, x)
    kept = np.arange(12) != 5  # of weight 0: its own gradient depends on what it would weigh
    np.testing.assert_allclose(got[kept], want[kept], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dx_want, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(got))
    # Against differences of float64, for the weights that are not 0.
    labels = np.indices(x.shape)[1]
    t = rng.normal(size=(12, 1)) * (weights > 0)

    def true(s):
        w = weights + s * t
        truth = oracle.normalize(x, labels, None, None, epsilon=1e-5, mask=mask, weights=w)
        n, mean, m2 = (a[0] for a in (truth.n, truth.mean, truth.var * truth.n))
        return np.vdot(truth.y, g) + sum(np.sum(np.sin(a)) for a in (n, mean, m2))

    np.testing.assert_allclose(np.vdot(got, t), (true(1e-5) - true(-1e-5)) / 2e-5, rtol=1e-4, atol=1e-4)


def test_the_count_of_broadcast_weights_has_a_tangent_of_its_shape(rng):
    x, w, dw = draw(rng, (4, 5, 3)), np.ones((4, 1, 1), "f"), draw(rng, (4, 1, 1))
    moments, tangent = jax.jvp(lambda w: jn.moments(x, 2, weights=w), (w,), (dw,))
    np.testing.assert_allclose(tangent.count, np.broadcast_to(3 * dw[:, :, 0], (4, 5)), rtol=1e-6)
    np.testing.assert_allclose(tangent.mean, np.zeros((4, 5)), atol=1e-6)  # all of a row's weights grow alike
    assert moments.count.shape == (4, 5)


@pytest.mark.parametrize("weighted", [False, True], ids=["mask", "weights"])
def test_an_infinity_spoils_its_channel_unless_it_is_masked_out(weighted, rng):
    """With an activation as without one, which could hide a NaN where an element is masked out."""
    x, mask = draw(rng, (8, 3)), rng.random((8, 3)) < 0.6
    mask[3], mask[0] = True, False
    given = dict(weights=1.5 * mask.astype("f")) if weighted else dict(mask=mask)
    apply = lambda x, f: jn.batch_norm(x, None, jn.BatchNorm().init(3)[1], train=True, activation=f, **given)
    clean = apply(x, "sigmoid")
    for activation in (None, "relu", "sigmoid"):
        spoiled, padded = x.copy(), x.copy()
        spoiled[3, 1], padded[0] = np.inf, np.inf
        y, state = apply(spoiled, activation)
        assert not np.isfinite(y[:, 1]).any()
        assert not np.isfinite(state.mean[1])
        assert np.isfinite(np.delete(y, 1, axis=1)).all()
        assert np.isfinite(apply(padded, activation)[0]).all()
    np.testing.assert_array_equal(apply(padded, "sigmoid")[0][1:], clean[0][1:])
    jax.tree.map(np.testing.assert_array_equal, apply(padded, "sigmoid")[1], clean[1])


@pytest.mark.parametrize("row", [*EACH, by_name["batch-ghost"]], ids=str)
def test_padding_gives_the_bias_so_that_a_masked_loss_stays_finite(row, rng):
    """A loss that multiplies by the mask last squares the padding's output first."""
    params, x = row.params(rng), draw(rng, row.shape)
    mask = rng.random(row.shape) < 0.7
    bad = np.where(mask, x, np.where(rng.random(row.shape) < 0.5, np.float32(np.inf), np.float32(np.nan)))
    y, vjp = jax.vjp(lambda p, x: row.apply(p, x, mask=mask), params, bad)
    bias = np.broadcast_to(0.0 if params.bias is None else np.reshape(params.bias, row.param), row.shape)
    np.testing.assert_array_equal(y[~mask], bias[~mask])
    assert np.isfinite((y**2 * mask.astype("f")).sum())
    dparams, dx = vjp(2 * y)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dparams))
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(dx[~mask], 0.0)  # the bias, whatever stands there


@pytest.mark.parametrize("train", [False, "traced"])
def test_poison_in_the_padding_reaches_no_gradient_at_inference(train, rng):
    norm = jn.BatchNorm(activation="gelu")
    (params, state), x, mask = norm.init(3), draw(rng, (9, 3)), np.arange(9)[:, None] < 6
    bad, g = np.where(mask, x, np.float32(np.inf)), np.where(mask, draw(rng, (9, 3)), np.float32(0))
    train = jnp.asarray(True) if train == "traced" else train
    pull = lambda x: jax.vjp(lambda p, x: norm.apply(p, state, x, train=train, mask=mask)[0], params, x)[1](g)
    for got, want in zip(jax.tree.leaves(pull(bad)), jax.tree.leaves(pull(x)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("poison", [np.nan, -np.inf])
def test_padding_of_weight_0_is_still_in_second_derivatives_in_every_mode(poison, rng):
    """Forward over reverse and reverse over reverse agree: x has no gradient there, though its weight moves."""
    x, w, v = draw(rng, (4, 8)), rng.uniform(0.5, 2.0, (4, 8)).astype("f"), draw(rng, (4, 8))
    x[1, 3], w[1, 3] = poison, 0.0
    slope = lambda w: jax.grad(lambda x: (jn.moments(x, 1, weights=w).mean ** 2).sum())(x)
    along_w = jax.jvp(slope, (w,), (v,))[1]
    assert along_w[1, 3] == 0
    still = np.where(w == 0, 0, v)
    backward = jax.grad(lambda w: jnp.vdot(slope(w), still))(w)
    np.testing.assert_allclose(jnp.vdot(along_w, still), jnp.vdot(backward, v), rtol=1e-4)
