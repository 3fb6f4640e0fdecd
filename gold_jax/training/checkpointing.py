"""Checkpoints of a run, written, kept, found and removed by `orbax.checkpoint.CheckpointManager`.

A checkpoint is a folder `checkpoint-STEP` that holds

    state/            parameters and optimizer state, by orbax
    run.json          metadata: the step, the settings, where the log stood, and a checksum of every array
    rollouts.npz      completions that are drawn and not learned from yet, where there are any
    *.safetensors …   the student as transformers and vLLM open it, where it was given

All of it is written in the background. orbax commits it last: by renaming the folder, or by a marker in it on `gs://`.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationPolicy
from orbax.checkpoint.path import step as step_lib

from gold_jax.json_files import parse_json_object, regular_file
from gold_jax.training.rollout_buffer import Rollouts, from_bytes
from gold_jax.wording import listed, quoted

METADATA, STATE, ROLLOUTS = "run.json", "state", "rollouts.npz"
FORMAT = 1
STEP_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
_CURRENT_RUN = "current_run"
_RECORD = "_CHECKPOINT_METADATA"  # orbax's, which holds the date
_LOGGERS = "absl", "asyncio"
_REPLACED = ".replaced"  # ends the hidden name of a checkpoint whose successor of the same step is being written
_PRIMES = (2654435761, 2246822519, 3266489917, 668265263, 374761393, 2147483647)


class BadCheckpoint(Exception):
    """A checkpoint that is incomplete or damaged; the text says why."""


class _Saved(step_lib.Metadata):
    """A checkpoint's step, path and date: that of the oldest where orbax's record of it is damaged.

    Where there is no record, None, orbax takes the time at which the folder was last written to.
    """

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        if not (self.path / _RECORD).exists():
            return None
        with contextlib.suppress(Exception):
            date = super().commit_timestamp_nsecs
            if date is not None and 0 <= date < 2**62:
                return date
        return 0  # orbax has None for a record that it cannot parse, too


class _StepNames(step_lib.NameFormat):
    """The folders `checkpoint-STEP` of transformers and TRL; orbax's own format joins prefix and step by an underscore."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path: epath.PathLike) -> Iterator[step_lib.Metadata]:
        for path in epath.Path(base_path).iterdir():
            if (match := STEP_NAME.fullmatch(path.name)) and step_lib.is_path_finalized(path):
                yield _Saved(step=int(match[1]), path=path)

    def find_step(self, base_path: epath.PathLike, step: int) -> step_lib.Metadata:
        path = epath.Path(base_path) / self.build_name(step)
        if not step_lib.is_path_finalized(path):
            raise ValueError(f"{path} is not there, or was not written to its end")
        return _Saved(step=step, path=path)


@dataclasses.dataclass(frozen=True)
class _LastSaved(PreservationPolicy):
    """Keeps the `n` saved last. orbax's `LatestN` goes by step, and a higher one may be an earlier run's."""

    n: int
    steps: list[int]  # of this run, in the order in which they were saved: after all others, whatever the clock says
    best: set[int]  # at most one step, which is kept beside them

    def should_preserve(self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: Any) -> list[bool]:
        order = {step: number for number, step in enumerate(self.steps)}
        kept = sorted(checkpoints, key=lambda info: (order.get(info.step, -1), info.time))[-self.n :]
        return [info in kept or info.step in self.best for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run in one folder, local or `gs://…`; all processes call its methods.

    At most `limit` are kept (None: all), and beside them the step in `best`. A save that fails ends no run: `say` is given
    a line, and `last` stays what it was. OSError: the folder cannot be made.
    """

    def __init__(self, folder: Any, limit: int | None = None, say: Callable[[str], Any] = print):
        self.folder, self.say = epath.Path(folder), say
        self.last: epath.Path | None = None  # the newest that this run has written or gone on from
        self._failed: str | None = None  # why the last save did
        self._step: int | None = None  # of the save under way
        self._write_files: Callable[[], None] | None = None  # beside its arrays
        self._abandoned, self._is_local = False, "://" not in str(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._settle_replaced()  # of a save that was cut short
        # Failures are reported by `say`, in one line.
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_not_from_orbax)
        self._saved: list[int] = []  # steps, in the order in which this run saved them
        self.best: set[int] = set()
        policy = None if limit is None else _LastSaved(limit, self._saved, self.best)
        finalized = ocp.AsyncOptions(post_finalization_callback=lambda: self._write_files())
        plain = dict(step_name_format=_StepNames(), create=False, save_root_metadata=False)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, async_options=finalized, **plain)
        self._manager = ocp.CheckpointManager(_absolute(self.folder), options=options)

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any],
        student: Callable[[pathlib.Path], Any] | None = None,
        rollouts: bytes | None = None,
    ) -> None:
        """Begins to write a checkpoint and returns when `state`, a pytree of arrays, has been copied, so that it may be donated.

        One of the same step is replaced. `metadata` is for `read_metadata`, `rollouts` for `read_rollouts`; `student`
        writes the student into the folder that it is given, from another thread.
        """
        self.finish()  # one at a time
        arrays = named_arrays(state)
        kinds = {name: (list(x.shape), str(x.dtype)) for name, x in arrays.items()}
        sums = checksums(arrays)

        def write_files() -> None:  # called in the first process, when the arrays are written and not yet committed
            folder = step_lib.find_step_path(self._manager.directory, _StepNames(), step=step, include_uncommitted=True)
            if student is not None and "://" not in str(folder):
                student(pathlib.Path(folder))
            elif student is not None:
                with tempfile.TemporaryDirectory() as local:
                    student(pathlib.Path(local))
                    for path in epath.Path(local).iterdir():
                        path.copy(folder / path.name)
            infos = {name: [*kinds[name], int(sum_)] for name, sum_ in zip(sorted(kinds), np.asarray(sums))}
            row = {**metadata, "format": FORMAT, "step": step, "arrays": infos}
            if rollouts is not None:
                (folder / ROLLOUTS).write_bytes(rollouts)
                row["rollouts"] = zlib.crc32(rollouts)
            (folder / METADATA).write_text(json.dumps(row))

        def begin() -> None:
            self._saved[:] = [*(x for x in self._saved if x != step), step]
            if step in self._manager.all_steps():  # the manager refuses to write over one
                if self._is_local and jax.process_count() == 1:  # it stays until the new one is whole
                    path = self.folder / f"checkpoint-{step}"
                    path.rename(self.folder / f".{path.name}{_REPLACED}")
                    self._manager.reload()
                else:
                    self._manager.delete(step)
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays)), force=True)

        self._write_files, self._failed = write_files, None
        self._step = step if self._attempt(step, begin) else None

    def go_on_from(self, path: epath.Path) -> None:
        """Takes a checkpoint for the newest of this run."""
        self.last = path

    def poll(self) -> None:
        """Looks, without waiting, whether the save under way has ended or failed."""
        if self._step is not None and not self._manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> bool:
        """Waits for the save under way; returns whether the last save went well."""
        if self._step is not None:
            if self._attempt(self._step, self._manager.wait_until_finished):
                self.last = self.folder / f"checkpoint-{self._step}"
            self._step = self._write_files = None  # it holds a copy of the student
            self._settle_replaced()
        return self._failed is None

    def abandon(self) -> None:
        """Lets the save under way come to nothing, and puts back the checkpoint that it was to replace."""

        def stop() -> None:
            raise SystemExit  # of orbax's thread, which then commits nothing

        self._abandoned, self._step, self._write_files = True, None, stop
        self._settle_replaced()

    def close(self) -> None:
        """Waits for the save under way, if it is not abandoned, and lets go of orbax's threads."""
        self.finish()
        if not self._abandoned:
            self._manager.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(_not_from_orbax)

    def _attempt(self, step: int, action: Callable[[], Any]) -> bool:
        """Whether it worked. A run must outlive a full disk or a storage that does not answer."""
        try:
            action()
            return True
        except Exception as error:
            self._failed = describe_error(error)
        with contextlib.suppress(Exception):  # leftovers only take space
            self._manager.reload()
            self.remove_unfinished()
        failed = f"checkpoint-{step} could not be written to"
        if self._step is not None and step in self._manager.all_steps():  # it was begun, and is there
            failed, self.last = "old checkpoints could not be removed from", self.folder / f"checkpoint-{step}"
        self._settle_replaced()
        with contextlib.suppress(Exception):
            self._manager.reload()  # with what was put back
        if self.last is not None and not self.last.is_dir():
            self.last = None
        kept = f"the last whole one is {self.last}" if self.last else "there is no whole one yet"
        self.say(f"{failed} {self.folder} ({self._failed}); {kept}.")
        return False

    def _settle_replaced(self) -> None:
        """Removes the checkpoint in whose place a new one is whole; puts it back where that came to nothing."""
        if not self._is_local or jax.process_index():
            return
        for aside in self.folder.glob(f".checkpoint-*{_REPLACED}"):
            with contextlib.suppress(OSError):  # tried again when the next run starts
                path = self.folder / aside.name[1:].removesuffix(_REPLACED)
                aside.rmtree() if path.exists() else aside.rename(path)

    def remove_unfinished(self) -> None:
        """Removes what a save that was cut short left behind."""
        # orbax's `cleanup_tmp_directories` takes every folder of a bucket without a commit marker for an unfinished one.
        if jax.process_index() == 0:
            for path in self.folder.glob(f"checkpoint-*{step_lib.TMP_DIR_SUFFIX}*"):
                path.rmtree()


def checkpoints_in(folder: str | os.PathLike) -> list[epath.Path]:
    """The committed `checkpoint-STEP` folders of a folder, those saved last first; a higher step may be an earlier run's."""
    folder = epath.Path(folder)
    found = _StepNames().find_all(folder) if folder.is_dir() else ()
    return [info.path for info in sorted(found, key=lambda x: (x.commit_timestamp, x.step), reverse=True)]


def current_run(folder: str | os.PathLike) -> str | None:
    """The id of the run that was started last with its checkpoints in a folder; None where it is not recorded."""
    path = epath.Path(folder) / _CURRENT_RUN
    with contextlib.suppress(UnicodeDecodeError):
        return path.read_text().strip() if path.exists() else None
    return None


def set_current_run(run_id: str, *folders: str | os.PathLike) -> None:
    """Records which run has its logs or checkpoints in these folders from now on."""
    for folder in folders:
        (epath.Path(folder) / _CURRENT_RUN).write_text(run_id + "\n")


def run_of(checkpoint: epath.Path) -> str | None:
    """The id of the run that saved a checkpoint, empty for earlier versions; None where its metadata cannot be read."""
    try:
        run_id = _parsed(checkpoint).get("run_id", "")
    except (OSError, ValueError):
        return None
    return run_id if isinstance(run_id, str) else None


def order_in_run(checkpoint: epath.Path) -> tuple[int, int]:
    """What orders the checkpoints of one run: how often it had been resumed, and the step."""
    step = int(checkpoint.name.rpartition("-")[2])
    try:
        resumed = _parsed(checkpoint).get("resumed", 0)
    except (OSError, ValueError):
        return 0, step
    return resumed if _is_count(resumed) else 0, step


def _parsed(checkpoint: epath.Path) -> dict[str, Any]:
    """What the metadata file holds; ValueError where it is no JSON object, OSError where it cannot be read."""
    path = checkpoint / METADATA
    return parse_json_object((path if "://" in str(path) else regular_file(path)).read_text(), METADATA)


def _is_count(value: Any, below: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _is_dtype(value: Any) -> bool:
    return isinstance(np.dtype(value), np.dtype)  # or a TypeError


def _are_means(value: Any) -> bool:
    numbers = (x for total, dtype, weight in value.values() if not dtype or _is_dtype(dtype) for x in (total, weight))
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)


def _are_arrays(value: Any) -> bool:
    rows = value.values()
    return all(
        all(map(_is_count, shape)) and _is_dtype(dtype) and _is_count(sum_, 2**32) for shape, dtype, sum_ in rows
    )


# What metadata say of a run, and whether it can be: a test that raises says no.
_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "step": _is_count,
    "arrays": _are_arrays,
    "run": lambda value: isinstance(value, dict),
    "run_id": lambda value: isinstance(value, str),
    "resumed": _is_count,
    "skips": lambda value: value.keys() == {"in_a_row", "total"} and all(map(_is_count, value.values())),
    "unmeasured": lambda value: isinstance(value, bool),
    "num_tokens": lambda value: _is_count(value, 2**63),
    "best": lambda value: value is None or (_is_count(value["step"]) and isinstance(value["metric"], int | float)),
    "means": _are_means,
    "rollouts": lambda value: _is_count(value, 2**32),
    "unwritten": lambda value: all(row.keys() - {"reference"} == {"step", "prompt", "completion"} for row in value),
    "shapes": lambda value: all(len(shape) in (2, 4) and all(map(_is_count, shape)) and all(shape) for shape in value),
}


def _holds(test: Callable[[Any], Any], value: Any) -> bool:
    try:
        return bool(test(value))
    except (TypeError, ValueError, AttributeError, LookupError):
        return False


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a checkpoint. Raises BadCheckpoint where it was not written to its end, or cannot be read."""
    path = epath.Path(path)
    if missing := [name for name in (METADATA, STATE) if not (path / name).exists()]:
        raise BadCheckpoint(f"it has no {missing[0]}: it was not written to its end, or it holds a model alone")
    try:
        metadata = _parsed(path)
        version, *_ = metadata["format"], metadata["step"], metadata["arrays"]
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"{METADATA} is damaged ({describe_error(error)})") from error
    if version != FORMAT:
        raise BadCheckpoint(f"it has the format {quoted(version)}, and this version reads {FORMAT}")
    for name, test in _FORMS.items():
        if name in metadata and not _holds(test, metadata[name]):
            raise BadCheckpoint(f"{METADATA} is damaged (its {name} cannot be {quoted(metadata[name])})")
    if (named := STEP_NAME.fullmatch(path.name)) and int(named[1]) != metadata["step"]:
        raise BadCheckpoint(f"{METADATA} is damaged (its step is {metadata['step']}, and its folder is {path.name})")
    return metadata


def read_rollouts(path: str | os.PathLike, metadata: Mapping[str, Any]) -> Rollouts:
    """A checkpoint's completions that were drawn for later updates; BadCheckpoint: they are not what was saved."""
    if "rollouts" not in metadata:
        return {}
    try:
        data = (epath.Path(path) / ROLLOUTS).read_bytes()
        if zlib.crc32(data) == metadata["rollouts"]:
            return from_bytes(data)
    except OSError as error:
        raise BadCheckpoint(f"{ROLLOUTS} cannot be read ({describe_error(error)})") from error
    raise BadCheckpoint(f"{ROLLOUTS} differs from what was saved")


def check_arrays(path: Any, metadata: Mapping[str, Any], abstract: Any) -> None:
    """Raises a ValueError that names the arrays in which a checkpoint is of another model or optimizer.

    The run's counters, scalars beside parameters and optimizer state, may be missing on either side: versions differ.
    """
    wanted = {name: f"{x.dtype}{list(x.shape)}" for name, x in named_arrays(abstract).items()}
    saved = {name: f"{dtype}{shape}" for name, (shape, dtype, _) in metadata["arrays"].items()}
    differ = []
    for name, kind in (saved | wanted).items():
        old, new = saved.get(name, "missing"), wanted.get(name, "missing")
        counter = kind.endswith("[]") and name.split(".")[0] not in ("params", "optimizer")
        if old != new and not (counter and "missing" in (old, new)):
            differ.append(f"{name} is {old}, here {new}")
    if differ:
        instead = "Resume with the model and the optimizer's settings that it was saved with."
        raise ValueError(f"{path} is of another student or optimizer: {listed(differ, 5, joint=', and')}. {instead}")


def restore(path: str | os.PathLike, metadata: Mapping[str, Any], abstract: Any) -> Any:
    """The state of a checkpoint, sharded as `abstract`, a pytree of arrays or shapes; scalars that it lacks are zero.

    BadCheckpoint: something cannot be read, or is not what was saved.
    """
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), named_arrays(abstract))
    wanted = {name: x for name, x in target.items() if name in metadata["arrays"]}
    shardings = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=shardings, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            arrays = reader.restore(_absolute(path), args=ocp.args.Composite(**{STATE: args}))[STATE]
    except Exception as error:
        raise BadCheckpoint(f"its arrays cannot be read ({describe_error(error)})") from error
    sums = zip(sorted(arrays), np.asarray(checksums(arrays)).tolist())
    if bad := [name for name, sum_ in sums if sum_ != metadata["arrays"][name][2]]:
        raise BadCheckpoint(f"{listed(bad, 3)} in it differ from what was saved")
    new = {name: jnp.zeros(x.shape, x.dtype, device=x.sharding) for name, x in target.items() if name not in wanted}
    leaves = arrays | new
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in target])


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their positions, such as `params.layers.query`; no class of it is kept."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(found) != len(leaves):
        raise ValueError("two arrays of the state have the same name, so they cannot be told apart in a checkpoint")
    return found


@jax.jit
def checksums(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """A checksum of every array's bits, `[N]` uint32 in the order of `sorted` names, whatever they are sharded over.

    Sums of integers do not depend on their order, so that a checkpoint read onto another mesh has the same ones.
    """

    def checksum(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        position = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            position += iota * jnp.uint32(_PRIMES[axis % len(_PRIMES)])
        odd = 2 * position + 1  # so that a change of one element always shows
        return jnp.sum(bits * odd, dtype=jnp.uint32)

    return jnp.stack([checksum(arrays[name]) for name in sorted(arrays)])


def describe_error(error: BaseException) -> str:
    """What an error says in one line."""
    text = " ".join(str(error).split())
    if "No space left on device" in text:
        return "no space left on the disk"
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _absolute(path: str | os.PathLike) -> epath.Path:
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and not (record.name == "asyncio" and "orbax" in record.getMessage())
