"""The arrows of the design: which part may import which."""

import ast
import graphlib
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "gold_jax"
LOOKING = {"inspection", "planning", "profiling", "reporting"}  # these look at the core, which knows nothing of them
FORBIDDEN = {
    part: set(names.split()) | more
    for part, names, more in [
        ("config", "jax flax optax transformers text distributed models losses rollout training cli", LOOKING),
        ("text", "jax flax optax sharding distributed models losses rollout training", LOOKING),
        ("sharding", "text distributed models losses rollout training transformers", LOOKING),
        ("distributed", "text sharding models losses rollout training transformers", LOOKING),
        ("losses", "text sharding distributed models rollout training transformers", LOOKING),
        ("models", "text losses rollout training", LOOKING),
        ("rollout", "text losses training", LOOKING),
        ("training", "", LOOKING),
        ("serving", "losses training distributed", LOOKING),
        ("profiling", "text sharding models losses rollout inspection planning reporting", set()),
        ("planning", "inspection profiling reporting", set()),
        ("inspection", "jax flax optax models losses rollout training planning profiling reporting", set()),
        ("reporting", "jax flax optax text models losses rollout inspection planning profiling", set()),
    ]
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


def test_no_module_imports_what_imports_it():
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                source = ".".join([package] * bool(node.level) + [node.module] * bool(node.module))
                found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        graph[name] = (found & modules.keys()) - {name}
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    for name, found in graph.items():  # a package is brought along by each of its modules
        found -= {other for other in packages if name.startswith(other + ".")}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError says which


def test_nothing_in_the_package_imports_torch():
    assert not [p for p in PACKAGE.rglob("*.py") for m in imported(p) if m.split(".")[0] == "torch"]


def test_reading_flags_and_aligning_text_do_not_wait_for_jax():
    code = "import sys, gold_jax, gold_jax.cli, gold_jax.config.parsing, gold_jax.text.batch; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_inspect_module_of_python_stays_what_it_is():
    code = "import gold_jax.inspect, inspect; assert inspect.signature and inspect is not gold_jax.inspect"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_file_that_is_no_module_is_installed():
    patterns = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {path for pattern in patterns["gold_jax"] for path in PACKAGE.glob(pattern)}
    assert {path for path in PACKAGE.rglob("*.*") if path.suffix not in (".py", ".pyc")} <= installed


def test_every_public_name_is_there():
    import gold_jax

    for name in gold_jax.__all__:
        assert getattr(gold_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gold_jax.nonsense  # noqa: B018


def test_type_checkers_see_every_public_name_where_it_is():
    import gold_jax

    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    block = next(node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == gold_jax._HOMES


def _imported_names(text):
    """(module, name) of everything that a script takes from the package, also inside its functions; name None: the module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gold_jax":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "gold_jax")


def test_scripts_beside_the_package_import_what_is_there():
    root = PACKAGE.parent
    scripts = [path for folder in ("benchmarks", "tools", "tpu_scripts") for path in (root / folder).rglob("*.py")]
    texts = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in scripts}
    for path in [root / "README.md", *(root / "docs").glob("*.md")]:
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
        texts[path.name] = "\n".join(re.findall(r"^(?:from|import) gold_jax.*$", "\n".join(blocks), re.M))
    assert len(texts) > 20
    for where, text in texts.items():
        for module, name in _imported_names(text):
            found = importlib.import_module(module)
            if name is not None and not hasattr(found, name):
                assert importlib.util.find_spec(f"{module}.{name}"), f"{where}: {module} has no {name}"
