"""The network, its training over devices, and its evaluation. Everything about norms is a spec's `init` and `apply`.

Legend: B the images on one device, H and W their height and width, C channels, K batches.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm.demo._data import Batch

STRIDES = (1, 1, 1, 1, 2, 1, 1, 1)  # one convolution each
CHANNELS, CLASSES = 24, 10
EVERY = 5  # steps between two looks at the test set


@dataclass(frozen=True)
class NoNorm:
    """The absence of a norm, as a `jaxnorm.Norm`: a bias alone. Any spec of your own can take part like this."""

    def init(self, features) -> tuple[jn.Affine, tuple]:
        return jn.Affine(None, jnp.zeros(features, jnp.float32)), ()

    def apply(self, params: jn.Affine, state, x, *, train=None, mask=None):
        return x + jnp.broadcast_to(jnp.asarray(params.bias), x.shape), state


NORMS: dict[str, Any] = {
    "none": NoNorm(),
    "batch": jn.BatchNorm(momentum=0.8, axis_name="data"),  # statistics of the whole batch, over all devices
    "layer": jn.LayerNorm(axis=(1, 2, 3)),  # statistics of each image of its own
}


# --- the network: pure functions of (params, state) -------------------------------------------------------------------


class Block(NamedTuple):
    kernel: jax.Array  # (3, 3, C_in, C)
    affine: jn.Affine  # (C,) each


class Params(NamedTuple):
    blocks: tuple[Block, ...]
    weight: jax.Array  # (C, CLASSES)
    bias: jax.Array  # (CLASSES,)


def init(norm: jn.Norm, seed: int) -> tuple[Params, tuple]:
    """Parameters, and the state of every norm. The weights are the same whichever the norm."""
    *keys, last = jax.random.split(jax.random.key(seed), len(STRIDES) + 1)
    blocks, states = [], []
    for i, key in enumerate(keys):
        affine, state = norm.init(CHANNELS)
        kernel = jax.nn.initializers.he_normal()(key, (3, 3, CHANNELS if i else 1, CHANNELS), jnp.float32)
        blocks.append(Block(kernel, affine))
        states.append(state)
    weight = jax.nn.initializers.lecun_normal()(last, (CHANNELS, CLASSES), jnp.float32)
    return Params(tuple(blocks), weight, jnp.zeros(CLASSES, jnp.float32)), tuple(states)


def forward(norm: jn.Norm, params: Params, states: tuple, images, *, train: bool, mask=None):
    """Logits (B, CLASSES), the new states, and what enters the last ReLU: (B, H, W, C)."""
    x, z, new = images, images, []
    mask = None if mask is None else mask[:, None, None, None]
    for block, state, stride in zip(params.blocks, states, STRIDES, strict=True):
        z, state = norm.apply(block.affine, state, convolve(x, block.kernel, stride), train=train, mask=mask)
        x = jax.nn.relu(z)
        new.append(state)
    logits = x.mean((1, 2)) @ params.weight
    return logits + jnp.broadcast_to(params.bias, logits.shape), tuple(new), z


def convolve(x, kernel, stride: int):
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def mean_over_devices(values, mask):
    """The mean of what is not masked, on all devices together: with uneven masks not the mean of their means."""
    return lax.psum(jnp.where(mask, values, 0.0).sum(), "data") / lax.psum(mask.sum(dtype=values.dtype), "data")


# --- over devices: parameters on each, batches in shards --------------------------------------------------------------


def over_devices(mesh: Mesh, in_specs, out_specs):
    """jit of shard_map, with check_vma: what is said to be the same on all devices is proved to be."""
    return lambda f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def stepping(norm: Any, optimizer: optax.GradientTransformation, mean: Callable):
    """(params, states, optimizer state, batch) -> the same three after one step, and the loss before it."""

    def loss_of(params, states, batch: Batch):
        logits, states, _ = forward(norm, params, states, batch.images, train=True, mask=batch.mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return mean(losses, batch.mask), states

    def step(params, states, memory, batch):
        (loss, states), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, states, batch)
        updates, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), states, memory, loss

    return step


def make_step(norm: jn.Norm, optimizer: optax.GradientTransformation, mesh: Mesh):
    """`stepping` where each device sees its own images: norm and loss name the mesh axis they work over."""
    step = stepping(norm, optimizer, mean_over_devices)
    return over_devices(mesh, (P(), P(), P(), P("data")), P())(step)


def make_global_step(norm: jn.BatchNorm, optimizer: optax.GradientTransformation, mesh: Mesh):
    """`stepping` as one program over global arrays, which XLA divides: statistics are global there anyway."""
    step = stepping(replace(norm, axis_name=None), optimizer, lambda values, mask: values.mean(where=mask))
    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def make_evaluate(norm: jn.Norm, mesh: Mesh, *, one_by_one: bool = False):
    """(params, states, batch) -> accuracy, and what enters the last ReLU. No norm asks other images, or devices."""

    @over_devices(mesh, (P(), P(), P("data")), (P(), P("data")))
    def evaluate(params, states, batch: Batch):
        infer = lambda images: forward(norm, params, states, images, train=False)
        alone = lambda image: infer(image[None])
        logits, _, z = lax.map(alone, batch.images) if one_by_one else infer(batch.images)
        logits, z = logits.reshape(-1, CLASSES), z.reshape(-1, *z.shape[-3:])
        right = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
        return mean_over_devices(right, batch.mask), z

    return evaluate


def make_exact_statistics(norm: jn.BatchNorm, mesh: Mesh):
    """(params, batches) -> the states of batch norm with the statistics of all the batches, exactly.

    Layer by layer, since the input of one layer depends on the statistics of those before it. `batches` has a leading
    axis: images (K, B, 8, 8, 1), mask (K, B).
    """

    @over_devices(mesh, (P(), P(None, "data")), P())
    def exact_statistics(params: Params, batches: Batch):
        x, states = batches.images, []
        for block, stride in zip(params.blocks, STRIDES, strict=True):
            x = lax.map(functools.partial(convolve, kernel=block.kernel, stride=stride), x)
            each = jax.vmap(lambda x, mask: jn.moments(x, (0, 1, 2), mask=mask[:, None, None, None]))(x, batches.mask)
            total = jn.merge_across(merged(each), "data")  # first over batches, then over devices
            states.append(jn.RunningStats(total.mean, total.var))
            x = jax.nn.relu(norm.apply(block.affine, states[-1], x, train=False)[0])
        return tuple(states)

    return exact_statistics


def merged(each: jn.Moments) -> jn.Moments:
    """Moments with a leading axis, merged along it."""
    first, rest = jax.tree.map(lambda a: a[0], each), jax.tree.map(lambda a: a[1:], each)
    return lax.scan(lambda total, m: (jn.merge(total, m), None), first, rest)[0]


# --- a run ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What became of one norm."""

    params: Params
    states: tuple
    losses: np.ndarray  # (steps,), of each batch before its step
    looks: np.ndarray  # the steps after which the test set was looked at
    accuracies: np.ndarray  # there, 0 to 1
    before: np.ndarray  # what enters the last ReLU, on test images, before training: (TEST, H, W, C)
    after: np.ndarray  # and after it
    seconds: float  # per step, the median, without compilation

    def steps_to(self, accuracy: float) -> int | None:
        """The first look at which the test accuracy was reached."""
        return next((int(s) for s, a in zip(self.looks, self.accuracies, strict=True) if a >= accuracy), None)


def make_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Plain SGD; the learning rate rises over a tenth of the steps and falls to zero along a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    return optax.sgd(lambda count: schedule(jnp.asarray(count, jnp.float32)))


def fit(
    norm: jn.Norm, mesh: Mesh, batches: Iterator[Batch], test: Batch, *,
    steps: int, learning_rate: float, seed: int, on_step: Callable[[float, float], None] = lambda loss, accuracy: None,
) -> Run:  # fmt: skip
    """Train by `make_optimizer`, and look at the test set now and then."""
    optimizer = make_optimizer(steps, learning_rate)
    step, evaluate = make_step(norm, optimizer, mesh), make_evaluate(norm, mesh)
    params, states = init(norm, seed)
    params, states, memory = jax.device_put((params, states, optimizer.init(params)), NamedSharding(mesh, P()))
    accuracy, before = evaluate(params, states, test)
    looks, accuracies, losses, seconds, z = [0], [float(accuracy)], [], [], before
    for i, batch in enumerate(itertools.islice(batches, steps), start=1):
        start = time.perf_counter()
        params, states, memory, loss = step(params, states, memory, batch)
        losses.append(float(loss))  # waits for the devices
        seconds.append(time.perf_counter() - start)
        if i % EVERY == 0 or i == steps:
            accuracy, z = evaluate(params, states, test)
            looks.append(i)
            accuracies.append(float(accuracy))
        on_step(losses[-1], accuracies[-1])
    return Run(
        params, states, np.array(losses), np.array(looks), np.array(accuracies),
        np.asarray(before)[test.mask], np.asarray(z)[test.mask], float(np.median(seconds[1:] or seconds)),
    )  # fmt: skip
