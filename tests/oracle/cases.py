"""What the tests of the oracle share: rows with something of everything, both ways to run, and how near is the same."""

import functools
import json
import pathlib
import shutil

from rich.console import Console
from run_files import metrics

from oracle import oracle as o

ASSETS = pathlib.Path(o.__file__).parents[2] / "gold_jax" / "quickstart" / "assets"
STUDENT, TEACHER = ASSETS / "student", ASSETS / "teacher"

GRADIENT_REL = 2e-6
"""A gradient's norm adds up what float32 rounds in every parameter, forward and backward."""
REL, ABS = 1e-6, 1e-7
"""Float32 on one side: values agree to a millionth, and where they are small, to a ten-millionth of a nat or probability."""


def user(text):
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text):
    """An assistant's message."""
    return {"role": "assistant", "content": text}


ROWS = [
    {"prompt": [user("How do you say 5172?")], "completion": "5172 is five thousand one hundred seventy-two."},
    {"messages": [user("Please spell 19."), assistant("19 is nineteen."), user("And 1022?"), assistant("twenty-two")]},
    {
        "messages": [
            {"role": "system", "content": "Say it in words."},
            user("Write 88 in words."),
            assistant("88 is eighty-eight, fourteen and sixteen."),
        ],
        "teacher_context": "The answer is short.",
    },
    {"prompt": "The old miller asked", "completion": " why the children laughed\nabout thirteen sailors."},
    {"text": "Then Felix walked home, and everyone knew."},
    {"prompt": [user("Say <s> and <|end|>.")], "completion": "größer </s> 😀 3.5 <|end|>"},
    {"prompt": "Tell me about David", "completion": [assistant("David is a careful baker near the quiet harbour.")]},
    {"text": " and the farmer forgot", "teacher_context": "It is winter."},
]


@functools.cache
def student(**options) -> o.Side:
    """The embedded student."""
    return o.Side(STUDENT, o.student_style, ["</s>"], **{"leads": True} | options)


@functools.cache
def teacher(**options) -> o.Side:
    """The embedded teacher."""
    return o.Side(TEACHER, o.teacher_style, ["<|end|>"], **{"leads": False} | options)


def examples(rows=None, column="text") -> list[o.Example]:
    """Rows as the oracle reads them."""
    return [o.read_example(row, column) for row in (ROWS if rows is None else rows)]


def copied(source, folder, *, tokenizer=None, config=None, weights=None, template=None) -> pathlib.Path:
    """A copy of a model's folder with some of its files changed.

    Args:
        source: the folder.
        folder: where the copy goes.
        tokenizer: what is done to tokenizer.json's content.
        config: entries of config.json.
        weights: what becomes of all weights (`name, values -> values`), written as float32.
        template: another chat template.
    """
    shutil.copytree(source, folder)
    if tokenizer:
        path = folder / "tokenizer.json"
        about = json.loads(path.read_text())
        tokenizer(about)
        path.write_text(json.dumps(about))
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights:
        found = o.read_weights(folder)
        o.write_weights(folder / "model.safetensors", {name: weights(name, x) for name, x in found.items()})
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_rows(path, rows) -> str:
    """Rows as JSON lines, a key of one in none of which it is missing (columns have one type)."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def measured(output, rows, *, student=STUDENT, teacher=TEACHER, **flags) -> dict[str, float]:
    """What the package's trainer says of rows before any update."""
    from gold_jax import GOLDConfig, GOLDTrainer

    args = GOLDConfig(output_dir=str(output), **{"lmbda": 0.0} | flags)
    trainer = GOLDTrainer(
        str(student), str(teacher), args, list(rows), list(rows), console=Console(quiet=True)
    )  # fmt: skip
    return trainer.evaluate()


def trained(output, *flags, student="embedded:student", teacher="embedded:teacher") -> list[dict]:
    """What the command logs: the lines of metrics.jsonl."""
    from gold_jax import train

    command = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--output_dir", output]
    command += ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "1", *flags]
    train.main([str(word) for word in command])
    return metrics(output)


def differences(found: dict, wanted: dict, rel=REL, near=ABS) -> list[str]:
    """In words, where two sets of values differ by more than `rel` and `near` allow."""
    said = []
    for name, value in wanted.items():
        allowed = (max(rel, GRADIENT_REL) if name == "grad_norm" else rel) * abs(value) + near
        if name not in found:
            said.append(f"{name} is missing; it should be {value!r}")
        elif not abs(found[name] - value) <= allowed:
            said.append(
                f"{name} is {found[name]!r} and should be {value!r} (off by {(found[name] - value) / value:.1e})"
            )
    return said


def assert_evaluates(output, given: dict, *, rows=None, pair=None, rel=REL, **package) -> dict[str, float]:
    """The package and the oracle evaluate rows alike, and log the same names."""
    rows = ROWS if rows is None else rows
    pair = o.Pair(*(pair or (student(), teacher())), given)
    wanted = pair.evaluate(examples(rows))
    found = measured(output, rows, **given | package)
    assert set(found) == set(wanted)
    said = differences(found, wanted, rel)
    assert not said, said
    return wanted
