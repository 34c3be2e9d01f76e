"""Law 4 over micro-batches and over devices: gathered in parts, the state is what all of it at once would have made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from helpers.devices import close, mesh_of, needs
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen as jnn

OPTIONS = [{}, {"momentum": None}, {"zero_debias": True}, {"unbiased_running_var": True}, {"virtual_batch_size": 3},
           {"min_count": 4}, {"skip_nonfinite": True}]  # fmt: skip


def gather(norm, params, xs, masks=None):
    """The outputs and the moments of all micro-batches, by scan."""
    masks = np.ones(xs.shape[:2], bool) if masks is None else masks

    def micro(seen, batch):
        y, seen = norm.apply(params, seen, batch[0], train=True, mask=batch[1])
        return seen, y

    return jax.lax.scan(micro, jn.Moments.empty(xs.shape[-1]), (xs, masks))


@functools.partial(jax.jit, static_argnums=0)
def in_both_ways(norm, params, state, together, x, m):
    """An update by four micro-batches, what they hold, their outputs; and each output, and the update, by `apply`."""
    seen, y = gather(norm, params, x, m)
    apply = lambda state, x, m: norm.apply(params, state, x, train=True, mask=m)
    alone = jnp.stack([apply(norm.init(3)[1], x[k], m[k])[0] for k in range(4)])
    return norm.update_state(state, seen), seen, y, alone, apply(together, x.reshape(24, 3), m.reshape(24))[1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_micro_batches_update_as_one_batch_does(options, rng):
    norm = jn.BatchNorm(**{"momentum": 0.9, **options})
    some = rng.random((2, 4, 6)) < np.array([0.0, 0.3, 0.7, 1.0])[:, None]
    for mask in (np.ones_like(some), some):
        params, state = norm.init(3)
        together = state
        for x, m in zip(draw(rng, (2, 4, 6, 3), 5.0), mask, strict=True):  # two updates of four micro-batches
            state, seen, y, alone, together = in_both_ways(norm, params, state, together, x, m)
            np.testing.assert_array_equal(seen.count, m.sum())
            close(y, alone)  # each still normalized by its own statistics
        close(state, together)


def test_a_long_chain_of_merges_loses_no_bits_of_a_mean_near_0(rng):
    """The mean of many takes in that of a few about itself: 80 times as exact as about the larger of the two."""
    x = rng.normal(size=(2000, 64, 4)).astype(np.float32)
    steps = jax.lax.scan(lambda seen, x: (jn.merge(seen, jn.moments(x, 0)), None), jn.Moments.empty(4), jnp.asarray(x))
    want = x.astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(np.asarray(steps[0].mean, np.float64), want.mean(0), rtol=0, atol=1e-8)
    np.testing.assert_allclose(steps[0].var, want.var(0), rtol=3e-5)


def test_moments_may_be_merged_across_devices(rng):
    norm = jn.BatchNorm(axis_name="data", momentum=0.5)
    (params, state), xs = norm.init(3), draw(rng, (4, 16, 3), 2.0)

    def run(xs):
        return norm.update_state(state, gather(norm, params, xs)[0])

    mapped = jax.shard_map(run, mesh=mesh_of("auto"), in_specs=P(None, "data"), out_specs=P())
    whole = jn.BatchNorm(momentum=0.5).apply(params, state, xs.reshape(-1, 3), train=True)[1]
    close(jax.jit(mapped)(xs), whole)


def test_nonfinite_and_frozen_statistics_are_not_accumulated(rng):
    norm = jn.BatchNorm(skip_nonfinite=True)
    params, state = norm.init(3)
    xs = draw(rng, (3, 8, 3), 1.0)
    xs[1, 2, 0] = np.nan
    seen, _ = gather(norm, params, xs)
    np.testing.assert_array_equal(seen.count, [16, 24, 24])
    assert np.all(np.isfinite(seen.mean))
    jax.tree.map(np.testing.assert_array_equal, norm.update_state(state, jn.Moments.empty(3)), state)
    jax.tree.map(np.testing.assert_array_equal, jn.BatchNorm(frozen=True).update_state(state, seen), state)
    with pytest.raises(TypeError, match=r"no running statistics in the Moments.*Write train=True.*update_state"):
        norm.apply(params, seen, xs[0], train=False)


def test_accumulated_moments_have_no_gradient(rng):
    norm = jn.BatchNorm()
    (params, state), x, g = norm.init(3), draw(rng, (8, 3), 1.0), draw(rng, (8, 3))
    run = lambda state: jax.vjp(lambda p, x: norm.apply(p, state, x, train=True)[0], params, x)[1](g)
    close(run(jn.Moments.empty(3)), run(state))
    total = lambda x: sum(map(jnp.sum, norm.apply(params, jn.Moments.empty(3), x, train=True)[1]))
    assert np.all(jax.grad(total)(x) == 0)


def test_optax_multisteps_updates_the_statistics_once_a_step(rng):
    """The example of the docs: one step of the optimizer, and one of the statistics, for every k micro-batches."""
    optax = pytest.importorskip("optax")
    norm, k = jn.BatchNorm(momentum=0.9), 4
    multi = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=k)
    params, state = norm.init(3)

    def loss(params, seen, x, t):
        y, seen = norm.apply(params, seen, x, train=True)
        return jnp.mean(jnp.square(y - t)), seen

    def step(carry, batch):
        params, opt, state, seen = carry
        grads, seen = jax.grad(loss, has_aux=True)(params, seen, *batch)
        updates, opt = multi.update(grads, opt, params)
        updated = norm.update_state(state, seen), jn.Moments.empty(3)
        done = multi.has_updated(opt)
        state, seen = jax.tree.map(lambda new, old: jnp.where(done, new, old), updated, (state, seen))
        return (optax.apply_updates(params, updates), opt, state, seen), state

    xs, ts = draw(rng, (3 * k, 8, 3), 4.0), draw(rng, (3 * k, 8, 3))
    carry = params, multi.init(params), state, jn.Moments.empty(3)
    with jax.numpy_dtype_promotion("standard"):  # which optax takes for granted
        (_, _, last, seen), states = jax.jit(lambda carry: jax.lax.scan(step, carry, (xs, ts)))(carry)
    want = state
    for big in xs.reshape(3, k * 8, 3):
        want = norm.apply(params, want, big, train=True)[1]
    close(last, want)
    np.testing.assert_array_equal(seen.count, 0)
    changed = np.any(np.diff(np.concatenate([state.mean[None], states.mean]), axis=0) != 0, axis=1)
    np.testing.assert_array_equal(changed, np.arange(1, 3 * k + 1) % k == 0)


def test_a_cumulative_flax_layer_accumulates(rng):
    """`momentum=None` and a count of zero; trees of `batch_stats` update as one."""
    xs, layer = draw(rng, (4, 8, 3), 3.0), jnn.BatchNorm(momentum=None, use_running_average=False)
    variables = layer.init(jax.random.key(0), xs[0])
    seen = variables["batch_stats"]
    for x in xs:
        seen = layer.apply({**variables, "batch_stats": seen}, x, mutable=["batch_stats"])[1]["batch_stats"]
    old = {"block": {"norm": dict(mean=jnp.zeros(3), var=jnp.ones(3))}}
    new = jn.update_state(old, {"block": {"norm": seen}}, momentum=0.9)
    want = jn.BatchNorm(momentum=0.9).apply(None, jn.BatchNorm().init(3)[1], xs.reshape(-1, 3), train=True)[1]
    close(new, {"block": {"norm": dict(mean=want.mean, var=want.var)}})


ERRORS = [
    (lambda s, m: jn.update_state(s, s), ValueError, r"moments have no count.*jaxnorm\.Moments\.empty"),
    (lambda s, m: jn.update_state(s, m, momentum=None), ValueError, r"need state\.count.*Write state\._replace"),
    (lambda s, m: jn.update_state(s, m, momentum=2.0), ValueError, "update_state: momentum is the weight"),
    (lambda s, m: jn.update_state([s, s], [m]), TypeError, r"trees hold \[2, 1\] running statistics"),
    (lambda s, m: jn.update_state({"kernel": np.ones(3)}, m), TypeError, "holds ndarray, which is no running"),
    (lambda s, m: jn.sync_state(s, "nowhere"), NameError, "sync_state: axis_name='nowhere' is not bound here"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[m[:40] for _, _, m in ERRORS])
def test_a_wrong_accumulation_is_explained(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call(jn.BatchNorm().init(3)[1], jn.Moments.empty(3))


# --- what devices gathered apart --------------------------------------------------------------------------------------


def on_devices(f, *args, where):
    """f on eight devices, each with its row of the arguments; the result is proved, or asserted, to be one."""
    if where == "shard_map":
        one = lambda *args: f(*jax.tree.map(lambda a: a[0], args))
        return jax.jit(jax.shard_map(one, mesh=mesh_of("auto"), in_specs=P("data"), out_specs=P()))(*args)
    needs(8 if where == "pmap" else 1)
    out = dict(pmap=jax.pmap, vmap=jax.vmap)[where](f, axis_name="data")(*args)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, np.broadcast_to(a[:1], a.shape)), out)
    return jax.tree.map(lambda a: a[0], out)


@pytest.mark.parametrize("where", ["shard_map", "pmap", "vmap"])
def test_merging_diverged_states_adds_the_variance_between_them(where, rng):
    mean, var = rng.normal(size=(8, 3)).astype("f") * 5, rng.uniform(0.5, 2, (8, 3)).astype("f")
    got = on_devices(lambda s: jn.sync_state(s, "data"), jn.RunningStats(mean, var), where=where)
    close(got, jn.RunningStats(mean.mean(0), var.mean(0) + mean.var(0)))
    tree = {"a": dict(mean=mean, var=var), "b": [jn.RunningStats(mean + 1, var), ()]}
    got = on_devices(lambda s: jn.sync_state(s, "data"), tree, where=where)
    close(got["a"], dict(mean=mean.mean(0), var=var.mean(0) + mean.var(0)))
    close(got["b"][0].mean, mean.mean(0) + 1)
    assert got["b"][1] == ()


@pytest.mark.parametrize("where", ["shard_map", "pmap", "vmap"])
def test_cumulative_statistics_stay_exact_however_often_they_are_merged(where, rng):
    """Uneven masks, and one device that sees nothing: after every merge, the statistics of all elements so far."""
    norm = jn.BatchNorm(momentum=None)
    params, start = norm.init(3)
    xs, masks = draw(rng, (8, 4, 6, 3), 10.0), rng.random((8, 4, 6)) < np.arange(8)[:, None, None] / 7
    xs += 3 * np.arange(8, dtype=np.float32)[:, None, None, None]

    def run(xs, masks):
        state, states = start, []
        for k in range(4):
            state = norm.apply(params, state, xs[k], train=True, mask=masks[k])[1]
            if k % 2:
                state = jn.sync_state(jn.sync_state(state, "data"), "data")  # twice is once
                states.append(state)
        return states

    for n, state in zip((2, 4), on_devices(run, xs, masks, where=where), strict=True):
        seen = xs[:, :n][masks[:, :n]].astype(np.float64)
        close(state, jn.RunningStats(seen.mean(0), seen.var(0), np.full(3, len(seen) / 8)), rtol=1e-4)


def test_merging_states_without_data_keeps_the_initial_ones():
    norm = jn.BatchNorm(momentum=None)
    state = norm.init(3)[1]
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 8), state)
    close(on_devices(lambda s: jn.sync_state(s, "data"), stacked, where="shard_map"), state, atol=0)


def test_nnx_states_merge_too(rng):
    nnx = pytest.importorskip("flax.nnx")
    import jaxnorm.nnx as jnnx

    stats = nnx.state(jnnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat)
    mean = rng.normal(size=(8, 3)).astype("f")
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 8) * 0 + mean, stats)
    merged = jax.vmap(lambda s: jn.sync_state(s, "d"), axis_name="d", out_axes=None)(stacked)
    assert jax.tree.structure(merged) == jax.tree.structure(stats)
    close(merged["mean"][...], mean.mean(0))
    close(merged["var"][...], mean.mean(0) + mean.var(0))
