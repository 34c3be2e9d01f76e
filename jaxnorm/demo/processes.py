"""The digits once more, data-parallel over several processes, any of which may die: training goes on where it was.

Each process holds its own rows of every batch; they meet in collectives alone. Now and then they save one checkpoint
together. When one dies, the others end too, and started again, as many as before or not, with as many devices or not,
they go on from the last checkpoint. Without `--process` all of them are started on this machine; on machines of your
own start one on each, with a `--checkpoints` folder that all of them see:

    python -m jaxnorm.demo.processes --processes 2 --address HOST:PORT --process 0     # on HOST
    python -m jaxnorm.demo.processes --processes 2 --address HOST:PORT --process 1     # on another machine
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import sys
from pathlib import Path

from .._install import extra
from .__main__ import Parser, positive, rate
from .__main__ import seed as number
from ._together import HEARTBEAT, joined, launch, say

NEEDS = {"optax": "optax", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m jaxnorm.demo.processes", description=str(__doc__).splitlines()[0])

    def add(name: str, kind, default, metavar: str, text: str) -> None:
        text = text if default is None else f"{text} (default: {default})"
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    forms = ("shard_map", "jit")
    parser.add_argument("--form", choices=forms, default=forms[0], help="of a step (default: shard_map)")
    add("--processes", positive, 4, "N", "how many")
    add("--devices", positive, 1, "N", "CPU devices of each process")
    add("--steps", positive, 60, "N", "of the training")
    add("--images", positive, 1347, "N", "to train on")
    add("--batch-size", positive, 127, "N", "images in a step, over all processes")
    add("--learning-rate", rate, 0.5, "X", "of SGD")
    add("--seed", number, 0, "N", "of the weights and the order")
    add("--checkpoints", Path, Path("digits.checkpoints"), "DIR", "a folder that all processes see")
    add("--every", positive, 20, "N", "steps from one checkpoint to the next")
    add("--restarts", number, 0, "N", "how often all may start again, after a death")
    add("--heartbeat", positive, HEARTBEAT, "SECONDS", "of silence that make a process dead")
    add("--kill", death, None, "PROCESS:STEP", "SIGKILL it before that step; PROCESS:STEP:STOP freezes it")
    add("--process", number, None, "I", "be that one, instead of starting them all")
    add("--address", str, None, "HOST:PORT", "of process 0, to be given with --process")
    options = parser.parse_args(given)
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f'needs {", ".join(missing)}. Write: {extra("demo")}')
    if (options.process is None) != (options.address is None):
        parser.error("--process and --address go together. Write both, or neither to start all processes here.")
    if options.process is None:
        return start(given, options)
    if options.process >= options.processes:
        most = f"--processes {options.processes}"
        parser.error(f"argument --process: must be below {most}, got {options.process}")
    with joined(options.address, options.processes, options.process, options.devices, options.heartbeat):
        from . import _process

        _process.train(options)
    return 0


def death(text: str) -> tuple[int, int, signal.Signals]:
    found = re.fullmatch(r"(\d+):(\d+)(?::(KILL|STOP))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be PROCESS:STEP, such as 1:30, got {text!r}")
    return int(found[1]), int(found[2]), signal.Signals[f"SIG{found[3] or 'KILL'}"]


def start(given: list[str], options) -> int:
    """All processes, and where one has died all of them again. A death that was asked for happens once."""
    command = [sys.executable, "-m", "jaxnorm.demo.processes", *given]
    for left in range(options.restarts, -1, -1):
        if launch(command, options.processes, options.heartbeat):
            return 0
        again = "all start again" if left else "the same line, written again, goes on from the last checkpoint"
        say(f"launch: {again}")
        command += ["--kill", "0:0"]
    return 1


if __name__ == "__main__":
    sys.exit(main())
