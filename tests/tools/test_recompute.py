"""Statistics of the whole training set, against float64 populations, in every kind of model and on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import models
from jaxnorm import nnx as jnnx

DEPTH, WIDTH, EPSILON = 3, 4, 1e-3
SPEC = jn.BatchNorm(epsilon=EPSILON, unbiased_running_var=True)


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


class Linen(nn.Module):
    kernels: np.ndarray

    @nn.compact
    def __call__(self, batch):
        h, mask = batch
        for i, kernel in enumerate(self.kernels):
            options = dict(epsilon=EPSILON, unbiased_running_var=True, use_running_average=True, name=f"n{i}")
            h = jnp.tanh(jnn.BatchNorm(**options)(h @ kernel, mask=mask))
        return h


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


def test_specs(data):
    kernels, x, mask, batches = data
    variables = {"states": {f"n{i}": SPEC.init(WIDTH)[1] for i in range(DEPTH)}}
    new, outcome = models.recompute_stats(lambda v, b: by_specs(kernels, v, b), variables, batches)
    print(outcome)
    for i, (mean, var) in enumerate(population(kernels, x, mask)):
        np.testing.assert_allclose(new["states"][f"n{i}"].mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new["states"][f"n{i}"].var, var, rtol=1e-5)

def test_linen(data):
    kernels, x, mask, batches = data
    model = Linen(tuple(kernels))
    variables = model.init(jax.random.key(0), batches[0])
    new, outcome = models.recompute_stats(lambda v, b: model.apply(v, b, mutable=["batch_stats"]), variables, batches)
    print(outcome)
    for i, (mean, var) in enumerate(population(kernels, x, mask)):
        np.testing.assert_allclose(new["batch_stats"][f"n{i}"]["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new["batch_stats"][f"n{i}"]["var"], var, rtol=1e-5)

def test_nnx(data):
    kernels, x, mask, batches = data
    model = Nnx(kernels)
    new, outcome = models.recompute_stats(lambda m, b: m(b), model, batches)
    nnx.update(model, new)
    print(outcome)
    for i, (mean, var) in enumerate(population(kernels, x, mask)):
        np.testing.assert_allclose(model.norms[i].mean[...], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model.norms[i].var[...], var, rtol=1e-5)
