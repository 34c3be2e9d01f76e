"""A strict climate: eight host devices, no silent promotion of dtype or rank; warnings are errors (see pyproject).

The arrays of the catalogue are small, and the default leaves such to XLA. So that the laws are tested on the kernels,
`--room native`, which is what plain `pytest` does, runs those wherever they take a call, however small it is;
`--room auto` leaves the default as users have it, and `--room absent` is an installation without the extension.
`--rows mechanisms` runs the laws on one row of the catalogue for each mechanism, and not on the others.
"""

import os
import shutil
import tempfile
from types import SimpleNamespace

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

EMPTY = SimpleNamespace(params={})


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator seeded by the test's own name: the same numbers each run, others for each test."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def kernels(request) -> bool:
    """Whether the native kernels run wherever they take a call."""
    return request.config.getoption("--room") == "native"


def pytest_addoption(parser):
    parser.addoption("--room", choices=("native", "auto", "absent"), default="native")
    parser.addoption("--rows", choices=("all", "mechanisms"), default="all")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--rows") == "all":
        return
    from catalogue import MECHANISMS, Row

    rows = lambda item: [v for v in getattr(item, "callspec", EMPTY).params.values() if isinstance(v, Row)]
    left_out = [item for item in items if any(row.name not in MECHANISMS for row in rows(item))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def share_compiled_programs(config) -> None:
    """One folder of compiled programs for the workers and the processes of this run, and for no other run.

    What a worker, or a test, has compiled is loaded by the next one that needs it, which is three times as fast.
    """
    if hasattr(config, "workerinput") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # a worker has the environment of the process that started it
    folder = tempfile.mkdtemp(prefix="jaxnorm-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_configure(config):
    share_compiled_programs(config)
    # An entry that another worker is about to write counts as none.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")
    room = config.getoption("--room")
    if room == "absent":
        os.environ["JAXNORM_NATIVE"] = "0"
    from jaxnorm._kernels import cpu

    if room == "native":
        assert cpu.library().loaded, cpu.library().reason
        always.rule = cpu.pays
        cpu.pays = always


def always(view, dtype) -> bool:
    """In the place of the default's rule, which is kept as `always.rule`."""
    return True
