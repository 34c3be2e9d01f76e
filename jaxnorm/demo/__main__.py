"""Handwritten digits, one network, three norms, every device of this machine: a picture and a table in a minute."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from .._install import extra

NEEDS = {"matplotlib": "matplotlib", "optax": "optax", "rich": "rich", "sklearn": "scikit-learn"}
TITLES = {"none": "no normalization", "batch": "batch norm", "layer": "layer norm"}
HOST_DEVICES, MOST_HOST_DEVICES = 4, 64


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m jaxnorm.demo", description=__doc__)
    parser.add_argument("--norm", choices=[*TITLES, "all"], default="all", help="which to train (default: all)")
    parser.add_argument("--devices", type=positive, metavar="N", help="how many (default: all; on a CPU 4 are made)")
    parser.add_argument("--steps", type=positive, default=250, metavar="N", help="of each training (default: 250)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="over all devices (default: 128)")
    parser.add_argument("--learning-rate", type=rate, default=0.5, metavar="X", help="the same for all (default: 0.5)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the weights and the order (default: 0)")
    parser.add_argument("--out", type=Path, default="digits.png", metavar="PATH", help="picture (default: digits.png)")
    options = parser.parse_args(argv)
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f'needs {", ".join(missing)}. Write: {extra("demo")}')
    options.devices = devices(parser, options.devices)
    check(parser, options)
    run(options)


# --- options: whatever is wrong is said before anything is trained ----------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**31 - 1}, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def devices(parser: Parser, wanted: int | None) -> list:
    """The first `wanted` devices. A CPU is split into several, which must be said before JAX's backend starts.

    Importing JAX, as `import jaxnorm` did, does not start it. The user's own setting, if there is one, stays.
    """
    import jax

    flag = "--xla_force_host_platform_device_count"
    untouched = flag not in os.environ.get("XLA_FLAGS", "") and getattr(jax.config, "jax_num_cpu_devices", 0) == -1
    if untouched:
        with contextlib.suppress(RuntimeError):  # the backend runs already, when called from other code
            jax.config.update("jax_num_cpu_devices", min(wanted or HOST_DEVICES, MOST_HOST_DEVICES))
    found = jax.local_devices()
    if wanted and wanted > len(found):
        kind = found[0].platform
        hint = f"Write --devices {len(found)}"
        if kind != "cpu":
            hint += f", or JAX_PLATFORMS=cpu {parser.prog} --devices {min(wanted, MOST_HOST_DEVICES)}"
        elif wanted <= MOST_HOST_DEVICES:
            hint += f", or unset your own setting of their number (XLA_FLAGS={flag}, JAX_NUM_CPU_DEVICES)"
        parser.error(f"argument --devices: there are {len(found)} {kind} devices to be had, not {wanted}. {hint}.")
    return found[:wanted]


def check(parser: Parser, options) -> None:
    from . import _data, _plot

    count = len(options.devices)
    if options.batch_size < count:
        parser.error(
            f"argument --batch-size: {options.batch_size} images are too few for {count} devices. "
            f"Write --batch-size {count}, or --devices {options.batch_size}."
        )
    if options.batch_size > _data.TRAIN:
        parser.error(
            f"argument --batch-size: must be at most the {_data.TRAIN} training images, got {options.batch_size}."
        )
    if options.out.suffix.lower() not in _plot.FORMATS:
        parser.error(f"argument --out: must end in {', '.join(_plot.FORMATS)}, got {str(options.out)!r}.")
    existed = options.out.exists()
    try:
        with open(options.out, "ab"):
            pass
    except OSError as error:
        parser.error(f"argument --out: cannot write {str(options.out)!r}: {error.strerror}.")
    if not existed:
        options.out.unlink()


# --- the run ----------------------------------------------------------------------------------------------------------


def run(options) -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh
    from rich.console import Console

    from . import _data, _plot, _train

    console = Console(highlight=False)
    mesh = Mesh(np.array(options.devices), ("data",))
    count, size = len(options.devices), options.batch_size
    padded = lambda images: math.ceil(images / count) * count  # every device gets as many rows, some of them padding
    platform = f"{count} {options.devices[0].platform} device{'s' if count > 1 else ''}"
    console.print(f"{_data.TRAIN} digits to train on, {_data.TEST} to test; batches of {size} over {platform}.")

    train, test = _data.load()
    pixels = _data.pixel_moments(_data.in_order(train, size, padded(size)))
    train, test = _data.standardized(train, pixels), _data.standardized(test, pixels)
    (test,) = _data.in_order(test, _data.TEST, padded(_data.TEST))

    names = list(TITLES) if options.norm == "all" else [options.norm]
    runs: dict[str, _train.Run] = {}
    with progress(console) as begin:
        for name in names:
            batches = _data.shuffled(train, size, padded(size), options.seed)
            on_step = begin(TITLES[name], options.steps)
            given = dict(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed, on_step=on_step)
            runs[name] = _train.fit(_train.NORMS[name], mesh, batches, test, **given)

    console.print(main_table(runs))
    if "batch" in runs:
        norm, run = _train.NORMS["batch"], runs["batch"]
        stacked = jax.tree.map(lambda *a: np.stack(a), *_data.in_order(train, size, padded(size)))
        exact = _train.make_exact_statistics(norm, mesh)(run.params, stacked)
        together, alone = (_train.make_evaluate(norm, mesh, one_by_one=one) for one in (False, True))
        rows = {
            "running statistics, all test images at once": together(run.params, run.states, test)[0],
            "running statistics, one image at a time": alone(run.params, run.states, test)[0],
            "exact statistics of the training set": together(run.params, exact, test)[0],
        }
        console.print(inference_table(rows))
    console.print(
        f"Every norm: the same {len(_train.STRIDES)} convolutions, initial weights, batches and learning rate "
        f"({options.learning_rate:g}, SGD)."
    )
    facts = dict(batch_size=size, learning_rate=options.learning_rate, layer=len(_train.STRIDES))
    _plot.draw({TITLES[name]: run for name, run in runs.items()}, options.out, **facts)
    console.print(f"Picture: {options.out}", soft_wrap=True)


@contextlib.contextmanager
def progress(console) -> Iterator[Any]:
    """Gives a function (title, steps) -> on_step. A live bar for each training; in a log, a line after each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    numbers = TextColumn("loss {task.fields[loss]:6.3f}  test {task.fields[accuracy]:6.1%}")
    columns = (TextColumn("{task.description:16}"), BarColumn(24), MofNCompleteColumn(), numbers, TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def begin(title: str, steps: int):
            task = bars.add_task(title, total=steps, loss=math.nan, accuracy=math.nan)
            done = 0

            def on_step(loss: float, accuracy: float) -> None:
                nonlocal done
                done += 1
                bars.update(task, advance=1, loss=loss, accuracy=accuracy)
                if done == steps and not console.is_terminal:
                    console.print(f"{title}: {steps} steps, loss {loss:.3f}, test {accuracy:.1%}")

            return on_step

        yield begin


def main_table(runs: dict):
    from rich.table import Table

    table = Table(title="Digits", title_style="bold")
    table.add_column("norm")
    for title in ("test accuracy", "steps to 95 %", "time per step"):
        table.add_column(title, justify="right")
    for name, run in runs.items():
        steps = run.steps_to(0.95)
        reached = "never" if steps is None else str(steps)
        table.add_row(TITLES[name], f"{100 * run.accuracies[-1]:.1f} %", reached, f"{1e3 * run.seconds:.1f} ms")
    return table


def inference_table(rows: dict):
    from rich.table import Table

    table = Table(title="Batch norm at inference", title_style="bold")
    table.add_column("normalized by")
    table.add_column("test accuracy", justify="right")
    for title, accuracy in rows.items():
        table.add_row(title, f"{100 * float(accuracy):.1f} %")
    return table


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
