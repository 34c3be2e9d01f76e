"""Benchmarks report what they measured and nothing else. The smallest cases run in this process."""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers.models import TINY, VARIANTS

from benchmarks import accuracy, cpu, gpu, peers
from benchmarks.harness import case, records, table, timing
from benchmarks.harness.case import Case
from benchmarks.harness.contest import Contest, Crew, measured

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LAWS = {
    "layer_norm_1e2": 2e-6, "layer_norm_1e4": 2e-6, "batch_norm_1e2": 2e-6, "batch_norm_1e4": 2e-6, "sync_mean": 1e-6,
    "sync_var": 2e-6, "residuals": 2.1, "bfloat16": 0.51, "batch_bits": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Here:
    """A `Timed` in this process, in place of `timing.Worker`."""

    def __init__(self, kind: type[timing.Timed], allocator: str, *args):
        self.timed = kind(*args)

    def ask(self, method: str, *args, within: float | None = None):
        return getattr(self.timed, method)(*args)

    def close(self) -> None:
        self.timed.clear()

    kill = close


@pytest.fixture
def unoptimized():
    """What is compiled runs a few times, and is no function that another test calls."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def ordered(low, middle, high) -> bool:
    return 0 < low <= middle <= high


# --- the harness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "rms", "batch", "group", "add_rms", "gated_rms"])
def test_the_truth_of_a_tile_is_that_of_the_array(norm):
    """The gradient of the whole array by JAX, in float64, against the tile's truth by the oracle."""
    shape = (4096, 2, 4, 64) if norm in ("batch", "group") else (1 << 15, 64)
    it = Case(norm, shape, "float32")
    assert it.tiles == 2
    data = it.data()
    truth = it.truth(data)
    with jax.enable_x64(True):
        whole = lambda a: jnp.asarray(np.concatenate([a] * 2) if a.ndim > 1 else a, jnp.float64)
        big = jax.tree.map(whole, data)
        names = oracle.labels(norm, shape, case.GROUPS)

        def plain(x, scale, bias=0.0):
            size = int(names.max()) + 1
            counts = np.bincount(names.ravel())
            mean = lambda a: (jax.ops.segment_sum(a.ravel(), names.ravel(), size) / counts)[names]
            x = x if norm.endswith("rms") else x - mean(x)
            return x / jnp.sqrt(mean(x * x) + case.EPSILON) * scale + bias

        def call(*args):
            if norm == "add_rms":
                stream = args[0] + big.consts[0]
                return plain(stream, args[1]), stream
            if norm == "gated_rms":
                return (plain(args[0], args[2]) * jax.nn.silu(args[1]),)
            return (plain(*args),)

        outs, pull = jax.vjp(call, *big.args)
        gradients = pull(tuple(big.cotangents))
    for got, want in zip((*truth.outs, *truth.gradients), (*outs, *gradients), strict=True):
        np.testing.assert_allclose(got, np.asarray(want)[: len(got)], rtol=1e-5, atol=1e-5)


def test_a_wrong_norm_is_refused():
    it = Case("rms", (8, 16), "bfloat16")
    truth = it.truth(it.data())
    right = case.Outcome([truth.outs[0].astype("bfloat16")], truth.gradients)
    assert max(it.errors(right, truth, strict=True)) < 4e-3
    with pytest.raises(ValueError, match="relative errors"):
        it.errors(right._replace(outs=[-right.outs[0]]), truth, strict=False)
    with pytest.raises(TypeError, match="got float64, expected bfloat16"):
        it.errors(truth, truth, strict=False)


class Fragile(Contest):
    """One contestant ends the process, one is wrong, one is timed."""

    def __init__(self, mode, names):
        super().__init__(mode, ())
        self.names = names

    def about(self):
        return {}

    def present(self):
        return dict.fromkeys(self.names, "1"), {}

    def begin(self, case):
        self.clear()
        self.add(("copy", "copy"), lambda: lambda: sum(range(100)))

    def able(self, case):
        return list(self.names)

    def enter(self, name):
        if name == "fatal":
            os._exit(3)
        if name == "wrong":
            return "ValueError: relative errors"
        self.add((name, "forward"), lambda: lambda: sum(range(100)))
        return [0.0]


def test_a_contestant_that_ends_its_process_is_left_out():
    crew = Crew(Fragile, "cpu", ("fatal", "wrong", "good"), patience=60)
    found = measured(Case("rms", (8, 16), "float32"), [crew], 3, 0.0)
    crew.close()
    copy, *others = found
    assert copy["best"]
    assert copy["rounds"] == 3
    by_name = {record["name"]: record for record in others}
    assert by_name["fatal"]["failed"] == "its process ended"
    assert by_name["wrong"]["failed"] == "ValueError: relative errors"
    assert ordered(*by_name["good"]["forward"]["copies"])


def test_rounds_take_one_sample_of_each_and_end_in_time():
    class Counting:
        asked = 0

        def ask(self, method, key):
            Counting.asked += 1
            return float(Counting.asked), 0.0

    keys = {("a", "p"): Counting(), ("b", "p"): Counting()}
    taken = timing.in_turn(keys, rounds=9, seconds=-1.0)
    assert {len(samples) for samples in taken.values()} == {3}
    assert Counting.asked == 2 * 4
    merged = np.sort(np.concatenate([samples[:, 0] for samples in taken.values()]))
    assert merged.tolist() == [3, 4, 5, 6, 7, 8], "the first round is not counted"


def test_each_record_is_one_line(tmp_path):
    found = [{"command": "x", "jax": "1", "processor": "cpu"}, {"name": "a", "forward": {"copies": [1, 2, 3]}}]
    records.write(tmp_path / "x.jsonl", found)
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2
    assert records.read(tmp_path / "x.jsonl") == found
    assert records.results(found) == found[1:]


def test_tables_are_aligned():
    lines = table.table(["", "of"], [["first", "1.5"], ["b", "failed"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].endswith(":|") or lines[1].endswith(": |")


@pytest.mark.parametrize("name", ["cpu", "small", "gpu", "accuracy", "training", "compiled", "compile_time", "scale"])
def test_committed_pages_are_made_of_committed_records(name):
    if name == "training":
        pytest.importorskip("optax")
    page = __import__(f"benchmarks.{'cpu' if name == 'small' else name}", fromlist=["page"]).page
    assert page(records.read(RESULTS / f"{name}.jsonl")) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


# --- the commands -----------------------------------------------------------------------------------------------------


def test_accuracy_of_jaxnorm_keeps_the_laws():
    (setting,), *rows = accuracy.measure(("jaxnorm", "jax.nn.standardize"))
    found = {(record["row"], record["name"]): record["value"] for row in rows for record in row}
    for key, limit in LAWS.items():
        assert 0.0 <= found[key, "jaxnorm"] <= limit, key
    assert found["layer_norm_nan", "jaxnorm"] is found["batch_norm_nan", "jaxnorm"] is False
    assert found["sync_mean", "jax.nn.standardize"] is None, "the peer has no such call"
    assert setting["versions"].keys() == {"jaxnorm", "jax.nn.standardize"}
    page = accuracy.page([setting, *(record for row in rows for record in row)])
    assert sum(line.startswith("| ") for line in page.splitlines()) == 2 + len(accuracy.TABLE)


def test_cpu_records_each_pass_of_each_contestant(monkeypatch):
    monkeypatch.setattr(Contest, "seconds", 0.0)
    cases, names = [Case("rms", (8, 16), "bfloat16")], ("jaxnorm", "jax.nn.standardize")
    found = [r for step in cpu.measure(cases, names, ["warm"], 4, 0.0, worker=Here) for r in step]
    setting, *of = found
    assert {"command", "date", "processor", "jax", "jaxlib", "backends", "versions", "missing"} <= setting.keys()
    by_name = {record["name"]: record for record in of if "name" in record}
    assert by_name.keys() == set(names)
    for record in by_name.values():
        assert (record["norm"], record["shape"], record["dtype"]) == ("rms", "8x16", "bfloat16")
        assert len(record["errors"]) == 3
        for which in cpu.PASSES:
            assert ordered(*record[which]["seconds"])
            assert ordered(*record[which]["copies"])
    assert sum(record.get("best", False) for record in of) == 1
    assert sum(line.startswith("| rms 8x16 bfloat16") for line in cpu.page(found).splitlines()) == len(cpu.PASSES)


def test_gpu_on_a_cpu_checks_and_measures_each_pass(monkeypatch, unoptimized):
    monkeypatch.setattr(gpu, "CHECKS", gpu.CHECKS[-2:] * 5)
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    names = ("jaxnorm-xla", "jaxnorm-composed")
    found = [r for step in gpu.measure("cpu", names, [Case("add_rms", (16, 128), "bfloat16")], 9.0, Here)
             for r in step]  # fmt: skip
    setting, *of = found
    assert {"command", "date", "jax", "jaxlib", "device", "backends", "versions", "planned"} <= setting.keys()
    checks = [record for record in of if "check" in record]
    assert checks
    assert all(record["name"] == "jaxnorm-xla" and "errors" in record for record in checks)
    by_name = {record["name"]: record for record in of if "name" in record and "check" not in record}
    assert by_name.keys() == set(names)
    for record in by_name.values():
        assert len(record["errors"]) == 4, "y, the stream, dx and dscale"
        assert all(ordered(*record[which]["copies"]) for which in case.PASSES)
    page = gpu.page(found)
    assert "jaxnorm-xla: equals float64 in 2 of 2 small cases" in page
    assert sum(line.startswith("| add_rms 16x128 bfloat16") for line in page.splitlines()) == len(case.PASSES)


def test_gpu_says_when_there_is_none(monkeypatch):
    from benchmarks.harness.jax_process import JaxContest

    monkeypatch.setattr(JaxContest, "about", lambda self: {"error": "no CUDA"})
    with pytest.raises(SystemExit, match=r"There is no GPU that JAX can use: no CUDA\n.*--platform cpu"):
        next(gpu.measure("gpu", ("jaxnorm-xla",), [], 1.0, Here))


def test_training_compares_the_same_training(monkeypatch, unoptimized):
    pytest.importorskip("optax")
    from benchmarks import training

    found = training.measured("transformer-rms", "float32", TINY, 2, worker=Here)
    assert list(found["losses"]) == list(found["seconds"]) == ["flax", "jaxnorm", "identity"]
    assert all(ordered(*of) for of in [*found["seconds"].values(), *found["ratios"].values()])
    assert list(found["ratios"]) == list(training.RATIOS)
    layer = lambda **options: lambda x: 2 * x
    monkeypatch.setitem(VARIANTS, "jaxnorm", type("Other", (), {"RMSNorm": staticmethod(layer)}))
    with pytest.raises(AssertionError, match="the variables differ"):
        training.measured("transformer-rms", "float32", TINY, 1, worker=Here)


def test_every_library_is_in_the_table():
    files = Path(peers.__file__).parent.glob("*.py")
    classes = {f"{path.stem}:{name}" for path in files for name in re.findall(r"^class (\w+)", path.read_text(), re.M)}
    assert {where for where, _ in peers.PEERS.values()} == classes - {"__init__:Peer"}
