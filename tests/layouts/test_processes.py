"""Law 5 over processes: 2 and 4 train as one does, a death ends them all, and a checkpoint fits any number of them.

The program is `python -m examples.processes`. 71 images in batches of 13 make 6 steps. Two processes hold 7 rows each,
the last of them padding; in the last step, of 6 images, one process has none. Four processes hold 4 rows each.

The tolerance is relative to the largest element of each array, and ten times what float32 rounding does by itself: the
same training on one device with the rows of each batch in another order moves by up to 8e-7, and processes by up to
1.5e-6.
"""

import contextlib
import fcntl
import functools
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import oracle
import pytest
from catalogue import EACH
from helpers.devices import row_case
from helpers.jit import FLAGS
from jax.sharding import Mesh

pytest.importorskip("optax")
pytest.importorskip("sklearn")
pytest.importorskip("orbax.checkpoint")

import orbax.checkpoint as ocp

import jaxnorm as jn
from examples.processes import __main__ as processes
from examples.processes import launcher, training
from jaxnorm import demo

ROOT = Path(__file__).parents[2]
IMAGES, SIZE, STEPS, RATE = 71, 13, 6, 0.1
OPTIONS = f"--images {IMAGES} --batch-size {SIZE} --steps {STEPS} --every 3 --learning-rate {RATE}".split()
NORM, OPTIMIZER = demo.NORMS["batch"], demo.make_optimizer(STEPS, RATE)
TOLERANCE = 1.5e-5


def run(command, env, status=0, limit=240) -> str:
    """What a command and the processes that it starts print; none of them outlives this call."""
    theirs = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    env = theirs | {"XLA_FLAGS": FLAGS} | env
    with subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, **piped) as child:
        try:
            printed, _ = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail(f"still running after {limit} s:\n{child.communicate()[0]}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == status, printed
    return printed


def train(checkpoints: Path, form: str, processes: int, *further: str, devices: int = 1, status: int = 0) -> str:
    """What was printed."""
    how = ["--form", form, "--processes", str(processes), "--devices", str(devices)]
    given = ["-m", "examples.processes", *OPTIONS, *how, "--checkpoints", str(checkpoints), *further]
    return run(given, {}, status)


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """through(form, processes) -> (what was printed, the checkpoints) of a training that nothing disturbed.

    Each is run once, whichever of pytest-xdist's workers asks first; another that asks meanwhile waits for it.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(form, processes):
        folder = root / f"through-{form}-{processes}"
        printed = folder.with_suffix(".txt")
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not printed.exists():
                printed.write_text(train(folder, form, processes))
        return printed.read_text(), folder

    return once


def saved(folder: Path, step: int = STEPS) -> training.Progress:
    """A checkpoint, read by this process alone."""
    like = training.beginning(NORM, OPTIMIZER, SimpleNamespace(seed=0, steps=STEPS))
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == STEPS
        return jax.tree.map(np.asarray, manager.restore(step, args=ocp.args.StandardRestore(like)))


@functools.cache
def of_one_device():
    """A step and an evaluation, compiled once."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return demo.make_step(NORM, OPTIMIZER, mesh), demo.make_evaluate(NORM, mesh)


def on_one_device(order=lambda rows: rows) -> tuple[training.Progress, float]:
    """The same training on one device, without padding, and its test accuracy."""
    train, test = demo.load()
    train = demo.Batch(*(a[:IMAGES] for a in train))
    pixels = demo.pixel_statistics(demo.in_order(train, SIZE, SIZE))
    step, evaluate = of_one_device()
    now = training.beginning(NORM, OPTIMIZER, SimpleNamespace(seed=0, steps=STEPS))
    batches = demo.shuffled(demo.standardized(train, pixels), SIZE, SIZE, 0)
    for i, batch in enumerate(itertools.islice(batches, STEPS)):
        *trained, loss = step(*now[:3], demo.Batch(*(order(a) for a in batch)))
        now.losses[i] = loss
        now = training.Progress(*trained, now.losses)
    (test,) = demo.in_order(demo.standardized(test, pixels), demo.TEST, demo.TEST)
    return jax.tree.map(np.asarray, now), float(evaluate(now.params, now.states, test)[0])


@pytest.fixture(scope="module")
def one():
    return on_one_device()


def apart(a, b) -> list[float]:
    """For each array, the largest difference in units of its largest element."""
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_tolerance_is_that_of_rounding(one):
    beginning = training.beginning(NORM, OPTIMIZER, SimpleNamespace(seed=0, steps=STEPS))
    assert min(apart(beginning[:2], one[0][:2])) > 100 * TOLERANCE, "all of them were trained"
    assert 0 < max(apart(on_one_device(lambda rows: rows[::-1])[0], one[0])) < TOLERANCE / 5


REAL = {  # what each process says of its images
    2: ["6 to 7 images in 7", "0 to 6 images in 7"],
    4: ["4 to 4 images in 4", "2 to 4 images in 4", "0 to 4 images in 4", "0 to 1 images in 4"],
}
# Those of the losses and of all gradients together are one. Each norm has one backward, and forward one under
# shard_map and of kernels, two under jit by XLA's formula, which needs the mean first.
ROUNDS = {"shard_map": 2, "jit": 2 if jn.backends()["native"].active else 3}
COLLECTIVES = {form: 1 + rounds * len(demo.STRIDES) for form, rounds in ROUNDS.items()}


@pytest.mark.parametrize(("form", "processes"), [("shard_map", 4), ("jit", 2)])
def test_several_processes_train_as_one_does(form, processes, through, one):
    printed, folder = through(form, processes)
    for i, images in enumerate(REAL[processes]):
        assert f"process {i}: {images} rows a step\n" in printed
    assert f"each step: {COLLECTIVES[form]} all-reduce\n" in printed, "and nothing else; above all no all-gather"
    assert f"test accuracy {one[1]:.1%}\n" in printed
    assert max(apart(saved(folder), one[0])) < TOLERANCE


# --- death ------------------------------------------------------------------------------------------------------------


def others_ended_by_themselves(printed: str, processes: int, victim: int) -> None:
    assert f"launch: process {victim} ended SIGKILL\n" in printed
    for i in {*range(processes)} - {victim}:
        mine = f"process {i} cannot go on with the others, and ends. ", f"launch: process {i} ended with status 3\n"
        jax_s = "Terminating process because the JAX distributed service", f"launch: process {i} ended SIGABRT\n"
        assert any(all(line in printed for line in lines) for lines in (mine, jax_s)), printed
        assert f"process {i} still runs" not in printed


def test_a_crash_stops_all_processes_and_a_restart_changes_no_bit(through, tmp_path):
    """Process 0, which dies, is the coordinator. The death is before step 5, the last checkpoint of step 3."""
    printed = train(tmp_path, "jit", 2, "--kill", "0:5", "--restarts", "1")
    others_ended_by_themselves(printed, 2, 0)
    assert printed.count("launch: all start again\n") == printed.count("from the checkpoint of step 3\n") == 1
    _, folder = through("jit", 2)
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path), saved(folder))


def test_a_silent_process_stops_all_processes(tmp_path):
    """Its connections stay open, and only the heartbeats tell: JAX ends the others, `launch` what is left."""
    printed = train(tmp_path, "shard_map", 2, "--kill", "1:5:STOP", "--heartbeat", "6", status=1)
    assert "stopped sending heartbeats" in printed
    assert "launch: process 1 still runs 22 s after the first death, and is killed\n" in printed
    others_ended_by_themselves(printed, 2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "training.json"]
    again = f"python -m examples.processes {' '.join(OPTIONS)} --form shard_map --processes 2 --devices 1"
    assert printed.endswith(
        f"launch: this line goes on from the checkpoint of step 3\n    {again} --checkpoints {tmp_path} --heartbeat 6\n"
    )


def test_a_checkpoint_fits_other_processes_and_devices(through, one, tmp_path):
    """Of four processes under shard_map with one device each: two under jit go on, with two devices each."""
    _, folder = through("shard_map", 4)
    shutil.copytree(folder / "3", tmp_path / "3")
    printed = train(tmp_path, "jit", 2, devices=2)
    assert printed.count("from the checkpoint of step 3\n") == 1
    assert max(apart(saved(tmp_path), one[0])) < TOLERANCE


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_ctrl_c_stops_all_processes_without_a_traceback(tmp_path):
    """As from a terminal, which sends it to all of them."""
    command = [sys.executable, "-m", "examples.processes", "--processes", "2", "--checkpoints", str(tmp_path)]
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    with subprocess.Popen(command, cwd=ROOT, **piped) as parent:
        threads = Path(f"/proc/{parent.pid}/task")
        children = lambda: " ".join(p.read_text() for p in threads.glob("*/children")).split()
        while parent.poll() is None and len(children()) < 2:
            time.sleep(0.05)
        pids = children()
        time.sleep(0.2)
        os.killpg(parent.pid, signal.SIGINT)
        printed, _ = parent.communicate(timeout=60)
    assert (parent.returncode, printed) == (130, "")
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(("number", "raised"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_a_signal_to_the_parent_stops_its_children(number, raised, monkeypatch, capfd):
    """They ignore SIGINT themselves; that it kills a shell that does not is the control."""
    number, handlers = getattr(signal, number), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    script = ["sh", "-c", "kill -INT $$; echo survived; exec sleep 60"]
    assert subprocess.run(script, stdout=subprocess.DEVNULL).returncode == -signal.SIGINT
    children, supervise = {}, launcher.supervise

    def supervised(started, patience):
        children.update(started)
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        return supervise(started, patience)

    monkeypatch.setattr(launcher, "supervise", supervised)
    with pytest.raises(raised) as end:
        launcher.launch(script, 3)
    assert raised is KeyboardInterrupt or end.value.code == 128 + signal.SIGTERM
    assert [child.returncode for child in children.values()] == [-signal.SIGKILL] * 3
    assert capfd.readouterr() == ("survived\n" * 3, "")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


# --- options ----------------------------------------------------------------------------------------------------------

A_SEED = "a whole number from 0 to 2147483647"
BAD = {
    "--kill 3": "argument --kill: must be PROCESS:STEP, such as 1:30, got '3'",
    "--kill 4:3": "argument --kill: there is no process 4, only 0 to 3.",
    "--processes 2 --kill 2:3": "argument --kill: there is no process 2, only 0 to 1.",
    "--kill 0:61": "argument --kill: there is no step 61, only 1 to 60.",
    "--kill 1:6:STOP --steps 5": "argument --kill: there is no step 6, only 1 to 5.",
    "--kill 0:0": "argument --kill: there is no step 0, only 1 to 60.",
    "--process 1": "--process and --address go together",
    "--process 4 --address a:1": "argument --process: must be below --processes 4, got 4",
    "--process 1 --address a": "argument --address: must be HOST:PORT, such as 10.0.0.1:1234, got 'a'",
    "--process 1 --address a:0": "argument --address: must be HOST:PORT, such as 10.0.0.1:1234, got 'a:0'",
    "--process 1 --address :65536": "argument --address: must be HOST:PORT, such as 10.0.0.1:1234, got ':65536'",
    "--processes 0": "argument --processes: must be a whole number from 1 to 2147483647, got '0'",
    "--processes 65": "argument --processes: at most 64 start on one machine, got 65.",
    "--devices 65": "argument --devices: must be a whole number from 1 to 64, got '65'",
    "--steps 0": "argument --steps: must be a whole number from 1 to 1000000, got '0'",
    "--images 1348": "argument --images: must be a whole number from 1 to 1347, got '1348'",
    "--batch-size 1348": "argument --batch-size: must be a whole number from 1 to 1347, got '1348'",
    "--learning-rate 0": "argument --learning-rate: must be a number from 1e-30 to 1e+30, got '0'",
    "--every 0": "argument --every: must be a whole number from 1 to 2147483647, got '0'",
    "--restarts -1": f"argument --restarts: must be {A_SEED}, got '-1'",
    "--restarts 1.5": f"argument --restarts: must be {A_SEED}, got '1.5'",
    "--heartbeat 0": "argument --heartbeat: must be a whole number from 1 to 86400, got '0'",
    "--checkpoints file": "argument --checkpoints: cannot use 'file': Not a directory.",
    "--checkpoints file/folder": "argument --checkpoints: cannot use 'file/folder': Not a directory.",
    f"--checkpoints {'a' * 300}": f"argument --checkpoints: cannot use '{'a' * 300}': File name too long.",
}


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The command in this process and an empty folder. `main.lines` are those that it would start processes with."""

    def launch(command, processes, heartbeat):
        main.lines.append(command[3:])
        return main.ends_well

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "launch", launch)
    main = SimpleNamespace(run=lambda line: processes.main(shlex.split(line)), lines=[], ends_well=True)
    return main


def one_message(run, line: str, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run(line)
    assert end.value.code == 2
    printed, message = capsys.readouterr()
    assert printed == ""
    start = "python -m examples.processes: "
    assert message.startswith(start)
    assert message.count("\n") == 1
    return message[len(start) : -1]


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_a_bad_option_prints_one_message_and_exits_with_status_2(line, main, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert one_message(main.run, line, capsys).startswith(BAD[line])
    assert main.lines == []
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "a refused run leaves nothing behind"


@pytest.mark.parametrize("kill", ["--kill 1:30", "--kill=1:30:STOP", "--ki 1:30"])
def test_the_printed_command_to_repeat_does_not_kill_again(kill, main, tmp_path, capsys):
    main.ends_well = False
    given = f"--processes 2 {kill} --checkpoints 'my folder'"
    assert main.run(given) == 1
    *_, why, line = capsys.readouterr().out.splitlines()
    assert why == "launch: this line goes from the beginning: no checkpoint was saved"
    assert line == "    python -m examples.processes --processes 2 --checkpoints 'my folder'"
    (tmp_path / "my folder" / "20").mkdir()
    assert main.run(f"{given} --restarts 2") == 1
    printed = capsys.readouterr().out
    assert printed.count("launch: all start again\n") == 2
    assert "launch: this line goes on from the checkpoint of step 20\n" in printed
    line = printed.splitlines()[-1]
    main.ends_well = True
    assert main.run(line.split("processes", 1)[1]) == 0
    killed = lambda line: [word for word in line if word.startswith("--k")]
    assert [len(killed(line)) for line in main.lines] == [1, 1, 0, 0, 0]
    assert main.lines[-1] == ["--processes", "2", "--checkpoints", "my folder", "--restarts", "2"]


def test_a_folder_of_another_training_is_refused(main, tmp_path, capsys):
    """Of processes and devices there may be others, and of what was never saved nothing is left."""
    assert main.run("--steps 6 --checkpoints c") == 0
    assert main.run("--steps 7 --checkpoints c") == 0
    (tmp_path / "c" / "3").mkdir()
    said = "--steps 7 --images 1347 --batch-size 127 --learning-rate 0.5 --seed 0"
    for other in ("--steps 6", "--images 71", "--batch-size 13", "--learning-rate 0.1", "--seed 1"):
        message = one_message(main.run, f"--steps 7 {other} --checkpoints c", capsys)
        assert message == (
            "argument --checkpoints: 'c' holds another training. "
            f"Write {said} to go on with it, or name another folder."
        )
    assert main.run(f"{said} --checkpoints c --form jit --processes 2 --devices 3 --every 1") == 0
    (tmp_path / "c" / "training.json").write_text("{")
    assert "cannot use 'c': Expecting" in one_message(main.run, "--checkpoints c", capsys)


def test_processes_that_cannot_start_give_one_message(monkeypatch, main, capsys):
    def launch(*_):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(processes, "launch", launch)
    message = one_message(main.run, "--processes 3", capsys)
    assert message == "cannot start 3 processes: Resource temporarily unavailable."


def test_an_unreachable_address_gives_one_message(main, monkeypatch, capsys):
    """Where JAX would end the process by a signal."""
    monkeypatch.setattr(processes, "meet", functools.partial(launcher.meet, patience=0.3))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        nobody = one_message(main.run, f"--process 1 --address {address}", capsys)
        assert nobody == f"argument --address: cannot reach process 0 at {address}: Connection refused."
        taken.listen()
        in_use = one_message(main.run, f"--process 0 --address {address}", capsys)
        assert in_use == f"argument --address: cannot listen on {address}: Address already in use."
        assert launcher.meet(address, 1) is None


def test_the_wheel_does_not_ship_the_example():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]
    assert wheel["packages"] == ["jaxnorm"]
    assert not [path for path in (ROOT / "jaxnorm").rglob("*.py") if "distributed.initialize" in path.read_text()]


# --- kernels over global arrays ---------------------------------------------------------------------------------------

LAUNCH = "import sys; from examples.processes.launcher import launch; sys.exit(not launch(sys.argv[1:], 2))"
NORMS = """
import re, sys
folder, _, address, _, process = sys.argv[1:]
from examples.processes.launcher import joined, say
with joined(address, 2, int(process), 2):
    import jax, numpy as np
    from catalogue import EACH
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from jaxnorm._backends import cpu
    from helpers.devices import row_case
    cpu.is_profitable = lambda view, dtype: True  # however small

    def on(mesh):
        assert mesh.size == 4
        rows, all_of_it = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        own = lambda a: jax.make_array_from_process_local_data(rows, np.split(a, 2)[int(process)])
        shards = lambda a: np.concatenate([s.data for s in a.addressable_shards])
        for row in EACH:
            params, x, g = row_case(row)
            def step(params, x, g):
                f = lambda params, x: row.spec.apply(params, row.state(), x, train=True)
                y, pull, state = jax.vjp(f, params, x, has_aux=True)
                return y, pull(g), state
            args = jax.device_put(params, all_of_it), own(x), own(g)
            run = jax.jit(step).lower(*args).compile()
            text = run.as_text()
            kernels = re.findall(r'custom_call_target="jaxnorm_(\\w+)"', text)
            moves = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
            moves = re.findall(rf" ({moves})(?:-start)?\\(", text)
            say(f"{kind} {row.name} in {process}: {sorted({*kernels})} {moves}")
            y, (dparams, dx), state = run(*args)
            assert all(a.is_fully_replicated for a in jax.tree.leaves((dparams, state)))
            whole = {f"d{name}": np.asarray(a) for name, a in dparams._asdict().items() if a is not None}
            whole |= {name: np.asarray(getattr(state, name)) for name in ("mean", "var") if row.batch}
            whole |= {"y": shards(y), "dx": shards(dx)}
            yield from ((f"{kind} {row.name} {name}", a) for name, a in whole.items())

    out = {}
    for kind in ("Auto", "Explicit"):
        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType[kind],))
        with jax.set_mesh(mesh):
            out |= dict(on(mesh))

    import jaxnorm as jn
    from jaxnorm import inputs, models
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    own = lambda a: jax.make_array_from_process_local_data(rows, np.split(a, 2)[int(process)])
    batches = [*map(own, np.split(np.load(f"{folder}/data.npy"), (8, 16)))]
    norm = jn.BatchNorm()
    params, state = norm.init(3)
    state, _ = models.recompute_stats(lambda state, x: norm.apply(params, state, x), state, batches, passes=1)
    seen = inputs.StandardizeInputs().fit(batches)
    out |= {"recomputed": np.stack([state.mean, state.var]), "fitted": np.stack([seen.mean, seen.std**2])}
    np.savez(f"{folder}/{process}.npz", **out)
"""
ALONE, SYNCED = ["backward", "forward"], ["gradient", "gradient_sums", "moments", "normalize"]


def close(halves, row: str, name: str, want) -> None:
    got = np.concatenate([half[f"{row} {name}"] for half in halves])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5, err_msg=f"{row} {name}")


@pytest.mark.parametrize("native", [False, True], ids=["xla", "native"])
def test_norms_over_global_arrays_are_exact_and_gather_nothing(native, kernels, tmp_path):
    if native and not kernels:
        pytest.skip("the kernels are not under test")
    env = {"JAXNORM_NATIVE": str(int(native)), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    data = np.random.default_rng(0).normal(3.0, 2.0, (20, 3)).astype(np.float32)  # in three batches, the last of 4
    np.save(tmp_path / "data.npy", data)
    printed = run(["-c", LAUNCH, sys.executable, "-c", NORMS, str(tmp_path)], env)
    halves = [np.load(tmp_path / f"{i}.npz") for i in (0, 1)]
    for half, which in itertools.product(halves, ("recomputed", "fitted")):
        np.testing.assert_allclose(half[which], [data.mean(0), data.var(0)], rtol=1e-5)
    for kind, row in itertools.product(("Auto", "Explicit"), EACH):
        name = f"{kind} {row.name}"
        rounds = (2 if native else 3) if row.batch else 1  # all norms: one for gradients, those of parameters included
        found = [] if not native else SYNCED if row.batch else ALONE
        for i in (0, 1):
            assert f"{name} in {i}: {found} {['all-reduce'] * rounds}\n" in printed, printed
        params, x, g = row_case(row)
        labels, _ = row.with_shape(x.shape)
        how = dict(epsilon=row.spec.epsilon, centered=row.centered)
        truth = oracle.normalize(x, labels, *row.in_rank(params), **how)
        dx, dscale, dbias = oracle.gradients(x, labels, *row.in_rank(params), g, **how)
        near = functools.partial(close, halves, name)
        near("y", truth.y)
        near("dx", dx)
        for which, want in (("dscale", dscale), ("dbias", dbias)):
            if want is not None:
                near(which, np.tile(want.ravel(), 2))
        if row.batch:
            first = lambda a: np.tile(a[(0,) * (a.ndim - 1)], 2)
            near("mean", 0.01 * first(truth.mean))
            near("var", 0.99 + 0.01 * first(truth.var))
