"""`benchmarks/gpu.py` on a CPU: the same code on tiny arrays. It reports what it measured, and what it could not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

from benchmarks._gpu_page import GIB, verdicts
from benchmarks._work import PASSES, Work, least

ROOT = Path(__file__).parents[1]
CASE = ("add_rms", [16, 128], "bfloat16")
COMMAND = """
    -m benchmarks.gpu --platform cpu --cases add_rms:16x128:bfloat16
    --only jaxnorm-xla jaxnorm-native jaxnorm-composed tokamax liger quack
"""
#: In place of libraries that may be there: one ends its process, one is not the norm, one is not for this machine.
STAND_INS = {
    "tokamax.py": "import os\n\n\ndef layer_norm(*args, **options):\n    os._exit(3)\n",
    "quack.py": "__version__ = '0'\n\n\ndef rmsnorm(x, scale, residual=None, prenorm=False, eps=0.0):\n"
    "    return (x * scale, x + residual) if prenorm else x * scale\n",
    "liger_kernel.py": "raise RuntimeError('no driver')\n",
}


def python(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"PYTHONPATH": str(folder)} | more
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def test_it_reports_what_it_measured_and_what_it_could_not(tmp_path):
    """A run in which the native backend is switched off."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    folder = tmp_path / "out"
    done = python(tmp_path, *COMMAND.split(), "--out", str(folder), JAXNORM_NATIVE="0")
    assert done.returncode == 0, done.stderr
    report, page = json.loads((folder / "gpu.json").read_text(encoding="utf-8")), done.stdout
    (result,) = report["results"]
    assert (result["norm"], result["shape"], result["dtype"]) == CASE
    assert (report["done"], report["planned"], report["left_out"]) == (1, 1, [])

    # Whatever was measured was held against float64, and its time against a copy's.
    assert set(result["contestants"]) == {"jaxnorm-xla", "jaxnorm-composed"}
    best = min(seconds[1] for seconds in result["copies"].values())
    for name, value in result["contestants"].items():
        assert len(value["errors"]) == 4  # y, the stream, dx and dscale
        assert max(value["errors"]) < (4e-3 if name == "jaxnorm-xla" else 2e-2)
        assert set(value["passes"]) == set(PASSES)
        for which, taken in value["passes"].items():
            assert taken["rounds"] == 3
            low, middle, high = taken["seconds"]
            assert 0 < low <= middle <= high
            assert taken["percent"][1] == pytest.approx(100 * least(result["norm"], which) / 2 * best / middle)

    # Backends are checked, and one that refuses says why.
    assert set(report["checks"]) == {"jaxnorm-xla", "jaxnorm-native"}
    assert all(isinstance(found, list) for found in report["checks"]["jaxnorm-xla"].values())
    refused = [*report["checks"]["jaxnorm-native"].values(), result["failures"]["jaxnorm-native"]]
    assert len(refused) > 1
    assert all("switched off by JAXNORM_NATIVE=0" in why for why in refused)
    assert f"jaxnorm-native: equals float64 in 0 of {len(report['checks']['jaxnorm-native'])} small cases" in page

    # What is absent, wrong or fatal is named and has no number.
    assert report["missing"] == {"liger": "RuntimeError: no driver"}
    assert "Left out: liger (RuntimeError: no driver)." in page
    assert set(result["failures"]) == {"jaxnorm-native", "tokamax", "quack"}
    assert result["failures"]["tokamax"] == "its process ended"
    assert "relative errors" in result["failures"]["quack"]

    assert {"date", "command", "device", "driver", "python", "jax", "jaxlib", "backends", "minutes"} <= set(report)
    names = {"jaxnorm-xla", "jaxnorm-native", "jaxnorm-composed", "tokamax", "quack"}
    assert set(report["versions"]) == names
    assert "--platform cpu" in report["command"]
    assert sum(line.startswith("add_rms 16x128 bfloat16") for line in page.splitlines()) == len(PASSES)
    assert report["command"] in (folder / "gpu.md").read_text(encoding="utf-8")
    assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    folder = tmp_path / "out"
    done = python(tmp_path, "-m", "benchmarks.gpu", "--out", str(folder), CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1
    assert "There is no GPU that JAX can use" in done.stderr
    assert "--platform cpu" in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [("layer", "float32"), ("rms", "bfloat16"), ("add_rms", "bfloat16"), ("gated_rms", "float32")],
)
def test_its_truth_is_the_oracles(norm, dtype):
    """On all of the array, where it works on a tile of it."""
    work = Work(norm, (1 << 15, 64), dtype)
    assert (work.tile, work.tiles) == (1 << 14, 2)
    data = work.data()
    truth = work.truth(data)
    everything = lambda a: np.concatenate([a] * work.tiles).astype(np.float64)
    g, *dstream = map(everything, data.cotangents)
    scale, *bias = (p[None].astype(np.float64) for p in data.args if p.ndim == 1)
    x, *gate = (everything(a) for a in data.args if a.ndim == 2)
    if norm == "add_rms":
        x = everything(sum(a.astype(np.float32) for a in (data.args[0], data.consts[0])).astype(data.args[0].dtype))
    value, slope = (f(gate[0]) if gate else 1.0 for f in oracle.ACTIVATIONS["silu"])
    labels = np.repeat(np.arange(len(x)), 64).reshape(x.shape)
    options = dict(epsilon=1e-5, centered=norm == "layer")
    y = oracle.normalize(x, labels, scale, *(bias or [None]), **options).y
    dx, *dparams = oracle.gradients(x, labels, scale, *(bias or [None]), g * value, **options)
    outs = [y * value, *([x] if norm == "add_rms" else [])]
    arrays = [dx + sum(dstream), *(g * y * slope for _ in gate)]
    for got, want in zip(truth.outs + truth.gradients[: len(arrays)], outs + arrays, strict=True):
        np.testing.assert_allclose(got, want[work.tile :], rtol=1e-9, atol=1e-9)
    for got, want in zip(truth.gradients[len(arrays) :], dparams[: 1 + len(bias)], strict=True):
        np.testing.assert_allclose(got, want[0], rtol=1e-9, atol=1e-6)


def test_verdicts_count_what_was_measured():
    def result(columns: int, percents: dict[str, float]) -> dict:
        passes = lambda p: {"passes": {which: {"percent": [p, p, p]} for which in PASSES}}
        shape = [GIB // 2 // columns, columns]
        return {"norm": "rms", "shape": shape, "dtype": "bfloat16", "bytes": GIB,
                "contestants": {name: passes(p) for name, p in percents.items()}}  # fmt: skip

    results = [
        result(1024, {"jaxnorm-xla": 60.0, "jaxnorm-mosaic_gpu": 90.0, "flax.linen": 40.0}),
        result(4096, {"jaxnorm-xla": 80.0, "flax.linen": 41.0, "tokamax": 80.0}),
    ]
    found = {line["what"]: line for line in verdicts(results)}
    forward = found["forward: at least 85 % of the copy"]
    assert (forward["verdict"], forward["met"], forward["of"]) == ("NOT met", 1, 2)
    assert forward["worst"] == (80.0, "rms 131072x4096 bfloat16")
    assert found["backward: at least 75 % of the copy"]["verdict"] == "met"
    assert found["forward+backward: 2 x flax.linen"]["verdict"] == "NOT met"
    assert (found["forward: level with tokamax"]["verdict"], found["forward: level with tokamax"]["of"]) == ("met", 1)
    assert found["forward: level with torch.compile"]["verdict"] == "not measured"
