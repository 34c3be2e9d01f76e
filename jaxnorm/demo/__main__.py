"""Handwritten digits, one network, three norms, every device of this machine: a picture and a table in a minute."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from jaxnorm._core.install import extra

NEEDS = {"matplotlib": "matplotlib", "optax": "optax", "rich": "rich", "sklearn": "scikit-learn"}
TITLES = {"none": "no normalization", "batch": "batch norm", "layer": "layer norm"}
PROGRAM = "python -m jaxnorm.demo"
HOST_DEVICES, MOST_HOST_DEVICES = 4, 64
SMALLEST, LARGEST = 1e-30, 1e30  # a learning rate that is neither 0 nor infinite in float32
INTERRUPTED, UNREAD = 130, 141  # the status that a shell gives a program ended by Ctrl-C, or by a closed pipe


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--norm", choices=[*TITLES, "all"], default="all", help="which to train (default: all)")
    parser.add_argument("--devices", type=positive, metavar="N", help="how many (default: all; on a CPU 4 are made)")
    parser.add_argument("--steps", type=steps, default=250, metavar="N", help="of each training (default: 250)")
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
    run(parser, options)


def finish(main: Callable[[], int | None]) -> NoReturn:
    """Run a command. Ctrl-C and a reader that went away (`| head`) end it without a traceback."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        status = UNREAD
    sys.exit(status)


# --- options: whatever is wrong is said before anything is trained ----------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an option: a whole number of this range."""

    def number(text: str) -> int:
        if text.strip().isdecimal() and len(text) < 100 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text[:100]!r}")

    return number


steps, positive, seed = whole(1, 10**6), whole(1, 2**31 - 1), whole(0, 2**31 - 1)


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if SMALLEST <= float(text) <= LARGEST:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number from {SMALLEST} to {LARGEST}, got {text!r}")


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
    from jaxnorm.demo import _data, _plot

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
    existed = os.path.lexists(options.out)
    with writing(parser, options.out), open(options.out, "ab"):
        pass
    if not existed:
        options.out.unlink()


@contextlib.contextmanager
def writing(parser: Parser, out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        parser.error(f"argument --out: cannot write {str(out)!r}: {error.strerror}.")


def line(options) -> str:
    """The command that repeats this run, with every setting that its picture depends on."""
    given = {
        "norm": options.norm, "devices": len(options.devices), "steps": options.steps,
        "batch-size": options.batch_size, "learning-rate": f"{options.learning_rate:g}", "seed": options.seed,
    }  # fmt: skip
    return " ".join([PROGRAM, *(f"--{name} {value}" for name, value in given.items())])


# --- the run ----------------------------------------------------------------------------------------------------------


def run(parser: Parser, options) -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh
    from rich.console import Console

    from jaxnorm.demo import _data, _plot, _train

    console = Console(highlight=False, markup=False, emoji=False)
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

    show(console, *main_table(runs))
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
        show(console, *inference_table(rows))
    console.print(
        f"Every norm: the same {len(_train.STRIDES)} convolutions, initial weights, batches and learning rate "
        f"({options.learning_rate:g}, SGD)."
    )
    facts = dict(batch_size=size, learning_rate=options.learning_rate, layer=len(_train.STRIDES))
    with writing(parser, options.out):
        _plot.draw({TITLES[name]: run for name, run in runs.items()}, options.out, command=line(options), **facts)
    console.print(f"Picture: {options.out}", soft_wrap=True)


@contextlib.contextmanager
def progress(console) -> Iterator[Any]:
    """Gives a function (title, steps) -> on_step. A live line for each training; in a log, a line after each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    numbers = TextColumn("loss {task.fields[loss]:9.4g}  test {task.fields[accuracy]:6.1%}")
    columns = {  # the most telling first, each with its width: a narrow terminal has no place for the last ones
        TextColumn("{task.description:16}"): 16, MofNCompleteColumn(): 15, numbers: 27, BarColumn(24): 24,
        TimeElapsedColumn(): 7,
    }  # fmt: skip
    widths = itertools.accumulate(width + 1 for width in columns.values())
    fitting = [column for column, width in zip(columns, widths, strict=True) if width <= console.width + 1]
    live = console.is_interactive
    with Progress(*fitting, console=console, disable=not live) as bars:

        def begin(title: str, steps: int):
            task = bars.add_task(title, total=steps, loss=math.nan, accuracy=math.nan)
            done = 0

            def on_step(loss: float, accuracy: float) -> None:
                nonlocal done
                done += 1
                bars.update(task, advance=1, loss=loss, accuracy=accuracy)
                if done == steps and not live:
                    console.print(f"{title}: {steps} steps, loss {loss:.4g}, test {accuracy:.1%}")

            return on_step

        yield begin


def show(console, title: str, headers: list[str], rows: list[list[str]]) -> None:
    """A table; where it does not fit into the terminal, its cells one below the other."""
    from rich.table import Table

    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    if sum(widths) + 3 * len(widths) + 1 <= console.width:
        table = Table(title=title, title_style="bold")
        for header in headers:
            table.add_column(header, justify="left" if header is headers[0] else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    console.print(title, style="bold")
    for name, *cells in rows:
        console.print(name)
        for header, cell in zip(headers[1:], cells, strict=True):
            console.print(f"  {header}: {cell}")


def main_table(runs: dict) -> tuple[str, list[str], list[list[str]]]:
    def cells(name: str, run) -> list[str]:
        steps = run.steps_to(0.95)
        reached = f"not in {run.looks[-1]} steps" if steps is None else str(steps)
        return [TITLES[name], f"{100 * run.accuracies[-1]:.1f} %", reached, f"{1e3 * run.seconds:.1f} ms"]

    headers = ["norm", "test accuracy", "steps to 95 %", "time per step"]
    return "Digits", headers, [cells(name, run) for name, run in runs.items()]


def inference_table(rows: dict) -> tuple[str, list[str], list[list[str]]]:
    cells = [[title, f"{100 * float(accuracy):.1f} %"] for title, accuracy in rows.items()]
    return "Batch norm at inference", ["normalized by", "test accuracy"], cells


if __name__ == "__main__":
    finish(main)
