"""Executes the notebooks and saves their outputs: `python -m tools.refresh_notebooks [NAME ...]`, from the root of a checkout.

Edit `notebooks/NAME.py` (jupytext's percent format; in JupyterLab with jupytext either file). This executes it in a
temporary folder and writes `notebooks/NAME.ipynb` with its outputs, but without execution counts; outputs that name this
machine or the time are refused. Cells tagged `unsaved` keep no output.
"""

import os
import pathlib
import re
import socket
import sys
import tempfile
from collections.abc import Iterator

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
LARGEST = 200_000  # bytes of a notebook


def read(path: pathlib.Path) -> nbformat.NotebookNode:
    """A notebook without outputs, from its text file."""
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # jupytext gives random ones
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def execute(notebook: nbformat.NotebookNode, timeout: int = 600) -> None:
    """Runs all cells in a temporary folder; `nbclient.exceptions.CellExecutionError` where one raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
        where = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=timeout, record_timing=False, resources=where)
        client.execute(env={**os.environ, "PYTHONPATH": path})


def clean(notebook: nbformat.NotebookNode) -> None:
    """Removes execution counts, and the outputs of cells tagged `unsaved`."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        outputs = [] if "unsaved" in cell.metadata.get("tags", ()) else cell.outputs
        for output in outputs:
            if "execution_count" in output:
                output.execution_count = None
        cell.outputs = outputs


def traces(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Paths, host names, times and addresses in the outputs."""
    names = [re.escape(str(path)) for path in (FOLDER.parent, pathlib.Path.home(), tempfile.gettempdir(), sys.prefix)]
    names += [rf"\b{re.escape(socket.gethostname())}\b", r"\b\d{4}-\d\d-\d\d[ T]\d\d:", "0x[0-9a-f]{8,}"]
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield from re.findall("|".join(names), str(output))


def main(names: list[str]) -> None:
    """Refreshes the named notebooks, or all."""
    for path in sorted(FOLDER.glob("*.py")):
        if names and path.stem not in names:
            continue
        notebook = read(path)
        execute(notebook)
        clean(notebook)
        if found := sorted(set(traces(notebook))):
            raise SystemExit(f"{path.stem}: outputs name this machine or the time: {', '.join(found)}")
        text = nbformat.writes(notebook) + "\n"
        if len(text) > LARGEST:
            raise SystemExit(f"{path.stem}: {len(text):,} bytes with outputs, the most are {LARGEST:,}")
        path.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        print(f"{path.with_suffix('.ipynb')}: {len(text):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
