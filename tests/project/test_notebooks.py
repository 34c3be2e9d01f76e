"""Every notebook runs from top to bottom, by this interpreter, and ends in asserts."""

import pytest

pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbformat
from helpers.jit import FLAGS
from pictures import NOTEBOOKS, clean, execute, read

COMPILING = ("01", "02", "06")  # most of their time; their programs are compiled unoptimized. Others measure or train.


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.filterwarnings("default")  # those of the client's sockets and event loop are not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    execute(path, tmp_path, FLAGS if path.stem[:2] in COMPILING else "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path):
    """Without outputs, or with all that it prints and draws, as `python -m tests.pictures` stores them."""
    notebook, again = read(path), clean(read(path))
    nbformat.validate(notebook)
    assert notebook.cells == again.cells
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    drawn = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    printed = "".join(output.get("text", "") for output in cells[-1].outputs)
    if any(cell.outputs for cell in cells):
        assert drawn == sum("plt.show()" in cell.source for cell in cells)
        assert printed == "All of it holds.\n"
    assert "assert" in cells[-1].source
    badge = f"https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/{path.name}"
    assert badge in notebook.cells[0].source
