"""The model card: what a saved student was trained from, on and with."""

import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_MARK = "<!-- written by gold_jax -->"
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def shown_command(argv: Sequence[str]) -> str:
    """A command line as text, with the hub token hidden."""
    shown, hide = [], False
    for part in argv:
        name, equals, _ = part.partition("=")
        secret = name.replace("-", "_") == "__hub_token"
        shown.append("HIDDEN" if hide else f"{name}=HIDDEN" if secret and equals else part)
        hide = secret and not equals
    return shlex.join(shown)


def write_model_card(
    folder: str | os.PathLike,
    *,
    method: str,
    base_model: str | None,
    teacher: str | None = None,
    loss: str | None = None,
    dataset: str | None = None,
    command: Sequence[str] | None = None,
    results: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Write `README.md`: what the model was trained from, on and with. A README that someone else wrote is kept.

    Args:
        folder: the model's folder.
        method: such as "GOLD distillation" or "supervised fine-tuning".
        base_model: name of the model before training.
        teacher: name of the teacher.
        loss: the loss in one line (`LossSpec.describe()`).
        dataset: name of the data set.
        command: the command line; the hub token is left out.
        results: metric to value, as measured at the end.

    Returns:
        The path of the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = pathlib.Path(folder) / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gold_jax", "distillation" if teacher else "sft"],
        # The hub refuses cards whose metadata name a folder; the text below names it all the same.
        base_model=base_model if base_model and _on_hub(base_model) else None,
        datasets=[dataset] if dataset and _on_hub(dataset) else None,
    )
    lines = ["---", data.to_yaml(), "---", _MARK, "", f"# {pathlib.Path(folder).resolve().name}", ""]
    lines += [f"Trained with gold_jax by {method}. The weights open in transformers and vLLM.", ""]
    facts = {"Base model": base_model, "Teacher": teacher, "Data set": dataset, "Loss": loss}
    lines += [f"- {label}: `{value}`" for label, value in facts.items() if value]
    if results:
        lines += ["", "Measured at the end of training, on the run's own evaluation data:", "", "| metric | value |"]
        lines += ["| --- | --- |"] + [f"| {name} | {value} |" for name, value in results.items()]
    if command:
        lines += ["", "```", shown_command(command), "```"]
    ModelCard("\n".join(lines) + "\n").save(path)
    return path


def _on_hub(name: str) -> bool:
    """Whether a name is a hub id and no folder of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name)
