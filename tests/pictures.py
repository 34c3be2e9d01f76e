"""Notebooks with their pictures: `python -m tests.pictures 03` executes notebook 03 and stores what it draws.

A reader sees the pictures before running it. Times, counters and everything else that changes from run to run is left
out, so a notebook changes only where its pictures do.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300  # for one cell; the whole of a notebook takes less than 60 s on an idle machine


class _ThisInterpreter(KernelSpecManager):
    """The one kernel is the interpreter that runs this, whatever is registered on the machine."""

    def get_kernel_spec(self, kernel_name):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def _environment(folder: Path, flags: str) -> dict[str, str]:
    """That of this process, without what the tests, or a person's profile, would bring into the kernel."""
    strict = ("JAX_", "XLA_", "PYTEST_", "PYTHONWARNINGS", "MPLBACKEND", "IPYTHON", "JPY_", "COV_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(strict)}
    return kept | {
        "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder), "MPLCONFIGDIR": str(folder), "XLA_FLAGS": flags
    }  # fmt: skip


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def execute(path: Path, folder: Path, flags: str = "") -> Any:
    """The notebook, run from top to bottom by this interpreter. `folder` is for the kernel's files, `flags` for XLA."""
    notebook = read(path)
    manager = AsyncKernelManager(kernel_spec_manager=_ThisInterpreter(), connection_file=str(folder / "kernel.json"))
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=SECONDS, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=_environment(folder, flags), cleanup_kc=True)
    return notebook


def clean(notebook: Any) -> Any:
    """Without execution counts and times, and of the outputs what is printed and drawn."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [_kept(output) for output in cell.outputs if _is_kept(output)]
    return notebook


def _is_kept(output: Any) -> bool:
    return output.get("name") == "stdout" or (output.output_type == "display_data" and "image/png" in output.data)


def _kept(output: Any) -> Any:
    if output.output_type == "stream":
        return output
    return nbformat.v4.new_output("display_data", data={"image/png": _smaller(output.data["image/png"])})


def _smaller(png: str) -> str:
    """The picture in 128 colours, with white behind it: then its dark text is read on a dark page as well."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":  # it is small
        return png
    image = image.convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    packed = io.BytesIO()
    Image.alpha_composite(page, image).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(packed, "PNG")
    return base64.b64encode(packed.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in NOTEBOOKS:
        if path.stem.startswith(tuple(names)):
            with tempfile.TemporaryDirectory() as folder:
                notebook = clean(execute(path, Path(folder)))
            path.write_text(nbformat.writes(notebook, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", help="how the names of the notebooks begin, such as 03")
    main(parser.parse_args().names)
