"""Inputs, observations, rewards and targets: against float64 NumPy, gymnasium's wrappers, and formulas of others."""

import dataclasses
import functools
import itertools
import re

import gymnasium
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward
from helpers.devices import check_all_reduces, collectives, mesh_of
from helpers.jit import jit_unoptimized
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import inputs
from jaxnorm.inputs import PercentileNorm, PopArt, ReturnNorm, RunningNorm, SeenStats, StandardizeInputs

d = lambda a: np.asarray(a).astype("d")
close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)


def check_stats(state, x, axis=0, rtol=3e-7):
    """The pair is the mean and the deviation of x in float64; x is a masked array where elements are masked out."""
    np.testing.assert_array_equal(d(state.count) + d(state.count_low), np.ma.count(x, axis))
    np.testing.assert_allclose(
        d(state.mean) + d(state.mean_low), x.mean(axis), rtol=1e-13, atol=3e-7 * x.std(axis).max()
    )
    np.testing.assert_allclose(d(state.std), x.std(axis), rtol=rtol, atol=1e-30)


# --- statistics of a data set -----------------------------------------------------------------------------------------


@functools.partial(jit_unoptimized, static_argnums=0)
def there_and_back(norm, state, x):
    y, _ = norm.apply((), state, x)
    return y, norm.inverse(state, y)


def tree_of_data(rng):
    """100 examples with large means, tiny and huge units, a constant, and integers; and which of them count."""
    table = rng.normal(size=(100, 4)) * [1.0, 1e-18, 1e20, 0.0] + [1e5, 0.0, 0.0, 7.0]
    data = {"table": table.astype("f"), "image": rng.integers(0, 256, (100, 3, 2, 2), np.uint8)}
    return data, rng.random(100) < 0.7


def test_statistics_are_those_of_all_data_at_once_for_any_split_masked_and_after_a_kill(rng, tmp_path):
    data, keep = tree_of_data(rng)
    poisoned = {**data, "table": np.where(keep[:, None], data["table"], np.nan)}
    cut = lambda tree, i, j: jax.tree.map(lambda a: a[i:j], tree)
    batches = [inputs.Masked(cut(poisoned, i, i + 25), keep[i : i + 25]) for i in range(0, 100, 25)]
    norm = StandardizeInputs()
    _, nothing = norm.init({"table": 4, "image": (3, 1, 1)})  # of channels first
    file, seen = tmp_path / "fit.npz", []

    def killed():
        for batch in batches[:3]:
            seen.append(batch)
            yield batch
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        norm.fit(killed(), nothing, checkpoint=file, every=2)
    state = norm.fit(batches, nothing, checkpoint=file, every=2)
    check_stats(state["table"], d(data["table"])[keep])
    of_channels = jax.tree.map(lambda a: a[:, 0, 0], state["image"])
    check_stats(of_channels, np.moveaxis(d(data["image"])[keep], 1, -1).reshape(-1, 3))
    same(norm.fit(iter(batches), nothing, checkpoint=file), state)  # all was seen
    inputs.save(tmp_path / "state.npz", state)
    same(inputs.load(tmp_path / "state.npz", nothing), state)

    y, back = there_and_back(norm, state, data)
    table, use = d(data["table"]), d(data["table"])[keep]
    spread = np.maximum(use.std(0), 1e-7)
    np.testing.assert_allclose(d(y["table"]), (table - use.mean(0)) / spread, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_less(abs(d(back["table"]) - table), 1e-6 * (abs(table) + spread))
    np.testing.assert_allclose(d(back["image"]), d(data["image"]), atol=1e-4)


def test_millions_of_updates_lose_nothing(rng):
    """One observation at a time, about a mean of 1e5, and again where a float32 count grows no more."""
    x = (rng.normal(size=(30_000, 1, 2)) + 1e5).astype("f")
    norm = RunningNorm(axis_name=None)
    run = jax.jit(lambda s, x: jax.lax.scan(lambda s, x: (norm.update(s, x), None), s, x)[0])
    seen = run(norm.init(2)[1], x)
    check_stats(seen, d(x)[:, 0])
    check_stats(jit_unoptimized(SeenStats.merge)(seen, seen), np.tile(d(x)[:, 0], (2, 1)))
    n, mean, var = 2.0**28, 1e5 + 0.25, 4.0
    state = run(SeenStats.of(np.full(2, mean), np.full(2, 2.0), n), x)
    k, m, v = len(x), d(x)[:, 0].mean(0), d(x)[:, 0].var(0)
    np.testing.assert_array_equal(d(state.count) + d(state.count_low), n + k)
    moved = k / (n + k) * (m - mean)
    np.testing.assert_allclose(d(state.mean) - mean + d(state.mean_low), moved, rtol=1e-4)
    expected = (n * var + k * v + k * n / (n + k) * (m - mean) ** 2) / (n + k)
    np.testing.assert_allclose((d(state.std) + d(state.std_low)) ** 2 - var, expected - var, rtol=1e-4)


@functools.partial(jit_unoptimized, static_argnums=0)
def update_all(norm, state, x, mask):
    return norm.update(state, x, mask=mask)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
    cuts=st.lists(st.integers(0, 24), max_size=3),
    power=st.integers(-20, 20),
    mean=st.floats(-1e3, 1e3),
    seed=st.integers(0, 99),
)
def test_the_inverse_of_any_split_brings_everything_back(cuts, power, mean, seed):
    x = ((np.random.default_rng(seed).normal(size=(24, 3)) + mean) * 10.0**power).astype("f")
    norm, state = StandardizeInputs(epsilon=0.0), StandardizeInputs().init(3)[1]
    edges = sorted({0, 24, *cuts})
    place = np.arange(24)[:, None]
    for i, j in itertools.pairwise(edges):  # by masks, so that one program serves all splits
        state = update_all(norm, state, x, (place >= i) & (place < j))
    check_stats(state, d(x), rtol=1e-6)
    y, back = there_and_back(norm, state, x)
    np.testing.assert_allclose(y, (d(x) - d(x).mean(0)) / d(x).std(0), rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(back, x, rtol=1e-6, atol=1e-6 * float(np.abs(x).max()))


def test_devices_update_together_with_one_all_reduce(rng):
    """A tree of two arrays over eight devices with uneven masks, one device without an element; by jit as well."""
    mesh = mesh_of("auto")
    x = {"a": (rng.normal(size=(32, 3)) + 1e4).astype("f"), "b": rng.normal(size=(32,)).astype("f")}
    keep = (np.arange(32) % 4 < np.arange(32) // 4) & (np.arange(32) >= 4)
    norm = RunningNorm(axis_name="data")
    start = norm.init({"a": 3, "b": ()})[1]
    apply = lambda s, x, m: norm.apply((), s, x, train=True, mask=m)
    over = P("data")
    sharded = jit_unoptimized(jax.shard_map(apply, mesh=mesh, in_specs=(P(), over, over), out_specs=(over, P())))
    y, state = sharded(start, x, keep)
    check_all_reduces(collectives(sharded, start, x, keep), 1)
    check_stats(state["a"], d(x["a"])[keep])
    check_stats(state["b"], d(x["b"])[keep])
    for kind in ("auto", "explicit"):
        put = lambda a, kind=kind: jax.device_put(a, NamedSharding(mesh_of(kind), over))
        by_jit = jit_unoptimized(lambda s, x, m: RunningNorm().apply((), s, x, train=True, mask=m))
        other, of_jit = by_jit(start, jax.tree.map(put, x), put(keep))
        check_stats(of_jit["a"], d(x["a"])[keep])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other, y)
    with pytest.raises(NameError, match=r"running_norm.*axis_name=.data. is not bound.*write"):
        norm.apply((), start, x, train=True)


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_are_those_of_tensorflow_in_value_and_gradient(rng):
    x = rng.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    x[1] = 9
    x = (x / np.array([1, 1, 1e4]).reshape(3, 1, 1, 1)).astype("f")  # the last below the floor
    flat, g = d(x).reshape(3, -1), rng.normal(size=x.shape).astype("f")
    formula = lambda f: (f - f.mean(1, keepdims=True)) / np.maximum(f.std(1, keepdims=True), 60**-0.5)

    @jit_unoptimized
    def run(x, g):
        y, back = jax.vjp(inputs.standardize_images, x)
        return y, *back(g), inputs.standardize_images(x.transpose(0, 3, 1, 2), axis=(-2, -1))

    y, grad, each = run(x, g)
    close(y.reshape(3, -1), formula(flat))
    step = 1e-5 * rng.normal(size=flat.shape)
    slope = ((formula(flat + step) - formula(flat - step)) / 2 * g.reshape(3, -1)).sum(1)
    np.testing.assert_allclose((d(grad).reshape(3, -1) * step).sum(1), slope, rtol=1e-3, atol=1e-9)
    close(d(each[0]).std((1, 2)), np.ones(3))


# --- observations and rewards -----------------------------------------------------------------------------------------


class Walks(VectorEnv):
    """Random walks with a large offset, which end and are truncated at random; reset by the step after."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs=3):
        self.num_envs = num_envs
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        self.rng, self.over = np.random.default_rng(seed), np.zeros(self.num_envs, bool)
        self.at = 3 + self.rng.normal(size=(self.num_envs, 2)).astype("f")
        return self.at.copy(), {}

    def step(self, actions):
        fresh = self.over
        self.at = np.where(fresh[:, None], 3, self.at + self.rng.normal(size=self.at.shape)).astype("f")
        reward = np.where(fresh, 0.0, self.at[:, 0] + self.rng.normal(size=self.num_envs))
        ended, cut = (self.rng.random((2, self.num_envs)) < [[0.1], [0.05]]) & ~fresh
        self.over = ended | cut
        return self.at.copy(), reward, ended, cut, {}


def test_a_vector_environment_of_gymnasium_beside_its_own_wrappers():
    actions, nothing = np.zeros(3, int), np.zeros(3, "f")
    plain, wrapped = Walks(), NormalizeReward(NormalizeObservation(Walks()))
    obs_norm, reward_norm = RunningNorm.like("gymnasium"), ReturnNorm.like("gymnasium")

    @jit_unoptimized
    def run(states, x, r, ended, mask, train):
        y, first = obs_norm.apply((), states[0], x, train=train)
        z, second = reward_norm.apply((), states[1], r, done=ended, train=train, mask=mask)
        return (y, z), (first, second)

    x, theirs = plain.reset(seed=5)[0], wrapped.reset(seed=5)[0]
    states = obs_norm.init(2)[1], reward_norm.init(3)[1]
    (y, _), states = run(states, x, nothing, nothing, nothing > 0, True)  # a reset has no reward
    np.testing.assert_allclose(y, theirs, rtol=1e-4, atol=1e-4)  # their means are float32
    over = nothing > 0
    for step in range(60):
        train = wrapped.env.update_running_mean = wrapped.update_running_mean = step < 50  # then comes an evaluation
        (x, r, ended, cut, _), (theirs, reward, *_) = plain.step(actions), wrapped.step(actions)
        (y, z), states = run(states, x, r.astype("f"), ended, ~over, train)
        np.testing.assert_allclose(y, theirs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(z, reward, rtol=1e-5, atol=1e-6)
        over = ended | cut


def merged(stats, x):
    """Stable-baselines3's RunningMeanStd.update_from_moments, in float64."""
    mean, var, n = stats
    m, v, k = x.mean(0), x.var(0), len(x)
    delta, total = m - mean, n + k
    return mean + delta * k / total, (var * n + v * k + delta**2 * n * k / total) / total, total


@pytest.mark.parametrize("like", ["sb3", "rsl_rl"])
def test_a_rollout_under_scan_has_the_numbers_of_other_libraries(like, rng):
    obs, rewards = (rng.normal(size=(40, 5, 2)) * 3 + 7).astype("f"), rng.normal(size=(40, 5)).astype("f")
    done = rng.random((40, 5)) < 0.2
    obs_norm, reward_norm = RunningNorm.like(like, until=150), ReturnNorm.like(like)

    def step(states, xs):
        o, r, done = xs
        y, first = obs_norm.apply((), states[0], o, train=True)
        z, second = reward_norm.apply((), states[1], r, done=done, train=True)
        return (first, second), (y, z)

    start = obs_norm.init(2)[1], reward_norm.init(5)[1]
    run = jit_unoptimized(lambda start, xs: jax.lax.scan(step, start, xs))
    (state, _), (y, z) = run(start, (obs, rewards, done))
    count = 1e-4 if like == "sb3" else 0
    seen, ret, R = (np.zeros(2), np.ones(2), count), (0.0, 1.0, count), np.zeros(5)
    for o, r, end, ours, reward in zip(d(obs), d(rewards), done, d(y), d(z), strict=True):
        seen = merged(seen, o) if seen[2] < 150 else seen
        R = R * 0.99 + r
        ret = merged(ret, R)
        if like == "sb3":
            close(ours, np.clip((o - seen[0]) / np.sqrt(seen[1] + 1e-8), -10, 10), rtol=1e-5)
            close(reward, np.clip(r / np.sqrt(ret[1] + 1e-8), -10, 10), rtol=1e-5)
            R[end] = 0
        else:
            close(ours, (o - seen[0]) / (np.sqrt(seen[1]) + 1e-2), rtol=1e-5)
            close(reward, r / np.sqrt(ret[1]), rtol=1e-5)
    assert int(state.count[0]) == 150, "until"
    close(reward_norm.inverse(run(start, (obs, rewards, done))[0][1], z[-1]), rewards[-1], rtol=1e-5)


def test_frozen_traced_and_empty_updates_and_moving_averages(rng):
    x = (rng.normal(size=(6, 4, 2)) + 5).astype("f")
    norm = RunningNorm(momentum=0.5, skip_nonfinite=True)
    apply = jit_unoptimized(lambda s, x, train, mask: norm.apply((), s, x, train=train, mask=mask))
    state, every = norm.init(2)[1], np.ones(4, bool)
    w, mean, square = 0.0, 0.0, 0.0
    for b in x:
        y, new = apply(state, b, True, every)
        frozen, old = apply(new, b, False, every)
        same(old, new)
        same(frozen, y)
        state = new
        p = 1.0 if w == 0 else 0.5  # the second batch weighs a half as one of two, as well
        mean, square, w = mean + p * (d(b).mean(0) - mean), square + p * ((d(b) ** 2).mean(0) - square), 1.0
    close(state.mean, mean)
    close(state.std, np.sqrt(square - mean**2), rtol=1e-5)
    same(apply(state, x[0], True, ~every)[1], state)
    bad = x[0].copy()
    bad[1, 0] = np.nan
    _, new = apply(state, bad, True, every)
    assert new.count[0] == state.count[0]
    assert new.count[1] == state.count[1] + 4
    as_dict = {"obs": state._asdict()}  # as a checkpoint restored without a template has it
    _, new = jit_unoptimized(lambda s, x: norm.apply((), s, x, train=True))(as_dict, {"obs": x[0]})
    assert type(new["obs"]) is dict
    close(new["obs"]["mean"], apply(state, x[0], True, every)[1].mean)


def test_gradients_are_those_of_given_statistics_and_agents_are_mapped(rng):
    x = (rng.normal(size=(3, 16, 2)) * 2).astype("f")
    norm = RunningNorm(limit=1.0, epsilon=0.0)
    grad_of = jax.grad(lambda x: norm.apply((), norm.init(2)[1], x, train=True)[0].sum())
    grad = jit_unoptimized(jax.vmap(grad_of))(x)
    both = d(x)
    z = (both - both.mean(1, keepdims=True)) / both.std(1, keepdims=True)
    np.testing.assert_allclose(grad, np.where(abs(z) < 1, 1 / both.std(1, keepdims=True), 0), rtol=1e-5)


# --- percentiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("like", ["dreamerv3", "dreamerv3_debiased"])
def test_percentiles_are_those_of_dreamerv3_masked_and_over_devices(like, rng):
    returns, keep = (rng.normal(size=(3, 32, 5)) * 40).astype("f"), rng.random((3, 32, 5)) < 0.6
    keep[:, :4] = False  # nothing on the first device
    norm, over = PercentileNorm.like(like, axis_name="data" if like == "dreamerv3" else None), P("data")
    run = lambda s, r, m: norm.apply((), s, 2 * r, returns=r, train=True, mask=m)
    mapped = jax.shard_map(run, mesh=mesh_of("auto"), in_specs=(P(), over, over), out_specs=(over, P()))
    run = jit_unoptimized(mapped if norm.axis_name else run)
    state, low, high, corr = norm.init()[1], 0.0, 0.0, 0.0
    for r, k in zip(returns, keep, strict=True):
        _, state = run(state, np.where(k, r, np.nan), k)
        a, b = np.percentile(d(r[k]), [5, 95])
        low, high, corr = 0.99 * low + 0.01 * a, 0.99 * high + 0.01 * b, 0.99 * corr + 0.01
        start = 1.0 if like == "dreamerv3" else corr
        close([state.low, state.high], np.array([low, high]) / start, rtol=1e-5)
        close(norm.scale(state), max(norm.floor, (high - low) / start), rtol=1e-5)
    y, empty = run(state, returns[0], np.zeros((32, 5), bool))
    same(empty, state)
    close(y, 2 * d(returns[0]) / max(norm.floor, (high - low) / start), rtol=1e-5)


def test_percentiles_without_a_mask_are_numpys_and_constants(rng):
    returns, norm = rng.normal(size=(32, 5)).astype("f"), PercentileNorm(momentum=0.0, floor=1e-3)
    loss = lambda x: (norm.apply((), norm.init()[1], x, train=True)[0].sum(), norm.update(norm.init()[1], x))
    sharded = jax.device_put(returns, NamedSharding(mesh_of("explicit"), P("data")))
    grad, state = jit_unoptimized(jax.grad(loss, has_aux=True))(sharded)
    expected = np.percentile(d(returns), [5, 95])
    close([state.low, state.high], expected, rtol=1e-5)
    close(grad, np.full((32, 5), 1 / np.diff(expected)), rtol=1e-5)


# --- PopArt -----------------------------------------------------------------------------------------------------------


def rlax_art(state, x, ids, step, mean_of_samples):
    """The statistics of rlax's `art`, in float64."""
    mean, square = (s.copy() for s in state)
    for k in range(len(mean)):
        mine = x[ids == k]
        n = (len(mine) > 0) if mean_of_samples else len(mine)
        if len(mine):
            mean[k] += step * n * (mine.mean() - state[0][k])
            square[k] += step * n * ((mine**2).mean() - state[1][k])
    return mean, square


@pytest.mark.parametrize("accumulate", ["mean", "sum"])
def test_pop_art_keeps_the_outputs_and_has_the_statistics_of_rlax(accumulate, rng):
    """Four tasks, one without a target, and one far away; the mean over devices, with one all-reduce."""
    alone, over = PopArt(momentum=0.97, accumulate=accumulate), P("data")
    layer = {"kernel": rng.normal(size=(6, 4)).astype("f"), "bias": rng.normal(size=4).astype("f"), "more": np.ones(1)}
    h, update = rng.normal(size=(9, 6)), jit_unoptimized(alone.update)
    if accumulate == "mean":
        norm = dataclasses.replace(alone, axis_name="data")
        specs: dict = dict(mesh=mesh_of("auto"), in_specs=(P(), P(), over, over), out_specs=P())
        update = jit_unoptimized(jax.shard_map(norm.update, **specs))
    outputs = lambda layer, s: (h @ d(layer["kernel"]) + d(layer["bias"])) * d(s.std) + d(s.mean) + d(s.mean_low)
    state, expected = alone.init(4)[1], (np.zeros(4), np.ones(4))
    for step in range(4):
        ids = rng.integers(0, 3, 16)
        x = (rng.normal(size=16) * [1, 30, 0.1][step % 3] + np.array([0, 1e3, -5])[ids]).astype("f")
        before = outputs(layer, state)
        layer, state = update(layer, state, x, ids)
        np.testing.assert_allclose(outputs(layer, state), before, rtol=1e-6, atol=2e-4)  # 2e-7 of a mean of 1e3
        expected = rlax_art(expected, d(x), ids, 0.03, accumulate == "mean")
        close(state.mean, expected[0], rtol=1e-5)
        close(state.std, np.sqrt(expected[1] - expected[0] ** 2), rtol=1e-5)
    assert state.count[3] == 0
    assert layer["more"] == 1
    if accumulate == "sum":
        return
    check_all_reduces(collectives(update, layer, state, x, ids), 1)

    @jit_unoptimized
    def use(layer, state):
        (y, kept), frozen = alone.apply(layer, state, x, ids, train=False)
        return y, kept, frozen, alone.inverse(state, y, ids), alone.update(layer, state, x, ids, mask=ids != 1)[1]

    y, kept, frozen, back, masked = use(layer, state)
    same((kept, frozen), (layer, state))
    close(y, (d(x) - expected[0][ids]) / np.sqrt(expected[1] - expected[0] ** 2)[ids], rtol=1e-4, atol=1e-4)
    close(back, x, rtol=1e-6, atol=1e-5)
    same(jax.tree.map(lambda a: a[1], masked), jax.tree.map(lambda a: a[1], state))


# --- symlog -----------------------------------------------------------------------------------------------------------


def test_symlog_and_symexp_are_inverse_with_a_derivative_at_zero(rng):
    x = np.concatenate([rng.normal(size=50) * 10.0 ** rng.integers(-20, 20, 50), [0.0, -0.0]]).astype("f")

    @jit_unoptimized
    def run(x):
        each = lambda f: jax.vmap(f)(x)
        y, slope = inputs.symlog(x), jax.grad(inputs.symlog)
        return y, inputs.symexp(y), each(slope), each(jax.grad(slope)), each(jax.grad(inputs.symexp))

    y, back, slope, curve, grow = run(x)
    close(y, np.sign(d(x)) * np.log1p(abs(d(x))), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(back, x, rtol=2e-5, atol=1e-30)
    close(slope, 1 / (1 + abs(d(x))), atol=1e-30)
    close(curve[:-2], -np.sign(d(x[:-2])) / (1 + abs(d(x[:-2]))) ** 2, rtol=1e-5, atol=1e-30)
    small = abs(x) < 1
    close(grow[small], np.exp(abs(d(x[small]))))
    assert np.isfinite(grow).all()
    assert jax.eval_shape(inputs.symlog, jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


# --- errors -----------------------------------------------------------------------------------------------------------

STATE = SeenStats.empty(3)
LAYER = {"kernel": np.ones((2, 2), "f"), "bias": np.ones(2, "f")}
X = np.ones((4, 3), "f")
ERRORS = {
    "width": (lambda: inputs.running_norm(X[:, :2], STATE, train=True), r"running_norm: x of shape \(4, 2\).*\(3,\).*Write"),
    "tree": (lambda: RunningNorm().apply((), {"a": STATE}, X, train=True), r"running_norm: x must be a tree like.*Write"),
    "leaf": (lambda: RunningNorm().apply((), {"a": STATE}, {"a": X.T}, train=True), r"at \['a'\]: x of shape.*Write"),
    "state": (lambda: inputs.standardize_inputs(X, (1.0, 2.0)), r"standardize_inputs: state must be statistics.*Write"),
    "swapped": (lambda: StandardizeInputs().apply(STATE, (), X), r"StandardizeInputs.apply: it has no parameters.*Write"),
    "train": (lambda: RunningNorm().apply((), STATE, X), r"running_norm: train must be a bool, got None.*Write"),
    "complex": (lambda: inputs.running_norm(X + 1j, STATE, train=True), r"running_norm: x must be real.*Write"),
    "mask": (lambda: RunningNorm().update({"a": STATE}, {"a": X}, mask=np.ones((4, 3), bool)), r"batch axes, \(4,\).*Write"),
    "features": (lambda: RunningNorm().init({"a": -1}), r"RunningNorm.init: needs the shape.*-1.*Write"),
    "epsilon": (lambda: RunningNorm(epsilon=-1.0), r"RunningNorm: epsilon must be a number >= 0.*Write"),
    "mode": (lambda: StandardizeInputs(epsilon_mode="plus"), r"StandardizeInputs: epsilon_mode.*plus.*Write"),
    "limit": (lambda: RunningNorm(limit=0), r"RunningNorm: limit=0.*Write"),
    "like": (lambda: RunningNorm.like("keras"), r'RunningNorm.like: must be one of "sb3".*keras'),
    "keyword": (lambda: inputs.running_norm(X, STATE, train=True, eps=1.0), r"running_norm: .*Write epsilon"),
    "batches": (lambda: StandardizeInputs().fit(X), r"StandardizeInputs.fit: batches must be an iterable.*Write"),
    "no batch": (lambda: StandardizeInputs().fit([]), r"StandardizeInputs.fit: there are no batches"),
    "file": (lambda: inputs.save("stats", STATE), r"save: the name of the file.*Write"),
    "done": (lambda: inputs.return_norm(X[0], ReturnNorm().init(3)[1], train=True), r"return_norm: done is missing.*Write"),
    "rewards": (lambda: inputs.return_norm(X, ReturnNorm().init(3)[1], train=False), r"return_norm: rewards.*\(3,\).*Write"),
    "gamma": (lambda: ReturnNorm(gamma=1.5), r"ReturnNorm: gamma must be.*1.5.*Write"),
    "reset": (lambda: ReturnNorm(reset="never"), r"ReturnNorm: reset must be.*never.*Write"),
    "percentiles": (lambda: PercentileNorm(percentiles=(95, 5)), r"PercentileNorm: percentiles must rise.*Write"),
    "floor": (lambda: PercentileNorm(floor=0), r"PercentileNorm: floor=0.*Write"),
    "percentile state": (lambda: inputs.percentile_norm(X, STATE, train=True), r"percentile_norm: state must be.*Write"),
    "layer": (lambda: inputs.pop_art_update(X, SeenStats.empty(1), X), r"pop_art_update: params must be the last layer.*Write"),
    "columns": (lambda: inputs.pop_art_update(LAYER, SeenStats.empty(1), X), r"a column for each task; got \(2, 2\).*Write"),
    "no index": (lambda: inputs.pop_art(X, STATE), r"pop_art: the state has 3 tasks.*Write"),
    "index": (lambda: inputs.pop_art(X[0], STATE, np.arange(1, 4)), r"pop_art: indices must be from 0 to 2, got 1 to 3.*Write"),
    "index dtype": (lambda: inputs.pop_art(X[0], STATE, X[0]), r"pop_art: indices must be integers.*Write"),
    "image": (lambda: inputs.standardize_images(X), r"standardize_images: x must have rank 3.*Write"),
    "symlog": (lambda: inputs.symlog(X + 1j), r"symlog: x must be real.*Write"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_norm_and_the_line_to_write(case):
    call, message = ERRORS[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert re.search(message, str(caught.value), re.S), caught.value


def test_a_file_of_something_else_is_refused_and_stays(tmp_path):
    norm, file = StandardizeInputs(), tmp_path / "fit.npz"
    state = norm.fit([X, X], checkpoint=file)
    written = file.read_bytes()
    for call in (
        lambda: norm.fit([X[:, :2]], checkpoint=file),
        lambda: norm.fit([X], checkpoint=file),
        lambda: norm.fit([X, X, X[:, :2]], checkpoint=file),
        lambda: inputs.load(file, STATE),
    ):
        with pytest.raises(ValueError, match=r"fit|load|update"):
            call()
        assert file.read_bytes() == written
    inputs.save(file, state)
    with pytest.raises(ValueError, match=r"is no checkpoint of fit"):
        norm.fit([X], checkpoint=file)
    with pytest.raises(ValueError, match=r"holds mean of shape \(3,\)|holds count of shape"):
        inputs.load(file, SeenStats.empty(4))
