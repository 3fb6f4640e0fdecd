"""Writes docs/flags.md, docs/families.md, docs/api.md and the tables of docs/coming-from-trl.md from the code: `python tools/generate_docs.py`.

With `--check` nothing is written, and the exit code is 1 where a file is not what the code says.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from inspect import getdoc as inspect_docstring
from inspect import signature as python_signature

import gold_jax
from gold_jax import evaluate, generate, inspect, plan, report, serve
from gold_jax.config import DataArguments, GOLDConfig, ModelArguments, SFTConfig, trl_compat
from gold_jax.config.fields import Settings, field_names, groups
from gold_jax.config.parsing import default_text, group_name, values_text
from gold_jax.config.trl_compat import ANSWERS

ROOT = pathlib.Path(__file__).parents[1]
TRL_FLAGS = ROOT / "tests/golden/trl_flags.json"  # TRL's classes -> flags -> defaults
TRL_TRAINER = ROOT / "tests/golden/trl_trainer.json"  # what its GOLD trainer has, besides
START, END = "<!-- from here on written by tools/generate_docs.py -->", "<!-- up to here -->"
RESUMED = {"refuse": "refused", "warn": "said", "ignore": "taken"}
OTHERS = {
    "gold_jax.evaluate": evaluate.EvaluateArguments,
    "gold_jax.generate": generate.GenerateArguments,
    "gold_jax.serve": serve.ServeArguments,
    "gold_jax.inspect": inspect.InspectArguments,
    "gold_jax.plan": plan.PlanArguments,
    "gold_jax.report": report.ReportArguments,
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; bars in cells are escaped."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """Text as code; nothing stays nothing."""
    return f"`{text}`" if text else ""


def flag_row(cls: type, field: dataclasses.Field, *, resume: bool) -> list[str]:
    """Flag, default, values, meaning and, for a command that trains, what a resumed run does with another value."""
    names = [name for name, own in field_names(cls).items() if own == field.name]
    legal = field.metadata["range"]
    values = code(values_text(cls, field)) + (f", {legal.words}" if legal else "")
    default = default_text(field)
    if cls is GOLDConfig and field.name in field_names(SFTConfig):
        other = default_text(SFTConfig.__dataclass_fields__[field.name])
        default += "" if other == default else f" ({other} in sft)"
    row = [", ".join(code(f"--{name}") for name in names), default, values, field.metadata["help"]]
    return row + [RESUMED[field.metadata["on_resume"]]] * resume


def flag_tables(classes: Sequence[type], *, level: str, resume: bool) -> list[str]:
    """A heading and a table for each group."""
    header = ["flag", "default", "values", "meaning"] + ["another value on resuming"] * resume
    parts = []
    for cls in classes:
        for owner, fields in groups(cls).items():
            parts += [f"{level} {group_name(owner)}", owner.__doc__.splitlines()[0]]
            parts.append(table(header, (flag_row(cls, field, resume=resume) for field in fields)))
    return parts


def flags_page() -> str:
    """docs/flags.md."""
    alone = [group_name(g) for g in groups(GOLDConfig) if not issubclass(SFTConfig, g)]
    parts = [
        "# Flags",
        "Written by `tools/generate_docs.py` from the fields in `gold_jax/config/arguments.py` and the command-line modules.",
        "Every flag can stand in a YAML file (`--config FILE`, without the dashes), where the command line wins, and is an argument "
        "of `GOLDConfig` or `SFTConfig` in Python. `--no_FLAG` switches a true one off. `--help GROUP` shows a group below.",
        "A run that resumes from a checkpoint *refuses* another value of some flags, *says* that others have one, and *takes* the "
        "rest as they come; of rows, chat templates, tokenizers and the teacher's weights it compares digests. A flag that is named and changes nothing in a run is named in the run's first lines.",
        "## gold_jax.train and gold_jax.sft",
        f"`gold_jax.sft` has all groups but {', '.join(alone)}.",
        *flag_tables((ModelArguments, DataArguments), level="###", resume=False),
        *flag_tables((GOLDConfig,), level="###", resume=True),
    ]
    for command, cls in OTHERS.items():
        parts.append(f"## {command}")
        if command == "gold_jax.plan":
            parts.append("The flags of `gold_jax.train` (of `gold_jax.sft`, where nothing else is named), and:")
        elif command not in ("gold_jax.inspect", "gold_jax.report"):
            parts.append("The group `model` above, and:")
        parts += flag_tables((cls,), level="###", resume=False)
    return "\n\n".join(parts) + "\n"


def trl_tables() -> str:
    """The generated part of docs/coming-from-trl.md."""
    trl = {name: default for flags in json.loads(TRL_FLAGS.read_text()).values() for name, default in flags.items()}
    ours = {name: cls for cls in (ModelArguments, DataArguments, SFTConfig, GOLDConfig) for name in field_names(cls)}
    differing, same, own = [], [], []
    for name in sorted(set(ours) | set(trl) - set(ANSWERS)):
        field = ours[name].__dataclass_fields__[field_names(ours[name])[name]]
        default = default_text(field)
        if name not in trl:
            own += [code(f"--{name}")] if name == field.name else []
        elif field.metadata["differs"] and name == field.name:
            differing.append([code(f"--{name}"), code(trl[name]), code(default), field.metadata["differs"]])
        else:
            same.append(code(f"--{name}"))
    answered = {True: [], False: []}
    texts = dict.fromkeys((a.text, a.refused) for name, a in sorted(ANSWERS.items()) if name in trl)
    for text, refused in texts:
        names = sorted(name for name, a in ANSWERS.items() if (a.text, a.refused) == (text, refused) and name in trl)
        answered[refused].append(
            [", ".join(code(f"--{name}") for name in names), text[0].upper() + text[1:] if refused else text]
        )
    parts = [
        START,
        f"### Here, and not quite as in TRL ({len(differing)})",
        table(("flag", "TRL's default", "default here", "what differs"), differing),
        f"### As in TRL ({len(same)})",
        ", ".join(same) + ".",
        f"### Accepted, and something else stands in their place ({sum(len(row[0].split(', ')) for row in answered[False])})",
        "A line at the start of the run says so, unless the value asks for what happens anyway.",
        table(("flags", "what stands there"), answered[False]),
        f"### Refused, because the result would be another ({sum(len(row[0].split(', ')) for row in answered[True])})",
        "Values that switch them off are taken.",
        table(("flags", "why, and what to do"), answered[True]),
        f"### Here alone ({len(own)})",
        ", ".join(own) + ".",
        *trainer_tables(),
        END,
    ]
    return "\n\n".join(parts)


def trainer_tables() -> list[str]:
    """What TRL's trainer has, kind by kind: what is here under its name, and what is answered by a sentence."""
    trl = json.loads(TRL_TRAINER.read_text())
    kinds = {
        "Arguments of the constructor": ("arguments", trl_compat.TRAINER_ARGUMENTS),
        "Attributes and methods": ("members", trl_compat.MEMBERS),
        "Attributes of the settings that are no flags": ("settings", trl_compat.SETTINGS_MEMBERS),
        "Logged metrics": ("metrics", trl_compat.METRICS),
        "Events of callbacks": ("events", trl_compat.EVENTS),
        "Values of --lr_scheduler_type": ("schedules", trl_compat.VALUES["lr_scheduler_type"]),
    }
    flags = {name for names in json.loads(TRL_FLAGS.read_text()).values() for name in names}
    parts = [
        "## The trainer, name by name",
        "What TRL's `GOLDTrainer` has, with its bases in TRL and transformers. An argument that is answered takes None, and of "
        "another value is an error that says what stands here; so is an attribute when it is read.",
    ]
    for title, (kind, answers) in kinds.items():
        here = [name for name in trl[kind] if name not in answers and not (kind == "settings" and name in flags)]
        by_text = {
            text: [name for name in answers if answers[name] == text] for text in dict.fromkeys(answers.values())
        }
        rows = [[", ".join(map(code, names)), text] for text, names in by_text.items()]
        parts += [
            f"### {title}",
            f"Here ({len(here)}): {', '.join(map(code, here))}.",
            table(("not here", "what stands there"), rows),
        ]
    return parts


def trl_page() -> str:
    """docs/coming-from-trl.md with its tables written anew."""
    before, _, rest = (ROOT / "docs/coming-from-trl.md").read_text(encoding="utf-8").partition(START)
    return before + trl_tables() + rest.partition(END)[2]


def api_page() -> str:
    """docs/api.md: what `gold_jax.__all__` names."""
    parts = [
        "# The public surface",
        "Written by `tools/generate_docs.py` from `gold_jax.__all__`. Everything else may change from one version to the next.",
        API_INTRODUCTION,
    ]
    for name in gold_jax.__all__:
        thing = getattr(gold_jax, name)
        if isinstance(thing, str):
            continue
        parts.append(f"## {name}")
        if not issubclass(thing, Settings) if isinstance(thing, type) else True:
            signature = re.sub(r"<factory>|<object object at [^>]*>", "...", str(python_signature(thing)))
            signature = re.sub(r"(?<!=)(?<!= )'([A-Za-z_.\[\], |]+)'", r"\1", signature)  # annotations that are strings
            signature = re.sub(r"\bjax(?:\.jax)?lib\._jax\.(?=Array)", "jax.", signature)
            signature = re.sub(r"\b(?!jax\.|os\.)(?:\w+\.)+(?=[A-Z])", "", signature)  # names without their modules
            parts.append(f"```py\n{name}{signature}\n```")
        parts.append("```text\n" + inspect_docstring(thing) + "\n```")
        if isinstance(thing, type) and issubclass(thing, Settings):
            parts.append("Its fields are the flags of [flags.md](flags.md).")
    return "\n\n".join(parts) + "\n"


API_INTRODUCTION = """A model is a folder, a hub id, `embedded:student` or `embedded:teacher`, a `Decoder`, its `(graphdef, params)`, or a `LoadedModel`;
a tokenizer a folder, a hub id, `embedded:…`, a transformers tokenizer or a `ChatTokenizer`; rows are a hub id, a file or
folder, a `datasets.Dataset`, or a list of dicts; seeds are ints, where a key is wanted PRNG keys too.

```python
import gold_jax

print(gold_jax.align("embedded:student", "embedded:teacher", "5168 is forty-two."))
gold_jax.match_vocabularies("embedded:student", "embedded:teacher").matched
gold_jax.sample_completions("embedded:student", prompts=["How do you say 5168?"], key=0, max_new_tokens=16)
gold_jax.score_completions(
    "embedded:teacher", rows=[{"prompt": "How do you say 5?", "completion": "5 is five."}]
).bits_per_byte
gold_jax.load_model("embedded:student")([[1, 2, 3]])  # hidden states [B, T, D]
```

One loss of two rows, with its gradient:

```python
import jax

rows = gold_jax.load_examples(
    [{"prompt": f"How do you say {n}?", "completion": f"{n} is {text}."} for n, text in ((5, "five"), (7, "seven"))]
)
loss = gold_jax.DistillationLoss("embedded:student", "embedded:teacher", "gold")
(value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(loss.params, loss.batch(rows))
```

A custom training loop, on text that the student samples:

```python
import functools

import optax

optimizer, params = optax.adamw(1e-3), jax.tree.map(jax.numpy.copy, loss.params)
state = optimizer.init(params)


@functools.partial(jax.jit, donate_argnums=(1, 2))
def step(loss, params, state, batch):
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


prompts = [f"How do you say {n}?" for n in (5168, 42, 17, 903)]
for number in range(3):
    drawn = gold_jax.sample_completions(loss.student(params), prompts=prompts, key=number, max_new_tokens=16)
    batch = loss.batch([{"prompt": prompt} for prompt in prompts], drawn)
    params, state, value = step(loss, params, state, batch)
gold_jax.save_model(loss.student(params), "own-loop")
```"""


# Well-known models of each family.
_MODELS = {
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3, SmolLM 2, TinyLlama, Yi, DeepSeek-R1-Distill-Llama",
    "mistral": "Mistral 7B, Nemo, Small",
    "ministral": "Ministral 8B (2410)",
    "qwen2": "Qwen 2, 2.5, DeepSeek-R1-Distill-Qwen",
    "qwen3": "Qwen 3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M and 1B",
    "gemma3": "Gemma 3 4B to 27B, the language part",
    "phi3": "Phi 3 and 3.5 mini and medium, Phi 4, Phi 4 mini",
    "smollm3": "SmolLM3",
    "granite": "Granite 3, dense",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "exaone4": "EXAONE 4",
}


def families_page() -> str:
    """docs/families.md."""
    from transformers import AutoConfig

    from gold_jax.models.config import FAMILIES, DecoderConfig

    rows = []
    for family in FAMILIES:
        config = DecoderConfig.from_hf(AutoConfig.for_model(family))
        yes = lambda value: "yes" if value else ""  # noqa: E731
        norms = "before and after" if config.sandwich_norms else "after" if config.post_norms else "before"
        heads = "each head" if config.qk_norm else "all heads" if config.joint_qk_norm else ""
        rotations = {rope: "none" if rope is None else f"{rope.theta:,.0f}" for rope in config.layer_ropes}
        rows.append(
            [code(family), _MODELS[family], config.activation, yes(config.qkv_bias), heads, norms]
            + [yes(any(config.sliding)), ", ".join(rotations.values()), yes(config.embedding_scale != 1.0)]
            + [", ".join(n for n in ("attention", "final") if getattr(config, f"{n}_softcap") is not None)]
        )
    header = ("`model_type`", "models", "activation", "bias of Q, K, V", "norm of Q, K", "norms of blocks")
    header += ("sliding window", "rotary bases", "scaled embedding", "soft caps")
    parts = [
        "# Model families",
        "Written by `tools/generate_docs.py` from `gold_jax/models/config.py`: a family is a set of values of one decoder. What is "
        "shown is a family's default configuration; a checkpoint's own `config.json` decides, and what the decoder does not have is "
        "an error that names it.",
        table(header, rows),
        "Phi's checkpoints hold queries, keys and values in one tensor, gate and up in another, and are saved so again; Phi 4 mini "
        "rotates three quarters of a head. Granite's configs have factors on embeddings, scores, what layers add, and logits.",
        "With LongRoPE (Phi 3.5, Phi 4 mini) rows of more than `original_max_position_embeddings` tokens are rotated by other angles. "
        "Here the row's own length decides, in transformers that of the longest row in the batch. As such a row would have to be read "
        "anew, models decode up to this length, prompt and completion together; what asks for more is refused at the start (the prompts of a "
        "stream, which the teacher reads under `--seq_kd`, when they come).",
    ]
    return "\n\n".join(parts) + "\n"


PAGES = {"flags.md": flags_page, "families.md": families_page, "api.md": api_page, "coming-from-trl.md": trl_page}


def main() -> None:
    """Writes the pages, or compares them."""
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / "docs" / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"docs/: {', '.join(stale)} {'must be' if '--check' in sys.argv else 'have been'} written anew")
    raise SystemExit(1 if stale and "--check" in sys.argv else 0)


if __name__ == "__main__":
    main()
