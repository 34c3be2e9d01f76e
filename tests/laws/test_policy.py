"""Policies as objects, `EMA`, `Cumulative` and `Devices`, are the flat keywords of batch norm by another spelling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.devices import mesh_of
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32) * 2 + 1
RUNNING = [
    (jn.EMA(momentum=0.5), dict(momentum=0.5)),
    (jn.EMA(momentum=0.9, debias=True, unbiased=True), dict(momentum=0.9, zero_debias=True, unbiased_running_var=True)),
    (jn.EMA(min_count=17, skip_nonfinite=True), dict(min_count=17, skip_nonfinite=True)),
    (jn.Cumulative(), dict(momentum=None)),
    (jn.Cumulative(unbiased=True), dict(momentum=None, unbiased_running_var=True)),
]
same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("running", "flat"), RUNNING, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_an_object_says_what_the_flat_keywords_say(running, flat):
    ours, theirs = jn.BatchNorm(running=running), jn.BatchNorm(**flat)
    (params, state), (_, again) = ours.init(3), theirs.init(3)
    same(state, again)
    for _ in range(3):
        state, again = (n.apply(params, s, X, train=True)[1] for n, s in ((ours, state), (theirs, again)))
        same(state, again)
    seen = jn.moments(X, 0)
    same(jn.update_state(state, seen, running=running), jn.update_state(state, seen, **flat))
    same(ours.update_state(state, seen), theirs.update_state(state, seen))
    layer = jnn.BatchNorm(running=running)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    _, new = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    _, plain = jnn.BatchNorm(**flat).apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    same(new, plain)
    layer = jnnx.BatchNorm(3, running=running, rngs=nnx.Rngs(0))
    layer(X)
    np.testing.assert_array_equal(layer.mean[...], new["batch_stats"]["mean"])


def test_a_momentum_may_be_traced():
    state = jn.BatchNorm().init(3)[1]
    step = lambda m: jn.batch_norm(X, None, state, train=True, running=jn.EMA(momentum=m))[1]
    traced, known = jax.jit(step)(0.5), jn.batch_norm(X, None, state, train=True, momentum=0.5)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced, known)


HALVES = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(("groups", "sync"), [(None, "global"), (1, "local"), (4, 4), (HALVES, HALVES)])
def test_devices_say_what_axis_name_and_sync_say(groups, sync):
    mesh = mesh_of("auto")
    ours, theirs = jn.BatchNorm(share=jn.Devices("data", groups)), jn.BatchNorm(axis_name="data", sync=sync)
    params, state = theirs.init(3)

    def run(norm):
        step = lambda x: norm.apply(params, state, x, train=True)
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())))(X)

    same(run(ours), run(theirs))


def test_a_layer_shares_and_touches_no_axis_while_initializing():
    layer = jnn.BatchNorm(share=jn.Devices("data", groups=2))
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    step = lambda x: layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    y, new = jax.vmap(step, axis_name="data")(X.reshape(8, 2, 3))
    np.testing.assert_allclose(y[0].mean() + y[1].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["mean"], np.tile(0.01 * X.mean(0), (8, 1)), rtol=1e-5)


def test_policies_are_values():
    assert jn.EMA(momentum=0.5) == jn.EMA(momentum=np.float64(0.5))
    assert hash(jn.Devices("data", groups=[[0, 1], [2, 3]])) == hash(jn.Devices("data", groups=((0, 1), (2, 3))))
    assert dataclasses.replace(jn.EMA(), momentum=0.5) == jn.EMA(momentum=0.5)
    assert jn.BatchNorm(running=jn.Cumulative()) == jn.BatchNorm(running=jn.Cumulative())


WRONG = [
    (lambda: jn.EMA(momentum=None), r"EMA: momentum .* Write jaxnorm\.Cumulative\(\)"),
    (lambda: jn.EMA(momentum=2.0), r"EMA: momentum is the weight .* Write momentum=0\.9"),
    (lambda: jn.EMA(min_count=-1), r"EMA: min_count"),
    (lambda: jn.Cumulative(unbiased=3), r"Cumulative: unbiased must be a bool"),
    (lambda: jn.Devices(None), r'Devices: axis_name must name an axis.* Write Devices\("data"\)'),
    (lambda: jn.Devices("data", groups=0), "Devices: sync must be"),
    (lambda: jn.BatchNorm(running=0.9), r"BatchNorm: running must be .* Write running=jaxnorm\.EMA\(momentum=0\.99\)"),
    (lambda: jn.BatchNorm(running=jn.EMA(), momentum=0.5), r"momentum=0\.5 both .*=jaxnorm\.EMA\(momentum=0\.5\)"),
    (lambda: jn.BatchNorm(running=jn.Cumulative(), zero_debias=True), r"Write running=jaxnorm\.EMA\(debias=True\)"),
    (lambda: jn.BatchNorm(share="data"), r'BatchNorm: share must be .* Write share=jaxnorm\.Devices\("data"\)'),
    (lambda: jn.BatchNorm(share=jn.Devices("d"), axis_name="d"), r"both say which devices .* Write share="),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_messages_show_the_line_to_write(call, message):
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        call()
