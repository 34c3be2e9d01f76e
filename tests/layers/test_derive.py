"""Layers derived from specs: `Norm(spec)`, names that fall through to Flax, and what every layer takes besides."""

from __future__ import annotations

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

KEY = jax.random.key(0)
FLAX = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
SPECS = [jn.LayerNorm(epsilon=1e-3), jn.RMSNorm(scale_offset=1.0), jn.GroupNorm(num_groups=2), jn.InstanceNorm(),
         jn.BatchNorm(momentum=0.5), jn.BatchNorm(momentum=None, use_bias=False)]  # fmt: skip
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6)), jnp.float32)


def name_of(spec) -> str:
    return type(spec).__name__


# --- names and classes ------------------------------------------------------------------------------------------------


def test_other_names_are_flax_s():
    assert jnn.Dense is nn.Dense
    assert jnn.compact is nn.compact
    assert jnnx.Linear is nnx.Linear
    assert jnnx.Rngs is nnx.Rngs
    assert "Dense" in dir(jnn)
    for module in (jnn, jnnx):
        with pytest.raises(AttributeError, match="no_such_layer"):
            _ = module.no_such_layer
        assert not hasattr(module, "__path__")


def test_a_real_model_changes_one_import():
    """`nn` is jaxnorm's or Flax's: the same file, the same variables, the same output."""

    def model(nn):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.LayerNorm(name="norm")(nn.Dense(8)(x))
                return nn.RMSNorm()(nn.relu(x))

        return Block()

    with jax.numpy_rank_promotion("allow"):
        theirs, variables = model(nn).init_with_output(KEY, X)
        ours = model(jnn).apply(variables, X)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FLAX)
def test_layers_are_instances_of_flax_s_classes(name):
    assert isinstance(getattr(jnn, name)(), getattr(nn, name))
    options = dict(num_groups=2) if name == "GroupNorm" else {}
    assert isinstance(getattr(jnnx, name)(6, **options, rngs=nnx.Rngs(0)), getattr(nnx, name))


@pytest.mark.parametrize("name", FLAX)
def test_signatures_begin_with_flax_s(name):
    """Names, order, kinds and defaults are Flax's; what jaxnorm adds is keyword only."""
    for ours, theirs in ((getattr(jnn, name), getattr(nn, name)), (getattr(jnnx, name), getattr(nnx, name))):
        of_flax, of_ours = (inspect.signature(cls.__init__).parameters for cls in (theirs, ours))
        assert [*of_ours][: len(of_flax)] == [*of_flax]
        for key, parameter in of_flax.items():
            assert (of_ours[key].kind, of_ours[key].default) == (parameter.kind, parameter.default), key
        added = [p for key, p in of_ours.items() if key not in of_flax]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)


@pytest.mark.parametrize("module", [jnn, jnnx], ids=["linen", "nnx"])
def test_a_docstring_describes_every_argument_and_ends_with_an_example(module):
    for name in set(module.__all__) - {"Norm"}:
        cls = getattr(module, name)
        for key in inspect.signature(cls).parameters:
            if key not in ("parent", "name"):
                assert f"\n  {key}: " in inspect.getdoc(cls), (name, key)
                assert f"\n  {key}: \n" not in inspect.getdoc(cls), (name, key)
        for key in list(inspect.signature(cls.__call__).parameters)[1:]:
            assert f"\n  {key}: " in inspect.getdoc(cls.__call__), (name, key)
        assert ">>> " in cls.__doc__
        assert "Source: " in cls.__doc__


# --- Norm(spec) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_linen_norm_of_a_spec_is_the_spec(spec):
    train = {} if spec.State is tuple else dict(use_running_average=False)
    layer = jnn.Norm(spec)
    y, variables = layer.init_with_output(KEY, X, **train)
    params, state = spec.init(6)
    shapes = {name: value.shape for name, value in params._asdict().items() if value is not None}
    assert jax.tree.map(jnp.shape, variables["params"]) == shapes
    np.testing.assert_array_equal(y, spec.apply(params, state, X, train=True)[0])
    if train:
        y, new = layer.apply(variables, X, mutable=["batch_stats"], **train)
        expected = spec.apply(params, state, X, train=True)[1]
        for key, value in new["batch_stats"].items():
            np.testing.assert_array_equal(value, getattr(expected, key))
        evaluated = layer.apply({**variables, **new}, X, use_running_average=True)
        np.testing.assert_array_equal(evaluated, spec.apply(params, expected, X, train=False)[0])


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_nnx_norm_of_a_spec_is_the_spec(spec):
    layer = jnnx.Norm(spec, 6, rngs=nnx.Rngs(0))
    params, state = spec.init(6)
    y, new = spec.apply(params, state, X, train=True)
    np.testing.assert_array_equal(layer(X), y)
    assert (layer.bias is None) == (params.bias is None)
    if spec.State is not tuple:
        np.testing.assert_array_equal(layer.mean[...], new.mean)
        layer.eval()
        np.testing.assert_array_equal(layer(X), spec.apply(params, new, X, train=False)[0])
    graphdef, leaves = nnx.split(layer)
    np.testing.assert_array_equal(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(leaves, X), layer(X))


def test_norm_takes_operands_masks_and_given_parameters():
    gate = jnp.ones_like(X)
    spec = jn.GatedRMSNorm(activation="sigmoid")
    variables = jnn.Norm(spec).init(KEY, X, gate)
    expected = spec.apply(spec.init(6)[0], (), X, gate)[0]
    np.testing.assert_array_equal(jnn.Norm(spec).apply(variables, X, gate), expected)
    np.testing.assert_array_equal(jnnx.Norm(spec, 6, rngs=nnx.Rngs(0))(X, gate), expected)
    bare, mask, scale = jn.LayerNorm(use_scale=False, use_bias=False), X[..., :1] > 0, jnp.full(6, 2.0)
    expected = jn.layer_norm(X, scale, mask=jnp.broadcast_to(mask, X.shape))
    given = dict(mask=jnp.broadcast_to(mask, X.shape), scale=scale)
    np.testing.assert_array_equal(jnn.Norm(bare).apply({}, X, **given), expected)
    np.testing.assert_array_equal(jnnx.Norm(bare, 6, rngs=nnx.Rngs(0))(X, **given), expected)
    with pytest.raises(TypeError, match=r"spec must be a spec.* Write Norm\(jaxnorm.LayerNorm\(\)\)"):
        jnn.Norm(jn.layer_norm).init(KEY, X)


def test_norm_touches_no_axis_name_while_initializing():
    spec = jn.BatchNorm(axis_name="data", sync="local")
    variables = jnn.Norm(spec).init(KEY, X, use_running_average=False)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)


# --- names, initializers and dtypes of parameters ---------------------------------------------------------------------


def test_parameters_take_other_names():
    names = {"scale": "weight", "bias": "beta"}
    variables = jnn.LayerNorm(param_names=names).init(KEY, X)
    assert sorted(variables["params"]) == ["beta", "weight"]
    renamed = {"params": {"weight": 2 * variables["params"]["weight"], "beta": variables["params"]["beta"]}}
    np.testing.assert_array_equal(
        jnn.LayerNorm(param_names=names).apply(renamed, X), jn.layer_norm(X, jnp.full(6, 2.0), jnp.zeros(6))
    )
    layer = jnnx.RMSNorm(6, param_names={"scale": "kernel"}, rngs=nnx.Rngs(0))
    assert isinstance(layer.kernel, nnx.Param)
    layer.kernel[...] = jnp.full(6, 2.0)
    np.testing.assert_array_equal(layer(X), jn.rms_norm(X, jnp.full(6, 2.0)))
    assert sorted(jnn.Norm(jn.LayerNorm(), param_names=names).init(KEY, X)["params"]) == ["beta", "weight"]


def test_layers_with_other_names_are_hashed_split_and_pickled():
    for layer in (jnn.LayerNorm(param_names={"scale": "w"}), jnn.Norm(jn.RMSNorm(), param_names={"scale": "w"})):
        assert pickle.loads(pickle.dumps(layer)) == layer
        assert hash(layer) == hash(layer.clone())
        variables = layer.init(KEY, X)
        assert jax.jit(layer.apply)(variables, X).shape == X.shape
    for layer in (
        jnnx.RMSNorm(6, param_names={"scale": "w"}, rngs=nnx.Rngs(0)),
        jnnx.Norm(jn.BatchNorm(running=jn.EMA(momentum=0.5)), 6, param_names={"scale": "w"}, rngs=nnx.Rngs(0)),
    ):
        graphdef, state = nnx.split(layer)
        assert hash(graphdef) == hash(nnx.split(layer)[0])
        assert nnx.merge(graphdef, state)(X).shape == X.shape
        assert jnp.isfinite(nnx.jit(nnx.grad(lambda layer: layer(X).sum()))(layer).w[...]).all()


def test_statistics_take_initializers():
    inits = dict(mean_init=nn.initializers.constant(3.0), var_init=nn.initializers.constant(4.0))
    variables = jnn.BatchNorm(**inits).init(KEY, X, use_running_average=True)
    layer = jnnx.BatchNorm(6, **inits, rngs=nnx.Rngs(0))
    for mean, var in ((variables["batch_stats"]["mean"], variables["batch_stats"]["var"]), (layer.mean, layer.var)):
        np.testing.assert_array_equal(mean[...], jnp.full(6, 3.0))
        np.testing.assert_array_equal(var[...], jnp.full(6, 4.0))
    random = jnn.BatchNorm(mean_init=nn.initializers.normal()).init(KEY, X, use_running_average=True)
    assert len(np.unique(random["batch_stats"]["mean"])) == 6


def t5x(x, scale, dtype, epsilon):
    """t5x's LayerNorm, and EasyLM's RMSNorm, as they stand in those repositories."""
    x = jnp.asarray(x, jnp.float32)
    y = jnp.asarray(x * lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + epsilon), dtype)
    return y * jnp.asarray(scale, dtype)


def maxtext(x, scale, dtype, epsilon, offset):
    """MaxText's RMSNorm: the offset is added in the compute dtype."""
    x = jnp.asarray(x, jnp.float32)
    y = jnp.asarray(x * lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + epsilon), dtype)
    return jnp.einsum("...k,k->...k", y, jnp.asarray(scale, dtype) + jnp.asarray(offset, dtype))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_scale_in_the_compute_dtype_is_that_of_t5x_and_maxtext_to_the_bit(dtype, offset, rng):
    x = jnp.asarray(rng.normal(size=(64, 8, 32)), dtype)
    scale = jnp.asarray(rng.normal(size=32), jnp.float32)
    options = dict(epsilon=1e-6, dtype=dtype, cast="before_scale", cast_params=True, scale_offset=offset)
    expected = maxtext(x, scale, dtype, 1e-6, offset) if offset else None
    with jax.numpy_rank_promotion("allow"):
        expected = maxtext(x, scale, dtype, 1e-6, offset) if offset else t5x(x, scale, dtype, 1e-6)
    y = jnn.RMSNorm(**options, implementation="xla").apply({"params": {"scale": scale}}, x)
    np.testing.assert_array_equal(y, expected)
    layer = jnnx.RMSNorm(32, **options, implementation="xla", rngs=nnx.Rngs(0))
    layer.scale[...] = scale
    np.testing.assert_array_equal(layer(x), expected)
    uncast = jnn.RMSNorm(**{**options, "cast_params": False}).apply({"params": {"scale": scale}}, x)
    assert (uncast != expected).any()


def test_a_layer_of_one_s_own_keeps_the_form_of_its_base():
    class Zero(jnn.LayerNorm):
        scale_offset: float = 1.0

    variables = Zero().init(KEY, X)
    np.testing.assert_array_equal(variables["params"]["scale"], 0)
    np.testing.assert_array_equal(Zero().apply(variables, X), jn.layer_norm(X, jnp.ones(6), jnp.zeros(6)))
