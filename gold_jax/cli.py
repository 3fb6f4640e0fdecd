"""What the command-line modules share: parsing, data and models from flags, and errors of one paragraph."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gold_jax import cpu, progress
from gold_jax.compilation_cache import keep_compiled, restored
from gold_jax.config import DataArguments, ModelArguments, RunFacts, named_without_effect
from gold_jax.config.parsing import HelpRequested, parse_args
from gold_jax.preemption import end_when_preempted
from gold_jax.wording import shortened


def run(
    prog: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None, *, resumable: bool = False
) -> None:
    """Runs a command. What is wrong with the user's input ends it with one paragraph and exit code 2, not a traceback.

    `GOLD_JAX_TRACEBACK=1` shows where an error came from all the same. Without `argv` the process is the command's own,
    and may start again (`cpu.restart_with_huge_pages`); SIGTERM ends one that is `resumable` so that it is started again.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else each retry is a warning, twice
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if argv is None:
        cpu.restart_with_huge_pages()
        if resumable:
            end_when_preempted()
    try:
        _run(prog, main, sys.argv[1:] if argv is None else argv)
    finally:
        if "gold_jax.distributed.initialize" in sys.modules:  # the command may have joined other processes
            from gold_jax.distributed.watchdog import end_process

            end_process(sys.exception())


def _run(prog: str, main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Calls `main` and turns its errors into a paragraph on stderr and an exit code."""
    try:
        with cpu.enabled(), restored(), progress.displayed():
            main(argv)
    except HelpRequested as wanted:
        print(wanted, end="")
    except KeyboardInterrupt as error:
        if getattr(error, "at_once", False):  # a thread that still writes must not delay it
            sys.stdout.flush()
            os._exit(130)
        if not error.args:  # a run has said what is saved
            print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except (ValueError, OSError, TypeError, ImportError) as error:
        if os.environ.get("GOLD_JAX_TRACEBACK") or not _about_input(error):
            raise
        _exit(prog, error, 2)
    except RuntimeError as error:
        from gold_jax.training.hub import HubError
        from gold_jax.training.nonfinite import Diverged

        code = 1 if isinstance(error, HubError | Diverged) else getattr(error, "exit_code", None)
        if code is None:
            raise
        _exit(prog, error, code)


def _exit(prog: str, error: Exception, code: int) -> NoReturn:
    """Ends the command with what the error says, in one paragraph; those of libraries can be several."""
    words = shortened(" ".join(str(error).split()), 6000)
    if words or code == 2:
        print(f"{prog}: {words or type(error).__name__}", file=sys.stderr)
    raise SystemExit(code) from None


def _about_input(error: Exception) -> bool:
    """Whether an error is about the user's input: this package raised it, or the system did. Others are bugs."""
    if isinstance(error, OSError | ImportError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("gold_jax", "__main__")


def show(notices: Sequence[str]) -> None:
    """Prints lines about flags on stderr, where they are in no output's way."""
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def require(value: Any, flag: str, words: str) -> None:
    """Raises ValueError where a flag without which the command can do nothing was not given."""
    if not value:
        raise ValueError(f"--{flag} is missing: {words}")


def training_inputs(argv: Sequence[str] | None, settings: type, *, prog: str, doc: str | None) -> tuple:
    """Reads the flags of a command that trains, and its data; a ValueError or FileNotFoundError says what is wrong.

    Returns the model's name, the settings with those of the models in them, the rows as `_read_rows`, and further
    arguments of a trainer.
    """
    model, data, training, notices = parse_args(argv, ModelArguments, DataArguments, settings, prog=prog, doc=doc)
    if training.disable_tqdm:
        progress.stop_display()
    require(model.model_name_or_path, "model_name_or_path", "the model, a folder or a hub id")
    named = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
    changes = {"model_init_kwargs": named | training.model_init_kwargs}
    if hasattr(training, "teacher_model_name_or_path"):
        require(training.teacher_model_name_or_path, "teacher_model_name_or_path", "the teacher, a folder or a hub id")
        same = {"attn_implementation": model.attn_implementation}
        changes["teacher_model_init_kwargs"] = same | training.teacher_model_init_kwargs
    with progress.task("starting"):
        from gold_jax.distributed.initialize import initialize

        processes = training.coordinator_address, training.num_processes, training.process_id
        initialize(*processes, heartbeat_timeout=training.process_timeout)
        notices += _set_up_compiling(model.compilation_cache, training.checkpoint_dir)
        from gold_jax.training.trainer import require_packages  # what takes longest to import

    require_packages(training)  # before rows and models are read
    train, evaluation = _read_rows(data, training)
    unused = named_without_effect(data, RunFacts(training, evaluates=evaluation is not None, data=data))
    training = training.replace(**changes, notices=[*notices, *unused])
    called = data.dataset_name or ", ".join(entry["path"] for entry in data.datasets)
    options = {"dataset_name": called, "command": ["python", "-m", prog, *(argv or ())]}
    return model.model_name_or_path, training, train, evaluation, options


def _read_rows(data: DataArguments, training: Any) -> tuple[Any, Any]:
    """The rows to train and to evaluate on: `Examples`, the latter also a dict of them by name, or None for none.

    Errors as `load_examples` and `load_mixture`; a ValueError where flags name no data set, or two in the place of one.
    """
    from gold_jax.text.data import load_examples
    from gold_jax.text.mixture import load_evaluations, load_mixture

    mixture, name, most = data.datasets or [], data.eval_dataset_name, data.max_eval_samples
    if mixture and data.dataset_name is not None:
        raise ValueError("--dataset_name and --datasets both say what is trained on; give one of the two.")
    if mixture and data.dataset_streaming:
        raise ValueError(
            "--dataset_streaming reads one data set, --dataset_name, and no --datasets; give one of the two."
        )
    require(mixture or data.dataset_name, "dataset_name", "a hub id, or a JSON, JSONL or Parquet file or folder")
    options = {"config": data.dataset_config, "text_column": training.dataset_text_field, "renamed": training.columns}
    options["check_first"] = training.on_bad_row == "error"
    with progress.task("reading the rows"):
        if mixture:
            train: Any = load_mixture(mixture, **options)
        elif data.dataset_streaming:
            from gold_jax.text.stream import open_stream

            named = {name: value for name, value in options.items() if name != "check_first"}
            train = open_stream(data.dataset_name, split=data.dataset_train_split, **named)
        else:
            train = load_examples(data.dataset_name, split=data.dataset_train_split, **options)
    evaluates = training.eval_strategy != "no" or training.eval_on_start or name is not None
    if not evaluates and not any(entry.get("eval_split") for entry in mixture):
        return train, None
    if mixture and name is None:
        parts = load_evaluations(mixture, **options)
        if not parts:
            raise ValueError(
                "there is nothing to evaluate on: name an eval_split in --datasets, or --eval_dataset_name"
            )
        if most is not None:
            parts = {key: part.first(most) for key, part in parts.items()}
        return train, parts if len(parts) > 1 else next(iter(parts.values()))
    split = "train" if name is not None and os.path.isfile(name) else data.dataset_test_split
    evaluation = load_examples(data.dataset_name if name is None else name, split=split, **options)
    return train, evaluation if most is None else evaluation.first(most)


def _set_up_compiling(folder: str | None, checkpoints: str | None = None) -> list[str]:
    """Keeps compiled programs and watches compiling; leaves a display to the first process alone. Notices of `keep_compiled`.

    An error of `keep_compiled` ends all processes.
    """
    from gold_jax.distributed.consensus import raised_in_all_processes
    from gold_jax.distributed.initialize import is_main_process

    with raised_in_all_processes("the folder of compiled programs", ValueError):
        notices = keep_compiled(folder, checkpoints)
    progress.watch_compiling()
    if not is_main_process():
        progress.stop_display()
    return notices


def load_reader(
    model: ModelArguments,
    args: Any,
    tokenizer: str | None,
    *,
    special_tokens: bool = False,
    role: str = "model",
    one_device: bool = False,
):
    """The model of a command that does not train, its parameters kept in the compute dtype: a `LoadedModel`.

    Prints its chat template and stop tokens to stderr. With `special_tokens` the strings of special tokens in plain-text
    prompts are read as those tokens; `role` is its name in messages; with `one_device` there is no mesh. Raises what
    `load_model_and_tokenizer` and `mesh_sizes` raise.
    """
    from gold_jax.loading import compute_dtype, load_model_and_tokenizer
    from gold_jax.training.build import place_run

    show(_set_up_compiling(model.compilation_cache))
    dtype = compute_dtype(args.bf16)
    options = dict(dtype=dtype, param_dtype=dtype, read_dtype=model.dtype, revision=model.model_revision)
    placement = None if one_device else place_run(args.mesh)
    options |= dict(attention=model.attn_implementation, placement=placement)
    options |= dict(special_tokens_in_prompts=special_tokens, role=role, trust_remote_code=args.trust_remote_code)
    with progress.task(f"reading the {role}"):
        loaded = load_model_and_tokenizer(model.model_name_or_path, tokenizer, **options)
    print(f"{role}: {loaded.chat_tokenizer.describe()}", file=sys.stderr)
    return loaded
