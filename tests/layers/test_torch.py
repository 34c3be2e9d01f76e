"""Equality with torch: outputs, gradients, and running statistics over ten steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw

import jaxnorm as jn

torch = pytest.importorskip("torch")


def compare(module, apply, params, x, g, features_first=True):
    """Output and gradients of x, weight and bias: torch's module against apply(params, x)."""
    for name, value in zip(("weight", "bias"), params, strict=True):
        if getattr(module, name, None) is not None:
            getattr(module, name).data = torch.tensor(np.asarray(value))
    tx = torch.tensor(x, requires_grad=True)
    ty = module(tx)
    ty.backward(torch.tensor(g))
    y, vjp = jax.vjp(apply, params, jnp.asarray(x))
    dparams, dx = vjp(jnp.asarray(g))
    np.testing.assert_allclose(y, ty.detach(), rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(dx, tx.grad, rtol=1e-4, atol=1e-5)
    for name, got in zip(("weight", "bias"), dparams, strict=True):
        if getattr(module, name, None) is not None:
            np.testing.assert_allclose(got, getattr(module, name).grad, rtol=1e-4, atol=2e-5)


def affine(rng, shape):
    return jn.Affine(*(jnp.asarray(p, jnp.float32) for p in rng.normal(size=(2, *np.atleast_1d(shape)))))


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, 0.3])
def test_batch_norm(dims, momentum, rng):
    kind = {0: "BatchNorm1d", 1: "BatchNorm1d", 2: "BatchNorm2d", 3: "BatchNorm3d"}[dims]
    module = getattr(torch.nn, kind)(6, momentum=momentum)
    norm = jn.BatchNorm(momentum=1 - momentum, axis=1, unbiased_running_var=True)
    params, state = affine(rng, 6), norm.init(6)[1]
    step = jax.jit(lambda p, s, x: norm.apply(p, s, x, train=True))
    for _ in range(10):
        x = draw(rng, (8, 6, 5, 4, 3)[: 2 + dims], 2.0)
        compare(module, lambda p, x, state=state: step(p, state, x)[0], params, x, draw(rng, x.shape))
        module.zero_grad()
        state = step(params, state, x)[1]
        np.testing.assert_allclose(state.mean, module.running_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.var, module.running_var, rtol=1e-5, atol=1e-6)
    compare(module.eval(), lambda p, x: norm.apply(p, state, x, train=False)[0], params, x[:1], draw(rng, x[:1].shape))


@pytest.mark.parametrize("shape", [(16,), (5, 16)])
@pytest.mark.parametrize(("kind", "f"), [("LayerNorm", jn.layer_norm), ("RMSNorm", jn.rms_norm)])
def test_layer_and_rms_norm(kind, f, shape, rng):
    module = getattr(torch.nn, kind)(shape, eps=1e-5)
    x = draw(rng, (4, 3, *shape), 1.0)
    axes = tuple(range(-len(shape), 0))
    bias = (lambda b: b) if kind == "LayerNorm" else (lambda b: None)
    apply = lambda p, x: f(x, p.scale, bias(p.bias), axis=axes, epsilon=1e-5)
    compare(module, apply, affine(rng, shape), x, draw(rng, x.shape))


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm(groups, rng):
    x = draw(rng, (4, 12, 5, 6), 1.0)
    apply = lambda p, x: jn.group_norm(x, *p, num_groups=groups, axis=1, epsilon=1e-5)
    compare(torch.nn.GroupNorm(groups, 12), apply, affine(rng, 12), x, draw(rng, x.shape))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norm(dims, rng):
    module = getattr(torch.nn, f"InstanceNorm{dims}d")(6, affine=True)
    x = draw(rng, (4, 6, 7, 5, 4)[: 2 + dims], 1.0)
    compare(module, lambda p, x: jn.instance_norm(x, *p, axis=1, epsilon=1e-5), affine(rng, 6), x, draw(rng, x.shape))
