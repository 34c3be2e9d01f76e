"""Reparametrized weights: against torch, against float64 NumPy with other libraries' defaults, on devices."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen
from helpers.compiled.hlo import cost
from helpers.jit import jit_unoptimized
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import weights
from jaxnorm._core import collectives

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


def run(spec, params, state=(), train=False):
    """The effective weight, the next state, and the gradient of the sum of its cubes."""

    def cubes(params):
        found = spec.apply(params, state, train=train)
        return (found[0] ** 3).sum(), found

    grad, found = jit_unoptimized(jax.grad(cubes, has_aux=True))(params)
    return *found, grad


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
    effective, _, grads = run(spec, params)
    close(effective, conv.weight.detach())
    (conv.weight**3).sum().backward()
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
    ours, new, grad = run(spec, w, state, train)
    close(ours, effective.detach(), 1e-5)
    close(new.u, inside._u, 1e-5)
    (effective**3).sum().backward()
    close(grad, conv.parametrizations.weight.original.grad, 1e-4)


def haikus(w, u):
    import haiku as hk

    f = hk.transform_with_state(lambda w, train: hk.SpectralNorm()(w, update_stats=train))
    start = {"spectral_norm": {"u0": u[None], "sigma": jnp.ones(())}}
    return both(lambda w, train: f.apply({}, start, None, w, train), lambda new: new["spectral_norm"]["u0"][0], w)


def both(apply, u_of, w):
    """In training: the effective weight, u and the gradient of the sum of cubes; and the weight at inference."""

    def cubes(w):
        found, new = apply(w, True)
        return (found**3).sum(), (found, u_of(new), apply(w, False)[0])

    grad, found = jit_unoptimized(jax.grad(cubes, has_aux=True))(w)
    return *found, grad


def flaxes(w, u):
    norm, of_layer = linen.SpectralNorm(linen.DenseGeneral(w.shape[1:], use_bias=False)), "layer_instance/kernel"
    stats = {f"{of_layer}/u": u[None], f"{of_layer}/sigma": jnp.ones(())}
    given = lambda w: {"params": {"layer_instance": {"kernel": w}}, "batch_stats": stats}
    x, changes = np.eye(w.shape[0], dtype="f"), ["batch_stats"]
    apply = lambda w, train: norm.apply(given(w), x, update_stats=train, mutable=changes)
    return both(apply, lambda new: new["batch_stats"][f"{of_layer}/u"][0], w)


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
    found, new, mine = run(spec, w, state, train=True)
    still = spec.apply(w, state, train=False)[0]
    for ours, other in ((found, train), (new.u, u), (still, inference), (mine, grad)):
        if other is not None:
            np.testing.assert_allclose(ours, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


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
    matrix = jit_unoptimized(jax.jacobian(conv))(np.zeros((4, 4, 2), "f")).reshape(-1, 32)
    effective = jit_unoptimized(lambda kernel: spec.bake(*spec.init(kernel)))(kernel)
    close(effective, kernel / np.linalg.norm(matrix, 2), 1e-4)


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

    @jit_unoptimized
    def forms(w, style):
        turned = weights.Demodulate(like="torch").apply(w.transpose(3, 2, 0, 1), style=style)[0]
        return weights.demodulate(w, style), turned, weights.demodulation_scales(w, style * np.float32(1e20))

    ours, turned, (in_scale, out_scale) = jax.tree.map(np.asarray, forms(w, style))
    close(ours, expected, 1e-5)
    close(turned.transpose(0, 3, 4, 2, 1), expected, 1e-5)
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


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_dora_is_its_formula(rng, axis):
    spec, w = weights.DoRA(rank=2, alpha=6.0, axis=axis), rng.normal(size=(3, 4, 2)).astype("f")
    outs = w.shape[axis]
    params, _ = spec.init(w)
    params = params._replace(b=rng.normal(size=(2, outs)).astype("f"))
    a, b = np.asarray(params.a, "d"), params.b.astype("d")
    matrix = lambda t: np.moveaxis(t, axis, -1).reshape(-1, outs)  # (rest, out)
    v = matrix(w) + 3.0 * a @ b
    factor = np.asarray(params.magnitude) / np.linalg.norm(v, axis=0)
    effective, _, grads = run(spec, params)
    close(matrix(effective), v * factor, 1e-5)
    back = 3 * (v * factor) ** 2 * factor  # the norm is a constant
    close(grads.b, 3.0 * a.T @ back, 1e-4)
    close(grads.a, 3.0 * back @ b.T, 1e-4)
    assert not grads.w.any()


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
    """Of 16 bits, with their state carried along: each layer's is that of its weight alone."""
    stack, specs = (
        jnp.asarray(rng.normal(size=(3, 4, 4)), "bfloat16"),
        [weights.SpectralNorm(), *STARTS_AS_THE_WEIGHT[:3]],
    )

    @jit_unoptimized
    def run(x, train=True):
        found = []
        for spec in specs:
            made = jax.vmap(spec.init)(stack)

            def layer(x, of, spec=spec):
                w, state = spec.apply(*of, train=train)
                return jnp.matmul(x, w, preferred_element_type="float32").astype("bfloat16"), (w, state)

            _, (effective, new) = jax.lax.scan(layer, x, made)
            alone = [spec.apply(*jax.tree.map(lambda a, i=i: a[i], made), train=train) for i in range(3)]
            found.append((effective, new, *jax.tree.map(lambda *a: jnp.stack(a), *alone)))
        return found

    for spec, (effective, new, alone, alones) in zip(specs, run(jnp.eye(4, dtype="bfloat16")), strict=True):
        np.testing.assert_allclose(effective.astype("f"), alone.astype("f"), rtol=1e-2, err_msg=name(spec))
        jax.tree.map(lambda a, b: close(a, b, 1e-5), new, alones)


UV = weights.SpectralNormState(P("b"), P("a"))
SHARDED = [  # a spec of w (in over "a", out over "b"), how its parameters and its state lie, and its all-reduces
    (weights.WeightNorm(axis_name="a"), weights.WeightNormParams(P("a", "b"), P("b")), (), 1),
    (weights.Standardize(axis_name="a"), P("a", "b"), (), 1),
    (weights.Standardize(axis_name="a", scale=False), P("a", "b"), (), 1),
    (weights.ForcedNorm(axis_name="a"), P("a", "b"), (), 1),
    (weights.ScaledStandardize(axis_name="a"), weights.ScaledStandardizeParams(P("a", "b"), P("b")), (), 1),
    (weights.DoRA(rank=2, axis_name="a"), weights.DoRAParams(P("a", "b"), P("b"), P("a"), P(None, "b")), (), 1),
    (weights.Demodulate(axis_name="a"), P("a", "b"), (), 1),
    (weights.Demodulate(axis_name="a"), P("a", "b"), (), 2),  # too large for a slot each
    (weights.SpectralNorm(axis_name="a", out_axis_name="b"), P("a", "b"), UV, 4),
    (weights.SigmaReparam(axis_name="a", out_axis_name="b"), weights.SigmaReparamParams(P("a", "b"), P()), UV, 4),
]


@pytest.mark.parametrize(
    ("spec", "of_params", "of_state", "all_reduces"), SHARDED, ids=lambda a: getattr(a, "name", "")
)
def test_sharded_weights_merge(rng, monkeypatch, spec, of_params, of_state, all_reduces):
    """Under jit, and in shard_map by axis names: the whole weight's numbers and gradients, by so many all-reduces."""
    w, style = rng.normal(size=(8, 4)).astype("f"), rng.normal(size=(3, 8)).astype("f")
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    whole = dataclasses.replace(spec, axis_name=None, **{"out_axis_name": None} if of_state else {})
    params, state = whole.init(w)
    styled = isinstance(spec, weights.Demodulate)
    if all_reduces == 2:
        monkeypatch.setattr(collectives, "SLOT_BYTES", 0)
    if isinstance(spec, weights.DoRA):
        params = params._replace(b=rng.normal(size=(2, 4)).astype("f"))

    def effective(spec, params, state, style):
        more = {"style": style} if styled else {"train": True}
        return spec.apply(params, state, **more)[0]

    def step(f):
        def run(params, style):
            y, back = jax.vjp(lambda *args: f(args[0], state, args[1]), params, style)
            return y, back(y**2)

        return jit_unoptimized(run)

    of_y = P(None, "a", "b") if styled else P("a", "b")
    split = jax.shard_map(functools.partial(effective, spec), mesh=mesh, out_specs=of_y,
                          in_specs=(of_params, of_state, P(None, "a")))  # fmt: skip
    one = step(functools.partial(effective, whole))
    expected = one(params, style)
    put = lambda tree, places: jax.tree.map(lambda a, p: jax.device_put(a, NamedSharding(mesh, p)), tree, places)
    for found in (one(put(params, of_params), put(style, P(None, "a"))), step(split)(params, style)):
        jax.tree.map(lambda a, b: close(a, b, 3e-5), found, expected)
    text = jit_unoptimized(lambda params: split(params, state, style)).lower(params).compile().as_text()
    assert cost(text).collectives == {"all-reduce": all_reduces}
    if isinstance(spec, weights.SigmaReparam):
        with pytest.raises(ValueError, match="outside of shard_map"):
            jax.eval_shape(jax.shard_map(spec.init, mesh=mesh, in_specs=P("a", "b"), out_specs=P()), w)


def test_what_starts_on_each_device(rng):
    """DoRA's a and spectral norm's u are drawn apart for each device, and the lengths are those of the whole."""
    w = rng.normal(size=(8, 4)).astype("f")
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))

    def init(w):
        dora, _ = weights.DoRA(rank=2, axis_name="a").init(w)
        _, state = weights.SpectralNorm(axis_name="a", out_axis_name="b", init_steps=0).init(w)
        return dora.magnitude, dora.a, state.u

    lies = (P("b"), P("a"), P("b"))
    magnitude, a, u = jit_unoptimized(jax.shard_map(init, mesh=mesh, in_specs=P("a", "b"), out_specs=lies))(w)
    close(magnitude, np.linalg.norm(w, axis=0))
    assert np.abs(a).max() <= 8**-0.5
    assert len(np.unique(a)) == a.size
    assert len(np.unique(u)) == u.size


@pytest.mark.parametrize("shape", [(256, 512), (3, 3, 64, 96)])
@pytest.mark.parametrize("spec", [
    weights.WeightNorm(), weights.UnitNorm(), weights.Standardize(), weights.ScaledStandardize(like="timm", axis=-1),
], ids=name)  # fmt: skip
def test_two_passes_over_the_weight(spec, shape, kernels):
    if not kernels:
        pytest.skip("counted for a TPU in tests/backends/test_compiled.py")
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
    params, _ = weights.DoRA(rank=2).init(w)
    with pytest.raises(NameError, match=r"jaxnorm\.weights: axis_name='a' is not bound here: call it inside"):
        weights.DoRA(rank=2, axis_name="a").bake(params)
