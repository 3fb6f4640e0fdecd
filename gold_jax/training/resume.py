"""Resuming a run: which checkpoint, whether its settings match, and truncating the logs to it."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from gold_jax.config import GOLDConfig, RunFacts, fields_with, without_effect
from gold_jax.distributed.consensus import assert_same_across_processes
from gold_jax.json_files import read_json_object
from gold_jax.loading import LoadedModel
from gold_jax.models.functional import split
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.surface import backend_of
from gold_jax.training import checkpointing
from gold_jax.training.logging import LOGS, SUMMARY
from gold_jax.wording import listed, quoted, without_passwords

# Settings that a resumed run may change silently, and those whose change is reported, as it makes another run.
IGNORED_ON_RESUME = fields_with(GOLDConfig, on_resume="ignore")
WARNED_ON_RESUME = fields_with(GOLDConfig, on_resume="warn")
# What a checkpoint describes of its run besides the settings that had an effect.
_LEARNED, _ROWS, _MICRO = "rows to learn from", "rows of an update", "rows of a micro-batch"
EVALUATED = "the rows to evaluate on"
_DATA, _WEIGHTS = "the training data", "the teacher's weights"
_CHANGED = "from what the checkpoint was saved with"
# What a run that does not describe a setting has, as an earlier version or without effect, where that changes what is resumed.
_UNDESCRIBED = {"check_rows": "before", "bf16_stochastic_round": False}
# Of each digest whether a run that differs in it is refused, and what is said; None: which of the values differ.
_DIGESTS = {
    _DATA: (True, f"differ {_CHANGED}"),
    "the student's template and tokenizer": (True, f"differs {_CHANGED}"),
    "the student's config": (True, None),
    "the teacher's template and tokenizer": (False, f"differs {_CHANGED}"),
    "the teacher's config": (False, None),
    _WEIGHTS: (False, f"differ {_CHANGED}"),
    EVALUATED: (False, f"differ {_CHANGED}: earlier metrics are of other rows"),
}


def digests_of(sides: Mapping[str, LoadedModel], rows: str, evaluated: str | None) -> dict[str, Any]:
    """What is compared of data and models: `sides` by whose they are, and digests of the rows (None: no evaluation)."""
    digests = {_DATA: rows}
    digests |= {f"{whose}'s template and tokenizer": describe_tokenizer(x.chat_tokenizer) for whose, x in sides.items()}
    digests |= {f"{whose}'s config": describe_config(x.model.config) for whose, x in sides.items()}
    if evaluated is not None:
        digests[EVALUATED] = evaluated
    if "the teacher" in sides:
        digests[_WEIGHTS] = describe_weights(split(sides["the teacher"].model)[1])
    return digests


def describe_run(
    facts: RunFacts, digests: Mapping[str, Any], shards: int, count: int | None, checked: str
) -> dict[str, Any]:
    """Everything that updates depend on, as JSON: the settings that have an effect, sizes of updates, and `digests`.

    `count` rows can be learned from (None: not known); they are `checked` "before" training or "beside" it.
    """
    args, unused = facts.args, {name for name, _ in without_effect(facts.args, facts)}
    description = {name: value for name, value in args.to_dict().items() if name not in unused}
    description |= {} if count is None else {_LEARNED: count}
    description |= {"check_rows": checked, _ROWS: args.rows_per_update * shards}
    description |= {_MICRO: args.per_device_train_batch_size * shards, **digests}
    return json.loads(without_passwords(json.dumps(description, default=str)))


def describe_tokenizer(chat_tokenizer: ChatTokenizer) -> str:
    """A digest of template, tokenizer and stop tokens."""
    backend = backend_of(chat_tokenizer.tokenizer)
    if backend is None:
        pipeline: Any = sorted(chat_tokenizer.tokenizer.get_vocab().items())
    else:
        # Calling a tokenizer sets truncation and padding, so they are left out.
        pipeline = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    content = repr((chat_tokenizer.template.source, chat_tokenizer.stop_ids, pipeline))
    return _digest(content.encode("utf-8", "surrogatepass"))


def describe_weights(params: Any) -> str:
    """The dtype of a model's parameters and a digest of all of them, however they are sharded."""
    dtype = jax.tree.leaves(params)[0].dtype
    return f"{dtype} {_digest(np.asarray(checkpointing.checksums(checkpointing.named_arrays(params))).tobytes())}"


def describe_config(config: Any) -> dict[str, Any]:
    """A model's config without default values, as versions differ in fields."""
    fields = [field for field in dataclasses.fields(config) if field.compare]
    values = {field.name: getattr(config, field.name) for field in fields}
    return {field.name: _plain(values[field.name]) for field in fields if values[field.name] != field.default}


def _plain(value: Any) -> Any:
    """A config's value as JSON gives it back."""
    if dataclasses.is_dataclass(value):
        return describe_config(value)
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def check_run(saved: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Any) -> list[str]:
    """Compares the run of a checkpoint with the one that resumes from it; returns a line for each reported difference.

    ValueError: differences by which rows would be repeated, left out, or learned in another way.
    """
    refused, warnings = [], []
    if _DATA in now and _DATA not in saved:
        earlier = f"{checkpoint} was saved by an earlier version, which did not describe its training data in full"
        warnings.append(f"{earlier}: check that it is the same")
    for name, new in (_UNDESCRIBED | now).items():
        # Settings that the checkpoint lacks are newer than it.
        old = saved.get(name, _UNDESCRIBED.get(name, new))
        if name in IGNORED_ON_RESUME or name == _MICRO or old == new:
            continue
        if name == _WEIGHTS and str(old).split()[:1] != new.split()[:1]:
            continue  # in another precision, which is reported for --bf16
        flag = name if " " in name else f"--{name}"
        if name in _DIGESTS:
            lines, differ = (refused if _DIGESTS[name][0] else warnings), _DIGESTS[name][1]
            lines.append(f"{name} {differ or f'differs in {_differences(old, new)}'}")
        elif name in WARNED_ON_RESUME or _is_compatible(name, saved, now):
            warnings.append(f"{flag} is now {new!r}; the checkpoint was saved with {old!r}")
        else:
            before = old if name == "check_rows" else repr(old)
            is_now = (new if name == "check_rows" else repr(new)) if name in now else "without effect"
            refused.append(f"{flag} is {is_now} and was {before}")
    if refused:
        anew = f"begin a new run from its weights with --model_name_or_path {checkpoint}"
        instead = f"Resume with what it was saved with, or {anew}."
        raise ValueError(f"this run cannot resume from {checkpoint}: {'; '.join(refused)}. {instead}")
    return warnings


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The values of two configs that differ."""
    pairs = {name: (now.get(name, "the default"), saved.get(name, "the default")) for name in [*saved, *now]}
    shown = {
        n: [quoted(x) if isinstance(x, list) else x for x in both] for n, both in pairs.items() if both[0] != both[1]
    }
    return ", ".join(f"{name}: now {new}, before {old}" for name, (new, old) in shown.items())


def _is_compatible(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether another split into devices and micro-batches keeps the rows of every update and which are on-policy."""
    if name not in ("per_device_train_batch_size", "gradient_accumulation_steps") or saved.get(_ROWS) != now[_ROWS]:
        return False
    micro = saved.get(_MICRO, saved.get("per_device_train_batch_size"))  # old checkpoints have only the latter
    return now.get("lmbda", 0) in (0, 1) or (micro is not None and micro == now.get(_MICRO))


def find_and_restore(
    wanted: str, folder: Any, run: Mapping[str, Any], abstract: Any, say: Callable[[str], Any], last: int
) -> tuple[epath.Path, dict[str, Any], Any] | None:
    """The checkpoint to resume from: folder, metadata and state; None where "latest" finds none.

    `wanted` is "latest", of the run that was started last in `folder`, a checkpoint's folder, or one with checkpoints.
    `run` is this run's `Data.description`, `last` the number of its updates, `abstract` as for `checkpointing.restore`.
    `say` prints a line for every incomplete checkpoint and every reported difference.
    FileNotFoundError: there is nothing at this path. ValueError: of another run or model, or none is complete.
    """
    found = _latest_checkpoints(folder, say) if wanted == "latest" else _named_checkpoints(epath.Path(wanted))
    assert_same_across_processes("the checkpoints that they find", [str(path) for path in found])
    if not found:
        return None
    bad = []
    for path in found:
        try:
            metadata = _agreed_metadata(path)
            warnings = check_run(metadata["run"], run, path)  # names the setting that makes other arrays
            checkpointing.check_arrays(path, metadata, abstract)
            if metadata["step"] > last:
                seen = f"{path} is at update {metadata['step']}"
                raise ValueError(f"{seen}, and this run makes {last}; raise --max_steps or --num_train_epochs.")
            state = checkpointing.restore(path, metadata, abstract)
        except checkpointing.BadCheckpoint as error:
            bad.append(f"{path} is incomplete or damaged: {error}")
            say(f"{bad[-1]}. " + ("Trying the one before it." if path != found[-1] else "There is none before it."))
            continue
        for line in warnings:
            say(line)
        return path, metadata, state
    others = [p.name for p in checkpointing.checkpoints_in(found[0].parent) if p not in found]
    hint = f"; others are there: {', '.join(others[:5])}" if others else ""
    instead = "Name another with --resume_from_checkpoint, or leave it out to start a new run."
    raise ValueError(f"no complete checkpoint is left to resume from ({'; '.join(bad)}){hint}. {instead}")


def _agreed_metadata(path: epath.Path) -> dict[str, Any]:
    """A checkpoint's metadata and rollouts, the same in all processes, which restore together, or a ValueError."""
    metadata, bad, rollouts = None, None, {}
    try:
        metadata = checkpointing.read_metadata(path)
        missing = [name for name in ("run", "skips", "means", "unmeasured") if name not in metadata]
        if missing:
            raise checkpointing.BadCheckpoint(f"{checkpointing.METADATA} is damaged (it has no {missing[0]})")
        rollouts = checkpointing.read_rollouts(path, metadata)
    except checkpointing.BadCheckpoint as error:
        metadata, bad = None, error
    assert_same_across_processes(f"what they read of {path}", str(bad) if metadata is None else metadata)
    if metadata is None:
        raise bad
    return metadata | {"rollouts": rollouts}


def _named_checkpoints(path: epath.Path) -> list[epath.Path]:
    """The checkpoint of a path, or those in it, newest first."""
    flag = f"--resume_from_checkpoint names {path}, which"
    if not path.is_dir():
        raise FileNotFoundError(f"{flag} is not a folder; it must be a checkpoint's, or latest")
    if checkpointing.STEP_NAME.fullmatch(path.name) or (path / checkpointing.METADATA).exists():
        return [path]
    if not (found := checkpointing.checkpoints_in(path)):
        raise FileNotFoundError(f"{flag} holds no folder checkpoint-STEP")
    return found


def _latest_checkpoints(folder: Any, say: Callable[[str], Any]) -> list[epath.Path]:
    """The checkpoints of the run that was started last in a folder, newest first; says where there are none."""
    found, current = checkpointing.checkpoints_in(folder), checkpointing.current_run(folder)
    earlier = [path for path in found if current is not None and checkpointing.run_of(path) not in (None, current)]
    if not found:
        say(f"There is no checkpoint in {folder} yet: a new run starts.")
    elif len(earlier) == len(found):
        over = f"Those of earlier runs are passed over ({', '.join(sorted(path.name for path in earlier)[:5])})"
        anew = f"The run that was started last has no checkpoint in {folder} yet: a new run starts"
        say(f"{anew}. {over}; --resume_from_checkpoint {earlier[0]} resumes one.")
    rest = [path for path in found if path not in earlier]
    # Of one run the later one has been resumed more often or has the higher step, whatever the clock said.
    return rest if current is None else sorted(rest, key=checkpointing.order_in_run, reverse=True)


def truncate_log(path: pathlib.Path, step: int, *, ended: bool = False) -> list[dict[str, Any]]:
    """Truncates a log to the lines up to a step, so that none is logged twice; returns them.

    With `ended` the closing evaluation of that step is dropped too. So is an incomplete last line.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):  # no JSON object with a step
            row = json.loads(line)
            again = ended and row.get("step") == step and any(name.startswith("eval_") for name in row)
            if row.get("step", 0) <= step and not again:
                kept.append((line, row))
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text("".join(line + "\n" for line, _ in kept), encoding="utf-8")
    os.replace(unfinished, path)
    return [row for _, row in kept]


def rename_logs(folder: pathlib.Path, say: Callable[[str], Any]) -> None:
    """Renames the logs of another run to `metrics.1.jsonl` and so on, with the first number free for all of them."""
    for log, name in _numbered(folder).items():
        os.replace(log, name)
        say(f"Renamed {log.name} of another run in {folder} to {name.name}.")


def _numbered(folder: pathlib.Path) -> dict[pathlib.Path, pathlib.Path]:
    """The logs in a folder, with their names under the first number free for all of them."""
    logs = [folder / name for name in (*LOGS, SUMMARY) if (folder / name).exists()]
    for number in itertools.count(1):
        names = [log.with_stem(f"{log.stem}.{number}") for log in logs]
        if not any(name.exists() for name in names):
            break
    return dict(zip(logs, names))


def _keep_finished_logs(step: int, output: pathlib.Path, say: Callable[[str], Any]) -> None:
    """Copies the logs of a finished run that is resumed from an earlier update, `step`, before they are truncated."""
    try:
        last = read_json_object(output / SUMMARY)["parts"][-1]
        finished = last["to_update"] if last["how"] == "finished" else 0
    except (OSError, ValueError, LookupError, TypeError):
        return
    if isinstance(finished, int) and finished > step:
        copies = _numbered(output)
        for log, name in copies.items():
            shutil.copy2(log, name)
        kept = f"; its earlier logs are kept as {', '.join(name.name for name in copies.values())}"
        say(f"This run had finished at update {finished} and is repeated from update {step} on{kept}.")


def append_rows(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to a JSONL file; an OSError names it."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {checkpointing.describe_error(error)}") from error


def begin_logs(run_id: str, output: pathlib.Path, folder: Any, say: Callable[[str], Any]) -> None:
    """Prepares `output` and `folder` (of checkpoints) for a new run: renames logs and reports checkpoints of others."""
    rename_logs(output, say)
    if old := sorted(path.name for path in checkpointing.checkpoints_in(folder)):
        kept = "one of this run replaces that of the same step, --save_total_limit counts them too"
        over = "and --resume_from_checkpoint latest passes them over."
        say(f"{folder} holds checkpoints of an earlier run ({listed(old, 3)}): {kept}, {over}")
    checkpointing.set_current_run(run_id, output, folder)


def continue_logs(
    run_id: str,
    step: int,
    unwritten: list[dict],
    ended: bool,
    output: pathlib.Path,
    folder: Any,
    say: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """Truncates the logs of a run that resumes from `step` to it; returns the metrics.

    `unwritten` are completions that are not in their file, `ended` is as for `truncate_log`. Logs of another run than
    the checkpoint's are renamed.
    """
    history: list[dict[str, Any]] = []
    if (checkpointing.current_run(output) or "") == run_id:
        _keep_finished_logs(step, output, say)
        metrics, completions = (output / name for name in LOGS)
        history = truncate_log(metrics, step, ended=ended)
        truncate_log(completions, step - bool(unwritten), ended=ended)
        if unwritten:
            append_rows(completions, unwritten)
    else:
        rename_logs(output, say)
    checkpointing.set_current_run(run_id, output, folder)
    return history
