"""Tools see every call of a norm in a model, by its path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx
from jaxnorm._core import paths
from jaxnorm._models.calls import watching


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jnn.BatchNorm(use_running_average=not train, name="first")(x)
        return Inner(name="inner")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnn.LayerNorm()(x)


class Nnx(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([jnnx.LayerNorm(3, rngs=nnx.Rngs(0)), jnnx.Norm(jn.RMSNorm(), 3, rngs=nnx.Rngs(0))])
        self.compiled = jnnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return nnx.jit(lambda norm, x: norm(x))(self.compiled, x)


SPECS = {"a": jn.BatchNorm(), "b": {"c": jn.LayerNorm(use_scale=False, use_bias=False)}}


def plain(params, state, x):
    x, after = SPECS["a"].apply(params["a"], state["a"], x, train=True)
    return SPECS["b"]["c"].apply(params["b"]["c"], (), x)[0], {"a": after}


def test_each_kind_of_model_says_the_paths_of_its_norms():
    x, seen = jnp.ones((4, 3)), []

    def watch(path, call, run):
        y, state = run()
        seen.append((path, type(call.spec).__name__, call.x.shape, call.options.get("train")))
        return y + 1.0, state

    model = Linen()
    variables = model.init(jax.random.key(0), x, True)
    apply = jax.jit(lambda v: model.apply(v, x, True, mutable="batch_stats")[0])
    before = apply(variables)
    with watching(watch):
        during = apply(variables)
    assert seen == [("first", "BatchNorm", (4, 3), True), ("inner/LayerNorm_0", "LayerNorm", (4, 3), None)]
    np.testing.assert_allclose(during, before + 1.0)
    np.testing.assert_array_equal(apply(variables), before)  # compiled before, and again after

    seen.clear()
    model = Nnx()
    with watching(watch, model):
        model(x)
    assert [path for path, *_ in seen] == ["blocks/0", "blocks/1", "BatchNorm_0"]  # jit makes a module of its own

    seen.clear()
    params, state = {"a": jn.BatchNorm().init(3)[0], "b": {"c": None}}, {"a": jn.BatchNorm().init(3)[1]}

    @jax.jit
    def step(params, state):
        with watching(watch, trees=(params, state)):
            return plain(params, state, x)

    step(params, state)
    assert [path for path, *_ in seen] == ["a", "LayerNorm_0"]  # the second has no array to know it by


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("*/kernel", "a/b/kernel", False),
        ("block_?/*", "block_1/norm", True),
        ("block_?/*", "block_12/norm", False),
        ("a.b", "aXb", False),
        ("**", "a/b", True),
    ],
)
def test_patterns_of_paths(pattern, path, fits):
    assert paths.matches(pattern, path) == fits
