"""Statistics of the whole training set, against float64 populations, in every kind of model and on any devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.jit import jit_unoptimized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import models
from jaxnorm import nnx as jnnx
from jaxnorm._models.progress import with_bar

DEPTH, WIDTH, EPSILON = 3, 4, 1e-3
SPEC = jn.BatchNorm(epsilon=EPSILON, unbiased_running_var=True)


@pytest.fixture(autouse=True)
def _compiled_fast(monkeypatch):
    jit = jax.jit
    ours = lambda f: getattr(f, "__module__", None) == "jaxnorm._models.recompute_run"
    monkeypatch.setattr(jax, "jit", lambda f, **options: (jit_unoptimized if ours(f) else jit)(f, **options))


@pytest.fixture(scope="module")
def data():
    """Kernels, and 13 examples in batches of 5, 5 and 3, with a mask for their positions and far from mean 0."""
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(13, 2, WIDTH)) + 5.0, rng.random((13, 2)) < 0.7
    x, kernels = (a.astype(np.float32) for a in (x, rng.normal(size=(DEPTH, WIDTH, WIDTH))))
    return kernels, x, mask, [(x[i : i + 5], mask[i : i + 5]) for i in (0, 5, 10)]


def population(kernels, x, mask, unbiased=True):
    """(mean, var) of each layer in float64, where each is normalized by the statistics of all data."""
    found, h = [], x.astype(np.float64)
    for kernel in kernels.astype(np.float64):
        h = h @ kernel
        valid = h[mask]
        found.append((valid.mean(0), valid.var(0, ddof=int(unbiased))))
        h = np.tanh((h - found[-1][0]) / np.sqrt(found[-1][1] + EPSILON))
    return found


def by_specs(kernels, variables, batch, train=False):
    h, mask = batch
    states = dict(variables["states"])
    for i, kernel in enumerate(kernels):
        h, states[f"n{i}"] = SPEC.apply(None, states[f"n{i}"], h @ kernel, train=train, mask=mask)
        h = jnp.tanh(h)
    return {"states": states}


def layer(h, kernel, mask, name):
    options = dict(epsilon=EPSILON, unbiased_running_var=True, use_running_average=True)
    return jnp.tanh(jnn.BatchNorm(**options, name=name)(h @ kernel, mask=mask))


class Scan(nn.Module):
    @nn.compact
    def __call__(self, h, kernels, mask):
        axes = dict(variable_axes={"batch_stats": 0, "params": 0}, split_rngs={"params": True})
        return nn.scan(lambda _, h, kernel: (layer(h, kernel, mask, "norm"), None), **axes)(self, h, kernels)[0]


class Linen(nn.Module):
    """The first layer by itself, and the others as a scan, whose states are stacked in one."""

    kernels: tuple

    @nn.compact
    def __call__(self, batch):
        h, mask = batch
        return Scan(name="others")(layer(h, self.kernels[0], mask, "first"), jnp.stack(self.kernels[1:]), mask)


class Nnx(nnx.Module):
    def __init__(self, kernels):
        self.kernels, make = kernels, lambda: jnnx.BatchNorm(
            WIDTH, epsilon=EPSILON, unbiased_running_var=True, rngs=nnx.Rngs(0)
        )
        self.norms = nnx.List([make() for _ in kernels])

    def __call__(self, batch):
        h, mask = batch
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            h = jnp.tanh(nnx.jit(lambda norm, h: norm(h, mask=mask))(norm, h @ kernel))
        return h


@pytest.mark.parametrize("kind", ["specs", "linen", "nnx"])
def test_every_layer_has_the_population_statistics_of_inference(kind, data):
    """In float64, with masks, an uneven last batch, and statistics of all layers before it that are recomputed too."""
    kernels, x, mask, batches = data
    kernels = kernels[:2] if kind == "nnx" else kernels
    if kind == "specs":
        state = {f"n{i}": SPEC.init(WIDTH)[1] for i in range(DEPTH)}
        new, outcome = models.recompute_stats(lambda v, b: by_specs(kernels, v, b), {"states": state}, batches)
        assert state["n0"].mean.tolist() == [0.0] * WIDTH, "nothing is changed in place"
        found = [tuple(new["states"][f"n{i}"])[:2] for i in range(DEPTH)]
    elif kind == "linen":
        model = Linen(tuple(kernels))
        variables = model.init(jax.random.key(0), batches[0])
        apply = lambda variables, batch: model.apply(variables, batch, mutable=["batch_stats"])
        new, outcome = models.recompute_stats(apply, variables, [(x, mask)])
        assert jax.tree.structure(new) == jax.tree.structure(variables)
        first, others = new["batch_stats"]["first"], new["batch_stats"]["others"]["norm"]
        found = [(first["mean"], first["var"]), *zip(others["mean"], others["var"], strict=True)]
    else:
        model = Nnx(kernels)
        new, outcome = models.recompute_stats(lambda model, batch: model(batch), model, [(x, mask)])
        assert model.norms[0].mean[...].tolist() == [0.0] * WIDTH
        nnx.update(model, new)
        found = [(norm.mean[...], norm.var[...]) for norm in model.norms]
    for (mean, var), (mean64, var64) in zip(found, population(kernels, x, mask), strict=True):
        np.testing.assert_allclose(mean, mean64, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(var, var64, rtol=2e-6)
    assert len(outcome.changed) == (2 if kind == "linen" else len(kernels))
    assert f"{mask.sum()} elements" in outcome.rows[0].why


def test_one_pass_has_the_inputs_of_training(data):
    """Each batch is normalized by its own statistics. The moments of what follows are merged, between batches too."""
    kernels, x, mask, _ = data
    batches = [(x[:6], mask[:6]), (x[6:12], mask[6:12])]
    variables = {"states": {f"n{i}": SPEC.init(WIDTH)[1] for i in range(2)}}
    new, _ = models.recompute_stats(lambda v, b: by_specs(kernels[:2], v, b), variables, batches, passes=1)
    seen = np.concatenate([inputs_of_the_second(kernels, *batch) for batch in batches])
    np.testing.assert_allclose(new["states"]["n1"].mean, seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["states"]["n1"].var, seen.var(0, ddof=1), rtol=1e-5)
    exact = population(kernels, x[:12], mask[:12])[1]
    assert np.abs(new["states"]["n1"].var / exact[1] - 1).max() > 1e-2, "which are not those of inference"


def inputs_of_the_second(kernels, x, mask):
    mean, var = population(kernels, x, mask, unbiased=False)[0]
    h = np.tanh((x.astype(np.float64) @ kernels[0] - mean) / np.sqrt(var + EPSILON)) @ kernels[1]
    return h[mask]


@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_over_devices(form, data):
    """Eight devices, the last with fewer elements. Nothing but statistics is merged, and they are on all devices."""
    kernels, x, mask, _ = data
    x, mask = np.concatenate([x, x])[:24], np.concatenate([mask, mask])[:24]
    mask[21:] = False
    mesh = jax.make_mesh((8,), ("data",))
    norm = dataclasses.replace(SPEC, axis_name="data" if form == "shard_map" else None)

    def apply(state, batch):
        h, mask = batch
        return norm.apply(None, state, h @ kernels[0], train=False, mask=mask)

    if form == "shard_map":
        apply = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()))
    placed = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    state = placed(norm.init(WIDTH)[1], P())
    new, _ = models.recompute_stats(apply, state, [placed((x, mask), P("data"))])
    mean, var = population(kernels[:1], x, mask)[0]
    np.testing.assert_allclose(new.mean, mean, rtol=2e-6)
    np.testing.assert_allclose(new.var, var, rtol=2e-6)
    assert new.var.sharding == state.var.sharding


EXACT = dict(momentum=None)
SIBLINGS = {
    "batch_renorm": jn.BatchRenorm(),
    "rep": jn.RepBatchNorm(),
    "instance": jn.InstanceBatchNorm(**EXACT),
    "evo": jn.EvoNormB(zero_debias=True),
    "domain": jn.DomainBatchNorm(num_domains=2),
    "conditional": jn.ConditionalNorm(num_classes=3, inner=jn.BatchNorm(**EXACT)),
    "rms": jn.BatchNorm(spread="rms"),
    "frozen": jn.BatchNorm(frozen=True),
    "l1": jn.BatchNorm(spread="l1"),
    "never": jn.BatchNorm(min_count=1000),
}


def test_siblings_of_batch_norm_and_their_counts(rng):
    norms = {name: norm.init(4) for name, norm in SIBLINGS.items()}
    params, states = ({name: made[i] for name, made in norms.items()} for i in (0, 1))
    states["rep"] = states["rep"]._replace(count=jnp.full(4, 70.0))
    states["flax"], states["other"] = dict(jn.BatchNorm().init(4)[1]._asdict()), jn.BatchNorm().init(4)[1]
    del states["flax"]["count"]
    x = rng.normal(size=(12, 3, 4)).astype(np.float32) * [1, 2, 3, 4] + 2
    x, labels, weights = x.astype(np.float32), np.arange(12) % 2, rng.random((12, 3), np.float32)

    def apply(states, batch):
        x, labels, weights = batch
        new = {"flax": jn.BatchNorm().apply(None, states["flax"], x, train=False)[1], "other": states["other"]}
        for name, norm in SIBLINGS.items():
            operand = (labels,) if name in ("domain", "conditional") else ()
            more = {} if name in ("conditional", "never") else {"weights": weights}
            new[name] = norm.apply(params[name], states[name], x, *operand, train=True, **more)[1]
        return x, new

    batches = [(x[:6], labels[:6], weights[:6]), (x[6:], labels[6:], weights[6:])]
    new, outcome = models.recompute_stats(apply, states, batches, passes=1)
    flat, w = x.reshape(-1, 4).astype(np.float64), weights.ravel().astype(np.float64)
    average = lambda a, w=w: np.average(a, 0, w)
    spread = lambda a, w=w: average((a - average(a, w)) ** 2, w)
    for name in ("batch_renorm", "rep", "instance", "evo"):
        of = flat[:, 2:] if name == "instance" else flat
        np.testing.assert_allclose(new[name].mean, average(of), rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(new[name].var, spread(of), rtol=2e-6, err_msg=name)
    for found in (new["flax"]["var"], new["conditional"].var):
        np.testing.assert_allclose(found, flat.var(0), rtol=2e-6)
    for k in (0, 1):
        of, theirs = x[k::2].reshape(-1, 4).astype(np.float64), weights[k::2].ravel().astype(np.float64)
        np.testing.assert_allclose(new["domain"].var[k], spread(of, theirs), rtol=2e-6)
    np.testing.assert_allclose(new["rms"].var, average(flat**2), rtol=2e-6)
    counts = {name: None if s.count is None else float(s.count[0]) for name, s in new.items() if name in SIBLINGS}
    assert (counts["instance"], counts["conditional"]) == (pytest.approx(w.sum()), 36), "of elements"
    assert (counts["evo"], counts["rep"], counts["batch_renorm"]) == (2, 70, 0), "of batches; of schedules, kept"
    left = {row.path: row.why for row in outcome.left}
    assert left == {
        "frozen": "BatchNorm is frozen",
        "l1": 'moments hold no spread="l1"',
        "other": "no norm of jaxnorm was called there",
        "never": "36 elements are fewer than min_count=1000",
    }
    for name in left:
        assert new[name] is states[name]


# --- what it is for ---------------------------------------------------------------------------------------------------


def network(params, state, x, train):
    first, second, out = params
    h, n1 = DIGITS.apply(None, state["n1"], x @ first, train=train)
    h, n2 = DIGITS.apply(None, state["n2"], jax.nn.relu(h) @ second, train=train)
    return jax.nn.relu(h) @ out, {"n1": n1, "n2": n2}


DIGITS = jn.BatchNorm(momentum=0.999)


@pytest.fixture(scope="module")
def digits():
    """A network after 40 steps, whose running statistics have hardly moved from 0 and 1; and the data."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, labels = x[order].astype(np.float32), labels[order]
    rng, shapes = np.random.default_rng(1), [(64, 32), (32, 32), (32, 10)]
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in shapes]
    state = {name: DIGITS.init(32)[1] for name in ("n1", "n2")}

    def loss(params, state, x, labels):
        logits, state = network(params, state, x, True)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)), state

    def step(carry, batch):
        params, state = carry
        grads, state = jax.grad(loss, has_aux=True)(params, state, *batch)
        return (jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), state), None

    batches = (x[:1280].reshape(40, 32, 64), labels[:1280].reshape(40, 32))
    params, state = jit_unoptimized(lambda carry: jax.lax.scan(step, carry, batches)[0])((params, state))
    evaluate = jit_unoptimized(lambda p, s, x: network(p, s, x, False)[0])
    accuracy = lambda state: np.mean(np.argmax(evaluate(params, state, x[1280:]), -1) == labels[1280:])
    return params, state, x[:1280], labels[:1280], accuracy


def test_recomputed_statistics_bring_back_what_a_bad_momentum_lost(digits):
    params, state, x, _, accuracy = digits
    apply = lambda state, x: network(params, state, x, False)
    new, outcome = models.recompute_stats(apply, state, x.reshape(4, 320, 64).__iter__)
    assert accuracy(state) < 0.75
    assert accuracy(new) > 0.9
    assert float(outcome["n1"].why.split(", ")[1].split()[0]) > 0.9, "the mean of n1 is still near 0"


def test_update_bn_of_torch_has_another_variance(digits):
    """It averages the unbiased variances of batches, each as much as any other: the population has their means' too."""
    params, state, x, labels, _ = digits
    x = x[np.argsort(labels)]  # as a loader that does not shuffle has them
    batches = [x[i : i + 300] for i in range(0, 1280, 300)]
    first_norm = lambda state, x: DIGITS.apply(None, state, x @ params[0], train=False)
    new, _ = models.recompute_stats(first_norm, state["n1"], batches, passes=1)
    h = x.astype(np.float64) @ np.asarray(params[0], np.float64)
    np.testing.assert_allclose(new.var, h.var(0), rtol=1e-6)

    torch = pytest.importorskip("torch")
    first = torch.nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(np.asarray(params[0]).T.copy()))
    theirs = torch.nn.Sequential(first, torch.nn.BatchNorm1d(32))
    torch.optim.swa_utils.update_bn([torch.from_numpy(batch) for batch in batches], theirs)
    var = theirs[1].running_var.numpy()
    each = [b.astype(np.float64) @ np.asarray(params[0], np.float64) for b in batches]
    np.testing.assert_allclose(var, np.mean([b.var(0, ddof=1) for b in each], 0), rtol=1e-5)
    assert np.abs(var / h.var(0) - 1).max() > 0.2
    np.testing.assert_allclose(theirs[1].running_mean, np.mean([b.mean(0) for b in each], 0), rtol=1e-4)
    off = np.abs(theirs[1].running_mean.numpy() - h.mean(0)) / h.std(0)
    assert off.max() > 0.03, "the last batch, of 80, counts as much as one of 300"


# --- a run that is killed, progress, and wrong calls ------------------------------------------------------------------


class Killed(BaseException):
    pass


def ends(batches):
    yield from batches
    raise Killed


def test_a_run_goes_on_where_it_was_killed(data, tmp_path):
    """The statistics are the same to the bit, and batches that were counted are not read again."""
    kernels, x, mask, _ = data
    batches = [(x[i : i + 3], mask[i : i + 3]) for i in (0, 3, 6, 9)]
    state, file = {"states": {f"n{i}": SPEC.init(WIDTH)[1] for i in range(2)}}, tmp_path / "state.npz"
    apply = lambda v, b: by_specs(kernels[:2], v, b)
    whole, _ = models.recompute_stats(apply, state, batches, passes=2)
    opened = []

    def dies(at):
        for i, batch in enumerate(batches):
            opened.append(i)
            if len(opened) == at:
                raise Killed
            yield batch

    goes_on = dict(passes=2, resume=file, save_every=2)
    with pytest.raises(Killed):  # before batch 3 of pass 2, at which 2 batches of it are saved
        models.recompute_stats(apply, state, lambda: dies(7), **goes_on)
    with pytest.raises(ValueError, match="over other variables"):
        models.recompute_stats(apply, {"states": state["states"] | {"n1": whole["states"]["n1"]}}, batches, **goes_on)
    with pytest.raises(ValueError, match="over 2 batches or more, and there are 1"):
        models.recompute_stats(apply, state, batches[:1], **goes_on)
    gone = [tuple(np.full_like(a, np.nan) if a.dtype != bool else a for a in batch) for batch in batches]
    with pytest.raises(Killed):  # after the last batch
        models.recompute_stats(apply, state, lambda: ends([*gone[:2], *batches[2:]]), **goes_on)
    resumed, outcome = models.recompute_stats(apply, state, gone, **goes_on)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert f"{mask[:12].sum()} elements in 4 batches" in outcome["states/n1"].why
    assert not [*tmp_path.iterdir()]
    file.write_text("no such file")
    with pytest.raises(ValueError, match="is no state of recompute_stats"):
        models.recompute_stats(apply, state, batches, **goes_on)


def test_a_bar_where_a_library_has_one(monkeypatch, capsys):
    assert [*with_bar("tool", [1, 2], "pass 1", None)] == [1, 2]
    assert capsys.readouterr().err == ""
    assert [*with_bar("tool", [1, 2], "pass 1", True, 2)] == [1, 2]
    assert "pass 1" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs rich or tqdm"):
        with_bar("tool", [1, 2], "pass 1", True)


BATCHES, STATE = [np.ones((2, WIDTH), np.float32)], SPEC.init(WIDTH)[1]
APPLY = lambda state, x: SPEC.apply(None, state, x, train=False)


@pytest.mark.parametrize(
    ("apply", "variables", "batches", "options", "error", "message"),
    [
        (APPLY, STATE, iter(BATCHES), {}, TypeError, "read once, and each pass reads it. Write batches=lambda"),
        (APPLY, STATE, [], {}, ValueError, "pass 1 found no batch"),
        (APPLY, STATE, BATCHES[0], {}, TypeError, "batches must be several, got an array"),
        (APPLY, STATE, 3, {}, TypeError, "batches must be iterable, got 3"),
        (APPLY, STATE, BATCHES, {"passes": 0}, ValueError, "passes must be an int >= 1, got 0"),
        (APPLY, {"w": BATCHES[0]}, BATCHES, {}, ValueError, "hold no running statistics"),
        ("model", STATE, BATCHES, {}, TypeError, "apply must be a function of"),
        (lambda state, x: APPLY(state["a"], x)[0], {"a": STATE}, BATCHES, {}, TypeError, "the new state of a. Write"),
        (lambda state, x: APPLY(STATE, x), STATE, BATCHES, {}, ValueError, "called no norm of jaxnorm whose state"),
        (lambda s, x: jn.batch_norm(x, None, s, train=True), STATE, BATCHES, {}, TypeError, "states are for specs"),
    ],
)
def test_wrong_calls_say_what_to_write(apply, variables, batches, options, error, message):
    with pytest.raises(error, match=message):
        models.recompute_stats(apply, variables, batches, **options)


def test_flax_layers_and_batch_stats_that_cannot_change(data):
    x = data[1]
    model = nn.Sequential([nn.BatchNorm(use_running_average=True), jnn.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(TypeError, match=r'mutable=\["batch_stats"\]'):
        models.recompute_stats(model.apply, variables, [x])
    with pytest.raises(TypeError, match="got a linen module"):
        models.recompute_stats(nn.Dense(3), {}, [])
    with pytest.raises(TypeError, match="must be the nnx module itself"):
        models.recompute_stats(APPLY, nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), [x])
    both = nnx.Dict(theirs=nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)), ours=jnnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)))
    _, outcome = models.recompute_stats(lambda m, x: m.theirs(m.ours(x)), both, [x], passes=1)
    assert [(row.path, row.done) for row in outcome] == [("ours", True), ("theirs", False)]


# --- other domains ----------------------------------------------------------------------------------------------------


def test_adapted_statistics(rng):
    """Replaced, mixed linearly in the variance, and merged with the difference of the means: in float64."""
    source, target = rng.normal(size=(50, 3)), rng.normal(size=(10, 3)) * 3 + 2
    state = jn.RunningStats(*(a.astype(np.float32) for a in (source.mean(0), source.var(0))), np.full(3, 50, "f"))
    flax = {"bn": {"mean": state.mean, "var": state.var}}
    m = jn.moments(target.astype(np.float32), 0)
    both = np.concatenate([source, target])
    mixed = lambda p, a, b: p * a + (1 - p) * b
    for options, mean, var in [
        ({}, target.mean(0), target.var(0)),
        ({"prior": 0.7}, mixed(0.7, source.mean(0), target.mean(0)), mixed(0.7, source.var(0), target.var(0))),
        ({"prior_count": 30}, mixed(0.75, source.mean(0), target.mean(0)), mixed(0.75, source.var(0), target.var(0))),
        ({"prior_count": 50, "merge": True}, both.mean(0), both.var(0)),
    ]:
        new = models.adapt_state(state, m, **options)
        np.testing.assert_allclose(new.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.var, var, rtol=1e-5)
        assert new.count[0] == (60 if "merge" in options else 50)
    np.testing.assert_array_equal(models.adapt_state(state, m, merge=True).var, new.var)
    np.testing.assert_allclose(models.adapt_state(flax, {"bn": m})["bn"]["var"], target.var(0), rtol=1e-5)
    by_stats = models.adapt_state(state, jn.RunningStats(m.mean, m.var), prior=0.7)
    np.testing.assert_allclose(by_stats.var, mixed(0.7, source.var(0), target.var(0)), rtol=1e-5)
    empty = jn.Moments(jnp.array([0.0, 10.0, 10.0]), m.mean, m.m2)
    assert models.adapt_state(state, empty, prior_count=5).mean[0] == state.mean[0], "it saw nothing"
    with pytest.raises(ValueError, match="prior must be from 0 to 1, got 16"):
        models.adapt_state(state, m, prior=16)
    with pytest.raises(ValueError, match="the state has no count"):
        models.adapt_state(flax, {"bn": m}, merge=True)
    with pytest.raises(ValueError, match="the new statistics have no count"):
        models.adapt_state(state, jn.RunningStats(m.mean, m.var), prior_count=3)
    with pytest.raises(ValueError, match="which needs no prior_count"):
        models.adapt_state(state, m, prior=0.5, merge=True)


def test_masks_of_batch_norms(data):
    """Of batch norms alone: a layer norm has a scale as well, and a parameter of the user's own may be called so."""
    optax = pytest.importorskip("optax")
    model = nnx.Dict(
        bn=jnnx.BatchInstanceNorm(WIDTH, rngs=nnx.Rngs(0)), ln=jnnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0)),
        scale=nnx.Param(jnp.ones(WIDTH)),
    )  # fmt: skip
    params, state = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    paths = lambda mask: {"/".join(map(str, path)) for path, m in nnx.to_flat_state(mask) if m.get_value()}
    tent = models.tent_mask(params, state)
    assert paths(tent) == {"bn/scale", "bn/bias"}
    assert paths(models.fedbn_mask(params, state)) == {"bn/scale", "bn/bias", "bn/rho"}
    others = jax.tree.map(lambda trained: not trained, tent)
    optimizer = optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), others))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    assert (updates["bn"]["scale"][...] == -1).all()
    assert not updates["ln"]["scale"][...].any()
    with pytest.raises(ValueError, match="is at the path of a running statistic"):
        models.tent_mask({"w": 1.0}, {"bn": {"mean": 0.0, "var": 1.0}})
