"""The arrows of the design: which part may import which."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "gold_jax"
FORBIDDEN = {
    part: set(names.split())
    for part, names in {
        "config": "jax flax optax transformers text distributed models losses rollout training inspection planning cli",
        "text": "jax flax optax sharding distributed models losses rollout training inspection planning",
        "sharding": "text distributed models losses rollout training inspection planning transformers",
        "distributed": "text sharding models losses rollout training inspection planning transformers",
        "losses": "text sharding distributed models rollout training inspection planning transformers",
        "models": "text losses rollout training inspection planning",
        "rollout": "text losses training inspection planning",
        "training": "inspection planning",
        "planning": "inspection",
        "inspection": "jax flax optax models losses rollout training",
    }.items()
}
# What looks at models, and what brings everything together.
EXEMPT = {"inspection": {"mass.py", "pair.py"}}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("part", FORBIDDEN)
def test_arrows_between_the_parts_go_one_way(part):
    files = [path for path in (PACKAGE / part).glob("*.py") if path.name not in EXEMPT.get(part, ())]
    assert files
    for path in files:
        for module in imported(path):
            names = module.split(".")
            name = names[1] if names[0] == "gold_jax" and len(names) > 1 else names[0]
            assert name not in FORBIDDEN[part], f"{path.name} imports {module}"


def test_nothing_in_the_package_imports_torch():
    assert not [p for p in PACKAGE.rglob("*.py") for m in imported(p) if m.split(".")[0] == "torch"]


def test_reading_flags_and_aligning_text_do_not_wait_for_jax():
    code = "import sys, gold_jax, gold_jax.cli, gold_jax.config.parsing, gold_jax.text.batch; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_inspect_module_of_python_stays_what_it_is():
    code = "import gold_jax.inspect, inspect; assert inspect.signature and inspect is not gold_jax.inspect"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_is_there():
    import gold_jax

    for name in gold_jax.__all__:
        assert getattr(gold_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gold_jax.nonsense  # noqa: B018
