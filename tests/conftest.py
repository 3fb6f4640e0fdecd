import gc
import os
import pathlib

import pytest

# Most of the suite's time goes into compiling tiny programs that run once or twice. What stands here holds for this process,
# for the workers of xdist and for every command that a test starts, and must stand before the first import of JAX, which
# reads it. Without XLA's emitters for fusions a program of many small operations compiles in less than half the time.
os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices: numpy's other threads would only wait for work
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # both workers may ask the TPU compiler at the same time
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import datasets
import jax
import tiny_models as tiny


def pytest_configure(config):
    """Keeps what is compiled for the other workers, for the commands that tests start, and for the next run."""
    # Tracing makes many objects that last: looking through them took a sixth of the time.
    gc.set_threshold(20_000, 20, 50)
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("xla")))
    jax.config.update("jax_compilation_cache_dir", folder)


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
