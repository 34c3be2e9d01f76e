"""Conversion: each library's real layers and models, in training and at inference, and back to the bit."""

import copy
import os
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from helpers.jit import jit_unoptimized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import convert
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

nn = torch.nn
close = lambda a, b, tol=2e-5: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)
flexible = lambda: jax.numpy_rank_promotion("allow")  # what haiku and equinox need


def same(a, b):
    """Two trees, to the bit."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def numpy_of(state_dict):
    of = lambda value: value.detach().numpy().copy() if isinstance(value, torch.Tensor) else value
    return {name: of(value) for name, value in state_dict.items()}


def draw(rng, *shape):
    return rng.normal(1.0, 2.0, shape).astype("f")


# --- presets ----------------------------------------------------------------------------------------------------------


def follow(spec, state, batches, train, evaluate):
    """A spec beside a peer's layer: the same outputs in training, the same statistics in evaluation."""
    params = spec.init(batches[0].shape[spec.feature_axes()[0]])[0]
    step = jit_unoptimized(lambda s, x: spec.apply(params, s, x, train=True))
    for x in batches:
        y, state = step(state, x)
        close(y, train(x))
    close(jit_unoptimized(lambda s, x: spec.apply(params, s, x, train=False)[0])(state, x), evaluate(x))
    return state


def torch_calls(layer):
    def train(x):
        return layer.train()(torch.tensor(x)).detach()

    return train, lambda x: layer.eval()(torch.tensor(x)).detach()


@pytest.mark.parametrize(
    ("kind", "layer", "options"),
    [
        ("BatchNorm", lambda: nn.BatchNorm2d(4), {}),
        ("LayerNorm", lambda: nn.LayerNorm(6), {}),
        ("RMSNorm", lambda: nn.RMSNorm(6), {}),
        ("GroupNorm", lambda: nn.GroupNorm(2, 4), {"num_groups": 2}),
        ("InstanceNorm", lambda: nn.InstanceNorm2d(4), {}),
    ],
)
def test_presets_of_torch(kind, layer, options, rng):
    spec = getattr(jn, kind).like("torch", **options)
    layer = layer()
    batches = [draw(rng, 3, 4, 5, 6) * (1e-3 if kind == "RMSNorm" else 1) for _ in range(3)]  # epsilon is small there
    state = follow(spec, spec.init(6 if kind in ("LayerNorm", "RMSNorm") else 4)[1], batches, *torch_calls(layer))
    assert convert.from_torch(layer)[0] == spec
    if kind == "BatchNorm":
        close(state.var, layer.running_var)


@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_presets_of_flax(kind, rng):
    """The layers of nnx and linen have the same defaults, which those of jaxnorm are as well."""
    spec = getattr(jn, kind).like("flax")
    batches = [draw(rng, 3, 9, 32) for _ in range(2)]
    layer = getattr(nnx, kind)(32, rngs=nnx.Rngs(0))
    with flexible():
        train = lambda x: (layer.train() if kind == "BatchNorm" else None, layer(x))[1]
        evaluate = lambda x: (layer.eval() if kind == "BatchNorm" else None, layer(x))[1]
        follow(spec, spec.init(32)[1], batches, train, evaluate)
    for found in (convert.from_flax(layer)[0], convert.from_flax(getattr(jnnx, kind)(32, rngs=nnx.Rngs(0)))[0]):
        assert found.epsilon == spec.epsilon
        assert getattr(found, "momentum", None) == getattr(spec, "momentum", None)
    of_linen = getattr(linen, kind)(**({"use_running_average": True} if kind == "BatchNorm" else {}))
    variables = jax.eval_shape(of_linen.init, jax.random.key(0), batches[0])
    assert convert.from_flax(of_linen, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), variables))[0] == spec


HAIKU = {
    "BatchNorm": (lambda hk: hk.BatchNorm(True, True, 0.9), {"momentum": 0.9}),
    "LayerNorm": (lambda hk: hk.LayerNorm(-1, True, True), {}),
    "RMSNorm": (lambda hk: hk.RMSNorm(-1), {}),
    "GroupNorm": (lambda hk: hk.GroupNorm(2), {"num_groups": 2}),
    "InstanceNorm": (lambda hk: hk.InstanceNorm(True, True), {}),
}


@pytest.mark.parametrize("kind", HAIKU)
def test_presets_and_state_of_haiku(kind, rng):
    hk = pytest.importorskip("haiku")
    make, options = HAIKU[kind]
    made = []

    def call(x, train):
        made.append(make(hk))
        return made[-1](x, train) if kind == "BatchNorm" else made[-1](x)

    model = hk.without_apply_rng(hk.transform_with_state(call))
    batches = [draw(rng, 3, 5, 4) for _ in range(3)]
    spec = getattr(jn, kind).like("haiku", **options)
    with flexible():
        hk_params, hk_state = model.init(None, batches[0], True)
        kept = [hk_state]

        def train(x):
            y, kept[0] = model.apply(hk_params, kept[0], x, True)
            return y

        follow(spec, spec.init(4)[1], batches, train, lambda x: model.apply(hk_params, kept[0], x, False)[0])
        found, params, state, _ = convert.from_haiku(made[0], hk_params, kept[0])
        assert found == spec
        # And from there on, in both libraries, after the way back.
        (back, again), _ = convert.to_haiku(found, params, state, (hk_params, hk_state))
        same(back, hk_params)
        if kind == "BatchNorm":
            averages = lambda state: {k: v["average"] for k, v in state.items()}
            same(averages(again), averages(kept[0]))
            jax.tree.map(lambda a, b: close(a, b, 3e-7), again, kept[0])
            same(convert.from_haiku(made[0], back, again)[2], state)
            x = batches[0] + 1
            new = averages(model.apply(back, again, x, True)[1])["batch_norm/~/var_ema"].reshape(-1)
            close(spec.apply(params, state, x, train=True)[1].var, new)


EQUINOX = {
    "LayerNorm": (lambda eqx: eqx.nn.LayerNorm(6), {}, 2),
    "RMSNorm": (lambda eqx: eqx.nn.RMSNorm(6), {}, 2),
    "GroupNorm": (lambda eqx: eqx.nn.GroupNorm(2, 4), {"num_groups": 2}, 1),
}


@pytest.mark.parametrize("kind", EQUINOX)
def test_presets_of_equinox(kind, rng):
    eqx = pytest.importorskip("equinox")
    make, options, vmaps = EQUINOX[kind]
    layer, spec = make(eqx), getattr(jn, kind).like("equinox", **options)
    call = layer
    for _ in range(vmaps):
        call = jax.vmap(call)
    follow(spec, (), [draw(rng, 3, 4, 6)], call, call)
    found, params, state, _ = convert.from_equinox(layer)
    assert found == spec
    same(convert.to_equinox(found, params, state, layer)[0], layer)


def test_batch_norm_of_equinox(rng):
    """Its running variance keeps a share m**t / (1 - m**t) of its start at 1, which jaxnorm's has not."""
    eqx = pytest.importorskip("equinox")
    make = lambda mode: eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="batch", momentum=0.9, mode=mode)
    layer, own = make("batch")
    spec = jn.BatchNorm.like("equinox", momentum=0.9)
    params, state = spec.init(4)
    with flexible(), jax.numpy_dtype_promotion("standard"):
        call = lambda layer, x, own: jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, own)
        for t in range(1, 4):
            x = draw(rng, 3, 4, 5)
            y, own = call(layer, x, own)
            expected, state = spec.apply(params, state, x, train=True)
            close(y, expected)
            found, _, read, _ = convert.from_equinox(layer, own)
            assert found == spec
            close(read.mean, state.mean)
            close(read.var, state.var + 0.9**t / (1 - 0.9**t), 1e-5 * 10)
        again = convert.to_equinox(found, params, read, (layer, own))[0]
        same(convert.from_equinox(*again)[2].count, read.count)
        close(convert.from_equinox(*again)[2].var, read.var, 3e-7)
        y, own = call(layer, x, again[1])
        _, read = spec.apply(params, read, x, train=True)
        close(convert.from_equinox(layer, own)[2].var, read.var)
        ema, own = make("ema")
        with pytest.raises(convert.ConversionError, match="has seen no batch"):
            convert.from_equinox(ema, own)
        _, own = call(ema, x, own)
        with pytest.raises(convert.ConversionError, match="frozen=True"):
            convert.from_equinox(ema, own)
        spec, params, state, _ = convert.from_equinox(ema, own, frozen=True)
        close(spec.apply(params, state, x)[0], call(eqx.nn.inference_mode(ema), x, own)[0])


def test_keras(rng):
    """Presets, layers from and to, and a whole model, in one test because the import is slow."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    made = {
        "BatchNorm": layers.BatchNormalization(),
        "LayerNorm": layers.LayerNormalization(),
        "RMSNorm": layers.RMSNormalization(),
        "GroupNorm": layers.GroupNormalization(2),
    }
    with flexible(), jax.numpy_dtype_promotion("standard"):
        for kind, layer in made.items():
            spec = getattr(jn, kind).like("keras", **({"num_groups": 2} if kind == "GroupNorm" else {}))
            layer.build((3, 5, 4))
            modes = [{"training": mode} if kind == "BatchNorm" else {} for mode in (True, False)]
            train, evaluate = (lambda x, mode=mode, layer=layer: layer(x, **mode) for mode in modes)
            train = train if kind == "BatchNorm" else jit_unoptimized(train)  # keras assigns to its statistics
            follow(spec, spec.init(4)[1], [draw(rng, 3, 5, 4) for _ in range(2)], train, jit_unoptimized(evaluate))
            found, params, state, _ = convert.from_keras(layer)
            assert found == spec
            before = [np.array(w.value) for w in layer.weights]
            for w in layer.weights:
                w.assign(np.zeros(w.shape, "f"))
            assert convert.to_keras(found, params, state, layer)[0] is layer
            same([np.array(w.value) for w in layer.weights], before)
        with pytest.raises(convert.ConversionError, match="not built"):
            convert.from_keras(layers.LayerNormalization())
        model = keras.Sequential([
            layers.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"),
            layers.DepthwiseConv2D(2, depth_multiplier=2, name="deep"), layers.BatchNormalization(name="bn"), layers.Conv2DTranspose(5, 2, name="up"), layers.Dense(2, name="head"),
        ])  # fmt: skip

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.deep = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 2, groups=4)
                self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
                self.up, self.head = nn.ConvTranspose2d(8, 5, 2), nn.Linear(5, 2)

            def forward(self, x):
                return self.head(self.up(self.bn(self.deep(self.conv(x)))).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        net = randomized(Net())
        state_dict = numpy_of(net.state_dict())
        _, report = convert.transfer(net, model)
        assert "unbiased_running_var is True in torch and False in keras" in str(report)
        x = draw(rng, 2, 3, 8, 8)
        close(jit_unoptimized(model)(x.transpose(0, 2, 3, 1)), net.eval()(torch.tensor(x)).detach().permute(0, 2, 3, 1), 1e-4)
        same(numpy_of(convert.transfer(model, randomized(Net(), 1))[0].state_dict()), state_dict)


def test_a_hand_written_batch_norm_of_torch(rng):
    """A class with gamma and beta, and the variance that divides by n - 1: its arrays and three numbers are enough."""

    class Own(nn.Module):
        def __init__(self, features, eps=1e-5, momentum=0.1):
            super().__init__()
            self.eps, self.momentum = eps, momentum
            self.gamma, self.beta = nn.Parameter(torch.ones(features) * 2), nn.Parameter(torch.ones(features))
            self.register_buffer("running_mean", torch.zeros(features))
            self.register_buffer("running_var", torch.ones(features))

        def forward(self, x):
            mean, var = self.running_mean, self.running_var
            if self.training:
                mean, var = x.mean(0), x.var(0, unbiased=False)
                self.running_mean.lerp_(x.mean(0).detach(), self.momentum)
                self.running_var.lerp_(x.var(0).detach(), self.momentum)
            return (x - mean) / (var + self.eps).sqrt() * self.gamma + self.beta

    bn, x = Own(4), draw(rng, 6, 4)
    bn(torch.tensor(x))
    spec = jn.BatchNorm.like("torch", epsilon=bn.eps, momentum=1 - bn.momentum)
    spec, params, state, _ = convert.from_torch(spec, bn.state_dict())
    for train in (True, False):
        y, state = spec.apply(params, state, x + 1, train=train)
        close(y, bn.train(train)(torch.tensor(x + 1)).detach())
    close(state.var, bn.running_var)
    bn.load_state_dict(convert.to_torch(spec, params._replace(scale=params.scale * 3), state, bn.state_dict())[0])
    assert bn.gamma.tolist() == [6.0] * 4


def test_a_preset_that_a_library_lacks():
    with pytest.raises(ValueError, match=re.escape('Write InstanceNorm.like("torch") or InstanceNorm.like("flax")')):
        jn.InstanceNorm.like("keras")
    with pytest.raises(ValueError, match=re.escape('Write BatchNorm.like("haiku", momentum=0.99)')):
        jn.BatchNorm.like("haiku")
    with pytest.raises(ValueError, match=re.escape("Write DynamicTanh(...)")):
        jn.DynamicTanh.like("torch")
    assert jn.GroupNorm.like("torch", group_size=8).num_groups is None
    assert jn.BatchNorm.like("torch", running=jn.EMA(momentum=0.5)).unbiased_running_var is False


def randomized(model, seed=0):
    """A torch model with random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name != "model.inv_freq":
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
            if name.endswith(("var", "norm.weight", "bn.weight")) or (value.ndim == 1 and name.endswith("weight")):
                value.abs_().add_(0.5)
    return model


# --- whole models -----------------------------------------------------------------------------------------------------


class TorchBlock(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(o)
        down = lambda: nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.downsample = down() if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class TorchResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = nn.Sequential(TorchBlock(4, 4, 1)), nn.Sequential(TorchBlock(4, 6, 2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())).mean((2, 3)))


LIKE_TORCH = {"momentum": 0.9, "unbiased_running_var": True}


class LinenBlock(linen.Module):
    width: int
    stride: int

    @linen.compact
    def __call__(self, x, train):
        norm = lambda name: jnn.BatchNorm(use_running_average=not train, name=name, **LIKE_TORCH)
        conv = lambda k, s, name, g=1: linen.Conv(
            self.width, (k, k), s, padding=k // 2, use_bias=False, name=name, feature_group_count=g
        )
        y = norm("bn1")(conv(3, self.stride, "conv1")(x))
        y = norm("bn2")(conv(3, 1, "conv2", 2)(jax.nn.relu(y)))
        if self.stride > 1:
            x = norm("downsample_1")(conv(1, self.stride, "downsample_0")(x))
        return jax.nn.relu(x + y)


class LinenResNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = jax.nn.relu(jnn.BatchNorm(use_running_average=not train, name="bn1", **LIKE_TORCH)(x))
        x = LinenBlock(4, 1, name="layer1_0")(x, train)
        x = LinenBlock(6, 2, name="layer2_0")(x, train)
        return linen.Dense(5, name="fc")(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, i, o, stride, rngs):
        conv = lambda i, k, s, g=1: nnx.Conv(
            i, o, (k, k), s, padding=k // 2, use_bias=False, feature_group_count=g, rngs=rngs
        )
        norm = lambda: jnnx.BatchNorm(o, rngs=rngs, **LIKE_TORCH)
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(i, 3, stride), norm(), conv(o, 3, 1, 2), norm()
        self.downsample = nnx.Sequential(conv(i, 1, stride), norm()) if stride > 1 else lambda x: x

    def __call__(self, x):
        y = self.bn2(self.conv2(jax.nn.relu(self.bn1(self.conv1(x)))))
        return jax.nn.relu(self.downsample(x) + y)


class NNXResNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn1 = jnnx.BatchNorm(4, rngs=rngs, **LIKE_TORCH)
        self.layer1 = nnx.Sequential(NNXBlock(4, 4, 1, rngs))
        self.layer2 = nnx.Sequential(NNXBlock(4, 6, 2, rngs))
        self.fc = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = self.layer2(self.layer1(jax.nn.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((1, 2)))


def torch_steps(model, xs, targets, rate):
    """SGD in torch: the losses."""
    losses = []  # `import torch.optim` takes seconds
    for x, t in zip(xs, targets, strict=True):
        loss = nn.functional.cross_entropy(model.train()(torch.tensor(x)).flatten(0, -2), torch.tensor(t).flatten())
        loss.backward()
        for p in model.parameters():
            p.data -= rate * p.grad
            p.grad = None
        losses.append(loss.item())
    return losses


def entropy(logits, target):
    logp = jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1]))
    return -jnp.take_along_axis(logp, target.reshape(-1, 1), 1).mean()


def linen_steps(apply, evaluate, variables, xs, targets, rate):
    """Logits in evaluation, and SGD in JAX on variables of linen. `apply` returns logits and the new batch_stats."""

    def step(variables, batch):
        def loss(params):
            logits, stats = apply({**variables, "params": params}, batch[0])
            return entropy(logits, batch[1]), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return {**stats, "params": jax.tree.map(lambda p, g: p - rate * g, variables["params"], grads)}, value

    run = lambda v, xs, ts: (evaluate(v, xs[0]), *jax.lax.scan(step, v, (xs, ts)))
    return jit_unoptimized(run)(variables, jnp.asarray(xs), jnp.asarray(targets))


def nnx_steps(model, xs, targets, rate):
    """The same on an nnx module."""
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    frozen = nnx.graphdef(nnx.view(model, use_running_average=True)) if stats else graph

    def apply(variables, x):
        merged = nnx.merge(graph, variables["params"], variables["stats"], copy=True)
        return merged(x), {"stats": nnx.state(merged, nnx.Not(nnx.Param))}

    evaluate = lambda v, x: nnx.merge(frozen, v["params"], v["stats"])(x)
    logits, new, losses = linen_steps(apply, evaluate, {"params": params, "stats": stats}, xs, targets, rate)
    return logits, nnx.merge(graph, new["params"], new["stats"]), losses


def test_a_resnet_of_torch_in_linen_and_nnx_and_back(rng):
    """The same logits in training and evaluation, ten steps alike, statistics too, and the way back to the bit."""
    model = randomized(TorchResNet())
    start, evaluated = numpy_of(model.state_dict()), copy.deepcopy(model).eval()
    xs, targets = draw(rng, 10, 4, 3, 6, 6) * 0.5, rng.integers(0, 5, (10, 4))
    images = xs.transpose(0, 1, 3, 4, 2)
    net = LinenResNet()
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), images[0], False))
    variables, report = convert.transfer(model, shapes)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    assert len(report) == len(start)
    assert next(row for row in report if row.target == "params/layer2_0/conv2/kernel") == (
        "layer2.0.conv2.weight", "params/layer2_0/conv2/kernel", (3, 3, 3, 6), "OIHW -> HWIO"
    )  # fmt: skip
    modern = nnx.eval_shape(lambda: NNXResNet(nnx.Rngs(0)))
    assert convert.transfer(model, modern)[0] is modern
    same(numpy_of(convert.transfer(variables, model.state_dict())[0]), start)
    same(numpy_of(convert.transfer(modern, model.state_dict())[0]), start)
    expected = evaluated(torch.tensor(xs[0])).detach()
    losses = torch_steps(model, xs, targets, 0.05)
    apply = lambda v, x: net.apply(v, x, True, mutable=["batch_stats"])
    evaluate = lambda v, x: net.apply(v, x, False)
    logits, variables, found = linen_steps(apply, evaluate, variables, images, targets, 0.05)
    close(logits, expected, 1e-4)
    close(found, losses, 1e-4)
    logits, modern, found = nnx_steps(modern, images, targets, 0.05)
    close(logits, expected, 1e-4)
    close(found, losses, 1e-4)
    trained = numpy_of(model.state_dict())
    for tree in (variables, modern):
        back, _ = convert.transfer(tree, model.state_dict())
        for name, value in numpy_of(back).items():
            close(value, trained[name], 5e-4)
        copied = copy.deepcopy(model)
        assert convert.transfer(tree, copied)[0] is copied
        same(numpy_of(copied.state_dict()), numpy_of(back))


class TorchLlama(nn.Module):
    """Two blocks with the names of Hugging Face's."""

    def __init__(self, width=8, heads=2, vocabulary=11):
        super().__init__()
        block = lambda: nn.ModuleDict({
            "input_layernorm": nn.RMSNorm(width, 1e-5), "post_attention_layernorm": nn.RMSNorm(width, 1e-5),
            "self_attn": nn.ModuleDict({f"{name}_proj": nn.Linear(width, width, bias=False) for name in "qkvo"}),
            "mlp": nn.ModuleDict({
                "gate_proj": nn.Linear(width, 12, bias=False), "up_proj": nn.Linear(width, 12, bias=False),
                "down_proj": nn.Linear(12, width, bias=False),
            }),
        })  # fmt: skip
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(vocabulary, width), "layers": nn.ModuleList([block(), block()]),
            "norm": nn.RMSNorm(width, 1e-5),
        })  # fmt: skip
        self.model.register_buffer("inv_freq", 100.0 ** (-torch.arange(0, width // heads, 2) / (width // heads)))
        self.lm_head, self.heads = nn.Linear(width, vocabulary, bias=False), heads

    def forward(self, tokens):
        x = self.model["embed_tokens"](tokens)
        split = lambda a: a.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        angle = torch.arange(x.shape[1])[:, None] * self.model.inv_freq

        def rotate(a):
            a, b = a.chunk(2, -1)
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

        for block in self.model["layers"]:
            y, attn, mlp = block["input_layernorm"](x), block["self_attn"], block["mlp"]
            q, k, v = (split(attn[f"{name}_proj"](y)) for name in "qkv")
            y = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + attn["o_proj"](y.transpose(1, 2).flatten(2))
            y = block["post_attention_layernorm"](x)
            x = x + mlp["down_proj"](nn.functional.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        return self.lm_head(self.model["norm"](x))


def attend(q, k, v, width=4):
    angle = np.arange(q.shape[1], dtype="f")[:, None, None] * (100.0 ** (-np.arange(0, width, 2) / width)).astype("f")

    def rotate(a):
        a, b = jnp.split(a, 2, -1)
        cos, sin = jnp.asarray(np.cos(angle))[None], jnp.asarray(np.sin(angle))[None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    return jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)


class LinenLlama(linen.Module):
    """With kernels of attention that have the heads as an axis, as Flax's have."""

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(11, 8, name="embed")(tokens)
        dense = lambda n, name: linen.Dense(n, use_bias=False, name=name)
        for i in range(2):
            y = jnn.RMSNorm(epsilon=1e-5, name=f"block_{i}_norm1")(x)
            heads = lambda name, i=i: linen.DenseGeneral((2, 4), use_bias=False, name=f"block_{i}_attn_{name}")
            y = attend(heads("q")(y), heads("k")(y), heads("v")(y))
            x = x + linen.DenseGeneral(8, axis=(-2, -1), use_bias=False, name=f"block_{i}_attn_o")(y)
            y = jnn.RMSNorm(epsilon=1e-5, name=f"block_{i}_norm2")(x)
            y = jax.nn.silu(dense(12, f"block_{i}_gate_proj")(y)) * dense(12, f"block_{i}_up_proj")(y)
            x = x + dense(8, f"block_{i}_down_proj")(y)
        return dense(11, "lm_head")(jnn.RMSNorm(epsilon=1e-5, name="norm")(x))


TO_LINEN = {
    "model/inv_freq": None,
    "model/embed_tokens": "embed",
    "model/norm": "norm",
    "model/layers/*/self_attn/*_proj": "block_*_attn_*",
    "model/layers/*/input_layernorm": "block_*_norm1",
    "model/layers/*/post_attention_layernorm": "block_*_norm2",
    "model/layers/*/mlp/*": "block_*_*",
}


class NNXLlama(nnx.Module):
    def __init__(self, rngs):
        dense = lambda i, o: nnx.Linear(i, o, use_bias=False, rngs=rngs)
        norm = lambda: jnnx.RMSNorm(8, epsilon=1e-5, rngs=rngs)
        self.embed_tokens, self.norm, self.lm_head = nnx.Embed(11, 8, rngs=rngs), norm(), dense(8, 11)
        block = lambda: nnx.Dict(
            input_layernorm=norm(), post_attention_layernorm=norm(),
            self_attn=nnx.Dict({f"{name}_proj": dense(8, 8) for name in "qkvo"}),
            mlp=nnx.Dict(gate_proj=dense(8, 12), up_proj=dense(8, 12), down_proj=dense(12, 8)),
        )  # fmt: skip
        self.layers = nnx.List([block(), block()])

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        for block in self.layers:
            y = block.input_layernorm(x)
            q, k, v = (block.self_attn[f"{name}_proj"](y).reshape(*y.shape[:2], 2, 4) for name in "qkv")
            x = x + block.self_attn.o_proj(attend(q, k, v).reshape(x.shape))
            y = block.post_attention_layernorm(x)
            x = x + block.mlp.down_proj(jax.nn.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))
        return self.lm_head(self.norm(x))


def test_a_llama_of_torch_in_linen_and_nnx_and_back(rng):
    """The names of Hugging Face by a dict of renames, attention's kernels with their heads; ten steps alike."""
    model = randomized(TorchLlama())
    start = numpy_of(model.state_dict())
    tokens, targets = rng.integers(0, 11, (2, 10, 3, 5))
    net, modern = LinenLlama(), nnx.eval_shape(lambda: NNXLlama(nnx.Rngs(0)))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), tokens[0]))
    variables, report = convert.transfer(start, shapes, rename=TO_LINEN)
    assert "OI -> IO, reshaped" in str(report)
    rename = {"model/inv_freq": None, "model/**": "**"}
    convert.transfer(model, modern, rename=rename)
    expected = model(torch.tensor(tokens[0])).detach()
    backwards = {new: old for old, new in TO_LINEN.items() if new}
    of_nnx = {"lm_head": "lm_head", "**": "model/**"}
    for tree, names in ((variables, backwards), (modern, of_nnx)):
        same(numpy_of(convert.transfer(tree, start, rename=names, skip=["model/inv_freq"])[0]), start)
    losses = torch_steps(model, tokens, targets, 0.1)
    apply = lambda v, x: (net.apply(v, x), {})
    logits, variables, found = linen_steps(apply, net.apply, variables, tokens, targets, 0.1)
    close(logits, expected, 1e-4)
    close(found, losses, 1e-4)
    logits, modern, found = nnx_steps(modern, tokens, targets, 0.1)
    close(logits, expected, 1e-4)
    close(found, losses, 1e-4)
    for tree, names in ((variables, backwards), (modern, of_nnx)):
        back, _ = convert.transfer(tree, model.state_dict(), rename=names, skip=["model/inv_freq"])
        for name, value in numpy_of(back).items():
            close(value, model.state_dict()[name], 5e-4)


class TorchUp(nn.Module):
    """Every kind of kernel and a batch norm, in a line."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.up, self.head = nn.ConvTranspose2d(4, 3, (3, 2), 2), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.up(self.bn(self.conv(x))).permute(0, 2, 3, 1))


def test_models_of_haiku_and_equinox(rng):
    """From torch into both, and on from there into linen and back to torch to the bit."""
    hk, eqx = pytest.importorskip("haiku"), pytest.importorskip("equinox")
    model = randomized(TorchUp())
    start, x = numpy_of(model.state_dict()), draw(rng, 2, 2, 6, 6)
    expected = model.eval()(torch.tensor(x)).detach()

    def net(x, train):
        x = hk.Conv2D(4, 3, feature_group_count=2, padding="VALID", name="conv")(x)
        x = hk.BatchNorm(True, True, 0.9, name="bn")(x, train)
        return hk.Linear(5, name="head")(hk.Conv2DTranspose(3, (3, 2), 2, padding="VALID", name="up_transpose")(x))

    class Net(eqx.Module):
        layers: dict

        def __init__(self, key):
            self.layers = {
                "conv": eqx.nn.Conv2d(2, 4, 3, groups=2, key=key),
                "bn": eqx.nn.BatchNorm(4, "batch", momentum=0.9, mode="batch", inference=True),
                "up": eqx.nn.ConvTranspose2d(4, 3, (3, 2), 2, key=key),
                "head": eqx.nn.Linear(3, 5, key=key),
            }

        def __call__(self, x, state):
            x, state = self.layers["bn"](self.layers["conv"](x), state)
            x = self.layers["up"](x)
            return jax.vmap(self.layers["head"])(x.reshape(3, -1).T).reshape(*x.shape[1:], 5)

    with flexible(), jax.numpy_dtype_promotion("standard"):
        transformed = hk.without_apply_rng(hk.transform_with_state(net))
        shapes = jax.eval_shape(lambda x: transformed.init(jax.random.key(0), x, True), x.transpose(0, 2, 3, 1))
        (params, state), report = convert.transfer(model, shapes, rename={"up": "up_transpose"})
        call = jit_unoptimized(lambda x: transformed.apply(params, state, x, False)[0])
        close(call(x.transpose(0, 2, 3, 1)), expected, 1e-4)
        assert "fully counted" in str(report)
        empty = eqx.nn.make_with_state(Net)(jax.random.key(0))
        of_equinox, report = convert.transfer(model, empty, rename={"*": "layers/*"})
        call = lambda x: jax.vmap(of_equinox[0], axis_name="batch", in_axes=(0, None))(x, of_equinox[1])
        close(jit_unoptimized(call)(x), expected, 1e-4)
    assert "fully counted" in str(report)
    assert "zero_debias" not in str(report)
    same(numpy_of(convert.transfer((params, state), model, rename={"up_transpose": "up"})[0].state_dict()), start)
    same(numpy_of(convert.transfer(of_equinox, model, rename={"layers/*": "*"})[0].state_dict()), start)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), (params, state))
    copied, _ = convert.transfer((params, state), zeros)  # haiku into haiku, with its counters
    same(copied, (params, state))
    same(convert.transfer(model.state_dict(), zeros, rename={"up": "up_transpose"})[0], (params, state))


def test_counts_of_updates_go_from_model_to_model(rng):
    """haiku's counter is jaxnorm's count of a debiased norm, and equinox's counter; without a decay it is not guessed."""
    eqx = pytest.importorskip("equinox")
    ema = lambda value, n: {"average": np.full((1, 4), value, "f"), "hidden": np.full((1, 4), value / 2, "f"), "counter": np.int32(n)}
    of_haiku = ({"bn": {"scale": np.ones((1, 4), "f"), "offset": np.ones((1, 4), "f")}},
                {"bn/~/mean_ema": ema(1.0, 3), "bn/~/var_ema": ema(2.0, 3)})  # fmt: skip
    layer = jnn.BatchNorm(use_running_average=True, zero_debias=True)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), np.zeros((2, 4), "f"))
    target = {name: {"bn": tree} for name, tree in shapes.items()}
    variables, report = convert.transfer(of_haiku, target)
    stats = variables["batch_stats"]["bn"]
    assert (stats["count"].tolist(), stats["var"].tolist()) == ([3.0] * 4, [2.0] * 4)
    assert "the updates" in str(report)
    with pytest.raises(convert.ConversionError, match="haiku's decay is not known here"):
        convert.transfer(variables, of_haiku)

    class Net(eqx.Module):
        bn: eqx.nn.BatchNorm

        def __init__(self):
            self.bn = eqx.nn.BatchNorm(4, "batch", momentum=0.9, mode="batch")

    net, state = convert.transfer(variables, eqx.nn.make_with_state(Net)())[0]
    assert int(state.get(net.bn.batch_counter)) == 3
    close(state.get(net.bn.batch_state_index)[1], np.full(4, 2 * (1 - 0.9**3)))
    again, _ = convert.transfer((net, state), target)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), again, variables)
    with pytest.raises(convert.ConversionError, match="batch_stats/bn/count: missing"):
        convert.transfer(nn.ModuleDict({"bn": nn.BatchNorm1d(4)}), target)
    _, report = convert.transfer(nn.ModuleDict({"bn": nn.BatchNorm1d(4)}), variables, skip=["bn/count", "bn/scale"])
    assert [row.how for row in report if row.source == "bn.weight"] == ["left out: skip"]


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups, transpose_kernel, rng):
    """torch's are flipped and have the outputs of a group; Flax's are of two kinds, and have no groups."""
    module = randomized(nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, (3, 2), 2, groups=groups, bias=False)}))
    x = draw(rng, 2, 4, 3, 3)
    expected = module["up"](torch.tensor(x)).detach().permute(0, 2, 3, 1)
    images, kernel = x.transpose(0, 2, 3, 1), jax.ShapeDtypeStruct((3, 2, 4 // groups, 4), np.float32)
    target, kind = {"params": {"up": {"kernel": kernel}}}, "transposed_flipped" if transpose_kernel else "transposed"
    if groups == 1:
        with pytest.raises(convert.ConversionError, match="as many inputs as outputs"):
            convert.transfer(module, target)
    if groups > 1 and transpose_kernel:
        return
    variables, report = convert.transfer(module, target, layouts={"up/kernel": kind})
    if groups == 1:
        layer = linen.ConvTranspose(4, (3, 2), (2, 2), "VALID", use_bias=False, transpose_kernel=transpose_kernel)
        close(jit_unoptimized(layer.apply)({"params": variables["params"]["up"]}, images), expected)
        modern = nnx.eval_shape(lambda: nnx.Dict(up=nnx.ConvTranspose(
            4, 4, (3, 2), 2, padding="VALID", use_bias=False, transpose_kernel=transpose_kernel, rngs=nnx.Rngs(0)
        )))  # fmt: skip
        same(convert.transfer(module, modern)[0]["up"].kernel[...], variables["params"]["up"]["kernel"])
    else:
        assert "flipped, 2 groups" in str(report)
        numbers = jax.lax.conv_dimension_numbers(images.shape, (3, 2, 2, 4), ("NHWC", "HWIO", "NHWC"))
        y = jax.lax.conv_general_dilated(
            jnp.asarray(images), variables["params"]["up"]["kernel"], (1, 1), [(2, 2), (1, 1)], lhs_dilation=(2, 2),
            dimension_numbers=numbers, feature_group_count=2,
        )  # fmt: skip
        close(y, expected)
    back, _ = convert.transfer(variables, module.state_dict(), layouts={"up/kernel": kind})
    same(numpy_of(back), numpy_of(module.state_dict()))


# --- round trips ------------------------------------------------------------------------------------------------------

KERNELS = {
    "dense": lambda a, b, k: ((a, b), (b, a)),
    "conv": lambda a, b, k: ((a, b, *k), (*k, b, a)),
    "transposed": lambda a, b, k: ((a, b, *k), (*k, a, b)),
    "transposed_flipped": lambda a, b, k: ((a, b, *k), (*k, b, a)),
    "embedding": lambda a, b, k: ((a, b), (a, b)),
}
NORMS = {
    "BatchNorm1d": lambda n, e, f: nn.BatchNorm1d(n, eps=e, affine=f, momentum=e),
    "LayerNorm": lambda n, e, f: nn.LayerNorm((2, n), eps=e, elementwise_affine=f),
    "RMSNorm": lambda n, e, f: nn.RMSNorm(n, eps=e, elementwise_affine=f),
    "GroupNorm": lambda n, e, f: nn.GroupNorm(1 if n % 2 else 2, n, eps=e, affine=f),
    "InstanceNorm1d": lambda n, e, f: nn.InstanceNorm1d(n, eps=e, affine=f),
}
quick = settings(max_examples=30, deadline=None, derandomize=True)


@quick
@given(st.data())
def test_any_state_dict_survives_the_way_into_variables_and_back(data):
    """Kernels of all kinds with random sizes and names, in float32 and bfloat16."""
    source, params, layouts = {}, {}, {}
    dtype = data.draw(st.sampled_from([np.float32, jnp.bfloat16, np.float16]))
    for i in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(sorted(KERNELS)))
        sizes = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        a, b = KERNELS[kind](*sizes, data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
        leaf = "embedding" if kind == "embedding" else "kernel"
        source[f"body.{i}.w.weight"] = np.arange(np.prod(a), dtype="f").reshape(a).astype(dtype) + 1
        params[f"body_{i}"] = {"w": {leaf: np.zeros(b, dtype)}}
        layouts[f"body_{i}/w/{leaf}"] = kind
    as_torch = data.draw(st.booleans())
    if as_torch:
        source = {k: torch.tensor(v.astype("f")).to(getattr(torch, np.dtype(dtype).name)) for k, v in source.items()}
    variables, report = convert.transfer(source, {"params": params}, layouts=layouts)
    assert len(report) == len(source)
    back, _ = convert.transfer(variables, source, layouts=layouts)
    for name, value in source.items():
        assert type(back[name]) is type(value)
        assert bool((back[name] == value).all())


@quick
@given(
    st.sampled_from(sorted(NORMS)), st.integers(1, 5), st.sampled_from([1e-5, 1e-3, 0.25]), st.booleans(),
    st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_any_norm_of_torch_survives_the_way_there_and_back(kind, n, epsilon, affine, offset):
    layer = randomized(NORMS[kind](n, epsilon, affine))
    start = numpy_of(layer.state_dict())
    spec, params, state, report = convert.from_torch(layer, scale_offset=offset)
    assert spec.epsilon == epsilon
    assert spec.use_scale == affine
    if affine:
        close(params.scale, start["weight"] - offset)
    for value in layer.state_dict().values():
        value.zero_()
    convert.to_torch(spec, params, state, layer)
    for name, value in numpy_of(layer.state_dict()).items():
        if name != "num_batches_tracked":
            np.testing.assert_allclose(value, start[name], rtol=0, atol=1e-6 if offset else 0)
    assert len(report) == len(start)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    model = randomized(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    half = {"half": torch.arange(3.0).bfloat16(), "one": torch.tensor(2.0)}
    for state in (model.state_dict(), half):
        for suffix in (".safetensors", ".pt"):
            path = tmp_path / f"model{suffix}"
            convert.write_file(path, state)
            read = convert.read_file(path)
            same({k: np.asarray(v, "f") for k, v in read.items()}, {k: v.float().numpy() for k, v in state.items()})
            assert read.get("half", np.zeros(0, jnp.bfloat16)).dtype == jnp.bfloat16
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "wrapped.pth")
    same(convert.read_file(tmp_path / "wrapped.pth"), numpy_of(model.state_dict()))
    layer, _ = convert.transfer(convert.read_file(tmp_path / "wrapped.pth"), copy.deepcopy(model))
    same(numpy_of(layer.state_dict()), numpy_of(model.state_dict()))


def test_a_flat_dict_may_be_flax_s(tmp_path):
    variables = {"params": {"fc": {"kernel": np.arange(6.0, dtype="f").reshape(2, 3), "bias": np.ones(3, "f")}}}
    flat = {f"params/fc/{name}": value for name, value in variables["params"]["fc"].items()}
    convert.write_file(tmp_path / "flax.safetensors", flat)
    layer = nn.ModuleDict({"fc": nn.Linear(2, 3)})
    convert.transfer(convert.read_file(tmp_path / "flax.safetensors"), layer)
    same(layer["fc"].weight.detach().numpy(), variables["params"]["fc"]["kernel"].T)
    same(convert.transfer(flat, jax.tree.map(np.zeros_like, variables))[0], variables)
    same(convert.transfer(layer.state_dict(), flat)[0], flat)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        convert.read_file("evil.pt")
    assert not (tmp_path / "evil").exists()
    torch.save([1, 2], "list.pt")
    with pytest.raises(convert.ConversionError, match="no arrays by name"):
        convert.read_file("list.pt")
    with pytest.raises(ValueError, match="must end in"):
        convert.read_file("model.pkl")
    with pytest.raises(TypeError, match="flat dict"):
        convert.write_file("a.pt", {"a": {"b": np.ones(2)}})


# --- what does not fit ------------------------------------------------------------------------------------------------


def tree():
    return {
        "params": {
            "conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
            "bn": {"scale": jnp.zeros(4), "bias": jnp.zeros(4)},
        },
        "batch_stats": {"bn": {"mean": jnp.zeros(4), "var": jnp.zeros(4)}},
    }


def state_dict(**changes):
    given = {"conv.weight": np.ones((4, 2, 3, 3), "f"), "conv.bias": np.ones(4, "f")}
    given |= {f"bn.{name}": np.ones(4, "f") for name in ("weight", "bias", "running_mean", "running_var")}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in given.items() if value is not None}


BAD = {
    "shape": (state_dict(bn__bias=np.ones(5, "f")), {}, "params/bn/bias: its shape is (4,), and bn.bias gives (5,)."),
    "axes": (state_dict(conv__weight=np.ones((4, 2), "f")), {}, "its shape is (3, 3, 2, 4), and conv.weight gives (2, 4) (OI -> IO)"),
    "layout": (state_dict(conv__weight=np.ones((3, 3, 2, 4), "f")), {}, "gives (2, 4, 3, 3) (OIHW -> HWIO)"),
    "missing": (state_dict(bn__running_var=None), {}, "batch_stats/bn/var: missing; the nearest name is bn.running_mean"),
    "unexpected": (state_dict(fc__weight=np.ones(3, "f")), {}, "fc.weight: flax has no place for it"),
    "wider": (state_dict(bn__bias=np.ones(4)), {}, "its dtype is float32, and bn.bias has float64. Write cast=True"),
    "integers": (state_dict(bn__bias=np.ones(4, int)), {"cast": True}, "its dtype is float32, and bn.bias has int64."),
    "twice": (state_dict(), {"rename": {"conv/bias": "bn/bias"}}, "bn.bias: it has the same name as conv.bias. Rename one."),
    "no match": (state_dict(), {"rename": {"body/**": "**"}}, 'rename["body/**"]: it matches nothing. There are bn'),
    "no skip": (state_dict(), {"skip": ["**/rope"]}, "skip:"),
    "kind": (state_dict(), {"layouts": {"conv/kernel": "dense"}}, "conv.weight has (4, 2, 3, 3): not the axes of one kernel"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_nothing_changes(case):
    source, options, message = BAD[case]
    zeros = jax.nn.initializers.zeros
    conv = nnx.Conv(2, 4, (3, 3), kernel_init=zeros, rngs=nnx.Rngs(0))
    target, module = tree(), nnx.Dict(conv=conv, bn=jnnx.BatchNorm(4, rngs=nnx.Rngs(0), **LIKE_TORCH))
    before, own = jax.tree.map(np.array, target), jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
    with pytest.raises(convert.ConversionError) as error:
        convert.transfer(source, target, **options)
    assert message in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).refused == error.value.refused != ()
    with pytest.raises(convert.ConversionError):
        convert.transfer(source, module, **options)
    same(target, before)
    same(nnx.to_pure_dict(nnx.state(module)), own)


WRONG = [
    (lambda: convert.transfer(3, tree()), TypeError, "3 is no model"),
    (lambda: convert.transfer(state_dict(), tree(), rename={"a/*": "b"}), ValueError, "wildcards must be the same"),
    (lambda: convert.transfer(state_dict(), tree(), rename={"a": 3}), TypeError, "must be patterns"),
    (lambda: convert.transfer(state_dict(), tree(), rename=["a"]), TypeError, "must be dicts"),
    (lambda: convert.transfer(state_dict(), tree(), skip="a"), TypeError, "list of patterns"),
    (lambda: convert.transfer(state_dict(), tree(), layouts={"a": "OIHW"}), ValueError, "must be one of dense"),
    (lambda: convert.from_torch(nn.Linear(2, 2)), TypeError, "Linear is no norm"),
    (lambda: convert.from_torch(nn.BatchNorm1d(2, momentum=None)), convert.ConversionError, "frozen=True"),
    (lambda: convert.from_torch(nn.BatchNorm1d(2, track_running_stats=False)), convert.ConversionError, "train=True always"),
    (lambda: convert.from_torch(nn.InstanceNorm1d(2, track_running_stats=True)), convert.ConversionError, "for inference"),
    (lambda: convert.from_torch(nn.LayerNorm(2).double()), convert.ConversionError, "cast=True"),
    (lambda: convert.from_torch(jn.LayerNorm(), {}), convert.ConversionError, "no arrays of a norm"),
    (lambda: convert.from_torch(nn.LayerNorm(2), epsilon=-1.0), ValueError, "epsilon"),
    (lambda: convert.from_torch(nn.LayerNorm(2, bias=False), use_bias=True), convert.ConversionError, "Write use_bias=False"),
    (lambda: convert.from_flax(linen.LayerNorm(reduction_axes=(1, 2)), {"params": {"scale": np.ones(2, "f")}}),
     convert.ConversionError, "jaxnorm.linen.LayerNorm"),
    (lambda: convert.from_flax(linen.LayerNorm()), convert.ConversionError, "from_flax(layer, variables)"),
    (lambda: convert.to_torch(nn.LayerNorm(2), None, (), nn.LayerNorm(2)), TypeError, "must be a spec"),
    (lambda: convert.to_haiku(jn.LayerNorm(), None, (), {}), TypeError, "(params, state)"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_calls_are_explained(case):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (lambda: nn.BatchNorm1d(3, eps=1e-3), "epsilon: it is 1e-05 in jaxnorm and 0.001 in torch"),
        (lambda: nn.BatchNorm1d(3, momentum=0.3), "momentum: it is 0.9 in jaxnorm and 0.7 in torch"),
        (lambda: nn.BatchNorm1d(4), "weight: its shape is (4,), and scale gives (3,)"),
        (lambda: nn.BatchNorm1d(3, affine=False), "scale: torch has no place for it"),
        (lambda: nn.LayerNorm(3), "the layer is a LayerNorm, and the spec a BatchNorm"),
        (lambda: jnnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0)), "unbiased_running_var: it is True in jaxnorm"),
    ],
)
def test_a_layer_with_other_numbers_is_not_filled(into, message):
    spec = jn.BatchNorm.like("torch")
    params, state = spec.init(3)
    layer = into()
    fill = convert.to_torch if isinstance(layer, nn.Module) else convert.to_flax
    before = numpy_of(layer.state_dict()) if isinstance(layer, nn.Module) else {}
    with pytest.raises(convert.ConversionError, match=re.escape(message)):
        fill(spec, params._replace(scale=params.scale * 3), state, layer)
    same(numpy_of(layer.state_dict()) if before else {}, before)


def test_epsilon_that_differs_is_refused_where_both_models_say_it():
    source = nn.ModuleDict({"norm": nn.RMSNorm(4)})
    target = nnx.Dict(norm=jnnx.RMSNorm(4, rngs=nnx.Rngs(0)))
    message = "Write epsilon=1.1920928955078125e-07, or hand over the arrays"
    with pytest.raises(convert.ConversionError, match=re.escape(message)):
        convert.transfer(source, target)
    convert.transfer(randomized(source).state_dict(), target)
    same(target["norm"].scale[...], jnp.asarray(source["norm"].weight.detach().numpy()))


def test_a_momentum_that_jaxnorm_lacks_serves_inference(rng):
    layer = randomized(nn.BatchNorm1d(4, momentum=None)).eval()
    spec, params, state, _ = convert.from_torch(layer, frozen=True)
    x = draw(rng, 3, 4)
    close(spec.apply(params, state, x)[0], layer(torch.tensor(x)).detach())
    assert convert.from_torch(layer, momentum=0.5)[0].momentum == 0.5


def test_tied_weights_of_torch():
    """What is skipped on the way back does not overwrite what it is tied to."""
    tied = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    tied["head"].weight = tied["embed"].weight
    params = {"params": {"embed": {"embedding": jnp.arange(6.0).reshape(3, 2)}}}
    convert.transfer(params, tied, skip=["head/weight"])
    assert tied["head"].weight.tolist() == [[0, 1], [2, 3], [4, 5]]


# --- where arrays live ------------------------------------------------------------------------------------------------


def test_the_target_s_shardings_and_dtypes_are_kept_and_rounding_is_asked_for():
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    kernel = jax.device_put(jnp.zeros((4, 6), jnp.bfloat16), NamedSharding(mesh, P(None, "model")))
    shapes = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=NamedSharding(mesh, P("model")))
    target = {"params": {"fc": {"kernel": kernel, "bias": shapes}}, "cache": {"fc": {"index": jnp.zeros(())}}}
    source = {"module.fc.weight": np.full((6, 4), 1 / 3, "f"), "module.fc.bias": np.ones(6, np.float16)}
    with pytest.raises(convert.ConversionError, match="cast=True"):
        convert.transfer(source, target)
    new, report = convert.transfer(source, target, cast=True)
    assert new["params"]["fc"]["kernel"].sharding == kernel.sharding
    assert new["params"]["fc"]["bias"].sharding == shapes.sharding
    assert new["params"]["fc"]["kernel"].dtype == jnp.bfloat16
    assert "OI -> IO, float32 as bfloat16" in str(report)
    assert "float16 as float32" in str(report)
    assert "kept" in str(report)
    state = nnx.state(nnx.eval_shape(lambda: nnx.Dict(fc=nnx.Linear(4, 6, rngs=nnx.Rngs(0)))))
    again, _ = convert.transfer(source, state, cast=True)
    assert isinstance(again, nnx.State)
    close(again["fc"]["kernel"][...], np.full((4, 6), 1 / 3, "f"))
    boxed = {"params": {"fc": {"kernel": linen.Partitioned(jnp.zeros((4, 6)), ("in", "out")), "bias": jnp.zeros(6)}}}
    again, _ = convert.transfer(source, boxed)
    assert again["params"]["fc"]["kernel"].names == ("in", "out")


@pytest.mark.parametrize("library", ["torch", "flax", "haiku", "equinox", "keras"])
@pytest.mark.parametrize("given", [3, None, {"weight": 1.0}, np.ones(3)], ids=str)
def test_what_is_no_layer_is_refused(library, given):
    with pytest.raises(TypeError, match="Write the layer itself, or a spec"):
        getattr(convert, f"from_{library}")(given)
    spec = jn.LayerNorm()
    with pytest.raises((TypeError, convert.ConversionError), match=r"into must be|is no norm|no arrays of a norm"):
        getattr(convert, f"to_{library}")(spec, *spec.init(3), given)
