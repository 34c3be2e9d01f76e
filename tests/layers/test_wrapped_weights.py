"""Wrappers of weights in Flax: against Flax's own layers, side by side, and the claims of Flax's own tests."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from helpers.jit import jit_unoptimized

from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx
from jaxnorm import weights

close = lambda a, b, tol=2e-6: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


class Model(linen.Module):
    """The layers that Flax's tests wrap: dense, convolution, attention, whose kernels have rank 3."""

    of: object  # a module with both wrappers
    more: object = None

    @linen.compact
    def __call__(self, x, train: bool):
        x = self.of.SpectralNorm(linen.MultiHeadDotProductAttention(2))(x, update_stats=train)
        x = self.of.SpectralNorm(linen.Conv(3, (2,)))(x, update_stats=train)
        return self.of.WeightNorm(linen.Dense(5), variable_filter=None, **(self.more or {}))(x)


def saved(checkpointer, folder, tree):
    checkpointer.save(folder, tree)
    checkpointer.wait_until_finished()
    return lambda of: checkpointer.restore(folder, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), of))


def test_linen_wrappers_are_those_of_flax(rng, tmp_path):
    """Names, collections, values, gradients; and a model that one has saved, the other restores."""
    x = rng.normal(size=(2, 3, 4)).astype("f")
    models = Model(jnn, {"scale_init": linen.initializers.ones}), Model(linen)
    start = lambda model, key: jit_unoptimized(lambda key: model.init(key, x, train=False))(jax.random.key(key))
    mine, variables = (start(model, 0) for model in models)
    jax.tree.map(close, mine, variables)  # the same names, collections, shapes, and values

    def step(model):
        def run(variables):
            def loss(p):
                given = {**variables, "params": p}
                y, new = model.apply(given, x, train=True, mutable=["batch_stats"])
                still, same = model.apply(given, x, train=False, mutable=["batch_stats"])
                return (y**2).sum(), (y, new, still, same)

            return jax.value_and_grad(loss, has_aux=True)(variables["params"])

        return jit_unoptimized(run)

    ours, theirs = map(step, models)
    trained = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype("f"), variables)
    jax.tree.map(lambda a, b: close(a, b, 3e-5), ours(trained), theirs(trained))
    with ocp.StandardCheckpointer() as checkpointer:  # one tree of one library, restored into the form of the other
        for place, (source, target) in enumerate(((ours(trained), mine), (theirs(trained), variables))):
            given = {**trained, **source[0][1][1]}
            restored = saved(checkpointer, tmp_path / str(place), given)(target)
            jax.tree.map(np.testing.assert_array_equal, restored, given)
            jax.tree.map(lambda a, b: close(a, b, 3e-5), ours(restored), theirs(restored))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = linen.Sequential([linen.Dense(2)])(x)
            x = linen.Dense(3)(x)
        return x


def test_names_of_weight_norm_by_filter():
    x = np.ones((1, 4), "f")
    for chosen in ({}, None, {"kernel", "bias"}, {"Block"}, {"kernel"}, {"Sequential", "kernel"}):

        class Outer(linen.Module):
            of: object
            chosen: object

            @linen.compact
            def __call__(self, x):
                return self.of.WeightNorm(Block(), variable_filter=self.chosen)(x)

        of = lambda library, chosen=chosen: jax.eval_shape(Outer(library, chosen).init, jax.random.key(0), x)
        ours, theirs = of(jnn), of(linen)
        assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, theirs), chosen


def test_flax_tests_of_spectral_norm():
    class Foo(linen.Module):
        strict: bool = False
        n_steps: int = 1

        @linen.compact
        def __call__(self, x, train):
            layer, strict = linen.DenseGeneral((2, 4), use_bias=False), self.strict
            return jnn.SpectralNorm(layer, n_steps=self.n_steps, error_on_non_matrix=strict)(x, update_stats=train)

    with pytest.raises(ValueError, match="Input is 3D but error_on_non_matrix is True"):
        Foo(strict=True).init(jax.random.key(0), np.ones((1, 8), "f"), train=False)
    kernel, x = 4 * np.eye(8, dtype="f").reshape(8, 2, 4), np.ones((1, 8), "f")

    @jit_unoptimized
    def sigmas():
        found = []
        for train, steps in ((True, 1), (True, 3), (False, 1)):
            variables = Foo(n_steps=steps).init(jax.random.key(0), x, train=False)
            given = {**variables, "params": {"DenseGeneral_0": {"kernel": kernel}}}
            _, new = Foo(n_steps=steps).apply(given, x, train=train, mutable=["batch_stats"])
            found.append(new["batch_stats"]["SpectralNorm_0"]["DenseGeneral_0/kernel/sigma"])
        return found

    close(sigmas(), [4.0 * 2**0.5] * 2 + [1.0], 1e-3)  # of the (16, 4) matrix of leading axes by the last


def test_flax_tests_of_weight_norm(rng):
    x = rng.normal(size=(1, 3)).astype("f")
    cases = [(-1, 0, "kernel"), (0, 1, "kernel"), ((0, 1), (), "kernel"), ((), (0, 1), "kernel"),
             (None, (0, 1), "kernel"), (0, (), "bias"), ((), -1, "bias")]  # fmt: skip

    @jit_unoptimized
    def run():
        found = []
        for axes, _, chosen in cases:
            dense = linen.Dense(2, bias_init=linen.initializers.normal())
            layer = jnn.WeightNorm(dense, feature_axes=axes, variable_filter={chosen})
            variables = jax.tree.map(lambda a: a + 0.5, layer.init(jax.random.key(2), x))
            found.append((layer.apply(variables, x), variables["params"]))
        return found

    for (_, reduced, chosen), (y, params) in zip(cases, run(), strict=True):
        own = {name: np.asarray(value, "d") for name, value in params["layer_instance"].items()}
        scale = np.expand_dims(np.asarray(params[f"layer_instance/{chosen}/scale"]), reduced)
        own[chosen] = own[chosen] / np.sqrt((own[chosen] ** 2).sum(reduced, keepdims=True)) * scale
        close(y, x @ own["kernel"] + own["bias"], 1e-5)


@pytest.mark.parametrize("spec", [None, weights.SpectralNorm(), weights.ScaledStandardize()], ids=str)
def test_nnx_wrappers_keep_the_kernel(rng, spec):
    x, make = rng.normal(size=(2, 4)).astype("f"), lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    linear = make()
    if spec is None:
        layer, theirs = jnnx.SpectralNorm(linear, rngs=nnx.Rngs(1)), nnx.SpectralNorm(make(), rngs=nnx.Rngs(1))
        ours_at, theirs_at = ([path for path, _ in nnx.to_flat_state(nnx.state(a))] for a in (layer, theirs))
        assert ours_at == theirs_at
        expected = theirs(x)
    else:
        layer = jnnx.Reparametrized(linear, spec, rngs=nnx.Rngs(1))
        params, state = spec.init(linear.kernel[...], nnx.Rngs(1).params())
        expected = x @ spec.apply(params, state, train=True)[0]
    before = np.asarray(linear.kernel[...])
    close(layer(x), expected, 1e-5)
    assert (np.asarray(linear.kernel[...]) == before).all()
    state = lambda: jax.tree.leaves(nnx.state(layer, nnx.BatchStat))
    layer.eval()
    old = state()
    nnx.jit(lambda layer, x: layer(x))(layer, x)
    jax.tree.map(np.testing.assert_array_equal, state(), old)


def test_nnx_weight_norm_trains_its_scales(rng):
    x, make = rng.normal(size=(2, 4)).astype("f"), lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layer = jnnx.WeightNorm(make(), rngs=nnx.Rngs(1))
    close(layer(x), make()(x))
    constant = {"scale_init": nnx.initializers.constant(2.0), "rngs": nnx.Rngs(1)}
    close(jnnx.WeightNorm(make(), **constant)(x), nnx.WeightNorm(make(), **constant)(x), 1e-5)
    grads = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum()))(layer, x)
    assert np.abs(grads["scales"][("kernel",)][...]).min() > 0


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_nnx_models_are_restored_from_those_of_flax(rng, tmp_path, name):
    """And the other way: the states have one form, and the outputs are the same."""
    x = rng.normal(size=(2, 4)).astype("f")
    ones = {"scale_init": nnx.initializers.ones} if name == "WeightNorm" else {}
    make = lambda library, more, seed: getattr(library, name)(
        nnx.Linear(4, 3, rngs=nnx.Rngs(seed)), **more, rngs=nnx.Rngs(seed)
    )
    ours, theirs = make(jnnx, ones, 1), make(nnx, {}, 2)
    outputs = []
    with ocp.StandardCheckpointer() as checkpointer:
        for source, target in ((theirs, ours), (ours, theirs)):
            tree = jax.tree.map(lambda a: a + 0.25, nnx.to_pure_dict(nnx.state(source)))
            state = nnx.state(target)
            restore = saved(checkpointer, tmp_path / type(target).__module__, tree)
            for layer in (source, target):
                state = nnx.state(layer)
                nnx.replace_by_pure_dict(state, restore(nnx.to_pure_dict(state)))
                nnx.update(layer, state)
            outputs.append((target(x), source(x)))
            close(*outputs[-1], 1e-5)
    assert np.abs(outputs[0][0] - outputs[1][0]).max() > 1e-3  # of two models
