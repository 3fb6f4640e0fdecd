"""What the command-line modules share: one-paragraph errors, and data sets from flags."""

import os
import sys
from collections.abc import Callable, Sequence

from gold_jax.config import DataArguments, ModelArguments, SFTConfig
from gold_jax.host_memory import start_again_with_huge_pages


def run(prog: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command. What is wrong with the user's input ends it with one paragraph and exit code 2, not a traceback.

    Without `argv` the process is the command's own, and may start again (`host_memory.start_again_with_huge_pages`).
    `GOLD_JAX_TRACEBACK=1` shows where an error came from all the same.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if argv is None:
        start_again_with_huge_pages()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except (ValueError, OSError, TypeError, ImportError) as error:
        if os.environ.get("GOLD_JAX_TRACEBACK") or not _about_input(error):
            raise
        print(f"{prog}: {_paragraph(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        from gold_jax.training.hub import HubError
        from gold_jax.training.nonfinite import Diverged

        if not isinstance(error, HubError | Diverged):
            raise
        print(f"{prog}: {_paragraph(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def show(notices: Sequence[str]) -> None:
    """Prints lines about flags on stderr, where they are in no output's way."""
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def _about_input(error: Exception) -> bool:
    """Whether an error speaks of what the user gave: this package raised it, or the system did. Others are bugs."""
    if isinstance(error, OSError | ImportError):
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("gold_jax", "__main__")


def _paragraph(error: Exception) -> str:
    """What an error says, in one paragraph; those of libraries can be several."""
    return " ".join(str(error).split()) or type(error).__name__


BETWEEN = "\0"  # parts what `with_one` joins: no argument of a command can hold it


def with_one(argv: Sequence[str], flag: str) -> list[str]:
    """The arguments with all values of all of one flag's occurrences as one, so that blanks and commas in them stay."""
    values, others, inside, asked = [], [], False, False
    for token in argv:
        name, equals, value = token.partition("=")
        if not token.startswith("--"):
            (values if inside else others).append(token)
            continue
        inside = name == flag
        asked = asked or inside
        if not inside:
            others.append(token)
        elif equals:
            values.append(value)
    if not asked:
        return others
    return [*others, f"{flag}={BETWEEN.join(values)}" if values else flag]


def load_reader(
    model: ModelArguments,
    tokenizer: str | None,
    bf16: bool | None,
    *,
    mesh: str | None = None,
    special_tokens: bool = False,
):
    """The model of a command that does not train, its parameters kept in the compute dtype: a `LoadedModel`.

    It is spread over all devices, as `mesh` says. `special_tokens` has the strings of special tokens in plain-text
    prompts read as those tokens.

    Raises:
        FileNotFoundError, ValueError: as `load_model_and_tokenizer` and `mesh_sizes`.
    """
    from gold_jax.loading import load_model_and_tokenizer
    from gold_jax.training.setting import compute_dtype, place_run

    dtype = compute_dtype(bf16)
    return load_model_and_tokenizer(
        model.model_name_or_path,
        tokenizer,
        dtype=dtype,
        param_dtype=dtype,
        read_dtype=model.dtype,
        revision=model.model_revision,
        attention=model.attn_implementation,
        special_tokens_in_prompts=special_tokens,
        placement=place_run(mesh),
    )


def _evaluates(data: DataArguments, training: SFTConfig) -> bool:
    return training.eval_strategy != "no" or training.eval_on_start or data.eval_dataset_name is not None


def unread(data: DataArguments, training: SFTConfig) -> list[str]:
    """A line for settings of the data that somebody named and that nothing reads."""
    lines = []
    asked = [name for name in ("dataset_test_split", "max_eval_samples") if name in data.given]
    if asked and not _evaluates(data, training):
        flags = ", ".join(f"--{name}" for name in asked)
        lines.append(f"{flags}: no effect without --eval_strategy, --eval_on_start or --eval_dataset_name.")
    local = data.dataset_name is not None and (
        os.path.exists(data.dataset_name) or data.dataset_name.startswith("embedded:")
    )
    if "dataset_config" in data.given and local:
        lines.append("--dataset_config: no effect on files; only data sets of the hub have configurations.")
    return lines


def load_split(data: DataArguments, training: SFTConfig):
    """The rows to train on and, where the settings ask for evaluation, those to evaluate on: `Examples` or None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no data set is named, or it has no row of a known form.
    """
    from gold_jax.text.data import load_examples

    if data.dataset_name is None:
        raise ValueError("--dataset_name is missing: a hub id, or a JSON, JSONL or Parquet file or folder")
    column = training.dataset_text_field
    train = load_examples(
        data.dataset_name, config=data.dataset_config, split=data.dataset_train_split, text_column=column
    )
    if not _evaluates(data, training):
        return train, None
    name, split = data.dataset_name, data.dataset_test_split
    if data.eval_dataset_name is not None:
        name = data.eval_dataset_name
        split = "train" if os.path.isfile(name) else split
    found = load_examples(name, config=data.dataset_config, split=split, text_column=column)
    return train, found if data.max_eval_samples is None else found.first(data.max_eval_samples)
