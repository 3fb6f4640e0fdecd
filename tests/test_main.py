"""`python -m gold_jax` and `gold-jax`: what there is, and each command by its name."""

import importlib
import subprocess

import pytest

import gold_jax
from gold_jax import __main__ as entry


def test_the_overview_names_every_command(capsys):
    entry.main([])
    shown = capsys.readouterr().out
    assert shown.startswith(f"gold_jax {gold_jax.__version__}: ")
    for name in entry.COMMANDS:
        doc = importlib.import_module(f"gold_jax.{name}").__doc__
        assert f"  {name} " in shown and doc.startswith(f"`python -m gold_jax.{name}`: ")
    entry.main(["--help"])
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    "argv", [["--version"], ["-V"], ["train", "--version"], ["plan", "--topology", "x", "--version"]]
)
def test_the_version(capsys, argv):
    entry.main(argv)
    assert capsys.readouterr().out == f"gold_jax {gold_jax.__version__}\n"


def test_a_command_gets_its_flags(capsys):
    with pytest.raises(SystemExit) as end:
        entry.main(["evaluate", "--max_eval_samples", "0"])
    assert end.value.code == 2 and "--max_samples" in capsys.readouterr().err


def test_what_is_no_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        entry.main(["trian", "--config", "x"])
    said = capsys.readouterr().err
    assert (
        end.value.code == 2 and "there is no command 'trian'; the nearest is train;" in said and said.count("\n") == 1
    )


def test_the_shell_completes_commands_and_their_flags(capsys):
    entry.main(["completion", "bash"])
    script = capsys.readouterr().out

    def completed(*words):
        typed = " ".join(f"'{word}'" for word in words)
        line = f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _gold_jax; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()

    assert completed("gold-jax", "ev") == ["evaluate"]
    assert completed("gold-jax", "train", "--gener") == ["--generation_batch_size"]
    assert "--max_eval_samples" in completed("gold-jax", "evaluate", "--max_")
