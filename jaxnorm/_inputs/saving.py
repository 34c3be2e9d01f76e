"""Any state as an npz file: arrays by their paths, no pickles."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._core.messages import shown

T = TypeVar("T")


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Write a state to an npz file: one array for each leaf, named by its path.

    The file is replaced as a whole, so that a kill leaves the old one or the new one. States are pytrees, which
    checkpoint libraries take as well.

    Args:
      path: the file, whose name ends in ".npz".
      state: a state of `jaxnorm.inputs`, or any tree of arrays.

    >>> from jaxnorm import inputs
    >>> import tempfile, os
    >>> state = inputs.SeenStats.of([1.], [2.])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "stats.npz")
    ...     inputs.save(file, state)
    ...     float(inputs.load(file, inputs.SeenStats.empty(1)).std[0])
    2.0
    """
    write_arrays(checked_path("save", path), named(state))


def load(path: str | os.PathLike[str], like: T) -> T:
    """Read a state that `save` has written.

    Args:
      path: the file.
      like: a state of the same tree, such as `norm.init(features)[1]`.

    Raises:
      ValueError: the file holds other names or shapes than `like`.
    """
    return as_state("load", path, read_arrays(path), like)


def as_state(norm: str, path: Any, arrays: dict[str, np.ndarray], like: T) -> T:
    wanted = named(like)
    if arrays.keys() != wanted.keys():
        raise ValueError(
            f"{norm}: {str(path)!r} holds {shown(sorted(arrays))}, and the state has {shown(sorted(wanted))}. "
            "Write like=norm.init(features)[1], with the spec and features that the file was written with."
        )
    for name, a in wanted.items():
        if arrays[name].shape != a.shape:
            raise ValueError(
                f"{norm}: {str(path)!r} holds {name} of shape {arrays[name].shape}, and the state has {a.shape}. "
                "Write like=norm.init(features)[1] with the features that the file was written with."
            )
    made = [jnp.asarray(arrays[name].astype(a.dtype)) for name, a in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), made)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def checked_path(norm: str, path: str | os.PathLike[str]) -> Path:
    if not str(path).endswith(".npz"):
        raise ValueError(f'{norm}: the name of the file must end in ".npz", got {str(path)!r}. Write "stats.npz".')
    return Path(path)


def named(state: Any) -> dict[str, np.ndarray]:
    """The leaves by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/") or "value": np.asarray(a) for path, a in leaves}
