"""Where commands keep compiled programs, and that a second process finds those of the first."""

import os
import subprocess
import sys

import jax
import pytest

from gold_jax import compilation_cache
from gold_jax.compilation_cache import keep_compiled

CHANGED = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def config():
    """JAX's settings without a folder, put back afterwards."""
    before = {name: getattr(jax.config, name) for name in CHANGED}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_by_default_the_user_s_cache_has_a_folder_for_each_kind_of_processor(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled(None) is None
    folder = config.jax_compilation_cache_dir
    assert folder.startswith(str(tmp_path / "gold_jax" / "xla")) and os.path.isdir(folder)
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "another")
    assert compilation_cache.default_folder() != folder


def test_a_folder_of_jax_s_own_variable_is_left_as_it_is(config, tmp_path):
    config.update("jax_compilation_cache_dir", str(tmp_path))
    shortest = config.jax_persistent_cache_min_compile_time_secs
    assert keep_compiled(None, "gs://bucket/run") is None
    assert config.jax_compilation_cache_dir == str(tmp_path)
    assert config.jax_persistent_cache_min_compile_time_secs == shortest


def test_several_processes_keep_them_beside_their_checkpoints(config):
    assert keep_compiled(None, "gs://bucket/run/") is None
    assert config.jax_compilation_cache_dir == "gs://bucket/run/.compiled"


def test_none_keeps_nothing(config):
    assert keep_compiled("none", "gs://bucket/run") is None
    assert not config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_made_is_told_and_the_command_goes_on(config, tmp_path):
    (tmp_path / "file").write_text("")
    said = keep_compiled(str(tmp_path / "file" / "folder"))
    assert said.startswith("compiled programs are not kept for later runs (") and "file" in said
    assert config.jax_compilation_cache_dir is None


def test_the_next_process_compiles_none_of_them_again(tmp_path):
    command = [sys.executable, "-m", "gold_jax.evaluate", "--model_name_or_path", "embedded:student"]
    command += ["--dataset_name", "embedded:task", "--max_samples", "4", "--compilation_cache", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = []
    for _ in range(2):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        kept.append({path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")})
    assert kept[0] and kept[0] == kept[1]
