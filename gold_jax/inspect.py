"""`python -m gold_jax.inspect`: how a student's and a teacher's tokenizers and models differ, before anything is trained."""

import json
import pathlib
from collections.abc import Sequence

from gold_jax.cli import require, run, show
from gold_jax.config import SFTConfig
from gold_jax.config.fields import Settings, flag, like
from gold_jax.config.parsing import parse_args


# fmt: off
class InspectArguments(Settings):
    """Which pair `gold_jax.inspect` looks at, on what texts, and where it writes."""

    student: str | None = flag(None, "The student: a folder or hub id of a model or a tokenizer, or embedded:student.",
        alias="model_name_or_path")
    teacher: str | None = flag(None, "The teacher: a folder or hub id of a model or a tokenizer, or embedded:teacher.",
        alias="teacher_model_name_or_path")
    text: list[str] | None = flag(None, "Texts to look at (quote each); none: samples of several kinds.", verbatim=True)
    text_file: str | None = flag(None, "A UTF-8 file whose content is a further text.")
    html: str | None = flag(None, "Also write a page of HTML, which needs nothing else, to this file.")
    json: bool = flag(False, "Print one JSON object.")
    models: bool | None = flag(None,
        "Let the models read the texts, too; false (--no_models): compare tokenizers alone; none: where both names are "
        "folders with weights, so that only tokenizers are downloaded.")
    bf16: bool | None = like(SFTConfig, "bf16")
    max_length: int = like(SFTConfig, "max_length", help="Longest sequence in tokens that a model reads.")
    loss_chunk: int | None = like(SFTConfig, "loss_chunk")
    trust_remote_code: bool = flag(False, "Let tokenizers run their own Python code.")


# fmt: on
def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, inspects the pair, shows the report (with `--json`, one JSON object), writes the page."""
    args, notices = parse_args(argv, InspectArguments, prog="gold_jax.inspect", doc=__doc__)
    for name in ("student", "teacher"):
        require(getattr(args, name), name, f"a folder or hub id of a model or a tokenizer, or embedded:{name}")
    show(notices)
    page = None if args.html is None else pathlib.Path(args.html)
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise ValueError(f"--html is {page}; it must be a file in a folder that is there, such as pair.html")
    texts = {f"text {k}" if len(args.text) > 1 else "text": text for k, text in enumerate(args.text, 1)}
    if args.text_file is not None:
        texts[args.text_file] = _read(args.text_file)
    from gold_jax.inspection.pair import inspect_pair
    from gold_jax.losses.fused_head import chunk_size

    report = inspect_pair(
        args.student,
        args.teacher,
        texts or None,
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


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_bytes().decode()
    except OSError as error:
        raise ValueError(f"--text_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {error.object[error.start]:#x}"
        raise ValueError(f"--text_file {path} is not UTF-8: {where}") from None


if __name__ == "__main__":
    run("gold_jax.inspect", main)
