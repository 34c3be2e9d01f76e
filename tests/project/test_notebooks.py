"""Every notebook runs from top to bottom, by this interpreter, and ends in asserts."""

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from jupyter_client import AsyncKernelManager  # noqa: E402
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager  # noqa: E402

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300  # for one cell; the whole of a notebook takes less than 60 s on an idle machine


class _ThisInterpreter(KernelSpecManager):
    """The one kernel is the interpreter that runs the tests, whatever is registered on the machine."""

    def get_kernel_spec(self, kernel_name):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def _environment(folder: Path) -> dict[str, str]:
    """The tests' own, without what the tests, or a person's profile, would bring into the kernel."""
    strict = ("JAX_", "XLA_", "PYTEST_", "PYTHONWARNINGS", "MPLBACKEND", "IPYTHON", "JPY_", "COV_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(strict)}
    return kept | {"JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder), "MPLCONFIGDIR": str(folder)}


def _read(path: Path):
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.filterwarnings("default")  # those of the client's sockets and event loop are not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    manager = AsyncKernelManager(
        kernel_spec_manager=_ThisInterpreter(), connection_file=str(tmp_path / "kernel.json")
    )
    client = nbclient.NotebookClient(
        _read(path), km=manager, timeout=SECONDS, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=_environment(tmp_path), cleanup_kc=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path):
    notebook = _read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count is not None]
    assert "assert" in cells[-1].source
    badge = f"https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/{path.name}"
    assert badge in notebook.cells[0].source
