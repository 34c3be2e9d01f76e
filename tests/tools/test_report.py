"""Diagnostics name each planted fault, with the line to write, and nothing in a healthy model."""

import functools
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


@pytest.mark.filterwarnings("ignore:.*keeps 10 %")
def test_options_that_are_faults():
    """The last two are none: all of one example is reduced, and a norm of three-quarters of the old statistics."""
    norms = {
        "torch": jn.BatchNorm(running=jn.EMA(momentum=0.1)), "never": jn.BatchNorm(momentum=1.0),
        "rows": jn.LayerNorm(axis=0), "whole": jn.LayerNorm(axis=(0, 1), use_scale=False), "quick": NORM,
    }  # fmt: skip
    params, state = {}, {}
    for name, norm in norms.items():
        params[name], state[name] = norm.init(BATCH if name == "rows" else WIDTH)
    apply = lambda params, state, x: [n.apply(params[k], state[k], x, train=True)[0] for k, n in norms.items()]
    found = jn.report(jit_unoptimized(models.collect(apply))(params, state, batch(0))[1]).findings
    assert [(f.path, f.fault, f.write) for f in found] == [
        ("torch", "momentum of torch", "Write BatchNorm(momentum=0.9)."),
        ("never", "never updated", "Write BatchNorm(momentum=0.9)."),
        ("rows", "wrong axis", "Write LayerNorm(axis=-1), or BatchNorm if that is meant."),
    ]


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


# --- devices ----------------------------------------------------------------------------------------------------------


def over_devices(norm, state_spec):
    step = models.collect(functools.partial(network, train=True, norm=norm), axis_name="data")
    specs = dict(in_specs=(P(), state_spec, P("data"), P("data")), out_specs=((P("data"), state_spec), P()))
    return jit_unoptimized(jax.shard_map(step, mesh=mesh_of("auto"), **specs))


def test_over_devices_measurements_are_those_of_one_device():
    """Device d has d + 1 examples."""
    (params, state), x = trained(), batch(99)
    mask = ALL & (np.arange(BATCH) % 8 <= np.arange(BATCH) // 8)[:, None]
    alone = jn.report(train_step(params, state, x, mask)[1])
    sharded = jax.device_put((x, mask), jax.NamedSharding(mesh_of("auto"), P("data")))
    by_jit = jn.report(train_step(params, state, *sharded)[1])
    synced = jn.report(over_devices(jn.BatchNorm(momentum=0.9, axis_name="data"), P())(params, state, x, mask)[1])
    assert alone.findings == by_jit.findings == synced.findings == []
    for name, value in alone.as_dict().items():
        for other in (by_jit, synced):
            np.testing.assert_allclose(other.as_dict()[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


def test_devices_that_do_not_share_statistics_are_found():
    (params, state), x, step = trained(), batch(99), over_devices(NORM, P("data"))
    for apart, fault in ((0, "small batch"), (0.1, "statistics differ over devices")):
        each = [jax.tree.map(functools.partial(np.add, np.float32(apart * d)), state) for d in range(8)]
        _, seen = step(params, jax.tree.map(lambda *a: np.concatenate(a), *each), x, ALL)
        report = jn.report(seen)
        assert fault in [f.fault for f in report.findings]
        assert all("BatchNorm(axis_name='data')" in f.write for f in report.findings)
        assert report.rows[0].quantities["count"] == 8
    assert "jn.sync_state(state, 'data')" in report.findings[0].write
    with pytest.raises(ValueError, match=r"inside of jax.shard_map.*collect\(f, axis_name='data'\)"):
        jax.shard_map(
            lambda x: models.collect(lambda x: NORM.apply(*NORM.init(WIDTH), x, train=True)[0])(x),
            mesh=mesh_of("auto"), in_specs=P("data"), out_specs=P("data"),
        )(x)  # fmt: skip


def test_the_count_is_that_of_the_devices_that_share_statistics():
    """Not of all or of one, which other tests see, but of some."""
    shares = {"pairs": (dict(axis_name="d", sync=2), 16), "ghosts": (dict(virtual_batch_size=4), 4),
              "halves": (dict(share=jn.Devices("d", groups=[[0, 1, 2, 3], [4, 5, 6, 7]])), 32)}  # fmt: skip
    norms = {name: jn.BatchNorm(**options) for name, (options, _) in shares.items()}
    params, state = NORM.init(WIDTH)
    apply = lambda x: [norm.apply(params, state, x, train=True)[0] for norm in norms.values()]
    step = jax.vmap(models.collect(apply, axis_name="d"), out_axes=(0, None), axis_name="d")
    report = jn.report(jit_unoptimized(step)(batch(0).reshape(8, 8, WIDTH))[1])
    assert [row.quantities["count"] for row in report.rows] == [count for _, count in shares.values()]


# --- linen, nnx, scans, and what is left out --------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.relu(jnn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(WIDTH)(x)))
        x = nn.remat(jnn.LayerNorm)(name="inside")(x)
        norm = jnn.GroupNorm(num_groups=4, name="twice")
        return norm(norm(x))


class OfNnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norms = nnx.List([jnnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs), jnnx.RMSNorm(WIDTH, rngs=rngs)])

    def __call__(self, x):
        for norm in self.norms:
            x = norm(x)
        return x


def test_linen_and_nnx_models_by_their_paths():
    model, x = Net(), batch(0)
    variables = jit_unoptimized(functools.partial(model.init, train=True))(jax.random.key(0), x)
    apply = models.collect(functools.partial(model.apply, mutable=["batch_stats"], train=True))

    @jit_unoptimized
    def step(params, x):
        def loss(params):
            (y, _), seen = apply({**variables, "params": params}, x)
            return jnp.sum(y**3), seen

        grads, seen = jax.grad(loss, has_aux=True)(params)
        return seen.with_gradients(grads), grads

    seen, grads = step(variables["params"], x)
    report = jn.report(seen, train=True)
    assert [row.path for row in report.rows] == ["BatchNorm_0", "BatchNorm_1", "twice", "twice@2"]
    assert report.findings == []
    assert "jax.checkpoint" in report.left_out["inside"]
    for row in report.rows:
        norm = np.linalg.norm(grads[row.path.partition("@")[0]]["scale"])
        np.testing.assert_allclose(row.quantities["gradient"], norm, rtol=1e-5)
    with pytest.raises(ValueError, match=r"with_gradients: no parameters of .*BatchNorm_0"):
        seen.with_gradients({"Dense_0": grads["Dense_0"]})

    model = OfNnx()

    @nnx.jit
    def nnx_step(model, x):
        def loss(model):
            y, seen = models.collect(model)(x)
            return jnp.sum(y**3), seen

        grads, seen = nnx.grad(loss, has_aux=True)(model)
        return seen.with_gradients(grads)

    report = jn.report(nnx_step(model, x))
    assert [(row.path, row.kind) for row in report.rows] == [("norms/0", "BatchNorm"), ("norms/1", "RMSNorm")]
    assert all(row.quantities["gradient"] > 0 for row in report.rows)
    model.eval()
    assert faults(jax.jit(models.collect(nnx.merge(*nnx.split(model))))(x)[1], train=True)[0][1] == "never updated"


def test_inside_of_a_scan_each_step_has_a_row():
    norm = jn.RMSNorm()
    params = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), norm.init(WIDTH)[0])
    block = models.collect(lambda p, h: h + norm.apply(p, (), h)[0])
    seen = jax.jit(lambda h: jax.lax.scan(lambda h, p: block(p, h), h, params)[1])(batch(0))
    report = jn.report(seen)
    assert [row.path for row in report.rows] == ["RMSNorm/0", "RMSNorm/1"]
    np.testing.assert_allclose(report.rows[1].quantities["growth"], 2, rtol=0.1)


# --- its cost ---------------------------------------------------------------------------------------------------------


def test_every_ten_steps_it_moves_less_than_2_percent_more_bytes_and_finds_nothing_in_a_new_resnet():
    """Of a step of the small ResNet, by the bytes that the compiled programs read and write. All other steps are those
    of the program without it."""
    sizes = Sizes(stages=(8, 16), blocks=1, images=(8, 16, 16, 3))
    model = ResNet(jnn, "BatchNorm", jnp.float32, sizes)
    images, labels = ResNet.batch(sizes)
    variables = jit_unoptimized(model.init)(jax.random.key(0), images)

    def step(on, variables, images):
        def loss(params):
            apply = functools.partial(model.apply, mutable=["batch_stats"])
            (logits, new), seen = models.collect(apply, on=on)({**variables, "params": params}, images)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), (new, seen)

        grads, (new, seen) = jax.grad(loss, has_aux=True)(variables["params"])
        return grads, new, seen.with_gradients(grads)

    compiled = [jit_unoptimized(functools.partial(step, on)).lower(variables, images).compile() for on in (False, True)]
    plain, observed = (cost(program.as_text()).bytes for program in compiled)
    assert 0 < (observed / plain - 1) / 10 < 0.02
    report = jn.report(compiled[1](variables, images)[2], train=True)
    assert len(report.rows) == 6
    assert report.findings == []


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_report_as_text_as_a_dict_and_as_a_picture(monkeypatch, capsys):
    params, state = trained()
    report = jn.report(evaluate(params, state, np.float32(8) * batch(99), ALL)[1])
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["path", "norm", "count", "drift_mean"]
    assert lines[2].startswith("norm0  BatchNorm     64  ")
    assert lines[6].startswith("1. norm0: other data. The batch is not scaled")
    flat = report.as_dict()
    assert flat["norm1/count"] == 64.0
    assert flat["findings"] == 1.0
    assert all(type(value) is float for value in flat.values())
    report.print()
    by_rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    report.print()
    assert capsys.readouterr().out == f"{report}\n"
    assert "norm0" in by_rich
    assert "│" in by_rich
    import matplotlib

    matplotlib.use("agg")
    figure = report.plot()
    assert [ax.get_title("left") for ax in figure.axes] == [
        "RMS of the input", "Drift of the mean", "Shares that should be 0",
    ]  # fmt: skip
    matplotlib.pyplot.close(figure)
    monkeypatch.setitem(sys.modules, "jaxnorm._models.plot", None)
    with pytest.raises(ImportError, match=r"Report.plot needs matplotlib. Write: pip install"):
        report.plot()
    assert str(jn.report(models.collect(lambda x: x)(batch(0))[1])).startswith("No norm was seen")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jn.report({"a": 1}), TypeError, r"report: seen must be what collect measured, got a dict"),
        (lambda: jax.jit(lambda x: jn.report(models.collect(ROW.apply)((None, None), (), x)[1]))(batch(0)), TypeError,
         "report: seen is traced. Return it from the compiled step"),
        (lambda: jn.report(models.Seen(), train=1), TypeError, "report: train must be True, False or None, got 1"),
        (lambda: models.collect(NORM), TypeError, r"collect: f must be a function, got the spec BatchNorm.*norm.apply"),
        (lambda: models.collect(Net()), TypeError, r"the linen module Net. Write collect\(functools.partial"),
        (lambda: models.collect(3), TypeError, "collect: f must be a function or an nnx module, got 3"),
        (lambda: models.collect(abs, activations={"**": "gelu"}), ValueError, r"must be one of \['tanh', 'sigmoid'\]"),
        (lambda: jn.tabulate(NORM), TypeError, r"tabulate: model must be .* Write tabulate\(norm.apply, params"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_activation_that_follows_is_told():
    norm = jn.LayerNorm()
    params = norm.init(WIDTH)[0]._replace(scale=np.full(WIDTH, 30, np.float32))
    apply = models.collect(norm.apply, activations={"**": "sigmoid"})
    (found,) = jn.report(jit_unoptimized(apply)(params, (), batch(0))[1]).findings
    assert found.fault == "saturated activation"
    assert "where sigmoid is flat" in found.says


def test_tabulate_reads_linen_nnx_and_functions(kernels):
    rows = jn.tabulate(Net(), batch(0), train=True).rows
    assert [(row.path, row.kind, row.reduces, row.groups) for row in rows] == [
        ("BatchNorm_0", "BatchNorm", (0,), None), ("BatchNorm_1", "BatchNorm", (0,), None),
        ("inside", "LayerNorm", (1,), None), ("twice", "GroupNorm", (1,), 4), ("twice", "GroupNorm", (1,), 4),
    ]  # fmt: skip
    assert rows[0].parameters == {"scale": (WIDTH,), "bias": (WIDTH,)}
    assert rows[0].statistics == {"mean": (WIDTH,), "var": (WIDTH,)}
    model = OfNnx()
    table = jn.tabulate(model, jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.bfloat16))
    assert [(row.path, row.dtype) for row in table.rows] == [("norms/0", "bfloat16"), ("norms/1", "float32")]
    assert "mean 16, var 16" in str(table)
    assert not isinstance(model.norms[0].mean[...], jax.core.Tracer)
    best = "native" if kernels else "xla"
    norms = {"a": jn.LayerNorm(implementation=best), "b": jn.LayerNorm(implementation="xla"), "c": jn.DynamicTanh()}
    params = {name: norm.init(WIDTH)[0] for name, norm in norms.items()}
    apply = lambda params, x: [norm.apply(params[name], (), x)[0] for name, norm in norms.items()]
    rows = jn.tabulate(apply, params, batch(0)).rows
    assert [(row.path, row.backend) for row in rows] == [("a", best), ("b", "xla"), ("c", "xla")]
