import gc
import os
import pathlib

import pytest

# Most of the suite's time goes into compiling tiny programs that run once or twice. What stands here holds for this process,
# for the workers of xdist and for every command that a test starts, and must stand before the first import of JAX, which
# reads it. Without XLA's emitters for fusions a program of many small operations compiles in less than half the time, and
# as one module of LLVM's, not cut for several threads, in two thirds of that.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
        # Eight devices on two busy cores may take longer than the 40 s after which XLA ends a process.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices: numpy's other threads would only wait for work
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # a twelfth of tracing and compiling
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # workers may ask the TPU compiler at the same time
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


# Files that take longest, the longest first: begun first, they keep no worker busy when the others are done.
LONGEST = (
    "distributed/test_runs.py",
    "sharding/test_mesh.py",
    "test_commands.py",
    "test_notebooks.py",
    "test_examples.py",
    "losses/test_trl_parity.py",
    "stateful/test_stories.py",
    "metamorphic/test_what_leaves_the_weights_alone.py",
    "training/test_step.py",
    "rollout/test_sampler.py",
    "training/test_resume.py",
    "losses/test_compare.py",
    "test_plan.py",
    "distributed/test_watchdog.py",
    "models/test_decoder.py",
    "training/test_again.py",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    here = pathlib.Path(__file__).parent
    rank = {str(here / name): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """After a file, drops compiled programs where the process has grown large: three workers share the memory."""
    yield
    memory = pathlib.Path("/proc/self/statm")  # Linux alone has it
    if memory.exists() and int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 3 * 2**30:
        jax.clear_caches()
        gc.collect()


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
