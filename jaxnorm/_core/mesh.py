"""Which axis names are bound where a norm is called, and which of them jit partitions."""

from __future__ import annotations

import contextlib

import jax
from jax import lax


def active_axis_names(axis_name, whole: bool = True) -> tuple[str, ...]:
    """Drop the names of mesh axes that jit partitions: arrays are global along them. With `whole=False`, keep them."""
    names = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    mesh = jax.sharding.get_abstract_mesh()
    jits = () if mesh.empty or not whole else {n for n in mesh.axis_names if n not in mesh.manual_axes}
    return tuple([name for name in names if name not in jits or is_bound(name)])


def is_bound(name) -> bool:
    """Whether a mapped axis has this name: also by vmap, whatever the mesh."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


@contextlib.contextmanager
def explain_unbound_axis(norm: str, axis_name):
    """An unbound axis name, explained."""
    try:
        yield
    except NameError as error:
        raise NameError(
            f"{norm}: axis_name={axis_name!r} is not bound here: call it inside jax.shard_map over a mesh with that "
            f"axis, or inside jax.pmap or jax.vmap with axis_name={axis_name!r}. Under plain jit over sharded arrays "
            "write axis_name=None, or wrap the call in jax.set_mesh(mesh): statistics there are global already."
        ) from error
