"""Batch renorm, domain batch norm, RepBN and other spreads: against references, and what they are equal to."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from flax import nnx
from helpers.jit import jit_unoptimized
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnx


def close(a, b, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 2e-6, **tolerance}), a, b)


def affine(rng, *shape):
    return jn.Affine(*(jnp.asarray(draw(rng, shape, 1.0)) for _ in range(2)))


# --- batch renorm -----------------------------------------------------------------------------------------------------

# keras 3.15.1 on jax, which keeps this as a committed value and not as a dependency:
#   k = keras.layers.BatchNormalization(momentum=0.9, renorm=True, renorm_momentum=0.9,
#       renorm_clipping=dict(rmin=1/1.5, rmax=1.5, dmax=0.5)); k.build((None, 4))
#   x = np.arange(24, dtype="f").reshape(6, 4) ** 1.5 / 10
#   for t in range(3): y = k(x + t, training=True)
#   y[:2], k.moving_mean, k.moving_variance
OF_KERAS = (
    [[-1.2965948581695557, -1.3556499481201172, -1.395577311515808, -1.4260131120681763],
     [-0.9144073724746704, -0.8955998420715332, -0.8844937086105347, -0.8765761852264404]],
    [1.3091378211975098, 1.4299136400222778, 1.55958092212677, 1.6965680122375488],
    [2.495056390762329, 2.651123285293579, 2.797877550125122, 2.9394757747650146],
)  # fmt: skip


def renorm(x, mean, var, r_max, d_max, track, epsilon=1e-3, momentum=0.9):
    """One update in float64: y, and the running mean and variance. Keras averages the deviation, sbx the variance."""
    m, v = x.mean(0), x.var(0)
    own, running = np.sqrt(v + epsilon), np.sqrt(var + epsilon)
    r, d = np.clip(own / running, 1 / r_max, r_max), np.clip((m - mean) / running, -d_max, d_max)
    y = (x - m) / own * r + d
    toward = lambda a, b: momentum * a + (1 - momentum) * b
    new = toward(var, v) if track == "var" else toward(running, own) ** 2 - epsilon
    return y, toward(mean, m), new


@pytest.mark.parametrize("track", ["std", "var"])
def test_batch_renorm_follows_its_references_through_its_schedules(track, rng):
    r_max, d_max = jn.Ramp(1.0, 3.0, 1, 3), jn.Ramp(0.0, 5.0, 2, 2)
    norm = jn.BatchRenorm(momentum=0.9, track=track, r_max=r_max, d_max=d_max)
    params, state = norm.init(4)
    step = jax.jit(lambda state, x: norm.apply(params, state, x, train=True))
    mean, var = np.zeros(4), np.float64(state.var)
    for t in range(5):
        x = draw(rng, (6, 4), 2.0 * t) * np.float32(t + 1)
        y, state = step(state, x)
        limits = [1.0, 1.0, 2.0, 3.0, 3.0][t], [0.0, 0.0, 5.0, 5.0, 5.0][t]
        want, mean, var = renorm(np.float64(x), mean, var, *limits, track)
        close(y, want)
        close(state, jn.RunningStats(mean, var, np.full(4, t + 1.0)))
    close(norm.apply(params, state, x, train=False)[0], (x - mean) / np.sqrt(var + 1e-3))
    folded = norm.as_affine(params, state)
    close(x * np.asarray(folded.scale) + np.asarray(folded.bias), (x - mean) / np.sqrt(var + 1e-3), atol=1e-5)


def test_batch_renorm_gives_the_values_of_keras():
    norm = jn.BatchRenorm(momentum=0.9, r_max=1.5, d_max=0.5)
    params, state = norm.init(4)
    x = np.arange(24, dtype=np.float32).reshape(6, 4) ** 1.5 / 10
    for t in range(3):
        y, state = norm.apply(params, state, x + np.float32(t), train=True)
    close((y[:2], state.mean, state.var), tuple(np.float32(a) for a in OF_KERAS))


def test_batch_renorm_within_limits_of_one_and_zero_is_batch_norm(rng):
    options = {"virtual_batch_size": 4}
    norm = jn.BatchRenorm(r_max=1.0, d_max=0.0, track="var", **options)
    plain = jn.BatchNorm(epsilon=1e-3, **options)
    x, g, params = draw(rng, (12, 3, 5), 4.0), draw(rng, (12, 3, 5)), affine(rng, 5)
    state = jn.RunningStats(jnp.ones(5), jnp.full(5, 2.0), jnp.zeros(5))
    weights = rng.uniform(0.0, 1.0, (12, 1, 1)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(norm):
        apply = lambda params, x: norm.apply(params, state, x, train=True, weights=weights)
        (y, new), vjp = jax.vjp(apply, params, x)
        return y, new[:2], vjp((jnp.asarray(g), jax.tree.map(jnp.zeros_like, new)))

    close(run(norm), run(plain))


def test_an_update_that_saw_nothing_leaves_the_count(rng):
    for norm in (jn.BatchRenorm(), jn.RepBatchNorm()):
        params, state = norm.init(3)
        state = norm.apply(params, state, draw(rng, (8, 3)), train=True)[1]
        mask = np.array([[True, False, True]])
        new = norm.apply(params, state, draw(rng, (8, 3), 1.0), train=True, mask=mask)[1]
        assert new.count.tolist() == [2.0, 1.0, 2.0]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), new, state)


def test_limits_come_back_from_plain_values_and_bad_ones_are_explained():
    norm = jn.BatchRenorm(r_max=jn.Ramp(1.0, 2.0, 3.0, 4.0), d_max=1.0)
    assert jn.make(**json.loads(json.dumps(jn.as_dict(norm)))) == norm
    for options, message in (
        (dict(r_max=0.5), "r_max must be a number >= 1"), (dict(track="mean"), 'Write track="std"'),
        (dict(momentum=None), "Write momentum=0.99"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jn.BatchRenorm(**options)
    with pytest.raises(ValueError, match="end=1 is before begin=2"):
        jn.Ramp(0.0, 1.0, 2, 1)
    with pytest.raises(ValueError, match=r"schedules need state\.count"):
        jn.batch_renorm(np.ones((4, 3)), None, jn.RunningStats(jnp.zeros(3), jnp.ones(3)), train=True)


# --- domain batch norm ------------------------------------------------------------------------------------------------


def test_each_domain_is_a_batch_norm_of_its_examples(rng):
    norm, plain = jn.DomainBatchNorm(num_domains=4), jn.BatchNorm()
    x, params = draw(rng, (12, 2, 5), 2.0), affine(rng, 4, 5)
    state = norm.init(5)[1]
    ids = np.arange(12) // 4 * 2 % 4  # 0, 2, 0: domains 1 and 3 are not there
    y, new = norm.apply(params, state, x, ids, train=True)
    still = norm.apply(params, new, x, ids, train=False)[0]
    for k in (0, 2):
        of_k = jax.tree.map(lambda p, k=k: p[k], params)
        one, after = plain.apply(of_k, plain.init(5)[1], x[ids == k], train=True)
        close((y[ids == k], new.mean[k], new.var[k]), (one, after.mean, after.var))
        close(norm.apply(params, state, x[ids == k], k, train=True)[0], one)
        close(still[ids == k], plain.apply(of_k, after, x[ids == k], train=False)[0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1::2], b[1::2]), new, state)
    runs = np.repeat(np.arange(4), 3)
    close(norm.apply(params, state, x, None, train=True), norm.apply(params, state, x, runs, train=True))
    close(norm.apply(params, new, x, None, train=False), norm.apply(params, new, x, 0, train=False))


def test_an_absent_domain_counts_nowhere_and_a_wrong_one_is_explained(rng):
    norm = jn.DomainBatchNorm(num_domains=2)
    params, state = norm.init(3)
    x, ids = draw(rng, (6, 3)), np.array([0, 1, 0, 1, -1, 2])
    y, new = norm.apply(params, state, x, ids, train=True)
    cut = norm.apply(params, state, x[:4], ids[:4], train=True)
    close((y[:4], new), cut)
    for domain, message in ((2, "none of the 2 domains"), (ids[:3], "one for each of the 6 examples")):
        with pytest.raises(ValueError, match=message):
            norm.apply(params, state, x, domain, train=True)
    with pytest.raises(ValueError, match=r"5 examples of x .* are not 2 equal runs"):
        norm.apply(params, state, x[:5], None, train=True)


def test_layers_keep_a_state_for_each_domain(rng):
    x, ids = draw(rng, (6, 3)), np.array([0, 1, 0, 1, 1, 0])
    spec = jn.DomainBatchNorm(num_domains=2, use_domain_params=True)
    y, new = spec.apply(*spec.init(3), x, ids, train=True)
    layer = jnn.DomainBatchNorm(num_domains=2, use_domain_params=True, use_running_average=False)
    of_linen, variables = layer.apply(layer.init(jax.random.key(0), x, ids), x, ids, mutable="batch_stats")
    of_nnx = jnx.DomainBatchNorm(3, num_domains=2, use_domain_params=True, use_running_average=False, rngs=nnx.Rngs(0))
    close((of_linen, of_nnx(x, ids)), (y, y))
    close((variables["batch_stats"]["mean"], of_nnx.mean[...]), (new.mean, new.mean))


# --- RepBN, and other spreads -----------------------------------------------------------------------------------------


def test_rep_batch_norm_fades_a_layer_norm_into_an_affine_map(rng):
    norm = jn.RepBatchNorm(fade=jn.Ramp(1.0, 0.0, 1, 3), momentum=0.5)
    params, state = norm.init(4)
    params = params._replace(scale=params.scale * 2, eta=jnp.float32(0.5))
    x = draw(rng, (6, 4), 2.0)
    batch = 2 * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + 0.5 * x
    for share in (1.0, 1.0, 0.5, 0.0):
        y, state = norm.apply(params, state, x, train=True)
        close(y, share * np.asarray(jn.layer_norm(x, epsilon=1e-5)) + (1 - share) * batch, atol=1e-5)
    still, folded = norm.apply(params, state, x, train=False)[0], norm.as_affine(params, state)
    close(still, x * np.asarray(folded.scale) + np.asarray(folded.bias), atol=1e-5)
    assert jn.RepBatchNorm(fade=0.0).init(4)[0].ln_scale is None


def test_soft_groups_are_batch_norms_with_their_states_and_layers_draw_their_weight(rng):
    norm, mask = jn.DiffGroupNorm(init_groups=3, rate=0.5, momentum=0.5, unbiased_running_var=True), np.arange(9) < 7
    params, state = norm.init(4)
    params = params._replace(scale=draw(rng, (3, 4)), bias=draw(rng, (3, 4)))
    x = draw(rng, (9, 4), 2.0)
    a = np.exp(x @ np.asarray(params.weight))
    z = (a / a.sum(-1, keepdims=True))[:, :, None] * x[:, None]
    sums = lambda train, of: jn.batch_norm(
        z, params[1:], of, train=train, axis=(1, 2), mask=mask, epsilon=1e-5, momentum=0.5, unbiased_running_var=True
    )
    want, moved = sums(True, state)
    y, new = norm.apply(params, state, np.where(mask[:, None], x, np.nan), train=True, mask=mask)
    close((y[:7], new), (x[:7] + 0.5 * want.sum(1)[:7], moved), atol=1e-5)
    close(norm.apply(params, new, x, train=False)[0], x + 0.5 * sums(False, new)[0].sum(1), atol=1e-5)
    first = lambda key: jnn.DiffGroupNorm(use_running_average=False).init(jax.random.key(key), x)["params"]["weight"]
    assert first(0).shape == (4, 10)
    assert not np.allclose(first(0), first(1))
    of_nnx = [jnx.DiffGroupNorm(4, use_running_average=False, rngs=nnx.Rngs(key)).weight[...] for key in (0, 1)]
    assert not np.allclose(*of_nnx)
    assert np.abs(of_nnx[0]).max() <= 0.5


@pytest.mark.parametrize("spread", ["l1", "rms", "none"])
def test_other_spreads_are_recorded_and_used_at_inference(spread, rng):
    norm, params = jn.BatchNorm(spread=spread, momentum=0.5), affine(rng, 5)
    x = draw(rng, (12, 5), 3.0)
    mean = 0.0 if spread == "rms" else x.mean(0, dtype=np.float64)
    d = x - mean
    own = {"l1": np.sqrt(np.pi / 2) * abs(d).mean(0), "rms": (d**2).mean(0), "none": (d**2).mean(0)}[spread]
    over = {"l1": lambda s: s + 1e-5, "rms": lambda s: np.sqrt(s + 1e-5), "none": np.ones_like}[spread]
    y, state = norm.apply(params, norm.init(5)[1], x, train=True)
    params64 = jn.Affine(*map(np.float64, params))
    close(y, d / over(own) * params64.scale + params64.bias, atol=1e-5)
    close(state[:2], (0.5 * mean + np.zeros(5), 0.5 + 0.5 * own))
    still = (x - 0.5 * mean) / over(0.5 + 0.5 * own) * params64.scale + params64.bias
    folded = norm.as_affine(params, state)
    close(norm.apply(params, state, x, train=False)[0], still, atol=1e-5)
    close(x * np.asarray(folded.scale) + np.asarray(folded.bias), still, atol=1e-5)
    for tiny in (1e-20, 1e18):
        assert np.all(np.isfinite(norm.apply(params, state, x * np.float32(tiny), train=True)[0]))


@pytest.mark.parametrize("options", [
    dict(momentum=None), dict(virtual_batch_size=4), dict(axis_name="d", sync="local"),
])  # fmt: skip
def test_the_mean_absolute_deviation_does_not_merge(options):
    with pytest.raises(ValueError, match='spread="l1" is no sum of squares'):
        jn.BatchNorm(spread="l1", **options)


# --- devices ----------------------------------------------------------------------------------------------------------

SHARED = {  # the all-reduces of the statistics forward; as many backward, for x
    "renorm": (jn.BatchRenorm(r_max=1.5, d_max=0.5, axis_name="d"), 1),
    "domain": (jn.DomainBatchNorm(num_domains=2, axis_name="d"), 1),
    "rep": (jn.RepBatchNorm(fade=0.25, axis_name="d"), 1),
    "rms": (jn.BatchNorm(spread="rms", axis_name="d"), 1),
    "l1": (jn.BatchNorm(spread="l1", axis_name="d"), 2),
    "soft groups": (jn.DiffGroupNorm(init_groups=2, axis_name="d"), 1),
}


@pytest.mark.parametrize("name", SHARED)
def test_devices_share_statistics_by_one_all_reduce_each_way(name, rng):
    norm, rounds = SHARED[name]
    mesh = Mesh(jax.devices()[:4], ("d",))
    x, g, params, state = draw(rng, (12, 5), 2.0), draw(rng, (12, 5)), *norm.init(5)
    ids = np.arange(12) % 2 if name == "domain" else None
    call = lambda norm: lambda x, *ids: norm.apply(params, state, x, *ids, train=True)
    operands = (x,) if ids is None else (x, ids)
    specs = (P("d"),) * len(operands)
    run = jax.shard_map(call(norm), mesh=mesh, in_specs=specs, out_specs=(P("d"), P()))

    def gradient(x, g, *ids):
        return jax.vjp(lambda x: run(x, *ids)[0], x)[1](g)[0]

    alone = call(dataclasses.replace(norm, axis_name=None))
    want = alone(*operands), jax.vjp(lambda x: alone(x, *operands[1:])[0], x)[1](jnp.asarray(g))[0]
    given = operands, (x, g, *operands[1:])
    for f, args, expected, most in zip((run, gradient), given, want, (rounds, 2 * rounds), strict=True):
        compiled = jit_unoptimized(f).lower(*args).compile()
        close(compiled(*args), expected, atol=1e-5)
        assert compiled.as_text().count(" all-reduce(") == most
