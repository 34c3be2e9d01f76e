"""A progress bar around an iterable, by rich or tqdm."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from typing import Any


def with_bar(
    name: str, batches: Iterable[Any], title: str, progress: bool | None, total: int | None = None
) -> Iterable[Any]:
    """The batches, with a bar on standard error.

    `progress` None: where rich or tqdm is installed and standard error is a terminal. True: always. False: never.
    """
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return batches
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import track

        return track(batches, title, total, console=Console(stderr=True))
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        return tqdm(batches, title, total, file=sys.stderr)
    if progress:
        raise ModuleNotFoundError(
            f"{name}: progress=True needs rich or tqdm. Write pip install rich, or progress=None."
        )
    return batches
