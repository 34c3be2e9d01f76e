"""The CPU kernels' C++ on its own: under sanitizers, random shapes, dtypes, layouts and threads against long double.

What is asked is in native/fuzz.cpp; native/sanitize builds it. More cases: `tests/native/sanitize none 100000`.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CROSS_COMPILER = "aarch64-linux-gnu-g++"  # Debian: apt-get install g++-aarch64-linux-gnu
SANITIZE = Path(__file__).parents[1] / "native" / "sanitize"
CANNOT_RUN = 77


def passes(mode: str, cases: int) -> None:
    compiler = os.environ.get("CXX", "c++")
    for tool in ("bash", compiler.split()[0]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the path")
    command = ["bash", str(SANITIZE), mode, str(cases)]
    env = {**os.environ, "WITHOUT_AVX2": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    lines = done.stdout.splitlines()
    if done.returncode == CANNOT_RUN:
        pytest.skip(lines[-1])
    assert done.returncode == 0, done.stdout[-10_000:]
    assert lines[-1] == f"{cases} cases, 0 failures"


def test_kernels_access_nothing_out_of_bounds():
    passes("address,undefined", 40)


def test_kernels_have_no_race():
    passes("thread", 24)


@pytest.mark.skipif(shutil.which(CROSS_COMPILER) is None, reason=f"no {CROSS_COMPILER}")
@pytest.mark.parametrize("source", ["ffi.cpp", "baseline.cpp"])
def test_kernels_compile_for_arm64(source):
    backend = Path(__file__).parents[2] / "jaxnorm" / "_backends" / "cpu"
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi", "-isystem", str(backend / "third_party")]
    subprocess.run([CROSS_COMPILER, *flags, str(backend / source)], check=True)
