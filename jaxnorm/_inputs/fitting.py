"""Statistics gathered over the batches of a data set, in a run that may be killed and started again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._core.messages import shown, to_python
from .saving import as_state, checked_path, named, read_arrays, write_arrays
from .trees import empty_like

BATCHES = "batches"  # what the file calls the number of batches that it has seen


class Masked(NamedTuple):
    """A batch and where its elements count: True, or a tree of masks like x."""

    x: Any
    mask: Any


def fitted(norm: Any, batches: Iterable[Any], state: Any, checkpoint: Any, every: Any) -> Any:
    """`StandardizeInputs.fit`."""
    name = f"{type(norm).__name__}.fit"
    every = to_python(every)
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"{name}: every must be an int >= 1, got {shown(every)}. Write every=100.")
    if not hasattr(batches, "__iter__") or hasattr(batches, "shape") or isinstance(batches, dict | tuple):
        raise TypeError(f"{name}: batches must be an iterable of batches, got {shown(batches)}. Write fit([batch]).")
    file = None if checkpoint is None else checked_path(name, checkpoint)
    done, saved = (0, None) if file is None or not file.exists() else _read(name, file)
    seen = 0
    for batch in batches:
        x, mask = batch if isinstance(batch, Masked) else (batch, None)
        state = empty_like(name, jax.tree.map(_last_axis, x), 0.0) if state is None else state
        if saved is not None:
            state, saved = as_state(name, file, saved, state), None
        seen += 1
        if seen > done:
            state = norm.update(state, x, mask=mask)
            if any(isinstance(a, np.ndarray) for a in jax.tree.leaves((x, mask))):
                jax.block_until_ready(state)  # JAX may read NumPy's memory later, and a loader may write to it again
            if file is not None and (seen - done) % every == 0:
                _write(file, seen, state)
    if seen == 0 and state is None:
        raise ValueError(f"{name}: there are no batches. An iterator is empty after one run: make a new one.")
    if seen < done:
        raise ValueError(
            f"{name}: the checkpoint {str(file)!r} has seen {done} batches, and there are {seen}. Delete it to start "
            "again, or give the batches that it was made of."
        )
    if file is not None and seen > done and (seen - done) % every:
        _write(file, seen, state)
    return state


def _last_axis(a: Any) -> tuple[int, ...]:
    shape = np.shape(a)
    return shape[-1:] if len(shape) > 1 else ()


def _read(name: str, file: Path) -> tuple[int, dict[str, np.ndarray]]:
    arrays = read_arrays(file)
    if BATCHES not in arrays:
        raise ValueError(
            f"{name}: {str(file)!r} is no checkpoint of fit; it lacks the number of batches. Statistics that "
            "jaxnorm.inputs.save has written go on with fit(batches, state=jaxnorm.inputs.load(path, like))."
        )
    return int(arrays.pop(BATCHES)), arrays


def _write(file: Path, seen: int, state: Any) -> None:
    if jax.process_index() == 0:
        write_arrays(file, {BATCHES: np.asarray(seen), **named(state)})
