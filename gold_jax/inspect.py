"""`python -m gold_jax.inspect`: what a student and a teacher will do together, before anyone trains them."""

import json
import pathlib
import sys
from collections.abc import Sequence

from gold_jax.command import BETWEEN, run, show, with_one
from gold_jax.fields import Settings, check_fields, flag, flags_dataclass
from gold_jax.flags import parse_args
from gold_jax.rules import RULES


@flags_dataclass(rules=RULES)
class InspectArguments(Settings):
    """Which pair `gold_jax.inspect` looks at, on what texts, and where it writes."""

    student: str | None = flag(
        None,
        "The student: a folder or hub id of a model or a tokenizer, or embedded:student.",
        aliases=("model_name_or_path",),
    )
    teacher: str | None = flag(
        None,
        "The teacher: a folder or hub id of a model or a tokenizer, or embedded:teacher.",
        aliases=("teacher_model_name_or_path",),
    )
    text: str | None = flag(None, "Texts to look at (quote each); none: samples of several kinds.")
    text_file: str | None = flag(None, "A file of UTF-8 that holds one text more.")
    html: str | None = flag(None, "Also write a page of HTML, which needs nothing else, to this file.")
    json: bool = flag(False, "Print one JSON object.")
    models: bool | None = flag(
        None,
        "Let the models read the texts, too; false (--no_models): compare tokenizers alone; none: where both names are "
        "folders with weights, so that only tokenizers are downloaded.",
    )
    bf16: bool | None = flag(None, "Compute in bfloat16; none: on accelerators, but not on CPUs.")
    max_length: int = flag(1024, "Longest sequence in tokens that a model reads.")
    loss_chunk: int | None = flag(
        None, "Positions whose logits are in memory at once; none: 64 on CPUs, 256 elsewhere."
    )
    trust_remote_code: bool = flag(False, "Let tokenizers run their own Python code.")

    def __post_init__(self):
        check_fields(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, inspects the pair, shows the report (with `--json`, one JSON object), writes the page."""
    argv = with_one(sys.argv[1:] if argv is None else argv, "--text")
    args, notices = parse_args(argv, InspectArguments, prog="gold_jax.inspect", doc=__doc__)
    for name in ("student", "teacher"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: a folder or hub id of a model or a tokenizer, or embedded:{name}")
    show(notices)
    page = None if args.html is None else _writable(args.html)
    texts = _texts(args)
    from gold_jax.inspection.pair import inspect_pair
    from gold_jax.losses.fused_head import chunk_size

    report = inspect_pair(
        args.student,
        args.teacher,
        texts,
        models=args.models,
        bf16=args.bf16,
        max_length=args.max_length,
        chunk=chunk_size(args.loss_chunk),
        trust_remote_code=args.trust_remote_code,
    )
    if page is not None:
        page.write_text(report.to_html(), encoding="utf-8")
    if args.json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
        return
    report.print()
    if page is not None:
        print(f"\nThe page is in {page}")


def _texts(args: InspectArguments) -> dict[str, str] | None:
    """The texts that were given, by name; None for none."""
    given = [] if args.text is None else args.text.split(BETWEEN)
    texts = {f"text {k}" if len(given) > 1 else "text": text for k, text in enumerate(given, 1)}
    if args.text_file is not None:
        texts[args.text_file] = _read(args.text_file)
    return texts or None


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_bytes().decode()
    except OSError as error:
        raise ValueError(f"--text_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text_file {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None


def _writable(path: str) -> pathlib.Path:
    """Where the page goes, looked at before anything is computed."""
    page = pathlib.Path(path)
    if page.is_dir() or not page.parent.is_dir():
        raise ValueError(f"--html is {path}; it must be a file in a folder that is there, such as pair.html")
    return page


if __name__ == "__main__":
    run("gold_jax.inspect", main)
