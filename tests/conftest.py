import os
import pathlib

import datasets
import pytest
import tiny_models as tiny


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """The folder of real tokenizers and models; the test is skipped where there is none."""
    folder = os.environ.get("GOLD_JAX_ASSETS")
    if not folder:
        pytest.skip(
            "GOLD_JAX_ASSETS does not name a folder of real models and tokenizers (tests/fetch_assets.py makes one)"
        )
    path = pathlib.Path(folder)
    if not path.is_dir():
        pytest.skip(f"GOLD_JAX_ASSETS names {path.name}, which is not a folder")
    return path


@pytest.fixture(scope="module")
def quick_compiles(request):
    """Tiny runs compile with little optimization and keep what they compiled."""
    with tiny.quick_compiles(request.config.cache.mkdir("xla")):
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    """A folder with a student, a teacher, a teacher with the student's tokenizer, bare tokenizers of the two, and data."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_student(folder / "student")
    tiny.write_teacher(folder / "teacher")
    tiny.write_student(folder / "sibling", seed=3)
    tiny.student_tokenizer().save_pretrained(folder / "student_tokenizer")
    tiny.teacher_tokenizer().save_pretrained(folder / "teacher_tokenizer")
    tiny.write_data(folder / "data")
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Data sets are read anew, and nothing is looked up on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
