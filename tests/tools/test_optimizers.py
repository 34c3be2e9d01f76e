"""Labels and masks say what layers say, not what names say; averages of a model with its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.jit import jit_unoptimized

import jaxnorm as jn
from examples import optimizers as example
from jaxnorm import linen as jnn
from jaxnorm import models, weights
from jaxnorm import nnx as jnnx

X = np.ones((2, 4), np.float32)
KEY = jax.random.key(0)


class Own(nn.Module):
    """A user's layer with a parameter called scale, in a module called LayerNorm_0."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (1, 4)) + self.param("bias", nn.initializers.zeros, (1, 4))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = Own(name="LayerNorm_0")(x)
        x = nn.BatchNorm(use_running_average=not train, name="flax")(x)
        x = jnn.LayerNorm(param_names={"scale": "kernel"}, name="named")(x)
        x = jnn.SeeDNorm(name="seed")(x)
        x = jnn.Reparametrized(nn.Dense(4), weights.DoRA(rank=1), name="dora")(x)
        x = jnn.WeightNorm(nn.Dense(4), name="wn")(x)
        return nn.Embed(3, 4, name="head").attend(x)


def flat(tree):
    return {jn._core.paths.path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_labels_of_linen_models_are_those_of_the_layers():
    variables = jax.eval_shape(Linen().init, KEY, X)
    labels = models.label_params(Linen(), variables, X, train=False)
    assert jax.tree.structure(labels) == jax.tree.structure(variables["params"])
    others = {"LayerNorm_0/scale", "LayerNorm_0/bias", "head/embedding"}
    others |= {"Dense_0/bias", "Dense_1/bias", "Dense_1/kernel", "dora/Dense_0/kernel/a", "dora/Dense_0/kernel/b"}
    assert flat(labels) == {
        **dict.fromkeys(others, "other"),
        "flax/scale": "norm", "flax/bias": "norm", "named/kernel": "norm", "named/bias": "norm",
        "seed/scale": "norm", "seed/alpha": "norm_weight", "seed/beta": "norm_weight",
        "Dense_0/kernel": "fixed", "dora/Dense_0/kernel/magnitude": "gain", "wn/Dense_1/kernel/scale": "gain",
    }  # fmt: skip
    mask = flat(models.decay_mask(Linen(), variables["params"], X))
    assert {path for path, decays in mask.items() if decays} == others | {"seed/alpha", "seed/beta"}
    only = flat(models.norm_mask(Linen(), jn.BatchNorm, variables, X))
    assert {path for path, of in only.items() if of} == {"flax/scale", "flax/bias"}
    swapped = models.swap(Linen(), {"flax": jn.SeeDNorm, "seed": jn.RMSNorm()}, variables, X)
    labels = flat(models.label_params(swapped.model, swapped.variables, X))
    assert labels["flax/alpha"] == "norm_weight"
    assert labels["seed/scale"] == "norm"


class NnxOwn(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(4))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.own, self.flax = NnxOwn(), nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([jnnx.SeeDNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.wn = jnnx.WeightNorm(nnx.Linear(4, 2, rngs=rngs), rngs=rngs)
        self.sigma = jnnx.Reparametrized(nnx.Linear(4, 2, rngs=rngs), weights.SigmaReparam(), rngs=rngs)


def test_labels_of_nnx_models_fit_their_parameters():
    model = nnx.eval_shape(Nnx)
    labels = models.label_params(model)
    params = jax.tree.map(lambda a: jnp.ones(a.shape), nnx.state(model, nnx.Param))
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    found = {path: label for path, label in flat(labels).items() if label != "other"}
    added = {path for path in found if "sigma/added" in path}
    assert len(added) == 1
    assert found == {
        "flax/scale": "norm", "flax/bias": "norm", "layers/0/scale": "norm", "layers/0/alpha": "norm_weight",
        "layers/0/beta": "norm_weight", "wn/scales/('kernel',)": "gain", "sigma/layer_instance/kernel": "undecayed",
        **dict.fromkeys(added, "gain"),
    }  # fmt: skip
    adamw = optax.adamw(0.1, weight_decay=0.5, mask=models.decay_mask(model))
    still = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(lambda s, p: adamw.update(s, adamw.init(p), p))(still, params)
    moved = {path for path, update in flat(updates).items() if np.any(update)}
    assert moved <= flat(params).keys() - {path for path, label in found.items() if label != "norm_weight"}
    assert {"own/scale", "layers/1/kernel", "layers/0/alpha", "wn/layer_instance/kernel"} <= moved


def test_labels_of_specs_and_of_parameters_alone():
    specs = {"norm": jn.QKNorm(), "bn": jn.BatchNorm(), "w": weights.SigmaReparam()}
    made = lambda: {"norm": specs["norm"].init((4,))[0], "bn": specs["bn"].init(4)[0], "w": specs["w"].init(X)[0]}
    params = {**jax.eval_shape(made), "own": {"scale": X}}
    labels = models.label_params(params)
    assert set(jax.tree.leaves(labels["norm"])) == {"norm"}
    assert labels["w"] == weights.SigmaReparamParams("undecayed", "gain")
    assert labels["own"] == {"scale": "other"}
    as_dicts = {name: value if name == "own" else value._asdict() for name, value in params.items()}
    as_dicts["norm"] = {"q_norm": {"scale": X}, "k_norm": {"scale": X}}  # where layers keep them
    named = models.label_params(specs, as_dicts)
    assert named["norm"] == {"q_norm": {"scale": "norm"}, "k_norm": {"scale": "norm"}}
    assert named["bn"] == {"scale": "norm", "bias": "norm"}
    assert named["w"] == {"w": "undecayed", "gamma": "gain"}
    assert named["own"] == {"scale": "other"}


WRONG = {
    "dicts": (lambda: models.decay_mask({"scale": X}), ValueError, "do not say which belong to norms"),
    "example": (
        lambda: models.decay_mask(Linen(), {"params": {"encoder": {"kernel": X}}}, X),
        ValueError, "does not reach 'encoder/kernel'"),
    "variables": (lambda: models.decay_mask(Linen(), X), TypeError, "needs its variables"),
    "nnx": (lambda: models.decay_mask(NnxOwn(), {"a": X}), TypeError, "an nnx model has its parameters"),
    "specs": (lambda: models.decay_mask(jn.LayerNorm(), {"kernel": X}), ValueError, "has no parameter 'kernel'"),
    "more": (lambda: models.decay_mask({"a": jn.LayerNorm()}, {"a": None}, X), TypeError, "only linen models"),
    "where": (lambda: models.norm_mask(NnxOwn(), 3), TypeError, "where must be"),
    "none": (lambda: models.norm_mask(NnxOwn(), jn.RevIN), ValueError, "RevIN fits no norm"),
    "trees": (lambda: models.ema_update({"a": X}, {"b": X}, 0.9), ValueError, r"differ in structure, at \['a', 'b'\]"),
    "decay": (lambda: models.ema_update({"a": X}, {"a": X}, 1.5), ValueError, "from 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_what_to_write(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_an_average_has_averages_of_statistics_and_the_latest_of_all_else(rng):
    draw = lambda *shape: rng.uniform(0.5, 2.0, shape).astype(np.float32)
    stats = lambda: jn.RunningStats(draw(2), draw(2), draw(2))
    tree = lambda step: {
        "params": {"w": jnp.asarray(draw(2), jnp.bfloat16), "count": draw(2)},  # a parameter of this name
        "batch_stats": {"bn": stats()._asdict(), "sn": {"l/kernel/u": draw(1, 2), "l/kernel/sigma": draw()}},
        "specs": stats(), "vectors": {"u": draw(2), "v": draw(3)},
        "step": np.int32(step),
    }  # fmt: skip
    seen = [tree(step) for step in range(4)]
    average = models.ema_init(seen[0])
    want = jax.tree.map(lambda a: np.float64(a), seen[0])
    update = jit_unoptimized(models.ema_update)
    for variables in seen[1:]:
        average = update(average, variables, 0.75)
        want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * np.float64(b), want, variables)
    latest = seen[-1]
    want["step"], want["vectors"] = latest["step"], latest["vectors"]
    want["batch_stats"]["sn"] = latest["batch_stats"]["sn"]
    want["batch_stats"]["bn"]["count"] = latest["batch_stats"]["bn"]["count"]
    want["specs"] = want["specs"]._replace(count=latest["specs"].count)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, want)
    assert average["params"]["w"].dtype == np.float32

    make = lambda: jnnx.SpectralNorm(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    state = nnx.state(nnx.eval_shape(make), (nnx.Param, nnx.BatchStat))
    first = models.ema_init(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state))
    after = jax.tree.map(lambda a: a + 1.0, first)
    average = flat(models.ema_update(first, after, 0.5))
    for path, value in flat(after).items():
        np.testing.assert_allclose(average[path], value if "batch_stats" in path else value - 0.5, atol=1e-6)


def test_the_example_trains_each_group_by_its_own_rule(monkeypatch):
    monkeypatch.setattr(jax, "jit", jit_unoptimized)  # which compiles in a third of the time
    first, last = example.main(steps=30)
    assert last < 0.7 * first
