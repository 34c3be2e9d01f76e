"""Start, join and end several processes as one JAX program. If one dies or hangs, all end in bounded time.

When a process dies, its connections close. The next collective of the others then raises and `joined` ends them, or
JAX's coordinator, which lives in process 0, ends them first. When a process hangs, its connections stay open; the
coordinator misses its heartbeats and ends the others. `launch` kills any process that is still running after that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from jaxnorm.demo import BROKEN_PIPE, INTERRUPTED

HEARTBEAT = 20  # seconds of silence after which the coordinator declares a process dead
START = 120  # seconds for all processes to connect
BROKEN = 3  # exit status of a process that lost the others
QUIET = {KeyboardInterrupt: INTERRUPTED, BrokenPipeError: BROKEN_PIPE}


@contextlib.contextmanager
def joined(address: str, processes: int, process: int, devices: int, heartbeat: int = HEARTBEAT) -> Iterator[None]:
    """Join the other processes with `devices` CPU devices, for the duration of the block.

    An error in the block ends this process at once, with status `BROKEN`. An ordinary exit would wait for the other
    processes, which wait for this one.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, processes, process, coordinator_bind_address=address, cluster_detection_method="deactivate",
        initialization_timeout=START, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat,
    )  # fmt: skip
    try:
        yield
    except tuple(QUIET) as error:
        os._exit(QUIET[type(error)])
    except BaseException as error:
        traceback.print_exc()
        say(f"process {process} cannot go on with the others, and ends. {type(error).__name__}: {error}", sys.stderr)
        sys.stdout.flush()
        os._exit(BROKEN)
    jax.distributed.shutdown()


def meet(address: str, process: int, patience: float = START) -> None:
    """Raise an OSError if process 0 cannot listen at `address`, or if nothing listens there within `patience` seconds.

    JAX raises no exception in these cases: it crashes with a segmentation fault in the first, SIGABRT in the second.
    """
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    end = time.monotonic() + patience
    while True:
        with socket.socket(family, kind, protocol) as probe:
            if process == 0:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # so does the coordinator; see `free_port`
                return probe.bind(place)
            probe.settimeout(max(1.0, end - time.monotonic()))
            try:
                return probe.connect(place)
            except OSError:
                if time.monotonic() > end:
                    raise
        time.sleep(0.1)


def launch(command: Sequence[str], processes: int, heartbeat: int = HEARTBEAT) -> bool:
    """Run `command --address HOST:PORT --process I` for every I on this machine. Return whether all succeeded.

    However this function ends, SIGTERM included, it ends the processes. They ignore Ctrl-C, which a terminal sends to
    them too.
    """
    children: dict[int, subprocess.Popen] = {}
    with free_port() as port, handling(signal.SIGTERM, lambda number, _: sys.exit(128 + number)):
        try:
            with handling(signal.SIGINT, signal.SIG_IGN):  # child processes inherit this
                for i in range(processes):
                    given = ["--address", f"127.0.0.1:{port}", "--process", str(i)]
                    children[i] = subprocess.Popen([*command, *given])
            return supervise(children, patience=2 * heartbeat + 10)
        finally:
            for child in children.values():
                child.kill()
            for child in children.values():
                child.wait()


@contextlib.contextmanager
def handling(number: signal.Signals, handler) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def supervise(children: dict[int, subprocess.Popen], patience: float) -> bool:
    """Wait for all processes, but only `patience` seconds after the first death. Report each failure."""
    running, died = dict(children), None
    while running:
        for i, child in list(running.items()):
            if child.poll() is None:
                continue
            del running[i]
            if child.returncode:
                died = died or time.monotonic()
                status = child.returncode
                how = f"with status {status}" if status > 0 else signal.Signals(-status).name
                say(f"launch: process {i} ended {how}")
        if died and time.monotonic() - died > patience:
            for i, child in running.items():
                say(f"launch: process {i} still runs {patience:g} s after the first death, and is killed")
                child.kill()
                child.wait()
        time.sleep(0.05)
    return died is None


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port of this machine, reserved for the duration of the block.

    It stays bound here without listening. SO_REUSEPORT, which gRPC also sets, lets the coordinator bind it as well.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def say(line: str, file=None) -> None:
    """Write one line at once, because several processes write to the same stream."""
    file = file or sys.stdout
    file.write(line + "\n")
    file.flush()
