"""`benchmarks/cpu.py` reports what it measured, of each case asked for, and nothing else. No time is judged."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = {"rms": [8, 16], "batch": [2, 4, 4, 32]}
PASSES = ("forward", "forward+backward")
ALLOCATORS = ("warm", "default")
MEASURED = {"jaxnorm", "jax.nn.standardize"}
COMMAND = """
    -m benchmarks.cpu --norms rms batch --shapes 8x16 2x4x4x32 --dtypes bfloat16 --rounds 4 --seconds 0
    --only jaxnorm jax.nn.standardize tokamax equinox
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str, Path]:
    """The numbers, the page and the folder of a run in which tokamax returns its input and equinox is not there."""
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "tokamax.py").write_text("def layer_norm(x, *args, **options):\n    return x\n", encoding="utf-8")
    (folder / "equinox.py").write_text("raise ImportError\n", encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"PYTHONPATH": str(folder)}
    out = ["--json", str(folder / "cpu.json"), "--chart", str(folder / "cpu.png")]
    command = [sys.executable, *COMMAND.split(), *out]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "cpu.json").read_text(encoding="utf-8")), done.stdout, folder


def test_every_case_that_was_asked_for_is_there_once(run):
    found = [(r["allocator"], r["norm"], r["shape"], r["dtype"], r["pass"]) for r in run[0]["results"]]
    assert found == [(a, n, s, "bfloat16", p) for a, (n, s), p in itertools.product(ALLOCATORS, CASES.items(), PASSES)]


def test_a_result_is_complete(run):
    for result in run[0]["results"]:
        assert set(result["contestants"]) == MEASURED
        assert result["rounds"] == 3  # of four, as the time was over, without the first
        assert result["copy"] in result["copy_seconds"]
        for value in result["contestants"].values():
            for low, middle, high in (value["copies"], value["seconds"]):
                assert 0 < low <= middle <= high
            assert value["page_faults"] >= 0
            assert len(value["errors"]) == (3 if result["norm"] == "rms" else 4)


def test_what_is_absent_or_wrong_is_named_and_has_no_number(run):
    report, page, _ = run
    assert report["missing"] == ["equinox"]
    assert "Not installed, left out: equinox." in page
    for result in report["results"]:
        assert list(result["failures"]) == (["tokamax"] if result["norm"] == "rms" else [])
    assert "torch" not in page.split("times jaxnorm's")[0]
    assert not [name for result in report["results"] for name in result["copy_seconds"] if "torch" in name]


def test_it_says_what_it_was_measured_with(run):
    report = run[0]
    assert {"date", "command", "cpu", "platform", "python", "jax", "jaxlib", "rooms"} <= set(report)
    assert set(report["versions"]) == MEASURED | {"tokamax"}
    assert report["threads"] == len(os.sched_getaffinity(0))
    assert report["devices"] == 1  # although the tests' own environment asks for eight


def test_the_page_has_a_line_for_each_result_and_the_chart_is_drawn(run):
    report, page, folder = run
    for shape in ("8x16", "2x4x4x32"):
        assert sum(line.startswith(f"{shape} bfloat16") for line in page.splitlines()) == len(report["results"]) // 2
    assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG")
