"""The notebooks run, have up-to-date outputs, and equal their text files."""

import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
TEXTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture(params=TEXTS, ids=lambda path: path.stem)
def text(request):
    for module in ("jupytext", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(module, reason=f"notebooks need {module}: pip install 'gold_jax[test]'")
    return request.param


def outputs_of(cells):
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_every_notebook_has_its_text():
    assert TEXTS and [path.stem for path in TEXTS] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def test_the_two_files_hold_the_same_cells(text):
    from tools import refresh_notebooks

    kept = json.loads(text.with_suffix(".ipynb").read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"]), cell["metadata"]) for cell in kept["cells"]]
    wanted = [(cell.cell_type, cell.source, cell.metadata) for cell in refresh_notebooks.read(text).cells]
    assert found == wanted, f"run python -m tools.refresh_notebooks {text.stem}"


def test_committed_outputs_are_small_without_errors_and_name_no_machine(text):
    from tools import refresh_notebooks

    path = text.with_suffix(".ipynb")
    kept = json.loads(path.read_text(encoding="utf-8"))
    found = outputs_of(kept["cells"])
    assert found and not [output for output in found if output["output_type"] == "error"]
    assert not [output["text"] for output in found if output.get("name") == "stderr"]
    assert path.stat().st_size < refresh_notebooks.LARGEST
    assert not {cell["execution_count"] for cell in kept["cells"] if cell["cell_type"] == "code"} - {None}
    assert list(refresh_notebooks.traces(refresh_notebooks.nbformat.from_dict(kept))) == []


@pytest.mark.slow
def test_a_notebook_runs_and_has_outputs_like_the_committed_ones(text):
    from tools import refresh_notebooks

    kept = json.loads(text.with_suffix(".ipynb").read_text(encoding="utf-8"))
    notebook = refresh_notebooks.read(text)
    for cell in notebook.cells:  # what a cell shows is the same after fewer updates
        cell.source = cell.source.replace("max_steps=200,", "max_steps=60,")
    refresh_notebooks.execute(notebook)  # raises where a cell does

    def kinds(cells):  # of what each cell shows, in the order of cells
        shown = [cell for cell in cells if cell["cell_type"] == "code"]
        shown = [cell for cell in shown if "unsaved" not in cell["metadata"].get("tags", ())]
        return [{kind for output in cell["outputs"] for kind in output.get("data", ())} for cell in shown]

    assert kinds(notebook.cells) == kinds(kept["cells"])
