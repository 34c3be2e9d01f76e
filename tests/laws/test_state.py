"""Law 4: the running statistics of batch norm, their options, and what leaves them as they were."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from catalogue import BATCH_NORMS, by_name, draw

import jaxnorm as jn

f32 = np.float32


def run(norm, batches, features=3, **call):
    params, state = norm.init(features)
    for x in batches:
        _, state = norm.apply(params, state, x, train=True, **call)
    return state


def close(a, b, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance}), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.versions
@pytest.mark.parametrize("row", BATCH_NORMS, ids=str)
def test_ten_updates_match_float64(row, rng):
    norm = dataclasses.replace(row.spec, momentum=0.9)
    params, state = row.params(rng), row.state()
    step = jax.jit(lambda state, x: norm.apply(params, state, x, train=True)[1])
    channel = row.param.index(max(row.param[1:]), 1)
    axes = tuple(a for a in range(len(row.shape)) if a != channel)
    mean, var = np.zeros(row.features), np.ones(row.features)
    for k in range(10):
        x = draw(rng, row.shape, k - 3.0)
        state = step(state, x)
        mean = 0.9 * mean + 0.1 * x.mean(axes, dtype=np.float64)
        var = 0.9 * var + 0.1 * x.var(axes, dtype=np.float64)  # of the whole batch, also where it is split into ghosts
    close(state, jn.RunningStats(mean, var, None))


@pytest.mark.parametrize("unbiased", [False, True])
def test_momentum_none_is_the_exact_statistic_of_all_data_seen(unbiased, rng):
    batches = [draw(rng, (n, 3), 10.0 * n) for n in (5, 1, 12, 7)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one batch has one element per channel: on purpose
        state = run(jn.BatchNorm(momentum=None, unbiased_running_var=unbiased), batches)
    together = np.concatenate(batches).astype(np.float64)
    close(state, jn.RunningStats(together.mean(0), together.var(0, ddof=int(unbiased)), np.full(3, 25.0)))


def test_zero_debias_forgets_where_it_started(rng):
    batches = [draw(rng, (16, 3), 5.0) for _ in range(4)]
    first = run(jn.BatchNorm(momentum=0.9, zero_debias=True), batches[:1])
    close(first[:2], (batches[0].mean(0, dtype=np.float64), batches[0].var(0, dtype=np.float64)))
    state = run(jn.BatchNorm(momentum=0.9, zero_debias=True), batches)
    weights = 0.9 ** np.arange(3, -1, -1)
    weights /= weights.sum()
    close(state.mean, sum(w * b.mean(0, dtype=np.float64) for w, b in zip(weights, batches, strict=True)))
    close(state.count, np.full(3, 4.0))


def test_zero_debias_by_a_momentum_that_float32_rounds_to_one(rng):
    batches = [draw(rng, (16, 3), 5.0) for _ in range(2)]
    state = run(jn.BatchNorm(momentum=1 - 1e-9, zero_debias=True), batches)
    close(state.mean, np.mean(batches, (0, 1), dtype=np.float64))


def test_unbiased_running_var_divides_by_one_less(rng):
    x = draw(rng, (8, 3))
    close(run(jn.BatchNorm(momentum=0.0, unbiased_running_var=True), [x]).var, x.var(0, ddof=1, dtype=np.float64))
    with pytest.warns(UserWarning, match="one element per channel"):
        one = run(jn.BatchNorm(momentum=0.0, unbiased_running_var=True), [x[:1]])
    close(one, jn.RunningStats(x[0], np.ones(3), None))  # one element has a mean, and no unbiased variance


def test_momentum_zero_replaces_and_one_keeps_the_statistics(rng):
    x = draw(rng, (8, 3), 2.0)
    close(run(jn.BatchNorm(momentum=0.0), [x])[:2], (x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)))
    close(run(jn.BatchNorm(momentum=1.0), [x])[:2], (np.zeros(3), np.ones(3)))


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"zero_debias": True}, {"virtual_batch_size": 4}], ids=str)
def test_an_update_without_valid_elements_keeps_the_state(options, rng):
    norm = jn.BatchNorm(**options)
    params, state = norm.init(3)
    _, state = norm.apply(params, state, draw(rng, (8, 3), 4.0), train=True)
    x = draw(rng, (8, 3), 9.0)
    for call in (
        {"mask": np.zeros((8, 1), bool)},
        {"weights": np.zeros((8, 3), f32)},
        {"update_stats": False},
    ):
        same(norm.apply(params, state, x, train=True, **call)[1], state)
    same(norm.apply(params, state, x[:0], train=True)[1], state)
    same(norm.apply(params, state, x, train=False)[1], state)
    # One channel masked out: it alone stays.
    new = norm.apply(params, state, x, train=True, mask=np.array([[True, False, True]]))[1]
    assert new.mean[1] == state.mean[1]
    assert new.var[1] == state.var[1]
    assert np.all(new.mean[::2] != state.mean[::2])


def test_frozen_never_updates_and_uses_the_running_statistics(rng):
    norm = jn.BatchNorm(frozen=True)
    params, _ = norm.init(3)
    state = jn.RunningStats(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 1.0, 9.0]))
    x = draw(rng, (8, 3))
    trained, after = norm.apply(params, state, x, train=True)
    same(after, state)
    same(trained, norm.apply(params, state, x, train=False)[0])
    np.testing.assert_allclose(trained, (x - [1, 2, 3]) / np.sqrt(np.array([4, 1, 9]) + 1e-5), rtol=1e-5, atol=1e-6)


def test_skip_nonfinite_keeps_a_channel_s_old_statistics(rng):
    x = draw(rng, (8, 3), 2.0)
    x[3, 1] = np.nan
    skipped = run(jn.BatchNorm(skip_nonfinite=True, momentum=0.5), [x])
    assert skipped.mean[1] == 0
    assert skipped.var[1] == 1
    assert np.all(np.isfinite(skipped.mean))
    close(skipped.mean[::2], 0.5 * x.mean(0, dtype=np.float64)[::2])
    assert np.isnan(run(jn.BatchNorm(momentum=0.5), [x]).mean[1])


def test_min_count_skips_the_update(rng):
    norm = jn.BatchNorm(min_count=5)
    params, state = norm.init(3)
    x, mask = draw(rng, (8, 3), 3.0), np.ones((8, 3), bool)
    mask[4:, 0], mask[5:, 1] = False, False  # 4, 5 and 8 elements
    new = norm.apply(params, state, x, train=True, mask=mask)[1]
    assert new.mean[0] == 0
    assert np.all(new.mean[1:] != 0)


def test_one_element_per_channel_in_training_warns(rng):
    norm = jn.BatchNorm()
    params, state = norm.init(3)
    for shape in ((1, 3), (1, 1, 1, 3)):
        with pytest.warns(UserWarning, match="batch_norm: x of shape .* one element per channel in training"):
            norm.apply(params, state, draw(rng, shape), train=True)
        norm.apply(params, state, draw(rng, shape), train=False)  # and at inference a batch of one is as any other
    with pytest.warns(UserWarning, match="instance_norm: .*one element per instance and channel"):
        jn.instance_norm(draw(rng, (2, 3)))
    with pytest.warns(UserWarning, match="group_norm: .*one element per group"):
        jn.group_norm(draw(rng, (2, 3)), num_groups=3)


@pytest.mark.parametrize("row", BATCH_NORMS, ids=str)
def test_a_traced_train_matches_a_static_one(row, rng):
    params, state, x, g = row.params(rng), row.state(), draw(rng, row.shape, 1.0), draw(rng, row.shape)
    state = state._replace(mean=state.mean + 0.5)

    def run(train, g):
        out, vjp = jax.vjp(lambda p, x: row.spec.apply(p, state, x, train=train), params, x)
        return out, vjp((g, jax.tree.map(jnp.zeros_like, state)))

    traced, told = jax.jit(run), jax.jit(run, static_argnums=0)
    for train in (True, False):
        (found, gradients), (want, true) = traced(train, g), told(train, g)
        close(found, want)
        close(gradients, true, atol=1e-4)


@pytest.mark.parametrize("row", BATCH_NORMS, ids=str)
def test_inference_uses_the_running_statistics(row, rng):
    params = row.params(rng)
    state = jn.RunningStats(*(jnp.asarray(rng.uniform(0.5, 2, row.features), f32) for _ in range(2)))
    x, g = draw(rng, row.shape), draw(rng, row.shape)
    run = jax.jit(lambda p, x: row.spec.apply(p, state, x, train=False)[0])
    y, vjp = jax.vjp(run, params, x)
    feature_rank = tuple(p if a else 1 for a, p in enumerate(row.param))
    mean, var = (np.reshape(np.float64(s), feature_rank) for s in state[:2])
    scale, bias = row.in_rank(params)
    r = 1 / np.sqrt(var + row.spec.epsilon)
    true = (x - mean) * r * (1.0 if scale is None else scale) + (0.0 if bias is None else bias)
    np.testing.assert_allclose(y, row.activated(true), rtol=1e-5, atol=2e-6)
    dx = vjp(jnp.asarray(g))[1]
    g = g * oracle.ACTIVATIONS[row.spec.activation][1](true)
    np.testing.assert_allclose(dx, g * r * (1.0 if scale is None else scale), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(params, x[:1]) if row.param[0] == 1 else y[:1], y[:1], rtol=1e-6, atol=1e-6)
    if row.param[0] == 1:
        folded = row.spec.as_affine(params, state)
        shape = tuple(p for p in row.param)
        np.testing.assert_allclose(
            x * np.reshape(folded.scale, shape) + np.reshape(folded.bias, shape), true, rtol=1e-4, atol=1e-5
        )


def test_no_gradient_flows_into_the_state(rng):
    norm = jn.BatchNorm()
    params, state = norm.init(3)
    x = draw(rng, (8, 3), 1.0)
    total = lambda x, state: sum(jnp.sum(a) for a in jax.tree.leaves(norm.apply(params, state, x, train=True)[1]))
    gradients = jax.grad(total, (0, 1))(x, state)  # neither of x nor of the state before
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


def test_apply_keeps_the_tree_shapes_and_dtypes_of_the_state(rng):
    for options in ({}, {"momentum": None}, {"zero_debias": True}):
        norm = jn.BatchNorm(**options)
        for dtype in (f32, jnp.bfloat16):
            params, state = norm.init(3)
            state = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), state)
            new = norm.apply(params, state, draw(rng, (8, 3), dtype=np.float16), train=True)[1]
            assert jax.tree.structure(new) == jax.tree.structure(state)
            assert [(a.shape, a.dtype) for a in jax.tree.leaves(new)] == [
                (a.shape, a.dtype) for a in jax.tree.leaves(state)
            ]


def test_ghost_batches_normalize_on_their_own(rng):
    row = by_name["batch-ghost-remainder"]
    x, params = draw(rng, row.shape, 2.0), row.params(rng)
    y = row.apply(params, x)
    whole = dataclasses.replace(row.spec, virtual_batch_size=None)
    for start in range(0, row.shape[0], 6):
        part = whole.apply(params, row.state(), x[start : start + 6], train=True)[0]
        np.testing.assert_allclose(y[start : start + 6], part, rtol=1e-5, atol=2e-6)


def test_the_state_goes_through_scan(rng):
    norm = jn.BatchNorm(momentum=0.9)
    params, state = norm.init(3)
    xs = draw(rng, (5, 8, 3), 1.0)
    last, _ = jax.lax.scan(lambda s, x: (norm.apply(params, s, x, train=True)[1], None), state, xs)
    close(last, run(norm, xs))


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999, 0.9999])
def test_running_statistics_have_no_bias(momentum, rng):
    """After many updates by one batch they are its statistics: the weights of old and new sum to 1."""
    batch = jn.moments(draw(rng, (64, 3), 100.0), 0)
    step = lambda state, _: (jn.update_state(state, batch, momentum=momentum), None)
    start = jn.RunningStats(batch.mean + 1e-2, batch.var * 1.01)
    steps = int(12 / (1 - momentum))
    state = jax.jit(lambda s: jax.lax.scan(step, s, None, steps)[0])(start)
    rounding = 1e-7 / (1 - momentum) + 1e-6  # smaller differences move nothing: half a unit in the last place stays
    close(state.mean, batch.mean, rtol=rounding)
    close(state.var, batch.var, rtol=rounding)


def test_the_running_mean_of_many_noisy_batches_matches_float64(rng):
    """Momentum 0.999, 10,000 steps of N(100, 1): within 1e-4 of the same recursion in float64."""
    means = draw(rng, (10_000, 1), 100.0)
    step = lambda state, m: (jn.update_state(state, jn.Moments(jnp.ones(1), m, jnp.zeros(1)), momentum=0.999), None)
    state = jax.jit(lambda m: jax.lax.scan(step, jn.RunningStats(jnp.zeros(1), jnp.ones(1)), m)[0])(means)
    truth = 0.0
    for m in means[:, 0].astype(np.float64):
        truth = 0.999 * truth + 0.001 * m
    assert abs(float(state.mean[0]) - truth) < 1e-4


@pytest.mark.parametrize("unbiased", [False, True])
def test_cumulative_statistics_keep_moving_when_float32_cannot_count(unbiased, rng):
    """From 2**24 batches of one size on the count stays. The statistics then move as an average of that many does."""
    full, size, steps = 2.0**28, 8.0, 1 << 20
    assert np.float32(full) + np.float32(size) == full
    state = jn.RunningStats(jnp.zeros(2), jnp.ones(2), jnp.full(2, full))
    batch = jn.Moments(jnp.full(2, size), jnp.array([0.0, 4.0]), jnp.full(2, size))
    step = lambda s, _: (jn.update_state(s, batch, momentum=None, unbiased_running_var=unbiased), None)
    new = jax.jit(lambda s: jax.lax.scan(step, s, None, steps)[0])(state)
    share = 1 - (1 - size / full) ** steps  # of the batches since
    close(new.mean, [0.0, 4.0 * share], rtol=3e-2)
    close(new.var[0], 1.0, rtol=1e-3)  # sums of squares over a count that stays would have grown it by 3 %
    close(new.var[1], 1.0 + 16.0 * share * (1 - share), rtol=3e-2)


@pytest.mark.parametrize("options", [{}, {"zero_debias": True}], ids=str)
def test_a_momentum_may_be_traced(options, rng):
    """A schedule computes it in the program. It does what the same number does as a float."""
    x = draw(rng, (16, 3), 2.0)
    seen, norm = jn.moments(x, 0), jn.BatchNorm(momentum=0.9, **options)
    state = norm.init(3)[1]
    given = lambda m: dataclasses.replace(norm, momentum=m)
    steps = lambda norm: (run(norm, [x, x + 1]), norm.update_state(state, seen))
    by_array = jax.jit(lambda m: steps(given(m)))
    close(by_array(0.9), jax.jit(lambda: steps(norm))())
    for m in (0.0, 1.0):
        close(by_array(m), steps(given(m)))
    close(given(jnp.asarray(0.9)).update_state(state, seen), norm.update_state(state, seen))
    with pytest.raises(ValueError, match="momentum is the weight of the old"):
        jn.batch_norm(x, None, state, train=True, momentum=jnp.asarray(1.5))
