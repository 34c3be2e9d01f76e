"""The state of `recompute_stats` in a file, so that a run that was killed goes on."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.types import RunningStats
from .gathering import nothing_seen


class Saved:
    """The state of a run in a file: the pass, the batches seen in it, the statistics before it and the moments."""

    def __init__(self, path: Path, arrays: Any, states: dict[str, RunningStats]):
        self.path, self.key, self.old = path, _fingerprint(arrays), states

    def save(self, at: int, done: int, states: dict[str, RunningStats], total: Any) -> None:
        leaves = [host(a).astype(doubled(a)) for a in jax.tree.leaves((states, total))]
        if jax.process_index() == 0:
            beside = self.path.with_name(self.path.name + ".new")
            with open(beside, "wb") as file:
                np.savez(file, *leaves, at=at, done=done, key=self.key)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)  # so that a kill leaves the old file or the new one

    def load(self) -> tuple[int, int, dict[str, RunningStats], Any]:
        at, done, states, total = 0, 0, self.old, None
        if self.path.exists():
            try:
                with np.load(self.path) as file:
                    key, at, done = str(file["key"]), int(file["at"]), int(file["done"])
                    leaves = [file[f"arr_{i}"] for i in range(len(file.files) - 3)]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"recompute_stats: {self.path} is no state of recompute_stats. Write another resume=."
                ) from error
            if key != self.key:
                raise ValueError(
                    f"recompute_stats: {self.path} is the state of a run over other variables. Write another resume=, "
                    "or remove the file."
                )
            olds = jax.tree.leaves(self.old)
            cast = [a.astype(b.dtype) for a, b in zip(leaves, olds, strict=False)]
            states = jax.tree.unflatten(jax.tree.structure(self.old), cast)
            like = {path: nothing_seen(stats) for path, stats in self.old.items()}
            total = jax.tree.unflatten(jax.tree.structure(like), leaves[len(olds) :]) if done else None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.assert_equal((at, done), "recompute_stats: not all processes read the same resume file")
        return at, done, states, total

    def remove(self) -> None:
        if jax.process_index() == 0:
            self.path.unlink(missing_ok=True)


def host(a: Any) -> np.ndarray:
    if isinstance(a, jax.Array) and not a.is_fully_addressable and not a.is_fully_replicated:
        from jax.experimental import multihost_utils

        a = multihost_utils.process_allgather(a, tiled=True)
    return np.asarray(a)


def doubled(a: Any) -> Any:
    return np.complex128 if np.issubdtype(a.dtype, np.complexfloating) else np.float64


def _fingerprint(arrays: Any) -> str:
    """Of all variables: other weights have other statistics."""
    text = hashlib.sha256()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        text.update(f"{jax.tree_util.keystr(keys)} {np.shape(leaf)} {getattr(leaf, 'dtype', type(leaf))}".encode())
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            text.update(np.ascontiguousarray(leaf).tobytes())
    return text.hexdigest()
