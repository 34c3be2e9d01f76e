"""Compiling for a GPU or a TPU that this machine does not have: XLA's own compilers, which need no device to run.

The TPU's comes with the `libtpu` wheel, CUDA's with `jax-cuda13-plugin`, `jax-cuda13-pjrt` and `nvidia-cuda-nvcc`.
They give the program, its temporary memory and its collectives. They run nothing: no numbers, no times, and, since
CUDA's compiler cannot time kernels here either, no autotuning.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"  # the one axis of every mesh here

#: What the compilers ask of the environment, before libtpu and CUDA's plugin are loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is touched, so processes need not take turns
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
WHEELS = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"),
}


@dataclass(frozen=True)
class Target:
    """Chips of one kind, and the smallest topology that has enough of them."""

    name: str
    platform: str
    topology: str
    devices: int

    def __str__(self) -> str:
        return self.name


TARGETS = {
    target.name: target
    for target in (
        Target("h200", "cuda", "1x1x1", 1),
        Target("h200x8", "cuda", "1x1x8", 8),
        Target("v5e", "tpu", "v5e:2x2", 1),
        Target("v5ex8", "tpu", "v5e:2x4", 8),
        Target("v5ex64", "tpu", "v5e:8x8", 64),
        Target("v5ex256", "tpu", "v5e:16x16", 256),
        Target("v5p", "tpu", "v5p:2x2x1", 1),
        Target("v5px8", "tpu", "v5p:2x2x2", 8),
        Target("v5px64", "tpu", "v5p:4x4x4", 64),
        Target("v5px256", "tpu", "v5p:4x8x8", 256),
        Target("v5px1024", "tpu", "v5p:8x8x16", 1024),
        Target("v6e", "tpu", "v6e:2x2", 1),
        Target("v6ex8", "tpu", "v6e:2x4", 8),
    )
}


def missing(platform: str) -> str | None:
    """Why programs cannot be compiled for a platform here, or None where they can."""
    absent = []
    for wheel in WHEELS[platform]:
        try:
            importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            absent.append(wheel)
    if not absent:
        return None
    return f"{platform}: {', '.join(absent)} not installed. Run: pip install {' '.join(absent)}"


@functools.cache
def mesh(target: str, explicit: bool = False) -> Mesh:
    """The devices of a target, as a mesh of one axis, `AXIS`."""
    it = TARGETS[target]
    reason = missing(it.platform)
    if reason is not None:
        raise RuntimeError(reason)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {}
    if it.platform == "cuda":
        config = (Path(__file__).parents[1] / "h200.txtpb").read_text(encoding="utf-8")
        options = {"topology": it.topology, "target_config": config}
    topology = topologies.get_topology_desc(platform=it.platform, topology_name=it.topology, **options)
    devices = np.array(topology.devices[: it.devices])
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))


REPLICATED = P()


def placed(target: str, tree, spec: P = REPLICATED):
    """Arrays, or their shapes and dtypes, as arguments that lie on a target's devices."""
    sharding = NamedSharding(mesh(target), spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def compiled(f, target: str, *args, **jit):
    """The program that `f` becomes on a target, for arguments from `placed`."""
    with jax.set_mesh(mesh(target)):  # a Pallas kernel learns from it for which chip it is
        return jax.jit(f, **jit).lower(*args).compile()
