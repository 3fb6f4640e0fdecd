"""The examples of README.md and docs/ run, and every flag that they name exists.

A block of Python or bash that cannot run here has `<!-- skip: next "why" -->` above it; the flags of its commands are parsed
nevertheless. Models of the hub are replaced by the embedded ones, and `…` by a run of a few updates.
"""

import contextlib
import doctest
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

import gold_jax.losses.compare as compare
from gold_jax import cli, evaluate, generate, inspect, plan, report, serve, sft, train
from gold_jax.config import DataArguments, GOLDConfig, ModelArguments
from gold_jax.config.fields import Settings, field_names
from gold_jax.config.parsing import FlagError, parse_args
from gold_jax.config.trl_compat import ANSWERS
from gold_jax.quickstart import resolve
from gold_jax.text.data import load_examples

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "configs").glob("*.yaml"))]
COMMANDS = {module.__name__: module for module in (train, sft, evaluate, generate, inspect, plan, report, serve)}
FEW = "--config configs/quickstart.yaml --max_steps 8 --eval_on_start false --eval_strategy no --log_completions false"
REPLACEMENTS = {
    "meta-llama/Llama-3.2-1B-Instruct": "embedded:student",
    "Qwen/Qwen3-4B-Instruct-2507": "embedded:teacher",
    "…": FEW,
}
ADDRESS = "127.0.0.1:8000"  # of a server
# Flags of other programs, by the page that names them.
OTHERS = {
    "distributed.md": {"signal"},
    "planning.md": {"gpus"},
    "troubleshooting.md": {"context_length", "max_model_len", "logprobs_mode"},
    "rollout-servers.md": {"enable_deterministic_inference", "logprobs_mode"},
}
SCRIPTS = {"tpu.md", "benchmarks.md"}  # mostly with flags of tpu_scripts/ and benchmarks/


# The blocks.
def with_replacements(example) -> str:
    text = example.parsed
    for name, replacement in REPLACEMENTS.items():
        text = text.replace(name, replacement)
    if "runs/" in text:
        example.namespace["fixture"]("runs")
    if ADDRESS in text:
        text = text.replace(ADDRESS, example.namespace["fixture"]("server"))
    return text


def run_bash(example):
    """Runs a block in the working directory, without installing packages; returns its output if it fails."""
    if "pip install -e" in example.parsed:
        pytest.skip("installs this project, which .ci/run does")
    env = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    line = ["bash", "-euo", "pipefail", "-c", "pip() { :; }\n" + with_replacements(example)]
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(line, env=env, timeout=600, **streams)
    return done.returncode and f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def run_python(example):
    exec(compile("\n" * example.line + with_replacements(example), example.path, "exec"), example.namespace)


def read_settings(example):
    pathlib.Path("settings.yaml").write_text(example.parsed)
    parse_args(["--config", "settings.yaml"], ModelArguments, DataArguments, GOLDConfig)


def read_rows(example):
    pathlib.Path("rows.jsonl").write_text(example.parsed)
    rows = load_examples("rows.jsonl")
    assert len([rows[i] for i in range(len(rows))]) == example.parsed.count("\n")


def blocks():
    """Every block that is run, after the skip comments above it."""
    skip = SkipParser()
    languages = {"python": run_python, "bash": run_bash, "yaml": read_settings, "json": read_rows}
    sybil = Sybil([skip, *(CodeBlockParser(name, run) for name, run in languages.items())])
    for page in PAGES:
        above, examples = [], list(sybil.parse(page))
        texts = [example.parsed for example in examples if example.region.evaluator in (run_bash, run_python)]
        trains = any(re.search(rf"gold_jax\.(train|report)|GOLDTrainer|_grad|{ADDRESS}", text) for text in texts)
        marks = [pytest.mark.slow] if trains else []  # for all blocks of a page, which share a namespace
        for example in examples:
            if example.region.evaluator in languages.values():
                yield pytest.param([*above, example], id=f"{page.name}:{example.line}", marks=marks)
                above = []
            else:
                above.append(example)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the configs, data and a trained student."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(resolve("embedded:student"), folder / "out")
    rows = (resolve("embedded:task") / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "your-data.jsonl").write_text("".join(rows[:8]))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """The runs that report.md shows."""
    with contextlib.chdir(folder):
        cli.run("gold_jax.train", train.main, shlex.split(f"{FEW} --output_dir runs/quickstart --max_steps 2"))
    for name in ("gold", "events"):
        shutil.copytree(folder / "runs/quickstart", folder / "runs" / name)


@pytest.fixture(scope="module")
def server(folder):
    """The address of a server of `out`, called as in serving.md."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = f"{sys.executable} -m gold_jax.serve --model_name_or_path out --served_model_name runs/quickstart"
    line += f" --port {address.rpartition(':')[2]}"
    with subprocess.Popen(shlex.split(line), cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://{address}/health").close()
                    break
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


@pytest.mark.parametrize("examples", blocks())
def test_a_block_runs(examples, folder, request, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(compare, "COMPARISONS", dict(compare.COMPARISONS))  # a block may register one
    for example in examples:
        example.namespace["fixture"] = request.getfixturevalue
        example.evaluate()


def test_the_doctest_of_the_example_loss_passes():
    (example,) = doctest.DocTestFinder().find(the_loss(), "skew_kl", globs=vars(compare) | {"skew_kl": the_loss()})
    assert doctest.DocTestRunner().run(example) == (0, 3)


def the_loss():
    """The example of add-a-loss.md."""
    namespace = dict(vars(compare))
    exec(re.search(r"```python\n(def skew_kl.*?)```", (ROOT / "docs/add-a-loss.md").read_text(), re.S)[1], namespace)
    return namespace["skew_kl"]


# The flags.
class Parsed(Exception):
    """The flags of a command were parsed."""


@pytest.fixture
def parse(monkeypatch, folder):
    """A function that parses the flags of a command and does not run it."""

    def parse_alone(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    for module in (cli, evaluate, generate, inspect, plan, report, serve):
        monkeypatch.setattr(module, "parse_args", parse_alone)
    monkeypatch.setattr(plan, "prepare", lambda: None)  # this process's environment stays as it is
    monkeypatch.chdir(folder)

    def parse(name, words):
        with pytest.raises(Parsed):
            COMMANDS[f"gold_jax.{name}"].main([word for word in words if word != "…"])

    return parse


def commands(text: str):
    """(name, words) of every command of this package in a text: `python -m gold_jax.NAME`, `gold-jax NAME`."""
    text = text.replace("\\\n", " ")
    for found in re.finditer(r"(?:python -m gold_jax\.|gold-jax )(\w+)((?: [^\n`]*)?)", text):
        words = shlex.shlex(found[2], posix=True, punctuation_chars=True)
        words.whitespace_split = True
        words = [word.strip("[]") for word in words]
        yield found[1], words[: next((i for i, word in enumerate(words) if set(word) <= set("();<>|&")), None)]


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_has_the_flags_that_it_is_given(page, parse, monkeypatch):
    text = page.read_text(encoding="utf-8")
    own = {"skew_kl": compare.Comparison(the_loss())} if page.name == "add-a-loss.md" else {}
    monkeypatch.setattr(compare, "COMPARISONS", compare.COMPARISONS | own)
    for file, content in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", text, re.M | re.S):
        pathlib.Path(file).write_text(content)
    for name, words in commands(text):
        if any(word.startswith("--") for word in words):
            parse(name, words)


CLASSES = [c for module in COMMANDS.values() for c in vars(module).values() if isinstance(c, type)]
NAMES = {"config", "help", "version", *ANSWERS}.union(*(field_names(c) for c in CLASSES if Settings in c.__mro__[1:]))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in SCRIPTS], ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page):
    spans = " ".join(re.findall(r"`(--[^`]+)`", page.read_text(encoding="utf-8")))
    named = {re.sub("^no_", "", name.replace("-", "_")) for name in re.findall(r"(?<!\S)--([\w-]+)", spans)}
    assert named - NAMES <= OTHERS.get(page.name, set()) | {"FLAG", "NAME", "A", "B"}


@pytest.mark.parametrize("page", ["papers.md", "coming-from-tokenkit.md", "coming-from-maxtext-and-tunix.md"])
def test_flags_in_tables_are_valid(page):
    """On these pages each span of flags can be given to `train` as it is; a flag may lack its value."""
    spans = re.findall(r"`(--[^`]+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert spans
    for span in spans:
        try:
            parse_args(shlex.split(span), ModelArguments, DataArguments, GOLDConfig)
        except FlagError as error:
            if not re.fullmatch(r"--\w+ needs a value\.", str(error)):
                raise AssertionError(f"{span}: {error}") from None


def test_extras_that_pages_install_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for page in [*PAGES, *OTHER_PAGES]
        for found in re.findall(r"(?:gold_jax|'\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert named - {"NAME"} <= set(extras) and "serve" in named
