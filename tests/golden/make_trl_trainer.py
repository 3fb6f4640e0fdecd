"""Writes trl_trainer.json: what the name of TRL's GOLD trainer and its settings promise (needs trl and torch)."""

import ast
import inspect
import json
import pathlib
import sys
import textwrap


def classes(cls: type) -> list[type]:
    """A class and its bases in TRL and transformers."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] in ("trl", "transformers")]


def attributes(tree: ast.AST) -> set[str]:
    """The public names that methods set on `self`."""
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}


def logged(tree: ast.AST) -> set[str]:
    """The keys that methods set in `logs`, or in a mode's `_metrics`."""
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            held = ast.unparse(node.value)
            if held == "logs" or held.startswith("self._metrics[mode]"):
                found.add(node.slice.value)
    return found


def surface() -> dict[str, list[str]]:
    """Arguments of the constructor, members of an instance, logged metrics, names that the scripts import, events, schedules."""
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_utils import SchedulerType
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    trees = [ast.parse(textwrap.dedent(inspect.getsource(cls))) for cls in classes(GOLDTrainer)]
    members = set(dir(GOLDTrainer)).union(*map(attributes, trees))
    settings = {name for cls in classes(GOLDConfig) for name in vars(cls)} | set(vars(TrainingArguments))
    return {
        "arguments": list(inspect.signature(GOLDTrainer).parameters),
        "members": sorted(name for name in members if not name.startswith("_")),
        "settings": sorted(name for name in settings if not name.startswith("_")),
        "metrics": sorted(set().union(*map(logged, trees))),
        "events": sorted(name for name in vars(TrainerCallback) if name.startswith("on_")),
        "schedules": sorted(kind.value for kind in SchedulerType),
    }


if __name__ == "__main__":
    text = json.dumps(surface(), indent=0) + "\n"
    if "--print" in sys.argv:
        print(text)
    else:
        pathlib.Path(__file__).with_name("trl_trainer.json").write_text(text)
