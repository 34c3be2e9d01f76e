"""A strict climate: eight host devices, no silent promotion of dtype or rank; warnings are errors (see pyproject).

The arrays of the catalogue are small, and the default leaves such to XLA. So that the laws are tested on the kernels,
`--room native`, which is what plain `pytest` does, runs those wherever they take a call, however small it is;
`--room auto` leaves the default as users have it, and `--room absent` is an installation without the extension.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

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
    return request.config.getoption("--room") == "native"


def pytest_addoption(parser):
    parser.addoption("--room", choices=("native", "auto", "absent"), default="native")
    parser.addoption("--versions", action="store_true", help="what .ci/versions runs on other releases of JAX")


def pytest_collection_modifyitems(config, items):
    """With --versions: the tests marked so, with one row of the catalogue for each norm."""
    if not config.getoption("--versions"):
        return
    from catalogue import EACH, Row

    names = {row.name for row in EACH}

    def kept(item) -> bool:
        rows = [v for v in item.callspec.params.values() if isinstance(v, Row)] if hasattr(item, "callspec") else []
        return item.get_closest_marker("versions") is not None and all(row.name in names for row in rows)

    config.hook.pytest_deselected(items=[item for item in items if not kept(item)])
    items[:] = [item for item in items if kept(item)]


def pytest_configure(config):
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
