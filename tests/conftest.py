"""A strict climate: eight host devices, no silent promotion of dtype or rank; warnings are errors (see pyproject).

The arrays of the catalogue are small, and the default leaves such to XLA. So that the laws are tested on the kernels,
`--backend native`, which is what plain `pytest` does, runs those wherever they take a call, however small it is;
`--backend auto` leaves the default as users have it, and `--backend absent` is an installation without the extension.
On a machine with a GPU, `JAX_PLATFORMS=cuda,cpu` and `--backend auto` run the laws and the kernels' tests on it.
`--rows mechanisms` runs the laws on one row of the catalogue for each mechanism, and not on the others; with `--backend
absent` not on rows that no kernel takes either, whose programs are XLA's with the extension as well. `--versions` runs
the tests marked `versions`, on one row for each norm. `-m "not slow"` leaves out layouts, backends, and whatever starts
processes: CONTRIBUTING has the tiers.
"""

import gc
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

if not hasattr(jax, "set_mesh"):  # jax 0.7.0 has them elsewhere
    from jax.experimental import enable_x64

    jax.set_mesh, jax.enable_x64 = jax.sharding.use_mesh, enable_x64

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator seeded by the test's own name: the same numbers each run, others for each test."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def kernels(request) -> bool:
    """Whether the native kernels run wherever they take a call."""
    return request.config.getoption("--backend") == "native"


def pytest_addoption(parser):
    parser.addoption("--backend", choices=("native", "auto", "absent"), default="native")
    parser.addoption("--rows", choices=("all", "mechanisms"), default="all")
    parser.addoption("--versions", action="store_true", help="what .ci/versions runs on other releases of JAX")


SLOW = {"layouts", "backends"}  # folders whose tests are all slow


@pytest.hookimpl(tryfirst=True)  # before -m selects by the marks that are made here
def pytest_collection_modifyitems(config, items):
    """Slow folders, exemptions of rows, and the rows that `--rows mechanisms` and `--versions` keep."""
    for item in items:
        if item.path.parent.name in SLOW:
            item.add_marker(pytest.mark.slow)
    from catalogue import EACH, MECHANISMS, NOT_NATIVE, Row

    rows = {item: [v for v in item.callspec.params.values() if isinstance(v, Row)] for item in items
            if hasattr(item, "callspec")}  # fmt: skip
    for item in rows:
        for row in rows[item]:
            if item.originalname in row.exempt:
                item.add_marker(pytest.mark.xfail(strict=True, reason=row.exempt[item.originalname]))
    versions = config.getoption("--versions")
    if not versions and config.getoption("--rows") == "all":
        return
    names = {row.name for row in EACH} if versions else MECHANISMS
    absent = config.getoption("--backend") == "absent"

    def chosen(row) -> bool:
        return row.name in names and not (absent and NOT_NATIVE in row.exempt)

    def kept(item) -> bool:
        marked = not versions or item.get_closest_marker("versions") is not None
        return marked and all(map(chosen, rows.get(item, ())))

    config.hook.pytest_deselected(items=[item for item in items if not kept(item)])
    items[:] = [item for item in items if kept(item)]


def share_compiled_programs(config) -> None:
    """One folder of compiled programs for all workers and processes of this run; JAX_COMPILATION_CACHE_DIR is another.

    What one of them has compiled the next one loads, which takes a third of the time.
    """
    if hasattr(config, "workerinput"):
        return  # it has the environment of the process that started it
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
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
    gc.set_threshold(200_000, 10, 10)  # tracing makes so many objects that collecting them took 7 % of the time
    share_compiled_programs(config)
    # An entry that another worker is about to write counts as none.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")
    backend = config.getoption("--backend")
    if backend == "absent":
        os.environ["JAXNORM_NATIVE"] = "0"
    from jaxnorm._backends import cpu

    if backend == "native":
        assert cpu.library().loaded, cpu.library().reason
        always.rule = cpu.is_profitable
        cpu.is_profitable = always


def always(view, dtype) -> bool:
    """In the place of the default's rule, which is kept as `always.rule`."""
    return True
