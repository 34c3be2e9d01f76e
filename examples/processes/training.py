"""What each process does: train on its own rows of every batch, and save checkpoints together with the others."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import demo
from jaxnorm.demo import Batch

from .launcher import say

COLLECTIVES = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


class Progress(NamedTuple):
    """The content of a checkpoint. The order of the data is not in it, because it depends on the step alone."""

    params: Any
    states: tuple  # the running statistics of each norm
    memory: Any  # of the optimizer
    losses: np.ndarray  # (steps,) float32, of each batch before its step; NaN for future steps


def train(options) -> None:
    """Train from the last checkpoint, if there is one, to step `options.steps`. Process 0 prints the results."""
    mesh = Mesh(np.array(jax.devices()), ("data",))  # devices of all processes, those of process 0 first
    norm, optimizer = demo.NORMS["batch"], demo.make_optimizer(options.steps, options.learning_rate)
    images, test = standardized(options, mesh)
    now, masks = beginning(norm, optimizer, options), []
    step: Any = None  # compiled for the first batch
    now = jax.device_put(now._replace(losses=None), NamedSharding(mesh, P()))._replace(losses=now.losses)
    tell = say if jax.process_index() == 0 else lambda line: None
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(options.checkpoints.absolute(), options=keep) as manager:
        done = manager.latest_step() or 0
        if done:
            now = manager.restore(done, args=ocp.args.StandardRestore(now))
            tell(f"from the checkpoint of step {done}")
            if options.kill and options.kill[1] <= done:
                tell(f"--kill does nothing: step {options.kill[1]} was done before that checkpoint")
        for i, mine in own_batches(images, mesh, options, done):
            batch = shared(mine, mesh)
            if step is None:
                step = FORMS[options.form](norm, optimizer, mesh).lower(*now[:3], batch).compile()
                tell(f"each step: {collectives(step.as_text())}")
            if options.kill and options.kill[:2] == (jax.process_index(), i):
                os.kill(os.getpid(), options.kill[2])
            params, states, memory, loss = step(*now[:3], batch)
            now.losses[i - 1] = jax.block_until_ready(loss)  # raises where another process has died
            now = Progress(params, states, memory, now.losses)
            masks.append(mine.mask)
            if i % options.every == 0 or i == options.steps:
                manager.save(i, args=ocp.args.StandardSave(now))
                tell(f"step {i}: loss {now.losses[i - 1]:.4f}, saved")
    if masks:
        counts = [mask.sum() for mask in masks]
        say(f"process {jax.process_index()}: {min(counts)} to {max(counts)} images in {len(masks[0])} rows a step")
    (test,) = demo.in_order(test, demo.TEST, rows(demo.TEST, mesh))
    accuracy, _ = demo.make_evaluate(norm, mesh)(now.params, now.states, shared(own(test), mesh))
    tell(f"test accuracy {float(accuracy):.1%}")


def make_global_step(norm: jn.BatchNorm, optimizer, mesh: Mesh):
    """A step as one program over global arrays, which XLA partitions. Their statistics are global without axis_name."""
    step = demo.update(replace(norm, axis_name=None), optimizer, lambda values, mask: values.mean(where=mask))
    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


FORMS = {"shard_map": demo.make_step, "jit": make_global_step}


def beginning(norm, optimizer, options) -> Progress:
    params, states = demo.init(norm, options.seed)
    return Progress(params, states, optimizer.init(params), np.full(options.steps, np.nan, np.float32))


# --- data: batches do not depend on the number of processes, so neither do the results --------------------------------


def standardized(options, mesh: Mesh) -> tuple[Batch, Batch]:
    """`options.images` training images, and the test images. Every process reads them all, because they are few."""
    train, test = demo.load()
    train = Batch(*(a[: options.images] for a in train))
    pixels = demo.pixel_statistics(demo.in_order(train, options.batch_size, rows(options.batch_size, mesh)))
    return demo.standardized(train, pixels), demo.standardized(test, pixels)


def rows(size: int, mesh: Mesh) -> int:
    """`size` rounded up to a multiple of the number of devices. The last devices hold the padding."""
    return math.ceil(size / mesh.size) * mesh.size


def own_batches(images: Batch, mesh: Mesh, options, done: int) -> Iterator[tuple[int, Batch]]:
    """(i, this process's rows of batch i) for each step after `done`."""
    size = options.batch_size
    batches = enumerate(demo.shuffled(images, size, rows(size, mesh), options.seed), start=1)
    return ((i, own(batch)) for i, batch in itertools.islice(batches, done, options.steps))


def own(batch: Batch) -> Batch:
    count = len(batch.mask) // jax.process_count()
    start = jax.process_index() * count
    return Batch(*(a[start : start + count] for a in batch))


def shared(mine: Batch, mesh: Mesh) -> Batch:
    """The whole batch as global arrays. Each process provides its own rows, and no data is sent."""
    over = NamedSharding(mesh, P("data"))
    return Batch(*(jax.make_array_from_process_local_data(over, a) for a in mine))


def collectives(text: str) -> str:
    """The collectives of a compiled program, counted by kind."""
    return ", ".join(f"{n} {kind}" for kind, n in Counter(re.findall(COLLECTIVES, text)).items()) or "no collective"
