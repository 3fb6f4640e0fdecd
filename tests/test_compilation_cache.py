"""Where commands keep compiled programs, and that a second process finds those of the first."""

import errno
import os
import subprocess
import sys
import warnings

import jax
import pytest
from etils import epath

from gold_jax import compilation_cache
from gold_jax.compilation_cache import keep_compiled, restored
from gold_jax.config import ModelArguments


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


@pytest.fixture
def unusable(tmp_path, monkeypatch):
    """What cannot be a folder of programs, by what is wrong with it."""
    (tmp_path / "file").write_text("")
    full, LocalPath = tmp_path / "full", type(epath.Path("."))

    def write_bytes(path, data, write=LocalPath.write_bytes):
        if path.parent == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(LocalPath, "write_bytes", write_bytes)
    return {
        "File exists": tmp_path / "file",
        "Not a directory": tmp_path / "file" / "folder",
        "No space left": full,
        "Could not determine home": "~nobody-has-this-name/folder",
        "KeyError": "files://folder",
    }


def test_a_named_folder_that_cannot_be_used_is_an_error_that_names_the_flag(config, unusable):
    for why, folder in unusable.items():
        with pytest.raises(
            ValueError, match=f"--compilation_cache is '{folder}', which cannot be used .*{why}.*or none"
        ):
            keep_compiled(str(folder))
    assert config.jax_compilation_cache_dir is None
    with pytest.raises(ValueError, match="compilation_cache.*name a folder"):
        ModelArguments(compilation_cache="")


def test_where_the_user_s_own_cannot_be_used_the_command_goes_on(config, unusable, tmp_path, monkeypatch):
    for home in (tmp_path / "file", "~nobody-has-this-name"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        (said,) = keep_compiled(None)
        assert said.startswith("compiled programs are not kept for later runs (")
        assert config.jax_compilation_cache_dir is None


def test_a_home_that_is_abbreviated_is_found_and_a_cache_home_that_is_relative_is_none(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for caches in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
        assert compilation_cache.default_folder().startswith(str(tmp_path / ".cache" / "gold_jax" / "xla"))
    assert keep_compiled("~/programs") == []
    assert config.jax_compilation_cache_dir == str(tmp_path / "programs") and (tmp_path / "programs").is_dir()


def test_what_the_user_has_set_of_jax_s_cache_stays(config, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "123456789")
    size = config.jax_compilation_cache_max_size
    keep_compiled(str(tmp_path))
    assert config.jax_compilation_cache_max_size == size and config.jax_compilation_cache_dir == str(tmp_path)
    config.update("jax_enable_compilation_cache", False)
    try:
        (said,) = keep_compiled(str(tmp_path / "named"))
        assert "JAX_ENABLE_COMPILATION_CACHE is off" in said and keep_compiled(None) == []
        assert not config.jax_enable_compilation_cache
    finally:
        config.update("jax_enable_compilation_cache", True)


def test_programs_that_jax_kept_without_a_bound_hinder_no_others(config, tmp_path, monkeypatch):
    """JAX wants to know of each program when it was last used, before it writes another."""
    monkeypatch.setattr(compilation_cache, "SHORTEST", 0)
    (tmp_path / "of-another-run-cache").write_bytes(b"program")
    (tmp_path / "killed-cache").write_bytes(b"program")
    (tmp_path / "killed-atime").write_bytes(b"")
    keep_compiled(str(tmp_path))
    with warnings.catch_warnings(action="error"):
        jax.jit(lambda x: x * 17).lower(jax.numpy.ones(3)).compile()
    programs = {path.name.removesuffix("-cache") for path in tmp_path.glob("*-cache")}
    assert len(programs) > 2 and programs == {x.name.removesuffix("-atime") for x in tmp_path.glob("*-atime")}


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
