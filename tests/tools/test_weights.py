"""Reparametrized weights: against torch, against float64 NumPy with other libraries' defaults, on devices, in Flax."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from helpers.compiled.hlo import cost
from helpers.jit import jit_unoptimized
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx
from jaxnorm import weights

STARTS_AS_THE_WEIGHT = [
    weights.WeightNorm(),
    weights.SigmaReparam(),
    weights.DoRA(rank=2),
    weights.WeightNorm(axis=None),
]
MORE = [
    weights.SpectralNorm(), weights.SpectralNorm(bound=2.0), weights.Standardize(),
    weights.Standardize(like="official"), weights.ScaledStandardize(), weights.ScaledStandardize(like="timm", axis=-1),
    weights.ForcedNorm(), weights.UnitNorm(),
]  # fmt: skip
name = lambda spec: f"{type(spec).__name__}-{spec.like}-{getattr(spec, 'bound', None)}-{spec.axis}"
close = lambda a, b, tol=2e-6: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.fixture
def w(rng) -> np.ndarray:
    return rng.normal(size=(5, 4)).astype("f")


def test_wrapping_changes_nothing_and_every_parameter_is_trained(w):
    @jit_unoptimized
    def run(w):
        made = [spec.init(w) for spec in STARTS_AS_THE_WEIGHT]
        loss = lambda spec, state: lambda p: (spec.apply(p, state, train=True)[0] ** 3).sum()
        grads = [jax.grad(loss(spec, s))(p) for spec, (p, s) in zip(STARTS_AS_THE_WEIGHT, made, strict=True)]
        return [spec.bake(*m) for spec, m in zip(STARTS_AS_THE_WEIGHT, made, strict=True)], grads

    for spec, baked, grads in zip(STARTS_AS_THE_WEIGHT, *run(w), strict=True):
        close(baked, w)
        frozen = {"w", "a"} if isinstance(spec, weights.DoRA) else set()  # b is 0, so a has no gradient yet
        for field, grad in grads._asdict().items():
            assert (np.abs(grad).max() == 0) == (field in frozen), (name(spec), field)


def test_zeros_extremes_and_16_bits(w):
    """Finite, in value and gradient; of one dtype; and equal under any scale of a weight that starts as it is."""
    specs = [*STARTS_AS_THE_WEIGHT, *MORE]

    @jit_unoptimized
    def run(a):
        found = []
        for spec in specs:
            params, state = spec.init(a)
            out, back = jax.vjp(lambda p, spec=spec, state=state: spec.apply(p, state, train=True)[0], params)
            found.append((out, back(jnp.ones_like(out))))
        return found

    for a in (np.zeros((5, 4), "f"), w * np.float32(1e20), w * np.float32(1e-20), w.astype(jnp.bfloat16)):
        for spec, (out, grads) in zip(specs, run(a), strict=True):
            assert out.dtype == a.dtype, name(spec)
            assert all(np.isfinite(np.asarray(g, "f")).all() for g in jax.tree.leaves((out, grads))), name(spec)
            if spec in STARTS_AS_THE_WEIGHT:
                tol = 2e-2 if a.dtype != w.dtype else 4e-6
                np.testing.assert_allclose(out.astype("f"), np.asarray(a, "f"), rtol=tol, err_msg=name(spec))


def test_mixed_precision(w):
    """A weight of 16 bits with float32 parameters beside it: float32 arithmetic, one rounding at the end."""
    small = w.astype(jnp.bfloat16)
    specs = [weights.WeightNorm(), weights.ScaledStandardize(), weights.SigmaReparam(), weights.DoRA(rank=2)]
    wide = lambda p: jax.tree.map(lambda a: a.astype("f"), p)

    @jit_unoptimized
    def run(small):
        found = []
        for spec in specs:
            params, state = spec.init(wide(small))
            (y, _), back = jax.vjp(lambda p, spec=spec, state=state: spec.apply(p, state, train=True),
                                   type(params)(small, *params[1:]))  # fmt: skip
            exact, _ = dataclasses.replace(spec, dtype="float32").apply(params, state, train=True)
            found.append((y, exact, back((jnp.ones_like(y), state))[0]))
        return found

    for spec, (y, exact, grads) in zip(specs, run(small), strict=True):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16), err_msg=name(spec))
        assert [g.dtype for g in grads] == [jnp.bfloat16] + [jnp.float32] * (len(grads) - 1)


def test_torch_weight_norm(rng):
    v = rng.normal(size=(6, 5, 3)).astype("f")
    conv = torch.nn.Conv1d(5, 6, 3)
    conv.weight.data = torch.tensor(v)
    torch.nn.utils.parametrizations.weight_norm(conv)
    spec = weights.WeightNorm(like="torch")
    params, _ = spec.init(v)
    params = params._replace(g=params.g * 2)
    conv.parametrizations.weight.original0.data *= 2
    close(spec.bake(params), conv.weight.detach())
    (conv.weight**3).sum().backward()
    grads = jax.grad(lambda p: (spec.apply(p)[0] ** 3).sum())(params)
    of_torch = conv.parametrizations.weight
    close(grads.v, of_torch.original1.grad, 1e-4)
    close(grads.g, of_torch.original0.grad.ravel(), 1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_torch_spectral_norm(rng, train):
    w = rng.normal(size=(6, 5, 3)).astype("f")
    conv = torch.nn.Conv1d(5, 6, 3)
    conv.weight.data = torch.tensor(w)
    torch.nn.utils.parametrizations.spectral_norm(conv)
    inside = conv.parametrizations.weight[0]
    inside._v.copy_(torch.nn.functional.normalize(torch.arange(1.0, 16.0), dim=0))  # far from the singular vector
    state = weights.SpectralNormState(inside._u.numpy().copy(), inside._v.numpy().copy().reshape(5, 3))
    conv.train(train)
    spec = weights.SpectralNorm(like="torch")
    effective = conv.weight
    ours, new = spec.apply(w, state, train=train)
    close(ours, effective.detach(), 1e-5)
    close(new.u, inside._u, 1e-5)
    (effective**3).sum().backward()
    grad = jax.grad(lambda w: (spec.apply(w, state, train=train)[0] ** 3).sum())(jnp.asarray(w))
    close(grad, conv.parametrizations.weight.original.grad, 1e-4)


def haikus(w, u):
    import haiku as hk

    f = hk.transform_with_state(lambda w, train: hk.SpectralNorm()(w, update_stats=train))
    start = {"spectral_norm": {"u0": u[None], "sigma": jnp.ones(())}}
    run = lambda w, train: f.apply({}, start, None, w, train)
    train, new = run(w, True)
    grad = jax.grad(lambda w: (run(w, True)[0] ** 3).sum())(w)
    return train, new["spectral_norm"]["u0"][0], run(w, False)[0], grad


def flaxes(w, u):
    norm, of_layer = linen.SpectralNorm(linen.DenseGeneral(w.shape[1:], use_bias=False)), "layer_instance/kernel"
    stats = {f"{of_layer}/u": u[None], f"{of_layer}/sigma": jnp.ones(())}
    given = lambda w: {"params": {"layer_instance": {"kernel": w}}, "batch_stats": stats}
    run = lambda w, train: norm.apply(given(w), np.eye(w.shape[0], dtype="f"), update_stats=train, mutable=["batch_stats"])
    train, new = run(w, True)
    grad = jax.grad(lambda w: (run(w, True)[0] ** 3).sum())(w)
    return train, new["batch_stats"][f"{of_layer}/u"][0], run(w, False)[0], grad


def kerases(w, u):
    """It stores the effective weight in the place of the weight, so it is equal in its first call."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    layer = keras.layers.SpectralNormalization(keras.layers.Conv1D(w.shape[-1], w.shape[0], use_bias=False))
    layer.build((None, 5, w.shape[1]))
    layer.set_weights([w, u[None]])
    layer(np.ones((1, 5, w.shape[1]), "f"), training=True)
    return layer.kernel.value, layer.vector_u.value[0], None, None


@pytest.mark.parametrize(
    ("like", "theirs", "size"), [("haiku", haikus, 3e-3), ("flax", flaxes, 1e-6), ("keras", kerases, 3e-8)]
)
@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_spectral_norm_is_that_of_others(rng, like, theirs, size):
    """Their real objects, at a weight so small that it shows the epsilon."""
    w = rng.normal(size=(2, 3, 4)).astype("f") * np.float32(size)
    spec = weights.SpectralNorm(like=like)
    _, state = spec.init(w, jax.random.key(1))
    assert (like == "keras") == (spec.eval_steps == 0)
    train, u, inference, grad = theirs(w, np.asarray(state.u))

    @jit_unoptimized
    def ours(w):
        found, new = spec.apply(w, state, train=True)
        grad = jax.grad(lambda w: (spec.apply(w, state, train=True)[0] ** 3).sum())(w)
        return found, new.u, spec.apply(w, state, train=False)[0], grad

    for mine, other in zip(ours(w), (train, u, inference, grad), strict=True):
        if other is not None:
            np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


def test_spectral_norm_finds_sigma_and_bounds(w):
    spec = weights.SpectralNorm(init_steps=200)
    params, state = spec.init(w)
    sigma = np.linalg.norm(w.astype("d"), 2)
    close(spec.bake(params, state), w / sigma, 1e-5)
    for bound, expected in ((sigma / 2, w / 2), (2 * sigma, w)):
        close(weights.spectral_norm(w, state, train=False, bound=float(bound))[0], expected, 1e-5)


def test_spectral_norm_of_a_convolution(rng):
    kernel = rng.normal(size=(3, 3, 2, 3)).astype("f")
    spec = weights.SpectralNorm(operator="conv", input_size=(4, 4), strides=2, init_steps=800)
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda v: jax.lax.conv_general_dilated(v[None], kernel, (2, 2), "SAME", dimension_numbers=layout).ravel()
    matrix = jax.jacobian(conv)(np.zeros((4, 4, 2), "f")).reshape(-1, 32)
    close(spec.bake(*spec.init(kernel)), kernel / np.linalg.norm(matrix, 2), 1e-4)


@pytest.mark.parametrize("spec", [
    weights.Standardize(), weights.Standardize(like="timm"), weights.Standardize(like="official"),
    weights.Standardize(like="big_vision"), weights.Standardize(like="bit"), weights.Standardize(scale=False),
    weights.ScaledStandardize(), weights.ScaledStandardize(like="timm", gamma=1.7),
], ids=repr)  # fmt: skip
def test_standardize_is_its_formula(spec, rng):
    w = rng.normal(size=(4, 3, 5)).astype("f") * np.float32(2e-3)  # shows the epsilon
    axes = (1, 2) if spec.axis == 0 else (0, 1)
    x, n, eps = w.astype("d"), np.prod([w.shape[a] for a in axes]), spec.epsilon
    d, v = x - x.mean(axes, keepdims=True), x.var(axes, keepdims=True, ddof=int(getattr(spec, "unbiased", False)))
    if isinstance(spec, weights.ScaledStandardize):
        root = np.sqrt(np.maximum(n * v, eps)) if spec.epsilon_mode == "max" else np.sqrt(n * (v + eps))
        expected = spec.gamma * d / root
    else:
        root = np.sqrt(v + eps) if spec.epsilon_mode == "inside" else np.sqrt(v) + eps
        expected = d / root if spec.scale else d
    close(spec.bake(spec.init(w)[0]), expected, 1e-5)


def test_variance_gains():
    z = np.linspace(-12, 12, 200001)
    weight = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    for activation in ("relu", "gelu", "silu", "elu", "celu", "leaky_relu", "relu6", "selu", "sigmoid", "soft_sign",
                       "softplus", "tanh"):  # fmt: skip
        y = np.asarray(getattr(jax.nn, activation, jnp.tanh)(jnp.asarray(z, jnp.float32)), "d")
        exact = ((y**2 * weight).sum() - (y * weight).sum() ** 2) ** -0.5
        np.testing.assert_allclose(weights.variance_gain(activation), exact, rtol=3e-3, err_msg=activation)


def test_both_forms_of_demodulation(rng):
    w, style = rng.normal(size=(3, 3, 4, 5)), rng.normal(size=(2, 4))
    each = w[None] * style[:, None, None, :, None]
    expected = each / np.sqrt((each**2).sum((1, 2, 3), keepdims=True) + 1e-8)
    w, style = w.astype("f"), style.astype("f")
    close(weights.demodulate(w, style), expected, 1e-5)
    turned = weights.Demodulate(like="torch").apply(w.transpose(3, 2, 0, 1), style=style)[0]
    close(turned.transpose(0, 3, 4, 2, 1), expected, 1e-5)
    in_scale, out_scale = weights.demodulation_scales(w, style * np.float32(1e20))
    assert np.abs(in_scale).max() <= 1
    close(w[None] * in_scale[:, None, None, :, None] * out_scale[:, None, None, None], expected, 1e-5)


def test_forced_and_unit_norm_project(w):
    x = w.astype("d")
    forced = x / (1e-4 + np.sqrt((x**2).mean(0)))
    close(weights.ForcedNorm().init(w)[0], forced, 1e-5)
    used = forced / (1e-4 + np.sqrt((forced**2).mean(0))) * 3 / np.sqrt(5)
    close(weights.ForcedNorm(gain=3.0).bake(forced.astype("f")), used, 1e-5)
    tree = weights.Tree({"up": weights.UnitNorm(), "down": weights.UnitNorm(axis=-1)})
    found = tree.project({"up": w, "down": w})
    close(found["up"], x / np.linalg.norm(x, axis=0))
    close(found["down"], x / np.linalg.norm(x, axis=1, keepdims=True))


def test_dora_is_its_formula(rng, w):
    spec = weights.DoRA(rank=2, alpha=6.0)
    params, _ = spec.init(w)
    params = params._replace(b=rng.normal(size=(2, 4)).astype("f"))
    params = jax.tree.map(np.asarray, params)
    v = w + 3.0 * params.a.astype("d") @ params.b
    close(spec.bake(params), params.magnitude * v / np.linalg.norm(v, axis=0), 1e-5)
    grad = jax.grad(lambda p: (spec.apply(p)[0] ** 2).sum())(params).b  # the norm is a constant
    factor = params.magnitude / np.linalg.norm(v, axis=0)
    close(grad, 3.0 * params.a.T @ (2 * v * factor**2), 1e-4)


def test_trees_by_path(w):
    conv = weights.SpectralNorm(init_steps=1)
    tree = weights.Tree({"head/*": None, "**/kernel": weights.WeightNorm(), "**/conv": conv})
    model = {"head": {"kernel": w}, "a": [{"kernel": w, "bias": w[0]}, {"conv": w}]}
    params, state = tree.init(model)
    assert list(state) == ["a/1/conv"]
    params["a"][0]["kernel"] = params["a"][0]["kernel"]._asdict()  # as a checkpoint restores it
    effective, new = jax.jit(lambda p, s: tree.apply(p, s, train=True))(params, state)
    assert jax.tree.structure(effective) == jax.tree.structure(model)
    close(effective["a"][0]["kernel"], w)
    assert np.abs(new["a/1/conv"].u - state["a/1/conv"].u).max() > 0
    close(tree.bake(params, state)["a"][1]["conv"], weights.SpectralNorm().bake(w, state["a/1/conv"]))
    with pytest.raises(ValueError, match=r'"\*\*/weight" matches no path. There are a/0/bias, head/kernel'):
        weights.Tree({"**/weight": weights.WeightNorm()}).init({"head": {"kernel": w}, "a": [{"bias": w}]})


def test_a_scan_over_layers(rng):
    stack = rng.normal(size=(3, 4, 4)).astype("f")
    spec = weights.SpectralNorm()
    params, states = jax.vmap(lambda w: spec.init(w))(stack)

    def layer(x, of):
        w, state = spec.apply(*of, train=True)
        return x @ w, state

    y, new = jax.jit(lambda x: jax.lax.scan(layer, x, (params, states)))(np.eye(4, dtype="f"))
    expected = np.eye(4)
    for w, u, v in zip(stack, *states, strict=True):
        expected = expected @ spec.apply(w, weights.SpectralNormState(u, v), train=True)[0]
    close(y, expected, 1e-5)
    assert new.u.shape == (3, 4)


@pytest.mark.parametrize(
    "kind", [weights.WeightNorm, weights.Standardize, weights.ScaledStandardize, weights.SpectralNorm]
)
def test_sharded_weights_merge(rng, kind):
    """Under jit, and inside shard_map by axis names: the whole weight's numbers and gradients."""
    w = rng.normal(size=(8, 4)).astype("f")
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    whole = kind()
    _, state = whole.init(w)
    of = lambda spec: lambda w: spec.apply(spec.init(w)[0] if state == () else w, state, train=True)[0]
    expected, back = jax.vjp(of(whole), w)
    (grad,) = back(expected**2)
    close(jax.jit(of(whole))(jax.device_put(w, NamedSharding(mesh, P("a", "b")))), expected)
    more = {} if state == () else {"out_axis_name": "b"}
    spec = kind(axis_name="a", **more)
    if state == ():
        split = jax.shard_map(of(spec), mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"))
    else:
        step = lambda w, state: spec.apply(w, state, train=True)[0]
        places = (P("a", "b"), weights.SpectralNormState(P("b"), P("a")))
        inside = jax.shard_map(step, mesh=mesh, in_specs=places, out_specs=P("a", "b"))
        split = lambda w: inside(w, state)
    found, back = jax.jit(lambda w: (lambda y, back: (y, back(y**2)))(*jax.vjp(split, w)))(w)
    close(found, expected)
    close(back[0], grad, 2e-5)


@pytest.mark.parametrize("shape", [(256, 512), (3, 3, 64, 96)])
@pytest.mark.parametrize("spec", [
    weights.WeightNorm(), weights.UnitNorm(), weights.Standardize(), weights.ScaledStandardize(like="timm", axis=-1),
], ids=name)  # fmt: skip
def test_two_passes_over_the_weight(spec, shape, kernels):
    if not kernels:
        pytest.skip("XLA alone reads more often")
    params, state = spec.init(jnp.ones(shape))
    f = spec.project if isinstance(spec, weights.UnitNorm) else lambda p: spec.apply(p, state, train=True)[0]
    assert cost(jax.jit(f).lower(params).compile().as_text()).bytes <= 2.5 * 4 * np.prod(shape)


def test_messages_have_the_line_to_write(w):
    for call, match in (
        (lambda: weights.WeightNorm(like="keras"), 'like must be None or one of "torch", "flax"'),
        (lambda: weights.weight_norm(w, w), r"Write g of shape \(4,\)"),
        (lambda: weights.WeightNorm().bake({"v": w}), "params lack 'g'"),
        (lambda: weights.SpectralNorm().init(w[0]), "rank 2 or more"),
        (lambda: weights.SpectralNorm(operator="conv"), r"input_size=\(32, 32\)"),
        (lambda: weights.demodulate(w, w), r"style of shape \(N, 5\)"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# --- Flax: the claims of its own tests, and its own layers side by side -----------------------------------------------


class Model(linen.Module):
    of: object  # a module with both wrappers
    more: object = None

    @linen.compact
    def __call__(self, x, train: bool):
        x = self.of.SpectralNorm(linen.DenseGeneral((3, 2)))(x, update_stats=train)
        return self.of.WeightNorm(linen.Dense(5), variable_filter=None, **(self.more or {}))(x.reshape(2, -1))


def test_linen_wrappers_are_those_of_flax(rng):
    x = rng.normal(size=(2, 4)).astype("f")
    ours, theirs = Model(jnn, {"scale_init": linen.initializers.ones}), Model(linen)
    start = lambda model: jit_unoptimized(lambda key: model.init(key, x, train=False))(jax.random.key(0))
    mine, variables = start(ours), start(theirs)
    jax.tree.map(close, mine, variables)  # the same names, collections, shapes, and values
    run = lambda model: (
        lambda p, train: model.apply({**variables, "params": p}, x, train=train, mutable=["batch_stats"])
    )
    for train in (True, False):
        found = [jit_unoptimized(lambda p, m=m, t=train: run(m)(p, t))(variables["params"]) for m in (ours, theirs)]
        jax.tree.map(close, *found)
    loss = lambda m: lambda p: (run(m)(p, True)[0] ** 2).sum()
    grads = [jit_unoptimized(jax.grad(loss(m)))(variables["params"]) for m in (ours, theirs)]
    jax.tree.map(lambda a, b: close(a, b, 2e-5), *grads)


def test_flax_tests_of_spectral_norm():
    class Foo(linen.Module):
        strict: bool = False

        @linen.compact
        def __call__(self, x, train):
            return jnn.SpectralNorm(linen.DenseGeneral((2, 4), use_bias=False), error_on_non_matrix=self.strict)(
                x, update_stats=train
            )

    with pytest.raises(ValueError, match="Input is 3D but error_on_non_matrix is True"):
        Foo(strict=True).init(jax.random.key(0), np.ones((1, 8), "f"), train=False)
    variables = Foo().init(jax.random.key(0), np.ones((1, 8), "f"), train=False)
    kernel = 4 * np.eye(8, dtype="f").reshape(8, 2, 4)
    for train, sigma in ((True, 4.0 * 2**0.5), (False, 1.0)):  # of the (16, 4) matrix of leading axes by the last
        given = {**variables, "params": {"DenseGeneral_0": {"kernel": kernel}}}
        _, new = Foo().apply(given, np.ones((1, 8), "f"), train=train, mutable=["batch_stats"])
        close(new["batch_stats"]["SpectralNorm_0"]["DenseGeneral_0/kernel/sigma"], sigma, 1e-3)


@pytest.mark.parametrize(("axes", "reduced"), [(-1, 0), (0, 1), ((0, 1), ()), ((), (0, 1)), (None, (0, 1))])
def test_flax_tests_of_weight_norm(rng, axes, reduced):
    x = rng.normal(size=(1, 3)).astype("f")
    layer = jnn.WeightNorm(linen.Dense(2, bias_init=linen.initializers.normal()), feature_axes=axes)
    variables = jax.tree.map(lambda a: a + 0.5, layer.init(jax.random.key(2), x))
    kernel = np.asarray(variables["params"]["layer_instance"]["kernel"], "d")
    scale = np.expand_dims(np.asarray(variables["params"]["layer_instance/kernel/scale"]), reduced)
    kernel = kernel / np.sqrt((kernel**2).sum(reduced, keepdims=True)) * scale
    close(layer.apply(variables, x), x @ kernel + np.asarray(variables["params"]["layer_instance"]["bias"]), 1e-5)


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
