"""Diagnostics name each planted fault, with the line to write, and nothing in a healthy model."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.compiled.hlo import cost
from helpers.devices import mesh_of
from helpers.jit import jit_unoptimized
from helpers.models import ResNet, Sizes
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import models
from jaxnorm import nnx as jnnx

WIDTH, BATCH = 16, 64
NORM = jn.BatchNorm(momentum=0.9)


# --- three dense layers with batch norm: one program for training and one for evaluation serve most faults ------------


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initial():
    weights = {f"w{i}": normal(i, WIDTH, WIDTH) / 4 for i in range(3)}
    params, state = NORM.init(WIDTH)
    return weights | {f"norm{i}": params for i in range(3)}, {f"norm{i}": state for i in range(3)}


def network(params, state, x, mask, *, train, norm=NORM):
    new = {}
    for i in range(3):
        x, new[f"norm{i}"] = norm.apply(
            params[f"norm{i}"], state[f"norm{i}"], x @ params[f"w{i}"], train=train, mask=mask
        )
        x = jax.nn.relu(x)
    return x, new


train_step = jit_unoptimized(models.collect(functools.partial(network, train=True)))
evaluate = jit_unoptimized(models.collect(functools.partial(network, train=False)))


def batch(seed):
    return normal(seed + 10, BATCH, WIDTH) + np.float32(0.5)


ALL = np.ones((BATCH, WIDTH), bool)


@functools.cache
def trained():
    """Weights, and running statistics of many batches under them."""
    params, state = initial()
    for seed in range(40):
        (_, state), _ = train_step(params, state, batch(seed), ALL)
    return params, state


def faults(seen, **options):
    return [(finding.path, finding.fault) for finding in jn.report(seen, **options).findings]


def test_a_healthy_model_has_no_findings_in_training_and_at_evaluation():
    params, state = trained()
    first = train_step(*initial(), batch(99), ALL)[1]
    for seen, train in (
        (first, True),
        (train_step(params, state, batch(99), ALL)[1], True),
        (evaluate(params, state, batch(99), ALL)[1], False),
    ):
        assert faults(seen, train=train) == faults(seen) == []
    row = jn.report(seen).rows[1]
    assert (row.path, row.kind) == ("norm1", "BatchNorm")
    x = (
        jax.nn.relu(NORM.apply(params["norm0"], state["norm0"], batch(99) @ params["w0"], train=False)[0])
        @ params["w1"]
    )
    var, old = np.var(x, 0), state["norm1"]
    drift = (np.mean(x, 0) - old.mean) / np.sqrt(old.var + 1e-5)
    expected = {
        "count": 64, "empty": 0, "drift_mean": np.sqrt(np.mean(drift**2)), "constant": 0,
        "drift_var": np.median(np.abs(np.log2(var / old.var))), "dead": 0, "tiny": 0, "nonfinite": 0,
        "rms": np.sqrt(np.mean(np.square(x))),
    }  # fmt: skip
    assert {*expected, "growth"} == {*row.quantities}
    for name, value in expected.items():
        np.testing.assert_allclose(row.quantities[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


def scaled(name, by):
    return lambda params, state, x: (params | {name: np.float32(by) * params[name]}, state, x)


def started(params, state, x):
    mix = lambda first, now: jax.tree.map(lambda a, b: 0.8 * np.asarray(a) + 0.2 * np.asarray(b), first, now)
    return params, {name: mix(initial()[1][name], now) for name, now in state.items()}, x


def without_some_scales(params, state, x):
    scale, bias = params["norm1"]
    return params | {"norm1": jn.Affine(np.where(np.arange(WIDTH) < 4, 0, scale), bias)}, state, x


def with_infinity(params, state, x):
    return params, state, np.where(np.arange(WIDTH) == 3, np.float32("inf"), x)


def polluted(params, state, x):
    return params, state | {"norm2": state["norm2"]._replace(mean=np.full(WIDTH, np.nan, np.float32))}, x


@pytest.mark.parametrize(
    ("plant", "path", "fault", "write"),
    [
        (lambda params, state, x: (params, initial()[1], x), "norm0", "never updated", "train=True"),
        (lambda params, state, x: (params, state, np.float32(8) * x), "norm0", "other data", "x = (x - mean) / std"),
        (scaled("w1", 8), "norm1", "stale statistics", "models.recompute_stats"),
        (started, "norm1", "statistics lag", "BatchNorm(momentum=0.9)"),  # norm0 has a variance near 1
        (without_some_scales, "norm1", "dead channels", "Set these scales to 1"),
        (with_infinity, "norm0", "not finite", "jax_debug_nans"),
        (polluted, "norm2", "not finite", "skip_nonfinite=True"),
    ],
)  # fmt: skip
def test_faults_at_evaluation(plant, path, fault, write):
    found = jn.report(evaluate(*plant(*trained(), batch(99)), ALL)[1]).findings
    if fault == "never updated":
        assert [f.path for f in found] == ["norm0", "norm1", "norm2"]
        found = found[:1]
    assert [(f.path, f.fault) for f in found] == [(path, fault)]  # it alone: nothing of the norms after it
    assert write in found[0].write


def test_modes_that_are_not_those_that_were_meant():
    params, state = trained()
    training, evaluation = train_step(params, state, batch(99), ALL)[1], evaluate(params, state, batch(99), ALL)[1]
    assert faults(training, train=False) == [(f"norm{i}", "training mode at evaluation") for i in range(3)]
    assert faults(evaluation, train=True) == [(f"norm{i}", "never updated") for i in range(3)]


def test_masks_leave_channels_without_elements():
    params, state = trained()
    seen = train_step(params, state, batch(99), ALL & ~np.isin(np.arange(WIDTH), range(5, 9)))[1]
    found = jn.report(seen).findings
    assert [(f.path, f.fault) for f in found] == [(f"norm{i}", "channels without elements") for i in range(3)]
    assert "25 % of the channels" in found[0].says
    assert "mask[..., None]" in found[0].write
    seen = train_step(params, state, batch(99), ALL & (np.arange(BATCH) < 3)[:, None])[1]
    found = jn.report(seen).findings
    assert [f.fault for f in found] == ["small batch"] * 3
    assert "GroupNorm" in found[0].write
    assert "A channel has 3 elements" in found[0].says


def test_epsilon_dominates_in_training():
    (found,) = jn.report(train_step(*scaled("w0", 1e-4)(*trained(), batch(99)), ALL)[1]).findings
    assert (found.path, found.fault) == ("norm0", "epsilon dominates")
    assert "BatchNorm(epsilon=1e-12)" in found.write


@pytest.mark.parametrize(("momentum", "fault"), [(0.1, "momentum of torch"), (1.0, "never updated")])
@pytest.mark.filterwarnings("ignore:.*keeps 10 %")
def test_momentum(momentum, fault):
    norm = jn.BatchNorm(running=jn.EMA(momentum=momentum))
    _, seen = models.collect(norm.apply)(*norm.init(WIDTH), batch(0), train=True)
    (found,) = jn.report(seen).findings
    assert (found.path, found.fault) == ("BatchNorm", fault)
    assert found.write == "Write BatchNorm(momentum=0.9)."


# --- a residual stream with layer norms, and its gradient -------------------------------------------------------------

LAYERS = 8
ROW = jn.LayerNorm(activation="tanh")


def stream(params, h):
    for p in params["blocks"]:
        h = p["keep"] * h + ROW.apply(p["norm"], (), h)[0] @ p["w"]
    return h


@jit_unoptimized
def gradient_step(params, h):
    def loss(params):
        out, seen = models.collect(stream)(params, h)
        return jnp.mean(jnp.square(out)), seen

    grads, seen = jax.grad(loss, has_aux=True)(params)
    return grads, seen.with_gradients(grads)


def blocks(size=1.0, keep=1.0, scale=1.0, grows=1.0):
    f32 = np.float32
    make = lambda i: {
        "w": f32(size * grows**i / 4) * normal(i, WIDTH, WIDTH), "keep": f32(keep),
        "norm": jn.Affine(np.full(WIDTH, scale, f32), np.zeros(WIDTH, f32)),
    }  # fmt: skip
    return {"blocks": [make(i) for i in range(LAYERS)]}


@pytest.mark.parametrize(
    ("params", "size", "path", "fault", "write"),
    [
        ({}, 1.0, None, None, None),
        ({"grows": 2.0}, 1.0, "blocks/7/norm", "variance grows with depth", "jn.rms_norm_add"),
        ({"scale": 40.0}, 1.0, "blocks/0/norm", "saturated activation", "scale_init=nn.initializers.ones"),
        ({"keep": 3.0}, 1.0, "blocks/0/norm", "gradient explodes", "optax.clip_by_global_norm"),
        ({"keep": 0.3, "size": 1e-5}, 1.0, "blocks/0/norm", "gradient vanishes", "h = h + f(norm(h))"),
        ({}, 1e-4, "blocks/0/norm", "epsilon dominates", "LayerNorm(epsilon=1e-12)"),
    ],
)
def test_faults_of_a_residual_stream(params, size, path, fault, write):
    params = blocks(**params)
    grads, seen = gradient_step(params, np.float32(size) * batch(3))
    report = jn.report(seen)
    if fault is None:
        assert not report.findings
        norms = [np.linalg.norm(p["norm"].scale) for p in grads["blocks"]]
        np.testing.assert_allclose([row.quantities["gradient"] for row in report.rows], norms, rtol=1e-5)
        return
    named = [f for f in report.findings if f.fault == fault]
    assert named
    assert named[0].path == path
    assert write in named[0].write


def test_a_norm_over_the_batch_is_a_wrong_axis():
    norm = jn.LayerNorm(axis=0)
    seen = models.collect(norm.apply)(norm.init(BATCH)[0], (), batch(0))[1]
    (found,) = jn.report(seen).findings
    assert found.fault == "wrong axis"
    assert "LayerNorm(axis=-1)" in found.write
    whole = jn.LayerNorm(axis=(0, 1))  # of one example, as in vmap
    assert faults(models.collect(whole.apply)((None, None), (), batch(0))[1]) == []


# --- devices ----------------------------------------------------------------------------------------------------------


def test_over_devices_measurements_are_those_of_one_device():
    """Under jit and in shard_map, where a norm that is not synchronized is found out."""
    mesh, params, state = mesh_of("auto"), *trained()
    x, mask = batch(99), ALL & (np.arange(BATCH) >= 10)[:, None]
    alone = jn.report(train_step(params, state, x, mask)[1])
    sharded = jax.device_put((x, mask), jax.NamedSharding(mesh, P("data")))
    under_jit = jn.report(train_step(params, state, *sharded)[1])
    norm = jn.BatchNorm(momentum=0.9, axis_name="data")
    synced, local = (
        jit_unoptimized(
            jax.shard_map(
                models.collect(functools.partial(network, train=True, norm=norm), axis_name="data"),
                mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=((P("data"), out), P()),
            )
        )
        for norm, out in ((norm, P()), (NORM, P("data")))
    )  # fmt: skip
    each = lambda state: jax.tree.map(lambda a: np.tile(a, 8), state)
    for report in (under_jit, jn.report(jax.jit(lambda *a: a[1])(*local(params, each(state), x, mask)))):
        flat, expected = report.as_dict(), alone.as_dict()
        if report is not under_jit:
            expected["norm0/count"] = 0
        for name in ("norm0/drift_mean", "norm0/drift_var", "norm0/rms", "norm0/count"):
            np.testing.assert_allclose(flat[name], expected[name], rtol=1e-4, err_msg=name)
