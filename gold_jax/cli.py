"""What the command-line modules share: parsing, data and models from flags, and errors of one paragraph."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gold_jax import cpu
from gold_jax.config import DataArguments, ModelArguments, RunFacts, SFTConfig, named_without_effect
from gold_jax.config.parsing import HelpRequested, parse_args


def run(prog: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command. What is wrong with the user's input ends it with one paragraph and exit code 2, not a traceback.

    What `gold_jax.cpu` has is enabled. Without `argv` the process is the command's own, and may start again
    (`cpu.restart_with_huge_pages`).
    `GOLD_JAX_TRACEBACK=1` shows where an error came from all the same.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if argv is None:
        cpu.restart_with_huge_pages()
    try:
        _run(prog, main, sys.argv[1:] if argv is None else argv)
    except BaseException as error:
        _end_process(error)
        raise
    _end_process(None)


def _end_process(error: BaseException | None) -> None:
    """Ends this process as `distributed.shutdown` says, where the command has joined it with others."""
    if "gold_jax.distributed.initialize" in sys.modules:
        from gold_jax.distributed.shutdown import end_process

        end_process(error)


def _run(prog: str, main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Calls `main` and turns its errors into a paragraph on stderr and an exit code."""
    try:
        with cpu.enabled():
            main(argv)
    except HelpRequested as wanted:
        print(wanted, end="")
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

        code = 1 if isinstance(error, HubError | Diverged) else getattr(error, "exit_code", None)
        if code is None:
            raise
        if str(error):
            print(f"{prog}: {_paragraph(error)}", file=sys.stderr)
        raise SystemExit(code) from None


def _about_input(error: Exception) -> bool:
    """Whether an error is about the user's input: this package raised it, or the system did. Others are bugs."""
    if isinstance(error, OSError | ImportError):
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("gold_jax", "__main__")


def _paragraph(error: Exception) -> str:
    """What an error says, in one paragraph; those of libraries can be several."""
    return " ".join(str(error).split()) or type(error).__name__


def show(notices: Sequence[str]) -> None:
    """Prints lines about flags on stderr, where they are in no output's way."""
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def require(value: Any, flag: str, words: str) -> None:
    """Raises ValueError where a flag without which the command can do nothing was not given."""
    if not value:
        raise ValueError(f"--{flag} is missing: {words}")


class TrainingInputs(NamedTuple):
    """What a trainer is made of: its settings with those of the models in them, and the rows (`Examples`)."""

    model: str
    args: Any
    train: Any
    evaluation: Any
    options: dict[str, Any]


def training_inputs(argv: Sequence[str] | None, settings: type, *, prog: str, doc: str | None) -> TrainingInputs:
    """Reads the flags of a command that trains, and its data.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a flag is wrong or missing, or the data set has no row of a known form.
    """
    model, data, training, notices = parse_args(argv, ModelArguments, DataArguments, settings, prog=prog, doc=doc)
    require(model.model_name_or_path, "model_name_or_path", "the model to train, a folder or a hub id")
    named = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
    changes = {"model_init_kwargs": named | training.model_init_kwargs}
    if hasattr(training, "teacher_model_name_or_path"):
        require(training.teacher_model_name_or_path, "teacher_model_name_or_path", "the teacher, a folder or a hub id")
        same = {"attn_implementation": model.attn_implementation}
        changes["teacher_model_init_kwargs"] = same | training.teacher_model_init_kwargs
    from gold_jax.distributed.initialize import initialize

    initialize(
        training.coordinator_address,
        training.num_processes,
        training.process_id,
        heartbeat_timeout=training.process_timeout,
    )
    train, evaluation = _load_splits(data, training)
    unused = named_without_effect(data, RunFacts(training, evaluates=_evaluates(data, training), data=data))
    training = training.replace(**changes, notices=[*notices, *unused])
    options = {"dataset_name": data.dataset_name, "command": ["python", "-m", prog, *(argv or ())]}
    return TrainingInputs(model.model_name_or_path, training, train, evaluation, options)


def _evaluates(data: DataArguments, training: SFTConfig) -> bool:
    return training.eval_strategy != "no" or training.eval_on_start or data.eval_dataset_name is not None


def _load_splits(data: DataArguments, training: SFTConfig) -> tuple[Any, Any]:
    """The rows to train on and, where the settings ask for evaluation, those to evaluate on: `Examples` or None."""
    from gold_jax.text.data import load_examples

    require(data.dataset_name, "dataset_name", "a hub id, or a JSON, JSONL or Parquet file or folder")
    options = {"config": data.dataset_config, "text_column": training.dataset_text_field}
    train = load_examples(data.dataset_name, split=data.dataset_train_split, **options)
    if not _evaluates(data, training):
        return train, None
    name, split = data.dataset_name, data.dataset_test_split
    if data.eval_dataset_name is not None:
        name = data.eval_dataset_name
        split = "train" if os.path.isfile(name) else split
    found = load_examples(name, split=split, **options)
    return train, found if data.max_eval_samples is None else found.first(data.max_eval_samples)


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
    from gold_jax.loading import compute_dtype, load_model_and_tokenizer
    from gold_jax.training.build import place_run

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
