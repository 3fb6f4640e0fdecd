"""Where commands keep compiled programs, and that a second process finds those of the first."""

import os
import subprocess
import sys

import jax
import pytest

from gold_jax import compilation_cache
from gold_jax.compilation_cache import keep_compiled, restored


@pytest.fixture
def config():
    """JAX's settings without a folder, put back afterwards."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    with restored():
        yield jax.config
    jax.config.update("jax_compilation_cache_dir", folder)


def several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)


def test_by_default_the_user_s_cache_has_a_folder_for_each_kind_of_processor(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled(None, "gs://bucket/run") == []
    folder = config.jax_compilation_cache_dir
    assert folder.startswith(str(tmp_path / "gold_jax" / "xla")) and os.path.isdir(folder)
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "another")
    assert compilation_cache.default_folder() != folder


def test_a_folder_of_jax_s_own_variable_is_left_as_it_is(config, tmp_path):
    config.update("jax_compilation_cache_dir", str(tmp_path))
    shortest = config.jax_persistent_cache_min_compile_time_secs
    assert keep_compiled(None, "gs://bucket/run") == []
    assert config.jax_compilation_cache_dir == str(tmp_path)
    assert config.jax_persistent_cache_min_compile_time_secs == shortest


def test_several_processes_keep_them_in_the_bucket_of_their_checkpoints_and_else_nowhere(config, monkeypatch):
    several_processes(monkeypatch)
    assert keep_compiled(None, "gs://bucket/run/") == []
    assert config.jax_compilation_cache_dir == "gs://bucket/run/.compiled" and config.jax_enable_compilation_cache
    for checkpoints in (None, "a/folder"):
        with restored():
            config.update("jax_compilation_cache_dir", None)
            assert keep_compiled(None, checkpoints) == [] and not config.jax_enable_compilation_cache


def test_a_command_leaves_jax_s_settings_as_they_were_and_the_next_has_its_own(config, tmp_path):
    before = config.jax_persistent_cache_min_compile_time_secs
    for asked in ("none", str(tmp_path / "one"), "none", str(tmp_path / "two")):
        with restored():
            assert keep_compiled(asked) == []
            assert config.jax_enable_compilation_cache == (asked != "none")
        assert config.jax_compilation_cache_dir is None and config.jax_enable_compilation_cache
        assert config.jax_persistent_cache_min_compile_time_secs == before


def test_a_folder_that_cannot_be_made_is_told_and_the_command_goes_on(config, tmp_path):
    (tmp_path / "file").write_text("")
    (said,) = keep_compiled(str(tmp_path / "file" / "folder"))
    assert said.startswith("compiled programs are not kept for later runs (") and "file" in said
    assert config.jax_compilation_cache_dir is None


def test_a_folder_that_is_set_after_something_was_compiled_is_used(config, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.jit(lambda x: x + 3).lower(jax.numpy.ones(3)).compile()
    for folder in (tmp_path / "one", tmp_path / "two"):
        with restored():
            config.update("jax_persistent_cache_min_compile_time_secs", 0)
            keep_compiled(str(folder))
            jax.jit(lambda x: x - 7).lower(jax.numpy.ones(3)).compile()
        assert list(folder.glob("*-cache"))


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
