"""Train the demo's network data-parallel over several processes, and survive the death of any of them.

Each process holds its own rows of every batch and talks to the others through collectives alone. They save checkpoints
together. When one dies, all end; restarted, they continue from the last checkpoint, also with another number of
processes or devices. Without `--process`, one command starts all of them on this machine:

    python -m examples.processes --processes 4 --kill 2:30 --restarts 1

On several machines start one process on each, with a `--checkpoints` folder that all of them see:

    python -m examples.processes --processes 2 --address HOST:PORT --process 0     # on HOST
    python -m examples.processes --processes 2 --address HOST:PORT --process 1     # on another machine
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path

from jaxnorm.demo import TRAIN, Parser, finish, positive, rate, steps, whole
from jaxnorm.demo import seed as number

from .launcher import HEARTBEAT, joined, launch, meet, say

PROGRAM = "python -m examples.processes"

NEEDS = {"optax": "optax", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}
MAX = 64  # processes on one machine, and devices of each
SETTINGS = ("steps", "images", "batch_size", "learning_rate", "seed")  # of a training; checkpoints belong to them


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = Parser(prog=PROGRAM, description=str(__doc__).splitlines()[0])

    def add(name: str, kind, default, metavar: str, text: str) -> None:
        text = text if default is None else f"{text} (default: {default})"
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

    forms = ("shard_map", "jit")
    parser.add_argument("--form", choices=forms, default=forms[0], help="of a step (default: shard_map)")
    add("--processes", positive, 4, "N", "how many")
    add("--devices", whole(1, MAX), 1, "N", "CPU devices of each process")
    add("--steps", steps, 60, "N", "of the training")
    add("--images", whole(1, TRAIN), TRAIN, "N", "to train on")
    add("--batch-size", whole(1, TRAIN), 127, "N", "images in a step, over all processes")
    add("--learning-rate", rate, 0.5, "X", "of SGD")
    add("--seed", number, 0, "N", "of the weights and the order")
    add("--checkpoints", Path, Path("digits.checkpoints"), "DIR", "a folder that all processes see")
    add("--every", positive, 20, "N", "steps from one checkpoint to the next")
    add("--restarts", number, 0, "N", "how often to start all again after a death")
    add("--heartbeat", whole(1, 86400), HEARTBEAT, "SECONDS", "of silence after which a process counts as dead")
    add("--kill", death, None, "PROCESS:STEP", "kill that process before that step; PROCESS:STEP:STOP freezes it")
    add("--process", number, None, "I", "run that one process instead of starting all")
    add("--address", str, None, "HOST:PORT", "of process 0; goes with --process")
    options = parser.parse_args(given)
    parser.require(NEEDS, "examples")
    check(parser, options)
    if options.process is None:
        return start(parser, given, options)
    try:
        meet(options.address, options.process)
    except OSError as error:
        doing = "listen on" if options.process == 0 else "reach process 0 at"
        parser.error(f"argument --address: cannot {doing} {options.address}: {error.strerror or error}.")
    with joined(options.address, options.processes, options.process, options.devices, options.heartbeat):
        from . import training

        training.train(options)
    return 0


def death(text: str) -> tuple[int, int, signal.Signals]:
    found = re.fullmatch(r"(\d+):(\d+)(?::(KILL|STOP))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be PROCESS:STEP, such as 1:30, got {text!r}")
    return int(found[1]), int(found[2]), signal.Signals[f"SIG{found[3] or 'KILL'}"]


def check(parser: Parser, options) -> None:
    """Check the options that depend on one another, and the folder, before any process starts."""
    count = options.processes
    if (options.process is None) != (options.address is None):
        parser.error("--process and --address go together. Write both, or neither to start all processes here.")
    if options.process is None and count > MAX:
        parser.error(f"argument --processes: at most {MAX} start on one machine, got {count}.")
    if options.process is not None and options.process >= count:
        parser.error(f"argument --process: must be below --processes {count}, got {options.process}")
    if options.address is not None:
        found = re.fullmatch(r".+:(\d{1,5})", options.address)
        if not found or not 1 <= int(found[1]) < 2**16:
            parser.error(f"argument --address: must be HOST:PORT, such as 10.0.0.1:1234, got {options.address!r}")
    if options.kill and options.kill[0] >= count:
        parser.error(f"argument --kill: there is no process {options.kill[0]}, only 0 to {count - 1}.")
    if options.kill and not 1 <= options.kill[1] <= options.steps:
        parser.error(f"argument --kill: there is no step {options.kill[1]}, only 1 to {options.steps}.")
    try:
        open_folder(parser, options)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        parser.error(f"argument --checkpoints: cannot use {str(options.checkpoints)!r}: {reason}.")


def open_folder(parser: Parser, options) -> None:
    """Create the folder of checkpoints. Refuse one that is not writable or that holds another training."""
    if options.checkpoints.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=options.checkpoints):
        pass
    note = options.checkpoints / "training.json"
    mine = {name: getattr(options, name) for name in SETTINGS}
    there = json.loads(note.read_text()) if note.exists() else mine
    write = lambda settings: " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in SETTINGS)
    if saved(options.checkpoints) and there != mine:
        parser.error(
            f"argument --checkpoints: {str(options.checkpoints)!r} holds another training. "
            f"Write {write(there)} to go on with it, or name another folder."
        )
    if not options.process and (there != mine or not note.exists()):
        fresh = note.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(mine))
        fresh.replace(note)


def saved(folder: Path) -> int:
    """The step of the last checkpoint, or 0."""
    return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)


def start(parser: Parser, given: list[str], options) -> int:
    """Start all processes, and start them again after a death. The death that --kill asks for happens once."""
    kill = Parser(add_help=False)
    kill.add_argument("--kill")
    again = kill.parse_known_args(given)[1]
    command = [sys.executable, *PROGRAM.split()[1:]]
    for left in range(options.restarts, -1, -1):
        try:
            if launch([*command, *given], options.processes, options.heartbeat):
                return 0
        except BrokenPipeError:
            raise
        except OSError as error:
            parser.error(f"cannot start {options.processes} processes: {error.strerror or error}.")
        given = again
        if left:
            say("launch: all start again")
    last = saved(options.checkpoints)
    where = f"on from the checkpoint of step {last}" if last else "from the beginning: no checkpoint was saved"
    say(f"launch: this line goes {where}")
    say(f"    {shlex.join([*parser.prog.split(), *again])}")
    return 1


if __name__ == "__main__":
    finish(main)
