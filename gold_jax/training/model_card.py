"""The model card of a trained model."""

import math
import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from gold_jax.wording import without_passwords

_MARK = "<!-- written by gold_jax -->"
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_SHOWN_LOSSES = 10  # rows of the table of losses
_CURVE_WIDTH, _LEVELS = 40, "▁▂▃▄▅▆▇█"
_GOLD = """@misc{patino2025unlocking,
  title  = {Unlocking On-Policy Distillation for Any Model Family},
  author = {Carlos Miguel Patiño and Kashif Rasul and Quentin Gallouédec and Ben Burtenshaw and Sergio Paniego and \
Vaibhav Srivastav and Thibaud Frere and Ed Beeching and Lewis Tunstall and Leandro von Werra and Thomas Wolf},
  year   = {2025},
  url    = {https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation}
}"""
_LIBRARY = """@software{gold_jax,
  title   = {gold_jax: on-policy logit distillation between any two tokenizers, in JAX and Flax},
  version = {VERSION},
  license = {Apache-2.0}
}"""
_CHAT, _TEXT = '[{"role": "user", "content": "What is JAX?"}]', '"What is JAX?"'
_LOAD = """With transformers:

```python
from transformers import pipeline

print(pipeline("text-generation", model=NAME)(PROMPT, max_new_tokens=128)[0]["generated_text"])
```

With vLLM:

```python
from vllm import LLM, SamplingParams

print(LLM(NAME).VLLM(PROMPT, SamplingParams(max_tokens=128))[0].outputs[0].text)
```

With JAX:

```python
import gold_jax

print(gold_jax.sample_completions(NAME, prompts=[PROMPT], max_new_tokens=128)[0].text)
```"""


def shown_command(argv: Sequence[str]) -> str:
    """A command line as text, with the hub token hidden."""
    shown, hide = [], False
    for part in argv:
        name, equals, _ = part.partition("=")
        secret = name.replace("-", "_") == "__hub_token"
        shown.append("HIDDEN" if hide else f"{name}=HIDDEN" if secret and equals else part)
        hide = secret and not equals
    # Arguments that are not UTF-8 have surrogates in Python, which cannot be encoded.
    return without_passwords(shlex.join(shown)).encode("utf-8", "backslashreplace").decode()


def write_model_card(
    folder: str | os.PathLike,
    *,
    method: str,
    base_model: str | None,
    teacher: str | None = None,
    loss: str | None = None,
    dataset: str | None = None,
    recipe: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    results: Mapping[str, Mapping[str, float]] | None = None,
    repo_id: str | None = None,
    title: str | None = None,
    tags: Sequence[str] | str | None = None,
) -> pathlib.Path:
    """Writes the model card, `README.md`, into a model's folder and returns its path.

    A README that was not written by this function is kept.

    Args:
        folder: of the model.
        method: the training method.
        base_model, teacher, loss, dataset: their names.
        recipe: further facts about the run: labels with their texts.
        settings: those that differ from the defaults, as `--config` takes them.
        command: the command line; the hub token is hidden.
        history: the logged lines of the run; those with `step` and `loss` make the table of losses.
        results: columns of metrics by their titles; empty columns are left out.
        repo_id: the name to load the model by; None: the folder's name.
        title: of the card; None: the folder's name.
        tags: further tags.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = pathlib.Path(folder) / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    on_hub = {x for x in (base_model, dataset) if x and _HUB_ID.fullmatch(x) and not os.path.exists(x)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gold_jax", "distillation" if teacher else "sft", *([tags] if isinstance(tags, str) else tags or ())],
        # The hub refuses cards whose metadata name a local folder; only the text below names it.
        base_model=base_model if base_model in on_hub else None,
        datasets=[dataset] if dataset in on_hub else None,
    )
    name = path.parent.resolve().name
    lines = ["---", data.to_yaml(), "---", _MARK, "", f"# {title or name}", ""]
    lines += [f"Trained with gold_jax by {method}. The weights open in transformers and vLLM.", "", "## Recipe", ""]
    facts = {"Base model": base_model, "Teacher": teacher, "Data set": dataset, "Loss": loss, **(recipe or {})}
    lines += [f"- {label}: `{value}`" for label, value in facts.items() if value]
    if settings:
        text = yaml.safe_dump(dict(settings), allow_unicode=True, sort_keys=False).rstrip()
        lines += ["", "Settings that are not the defaults:", "", "```yaml", without_passwords(text), "```"]
    if command:
        lines += ["", "```", shown_command(command), "```"]
    lines += _losses(history)
    lines += _results(results or {})
    chat = (path.parent / "chat_template.jinja").exists()
    filled = {
        "NAME": f'"{repo_id or name}"',
        "PROMPT": _CHAT if chat else _TEXT,
        "VLLM": "chat" if chat else "generate",
    }
    lines += ["", "## Use", "", re.sub("NAME|PROMPT|VLLM", lambda found: filled[found[0]], _LOAD)]
    cited = [*([_GOLD] if teacher else []), _LIBRARY.replace("VERSION", version("gold_jax"))]
    lines += ["", "## Citation", "", "```bibtex", "\n\n".join(cited), "```"]
    ModelCard("\n".join(lines) + "\n").save(path)
    return path


def _results(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The section of results as lines of Markdown: a table with a row for each metric."""
    columns = {head: column for head, column in results.items() if column}
    if not columns:
        return []
    rows = dict.fromkeys(name for column in columns.values() for name in column)
    cells = [[f"{c[row]:.4f}" if _is_number(c.get(row)) else "" for c in columns.values()] for row in rows]
    table = _table(["metric", *columns], [[row, *line] for row, line in zip(rows, cells)])
    return ["", "## Results", "", "Measured on the run's own evaluation data:", "", *table]


def _losses(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section of losses as lines of Markdown: a curve of block characters, and a table of some of them."""
    logged = [(row["step"], row["loss"]) for row in history if _is_number(row.get("loss")) and "step" in row]
    if not logged:
        return []
    count, last = min(_CURVE_WIDTH, len(logged)), len(logged) - 1
    parts = [logged[i * len(logged) // count : (i + 1) * len(logged) // count] for i in range(count)]
    means = [sum(loss for _, loss in part) / len(part) for part in parts]
    low, high = min(means), max(means)
    curve = "".join(_LEVELS[round((x - low) / ((high - low) or 1) * (len(_LEVELS) - 1))] for x in means)
    described = f"From update {logged[0][0]} to {logged[-1][0]}, lowest {low:.4g}, highest {high:.4g}: `{curve}`"
    curve = [described, ""] if last else []
    chosen = sorted({round(i * last / (_SHOWN_LOSSES - 1)) for i in range(_SHOWN_LOSSES)})
    rows = [[str(logged[i][0]), f"{logged[i][1]:.4f}"] for i in chosen]
    return ["", "## Loss", "", *curve, *_table(["update", "loss"], rows)]


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; a resumed run reads None from its log for others."""
    return isinstance(value, int | float) and math.isfinite(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
