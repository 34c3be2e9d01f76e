"""Compile for a GPU or a TPU that this machine does not have. XLA's compilers need no device.

The TPU compiler comes with the wheel `libtpu`, the CUDA compiler with `jax-cuda13-plugin`, `jax-cuda13-pjrt` and
`nvidia-cuda-nvcc`. They give the program, its temporary memory and its collectives. Nothing runs, so there are no
numbers, no times and no autotuning.
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

#: Set before libtpu and the CUDA plugin are loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so several processes may load it
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
WHEELS = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"),
}


@dataclass(frozen=True)
class Target:
    """A number of chips of one kind, and the smallest topology that has them."""

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
    """Why this machine cannot compile for a platform; None if it can."""
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
    """The devices of a target as a mesh with one axis, `AXIS`."""
    it = TARGETS[target]
    reason = missing(it.platform)
    if reason is not None:
        raise RuntimeError(reason)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {}
    if it.platform == "cuda":
        config = (Path(__file__).parent / "h200.txtpb").read_text(encoding="utf-8")
        options = {"topology": it.topology, "target_config": config}
    topology = topologies.get_topology_desc(platform=it.platform, topology_name=it.topology, **options)
    devices = np.array(topology.devices[: it.devices])
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))


REPLICATED = P()


def placed(target: str, tree, spec: P = REPLICATED):
    """Shapes and dtypes of a tree of arrays, placed on the devices of a target."""
    sharding = NamedSharding(mesh(target), spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def compiled(f, target: str, *args, **jit):
    """Compile `f` for a target; the arguments come from `placed`."""
    with jax.set_mesh(mesh(target)):  # Pallas kernels read the kind of chip from the mesh
        return jax.jit(f, **jit).lower(*args).compile()
