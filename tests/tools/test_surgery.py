"""Surgery: norms replaced in linen models, nnx models and trees of specs, and what of them is kept."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.jit import jit_unoptimized

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import models
from jaxnorm import nnx as jnnx
from jaxnorm._layers import known

X = np.random.default_rng(0).normal(1.0, 2.0, (6, 4)).astype(np.float32)
KEY = jax.random.key(0)


class Block(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        return self.norm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))


class Linen(nn.Module):
    """Layers by setup, by `compact`, under scan and remat and jit; called twice."""

    norm: type = nn.BatchNorm

    def setup(self):
        self.block, self.last = Block(self.norm), jnn.LayerNorm()

    def __call__(self, x, train=False):
        return self.last(self.encode(self.last(x), train))

    def encode(self, x, train=False):
        return self.block(x, train)


class Row(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, _):
        return self.norm(use_running_average=True)(x), None


class Lifted(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        rows = nn.scan(nn.remat(Row), variable_axes=axes, split_rngs={"params": True}, length=2)
        return nn.jit(Row)(self.norm)(rows(self.norm)(x, None)[0], None)[0]


@functools.cache
def linen():
    """The model and its first variables."""
    return Linen(), jit_unoptimized(Linen().init)(KEY, X)


def filled(variables):
    """Other numbers than those that layers start with."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.uniform(0.5, 2.0, a.shape), a.dtype) for a in leaves])


def close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), a, b)


def group(use_running_average, momentum):
    return jnn.GroupNorm(num_groups=2, epsilon=1e-5, name="BatchNorm_0")


def debiased(**options):
    return jnn.BatchNorm(zero_debias=True, epsilon=1e-5, name="BatchNorm_0", **options)


KINDS = {  # by kind: (key, value, the layer written out)
    "function": (nn.BatchNorm, lambda old: dataclasses.replace(old, zero_debias=True), debiased),
    "spec": (jn.BatchNorm, jn.GroupNorm(num_groups=2, epsilon=1e-5), group),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_linen_model_is_the_model_with_the_new_layers_written_out(kind):
    key, value, layer = KINDS[kind]
    (model, variables), written = linen(), Linen(norm=layer)
    variables = filled(variables)
    before = jax.tree.map(np.asarray, variables)
    new = models.swap(model, {key: value}, variables, X, train=False)
    close(variables, before)
    assert jax.tree.structure(new.variables) == jax.tree.structure(jax.eval_shape(written.init, KEY, X))
    norm = new.variables["params"]["block"]["BatchNorm_0"]
    assert norm["scale"] is variables["params"]["block"]["BatchNorm_0"]["scale"]
    run = lambda model: jit_unoptimized(lambda v: model.apply(v, X, train=True, mutable=["batch_stats"]))(new.variables)
    close(run(new.model), run(written))
    encoded = written.apply(new.variables, X, method="encode")
    close(new.model.apply(new.variables, X, method="encode"), encoded)
    close(new.model.apply(new.variables, X, method=Linen.encode), encoded)


def test_a_swapped_linen_model_is_used_as_the_model_is():
    (model, variables), rules = linen(), {"last": jn.DynamicTanh}
    new = models.swap(model, rules, variables, X)
    assert isinstance(new.model, Linen)
    assert pickle.loads(pickle.dumps(new.model)) == new.model
    assert hash(new.model) == hash(models.swap(model, rules, variables, X).model)
    assert "alpha" in new.model.tabulate(KEY, X, console_kwargs={"width": 200})
    assert str(new.outcome).startswith("swap: 1 changed, 1 left alone")
    first = jax.eval_shape(models.Swapped(model, rules).init, KEY, X)
    assert jax.tree.structure(first) == jax.tree.structure(new.variables)
    parent = nn.Sequential([new.model])  # a part of another model
    assert jax.eval_shape(parent.init, KEY, X)["params"]["layers_0"]["last"]["alpha"].shape == ()


def test_back_again_is_the_model_before():
    model, variables = linen()
    variables = filled(variables)
    new = models.swap(model, {"block/*": jn.BatchRenorm, "last": jn.RMSNorm(use_bias=False)}, variables, X)
    assert "bias" not in new.variables["params"]["last"]
    assert new.outcome["last"].why == "kept scale; dropped bias"
    assert new.outcome["block/BatchNorm_0"].why == "kept scale, bias, mean, var; new count: counts from 0 on"
    again = models.swap(
        new.model, {jn.BatchRenorm: jn.BatchNorm(momentum=0.9), "last": jn.LayerNorm()}, new.variables, X
    )
    variables["params"]["last"]["bias"] = jnp.zeros(4)
    close(again.variables, variables)
    close(again.model.apply(variables, X), model.apply(variables, X))


def test_layers_of_flax_become_those_of_jaxnorm():
    model, variables = linen()
    variables = filled(variables)
    new = models.swap(model, {nn.BatchNorm: jn.BatchNorm}, variables, X)
    assert new.outcome["block/BatchNorm_0"].what == "Flax's BatchNorm -> jaxnorm's"
    close(new.variables, variables)
    wide = models.swap(new.model, {jn.BatchNorm: jn.BatchNorm(axis_name="data", momentum=0.9)}, variables, X).model
    once = lambda model, x: model.apply(variables, x, True, method="encode", mutable=["batch_stats"])
    both = lambda: (jax.vmap(lambda x: once(wide, x), axis_name="data")(X.reshape(2, 3, 4)), once(model, X))
    (y, updates), (want, of_flax) = jit_unoptimized(both)()  # on two devices, and by Flax in one piece
    np.testing.assert_allclose(y.reshape(6, 4), want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(of_flax), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-5)
    rngs = nnx.Rngs(0)
    module = nnx.Sequential(
        nnx.GroupNorm(4, num_groups=2, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), Double(4, rngs=rngs)
    )
    ours = models.swap(module, {nnx.Module: lambda old: old})
    assert [row.path for row in ours.outcome.changed] == ["layers/0", "layers/1"]  # not one with a call of its own
    assert all(type(layer) is jnnx.Norm for layer in ours.model.layers[:2])
    assert ours.model.layers[0].num_features == 4


class Double(nnx.LayerNorm):
    def __call__(self, x, *, mask=None):
        return 2.0 * super().__call__(x, mask=mask)


def test_layers_of_flax_and_of_jaxnorm_have_their_specs():
    of = known.spec_of
    for layers in (nn, jnn):
        assert of(layers.BatchNorm(axis=1, momentum=0.5, axis_name="d")) == jn.BatchNorm(
            axis=1, momentum=0.5, axis_name="d"
        )
        assert of(layers.LayerNorm(reduction_axes=(-2, -1), use_bias=False)) == jn.LayerNorm(
            axis=(-2, -1), epsilon=1e-6, use_bias=False
        )
        assert of(layers.GroupNorm(num_groups=None, group_size=2)) == jn.GroupNorm(num_groups=None, group_size=2)
        assert of(layers.InstanceNorm(feature_axes=1)) == jn.InstanceNorm(axis=1)
        assert of(layers.RMSNorm(dtype=jnp.bfloat16)) == jn.RMSNorm(dtype=jnp.bfloat16)
    assert of(nnx.GroupNorm(4, group_size=2, num_groups=None, rngs=nnx.Rngs(0))) == jn.GroupNorm(num_groups=2)
    assert of(jnn.Norm(jn.RevIN())) == jn.RevIN()
    assert of(nn.Dense(3)) is None


def test_layers_under_scan_remat_and_jit_are_replaced():
    model, rules = Lifted(), {"**": jn.BatchNorm(spread="none", use_scale=False)}
    variables = filled(model.init(KEY, X))
    plain = model.apply(variables, X)  # compiled by nn.jit, before there is another model
    new = models.swap(model, rules, variables, X)
    stack = new.variables["params"]["ScanCheckpointRow_0"]["BatchNorm_0"]
    assert jax.tree.map(jnp.shape, stack) == {"bias": (2, 4)}
    layer = lambda **options: jnn.BatchNorm(spread="none", use_scale=False, name="BatchNorm_0", **options)
    close(new.model.apply(new.variables, X), Lifted(layer).apply(new.variables, X))
    close(model.apply(variables, X), plain)
    with_scale = models.swap(new.model, {"**": jn.BatchNorm()}, new.variables, X)
    assert with_scale.variables["params"]["ScanCheckpointRow_0"]["BatchNorm_0"]["scale"].tolist() == [[1.0] * 4] * 2


def test_a_class_that_flax_transforms_and_parameters_with_metadata():
    boxed = nn.Partitioned(jnp.arange(4.0), names=("model",))
    model = nn.remat(Row)(lambda use_running_average: jnn.LayerNorm(name="norm"))
    variables = {"params": {"norm": {"scale": boxed, "bias": jnp.ones(4)}}}
    new = models.swap(model, {"norm": jn.RMSNorm(scale_offset=1.0, use_bias=False)}, variables, X, None)
    scale = new.variables["params"]["norm"]["scale"]
    assert scale.names == ("model",)
    close(scale.value, jnp.arange(4.0) - 1.0)
    want = jn.rms_norm(X, boxed.value)
    close(new.model.apply(new.variables, X, None)[0], want)


class Nnx(nnx.Module):
    def __init__(self, first=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), first(4, rngs=rngs)])
        self.shared = self.last = jnnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, use_running_average=None):
        x = self.blocks[0](self.shared(x))
        return self.head(self.last(self.blocks[1](x, use_running_average)))


def test_nnx_models_have_new_layers_in_a_copy_or_in_place():
    model = Nnx()
    nnx.update(model, filled(nnx.state(model)))
    state = nnx.state(model)
    rules = {nnx.BatchNorm: jn.GroupNorm(num_groups=2), "last": jn.DynamicTanh, "shared": jn.DynamicTanh}
    rules.pop("last" if "shared" in models.swap(model, {jn.LayerNorm: jn.RMSNorm}).outcome.rows[0].path else "shared")
    new = models.swap(model, rules)
    close(nnx.state(model), state)
    assert isinstance(model.blocks[1], nnx.BatchNorm)
    assert new.model.shared is new.model.last
    assert new.model.last.spec == jn.DynamicTanh()
    close(new.model.blocks[1].scale[...], model.blocks[1].scale[...])
    written = models.swap(model, rules).model
    written.blocks[1] = jnnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    written.blocks[1].scale, written.blocks[1].bias = new.model.blocks[1].scale, new.model.blocks[1].bias
    forward = lambda x: written.head(written.last(written.blocks[1](written.blocks[0](written.shared(x)))))
    close(nnx.jit(lambda model, x: model(x, True))(new.model, X), forward(X))  # called as a batch norm is
    new.model.train()
    new.model.eval()

    scale = model.blocks[1].scale
    assert models.swap(model, {"blocks/1": jn.BatchRenorm}, in_place=True).model is model
    assert model.blocks[1].spec.epsilon == 1e-5
    assert model.blocks[1].scale is scale
    again = models.swap(model, {"blocks/*": jn.BatchNorm(epsilon=1e-5)}).model
    assert type(again.blocks[1]) is jnnx.Norm
    kept = nnx.to_pure_dict(nnx.state(again))
    close(kept, nnx.to_pure_dict(state) | {"blocks": kept["blocks"]})
    close(kept["blocks"][1], nnx.to_pure_dict(state)["blocks"][1])


def test_stacked_nnx_layers_stay_stacked():
    make = nnx.vmap(lambda rngs: nnx.Sequential(nnx.LayerNorm(4, use_bias=False, rngs=rngs)), in_axes=0)
    new = models.swap(make(nnx.Rngs(0).split(2)), {"**": jn.LayerNorm()}).model.layers[0]
    assert (new.scale.shape, new.bias.shape) == ((2, 4), (2, 4))


SPECS = {"a": jn.BatchNorm(momentum=None), "b": {"c": jn.LayerNorm(scale_offset=1.0)}, "d": [jn.RMSNorm()]}


def of_specs():
    made = jax.tree.map(lambda spec: spec.init(4), SPECS)
    part = lambda i: filled(jax.tree.map(lambda spec, both: both[i], SPECS, made, is_leaf=lambda t: type(t) is tuple))
    return part(0), {"a": part(1)["a"]}  # states of norms without one are left out


def test_trees_of_specs_have_new_specs_parameters_and_states():
    params, state = of_specs()
    rules = {
        lambda path, spec: path == "a": jn.DomainBatchNorm(num_domains=2, momentum=None, use_domain_params=True),
        "b/**": dataclasses.replace(SPECS["b"]["c"], scale_offset=0.0),
        jn.RMSNorm: None,
    }
    new = models.swap(SPECS, rules, (params, state))
    assert new.model["d"] == SPECS["d"]
    after, statistics = new.variables
    close(after["a"].scale, jnp.broadcast_to(params["a"].scale, (2, 4)))
    close(statistics["a"], jax.tree.map(lambda a: jnp.broadcast_to(a, (2, 4)), state["a"]))
    close(after["b"]["c"], params["b"]["c"]._replace(scale=params["b"]["c"].scale + 1.0))
    assert after["d"] is params["d"]
    y = new.model["b"]["c"].apply(after["b"]["c"], (), X)[0]
    np.testing.assert_allclose(y, SPECS["b"]["c"].apply(params["b"]["c"], (), X)[0], rtol=1e-5, atol=1e-6)
    restored = {"a": params["a"]._asdict()}, {"a": state["a"]._asdict()}  # as a checkpoint has them
    as_dicts = models.swap({"a": SPECS["a"]}, {"a": jn.GroupNorm(num_groups=2)}, restored)
    assert as_dicts.variables == (restored[0], {"a": ()})
    assert models.swap(SPECS, {"a": jn.EvoNormB}).variables is None


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        (jn.BatchNorm(), jn.BatchNorm(axis_name="data", sync=2), "kept scale, bias, mean, var"),
        (jn.BatchNorm(), jn.BatchNorm(virtual_batch_size=2, frozen=True), "kept scale, bias, mean, var"),
        (jn.BatchNorm(), jn.BatchNorm(spread="l1"), "kept scale, bias; new mean, var"),
        (jn.BatchNorm(), jn.BatchNorm(momentum=None), "kept scale, bias, mean, var; new count: counts from 0 on"),
        (jn.BatchNorm(momentum=None), jn.BatchRenorm(), "kept scale, bias, mean, var; new count: counts from 0 on"),
        (jn.BatchRenorm(), jn.BatchNorm(zero_debias=True), "kept scale, bias, mean, var, count"),
        (
            jn.BatchNorm(momentum=None),
            jn.ConditionalNorm(num_classes=3, inner=jn.BatchNorm(momentum=None)),
            "kept scale, bias, mean, var, count",
        ),
        (jn.BatchNorm(), jn.IterNorm(), "kept scale, bias; new mean, matrix; dropped var"),
        (jn.BatchNorm(), jn.GlobalResponseNorm(), "kept bias; new scale; dropped mean, var"),  # its scale starts at 0
        (jn.DynamicTanh(), jn.SeeDNorm(), "kept scale; new alpha, beta; dropped bias"),  # two kinds of alpha
        (jn.LayerNorm(), jn.ScaleNorm(), "new g; dropped scale, bias"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_what_means_the_same_is_kept(old, new, kept):
    params, state = filled(old.init(4))
    swapped = models.swap(old, {"": new}, (params, state))
    assert swapped.outcome[""].why == kept
    assert jax.tree.map(jnp.shape, swapped.variables) == jax.tree.map(jnp.shape, new.init(4))


def test_frozen_norms_stay_frozen_in_training():
    model = Nnx()
    new = models.freeze(model, "blocks/**").model
    before = np.asarray(new.blocks[1].mean[...])
    new.train()
    y = new(X)
    np.testing.assert_array_equal(new.blocks[1].mean[...], before)
    model.eval()
    close(y, model(X))
    thawed = models.unfreeze(new, ["blocks/**"])
    assert thawed.outcome["blocks/1"].what == "BatchNorm: frozen=True -> False"
    thawed.model(X)
    assert np.any(thawed.model.blocks[1].mean[...] != before)

    model, variables = linen()
    variables = filled(variables)
    new = models.freeze(model, "**", variables, X)
    y, after = new.model.apply(new.variables, X, train=True, mutable=["batch_stats"])
    close(after["batch_stats"], variables["batch_stats"])
    close(y, model.apply(variables, X))
    assert new.outcome["last"].why == "it has no running statistics"
    inside = models.freeze(jn.ConditionalNorm(num_classes=2, inner=jn.BatchNorm()), "")
    assert inside.model.inner.frozen
    assert not models.unfreeze(inside.model, "").model.inner.frozen


def test_what_a_new_norm_needs_is_passed_around_the_model():
    (model, variables), domain = linen(), jnp.array([0, 0, 0, 1, 1, 1])
    with models.passing(domain=domain):
        new = models.swap(model, {jn.BatchNorm: jn.DomainBatchNorm(num_domains=2, epsilon=1e-5)}, variables, X)
    tables = {"mean": jnp.array([[0.0] * 4, [9.0] * 4]), "var": jnp.ones((2, 4))}
    swapped = {**new.variables, "batch_stats": {"block": {"BatchNorm_0": tables}}}

    @jit_unoptimized
    def encode(variables, domain):
        with models.passing(domain=domain):
            return new.model.apply(variables, X, method="encode")

    plain = model.apply(variables, X, method="encode")
    for ids in (domain, 1 - domain):
        close(encode(swapped, ids), plain - np.float32(9.0 / np.sqrt(1.0 + 1e-5)) * np.float32(ids)[:, None])
    with pytest.raises(TypeError, match=r"DomainBatchNorm needs domain.*models.passing\(domain"):
        new.model.apply(new.variables, X)

    module = models.swap(Nnx(), {jn.LayerNorm: jn.BatchNorm}).model
    with models.passing(use_running_average=True):
        close(module.shared(X), X / np.sqrt(1.0 + 1e-6))
    close(module.shared(X).mean(0), np.zeros(4))  # trains, as a new nnx layer does


LABELS = lambda params: jax.tree_util.tree_map_with_path(lambda keys, _: "ab"["block" in str(keys[0])], params)
OPTIMIZERS = {
    "chain": optax.chain(optax.clip(1.0), optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p))),
    "masked": optax.masked(optax.adagrad(0.1), lambda p: jax.tree.map(lambda a: a.ndim == 1, p)),
    "groups": optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}, LABELS),
    "factored": optax.adafactor(0.1),
}


@jax.numpy_dtype_promotion("standard")  # which optax needs
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_mended(name):
    tx, (model, variables) = OPTIMIZERS[name], linen()
    params = variables["params"]
    grads = jax.tree.map(lambda a: jnp.full_like(a, 0.5), params)
    state = jit_unoptimized(lambda params: tx.update(grads, tx.init(params), params)[1])(params)
    new = models.swap(model, {"last": jn.DynamicTanh(use_bias=False), "**": jn.GroupNorm(num_groups=2)}, variables, X)
    after = new.variables["params"]
    mended, first = new.mend(state, tx), tx.init(after)
    assert jax.tree.structure(mended) == jax.tree.structure(first)
    old = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    for (keys, leaf), start in zip(
        jax.tree_util.tree_flatten_with_path(mended)[0], jax.tree.leaves(first), strict=True
    ):
        np.testing.assert_array_equal(leaf, start if "alpha" in str(keys) else old[keys])
    jax.eval_shape(tx.update, after, mended, after)


@jax.numpy_dtype_promotion("standard")
def test_an_nnx_optimizer_is_mended():
    model = Nnx()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    nnx.jit(lambda o, m: o.update(m, nnx.state(m, nnx.Param)))(optimizer, model)
    new = models.swap(model, {"blocks/*": jn.GroupNorm(num_groups=2), jn.LayerNorm: jn.DynamicTanh})
    mended = new.mend(optimizer)
    assert int(mended.step[...]) == 1
    mu = mended.opt_state[0].mu
    close(mu["blocks"][1]["scale"][...], optimizer.opt_state[0].mu["blocks"][1]["scale"][...])
    assert np.any(mu["blocks"][1]["scale"][...])
    assert not np.any(mu["last" if "last" in mu else "shared"]["alpha"][...])
    first = nnx.Optimizer(new.model, optimizer.tx, wrt=nnx.Param)
    assert jax.tree.structure(nnx.state(mended)) == jax.tree.structure(nnx.state(first))
    grouped = lambda model: optax.multi_transform(
        {"norm": optax.adam(0.1), "other": optax.sgd(0.1)}, models.label_params(model)
    )
    optimizer = nnx.Optimizer(model, grouped(model), wrt=nnx.Param)
    with pytest.raises(ValueError, match="or trees of the new ones"):
        new.mend(optimizer)
    assert new.mend(optimizer, grouped(new.model)).wrt is nnx.Param


WRONG = {
    "no rules": (lambda m, v: models.swap(m, {}, v, X), TypeError, "must map paths, kinds or predicates"),
    "key": (lambda m, v: models.swap(m, {3: jn.RMSNorm}, v, X), TypeError, "3 is no pattern"),
    "layer": (lambda m, v: models.swap(m, {"**": nn.LayerNorm}, v, X), TypeError, "Write jaxnorm.LayerNorm"),
    "value": (lambda m, v: models.swap(m, {"**": "rms"}, v, X), TypeError, "must be a spec, a class of specs"),
    "path": (lambda m, v: models.swap(m, {"blok/**": jn.RMSNorm}, v, X), ValueError, "fits no norm.*last: LayerNorm"),
    "kind": (lambda m, v: models.swap(m, {jn.RevIN: jn.RMSNorm}, v, X), ValueError, "RevIN fits no norm"),
    "returned": (lambda m, v: models.swap(m, {"**": lambda old: 3}, v, X), TypeError, "returned 3"),
    "predicate": (lambda m, v: models.swap(m, {(lambda p, s: 1): jn.RMSNorm}, v, X), TypeError, "Return True or"),
    "variables": (lambda m, v: models.swap(m, {"**": jn.RMSNorm}), TypeError, "models.Swapped"),
    "example": (lambda m, v: models.swap(m, {"**": jn.RMSNorm}, v), TypeError, "variables, x"),
    "params": (lambda m, v: models.swap(m, {"**": jn.RMSNorm}, v["params"], X), ValueError, "lack 'scale' of"),
    "bound": (lambda m, v: models.swap(m.bind(v), {"**": jn.RMSNorm}, v, X), ValueError, "bound to variables"),
    "model": (lambda m, v: models.swap(v, {"**": jn.RMSNorm}), TypeError, "not its variables"),
    "in place": (lambda m, v: models.swap(m, {"**": jn.RMSNorm}, v, X, in_place=True), TypeError, "for nnx modules"),
    "nnx": (lambda m, v: models.swap(Nnx(), {"**": jn.RMSNorm}, v), TypeError, "an nnx model has its variables"),
    "itself": (
        lambda m, v: models.swap(Nnx().last, {"": jn.RMSNorm}, in_place=True), ValueError, "is itself the norm"),
    "axes": (
        lambda m, v: models.swap(nnx.LayerNorm(4, feature_axes=0, rngs=nnx.Rngs(0)), {"": jn.RMSNorm}),
        ValueError, "has one axis for both"),
    "specs": (lambda m, v: models.swap(SPECS, {"a": jn.EvoNormB}, X), TypeError, r"are \(params, state\)"),
    "unknown": (
        lambda m, v: models.swap(jn.LayerNorm(use_scale=False, use_bias=False), {"": jn.RMSNorm()}, (None, ())),
        ValueError, "no array that says how many features"),
    "where": (lambda m, v: models.freeze(m, 3, v, X), TypeError, "where must be a pattern"),
    "called with": (
        lambda m, v: models.swap(Nnx(), {"blocks/**": jn.LayerNorm}).model.blocks[1](X, lengths=3),
        TypeError, "lengths"),
    "mend": (lambda m, v: models.swap(m, {"**": None}, v, X).mend(()), TypeError, "Write new.mend"),
    "other state": (
        lambda m, v: models.swap(m, {"**": None}, v, X).mend(optax.sgd(0.1).init(v["params"]), optax.adam(0.1)),
        ValueError, "belong together"),
    "old mask": (
        lambda m, v: models.swap(m, {"last": jn.DynamicTanh}, v, X).mend(
            (), optax.masked(optax.adam(0.1), jax.tree.map(lambda a: True, v["params"]))),
        ValueError, "functions of the parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_surgery_says_what_to_write(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call(*linen())


def test_a_failing_swap_in_place_changes_nothing():
    model = Nnx()
    state, first = nnx.state(model), model.blocks[1]
    with pytest.raises(ValueError, match="groups"):
        models.swap(model, {jn.LayerNorm: jn.RMSNorm, jn.BatchNorm: jn.GroupNorm(num_groups=3)}, in_place=True)
    assert model.blocks[1] is first
    assert type(model.last) is jnnx.LayerNorm
    close(nnx.state(model), state)
