"""Checkpoints: all that a run needs to go on, written in the background, whole or not there.

A checkpoint is a folder `checkpoint-STEP` that holds

    state/            parameters and optimizer state, by orbax
    run.json          the step, the settings, what the log stood at, and a checksum of every array
    *.safetensors …   the student as transformers and vLLM open it, where it was given

orbax writes all of it beside its place and commits it as its last act: by renaming the folder, or with a marker in it
where the storage (`gs://`) has no renaming.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gold_jax.training.checkpoint import checkpoint_folder, prune_checkpoints

METADATA, STATE = "run.json", "state"
FORMAT = 1
_UNFINISHED = re.compile(r"checkpoint-\d+\.orbax-checkpoint-tmp.*")
_PRIMES = (2654435761, 2246822519, 3266489917, 668265263, 374761393, 2147483647)


class BadCheckpoint(Exception):
    """A checkpoint that is not whole; the text says why."""


class Checkpoints:
    """The checkpoints of one run in one folder, local or `gs://…`.

    Attributes:
        folder: where they are.
        last: the newest that this object has written or read whole; None before that.
        failed: why the last save failed; None if it did not.
    """

    def __init__(self, folder: Any, *, limit: int | None = None, say: Callable[[str], Any] = print):
        """Keeps at most `limit` checkpoints (None: all); `say` is given a line where a save fails, which ends no run.

        Raises:
            OSError: the folder cannot be made.
        """
        self.folder = epath.Path(folder)
        self.limit, self.say = limit, say
        self.last: epath.Path | None = None
        self.failed: str | None = None
        self._step: int | None = None
        self._beside: Callable[[epath.Path], None] = lambda folder: None
        self._written = threading.Event()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saver = ocp.AsyncCheckpointer(_Handler(self._write_beside))
        logging.getLogger("absl").addFilter(_not_from_orbax)  # what fails is said here, in one line

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any],
        student: Callable[[pathlib.Path], Any] | None = None,
    ) -> None:
        """Begins to write a checkpoint and returns when `state` has been copied, so that it may change or be donated.

        Args:
            step: updates made so far.
            state: a pytree of arrays, sharded in any way.
            metadata: anything that JSON can hold, for `read_metadata`.
            student: writes the student into the folder that it is given, from another thread.
        """
        self.finish()  # one at a time
        arrays = named_arrays(state)
        sums = checksums(arrays)

        def beside(folder: epath.Path) -> None:
            info = {name: [*kinds[name], int(sum_)] for name, sum_ in zip(sorted(kinds), np.asarray(sums))}
            if student is not None:
                _write_student(student, folder)
            row = {**metadata, "format": FORMAT, "step": step, "saved": time.time(), "arrays": info}
            (folder / METADATA).write_text(json.dumps(row))

        kinds = {name: (list(x.shape), str(x.dtype)) for name, x in arrays.items()}
        self._step, self._beside, self.failed = step, beside, None
        self._written.clear()
        self._attempt(
            lambda: self._saver.save(
                _absolute(checkpoint_folder(self.folder, step)),
                args=_Args(state=ocp.args.StandardSave(arrays)),
                force=True,
            )
        )

    def _write_beside(self, folder: epath.Path) -> None:
        if jax.process_index() == 0:
            self._beside(folder)
        self._written.set()

    def poll(self) -> None:
        """Looks, without waiting, whether the save under way has ended or failed."""
        if self._step is not None and (self._written.is_set() or not self._attempt(self._saver.check_for_errors)):
            self.finish()

    def finish(self) -> bool:
        """Waits for the save under way and removes the oldest checkpoints; returns whether the last save went well."""
        if self._step is not None and self._attempt(self._saver.wait_until_finished):
            self.last, self._step = checkpoint_folder(self.folder, self._step), None
            if jax.process_index() == 0:
                self._attempt(lambda: prune_checkpoints(self.folder, self.limit))
        return self.failed is None

    def read(self, checkpoint: epath.Path) -> None:
        """Remembers a checkpoint that was read whole as the `last`."""
        self.last = checkpoint

    def close(self) -> None:
        """Waits for the save under way and lets go of orbax's threads."""
        self.finish()
        self._saver.close()
        logging.getLogger("absl").removeFilter(_not_from_orbax)

    def _attempt(self, action: Callable[[], Any]) -> bool:
        """Whether it worked. A run must outlive a full disk or a storage that does not answer."""
        try:
            action()
            return True
        except Exception as error:
            step, self._step = self._step, None
            self.failed = describe_error(error)
            what = "old checkpoints could not be removed" if step is None else f"checkpoint-{step} could not be written"
            kept = f"the last whole one is {self.last}" if self.last else "there is no whole one yet"
            self.say(f"{what} to {self.folder} ({self.failed}); training goes on, and {kept}.")
            try:
                self.remove_unfinished()
            except OSError:
                pass  # they are in nobody's way but the disk's
            return False

    def remove_unfinished(self) -> None:
        """Removes what a save that was cut short left behind."""
        if jax.process_index():
            return
        for path in self.folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.rmtree()


class _Handler(ocp.CompositeCheckpointHandler):
    """Writes more files beside the arrays, in the background and before all is committed."""

    def __init__(self, beside: Callable[[epath.Path], None] = lambda folder: None):
        super().__init__()
        self._write_more = beside

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        self._write_more(epath.Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Args(ocp.args.Composite):
    """What `_Handler` saves and restores."""


def _absolute(path: Any) -> epath.Path:
    """A path as orbax takes it."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _write_student(write: Callable[[pathlib.Path], Any], folder: epath.Path) -> None:
    if "://" not in str(folder):
        write(pathlib.Path(folder))
        return
    with tempfile.TemporaryDirectory() as local:
        write(pathlib.Path(local))
        for path in sorted(pathlib.Path(local).iterdir()):
            epath.Path(path).copy(folder / path.name)


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their places, such as `params.layers.query`; no class of it is kept.

    Raises:
        ValueError: two leaves have the same name.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(found) != len(leaves):
        raise ValueError("two arrays of the state have the same name, so they cannot be told apart in a checkpoint")
    return found


def from_named_arrays(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """The pytree with the arrays of these names in its leaves' places."""
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in named_arrays(tree)])


@jax.jit
def checksums(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """A checksum of every array's bits, `[N]` uint32 in the order of `sorted` names, whatever they are sharded over.

    Sums of integers do not depend on their order, so that a checkpoint read onto another mesh has the same ones.
    """
    return jnp.stack([_checksum(arrays[name]) for name in sorted(arrays)])


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(_PRIMES[axis % len(_PRIMES)])
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)  # an odd weight: a change of one element always shows


def describe_error(error: BaseException) -> str:
    """What an error says in one line."""
    text = " ".join(str(error).split())
    if "No space left on device" in text:
        return "no space left on the disk"
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def is_checkpoint(path: Any) -> bool:
    """Whether a folder has a checkpoint's name, or its notes."""
    path = epath.Path(path)
    return bool(re.fullmatch(r"checkpoint-\d+", path.name)) or (path / METADATA).exists()


def read_metadata(path: Any) -> dict[str, Any]:
    """The notes of a checkpoint.

    Raises:
        BadCheckpoint: it was not written to its end, or its notes cannot be read.
    """
    path = epath.Path(path)
    if not (path / METADATA).exists():
        raise BadCheckpoint(f"it has no {METADATA}: it was not written to its end, or it holds a model alone")
    if not (path / STATE).is_dir():
        raise BadCheckpoint(f"it has no {STATE}/")
    try:
        metadata = json.loads((path / METADATA).read_text())
        if metadata["format"] != FORMAT:
            raise BadCheckpoint(f"it has the format {metadata['format']}, and this version reads {FORMAT}")
        metadata["step"], metadata["arrays"], metadata["saved"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{METADATA} is damaged ({describe_error(error)})") from error
    return metadata


def abstract_arrays(metadata: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array of a checkpoint by its name, on one device: what `restore` takes where there is no run."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype, _) in metadata["arrays"].items()
    }


def check_arrays(path: Any, metadata: Mapping[str, Any], abstract: Any) -> None:
    """Makes sure that a checkpoint is of this model and optimizer, before any array is read.

    Raises:
        ValueError: naming the arrays that differ.
    """
    wanted = {name: [list(x.shape), str(x.dtype)] for name, x in named_arrays(abstract).items()}
    saved_arrays = {name: info[:2] for name, info in metadata["arrays"].items()}
    faults = [f"{name} is missing" for name in wanted if name not in saved_arrays]
    faults += [f"{name} is in it, but not in this run" for name in saved_arrays if name not in wanted]
    faults += [
        f"{name} is {saved_arrays[name][1]}{saved_arrays[name][0]}, here {wanted[name][1]}{wanted[name][0]}"
        for name in wanted
        if name in saved_arrays and saved_arrays[name] != wanted[name]
    ]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{path} is of another student or optimizer: {', '.join(faults[:5])}{more}. Resume with the model and the "
            "optimizer's settings that it was saved with."
        )


def restore(path: Any, metadata: Mapping[str, Any], abstract: Any) -> Any:
    """The state of a checkpoint, bit for bit.

    Args:
        path: the checkpoint's folder.
        metadata: what `read_metadata` gave for it.
        abstract: a pytree as it was saved, of arrays or of `jax.ShapeDtypeStruct`; its shardings are those of the
            result, whatever mesh the checkpoint was saved from.

    Raises:
        BadCheckpoint: something in it cannot be read, or is not what was saved.
    """
    path, target = epath.Path(path), named_arrays(abstract)
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in target.items()}
    try:
        with ocp.Checkpointer(_Handler()) as reader:
            arrays = reader.restore(_absolute(path), args=_Args(state=ocp.args.StandardRestore(target)))[STATE]
    except Exception as error:
        raise BadCheckpoint(f"its arrays cannot be read ({describe_error(error)})") from error
    sums = dict(zip(sorted(arrays), np.asarray(checksums(arrays)).tolist()))
    bad = [name for name, (_, _, saved) in metadata["arrays"].items() if sums[name] != saved]
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise BadCheckpoint(f"{shown} in it differ from what was saved")
    return from_named_arrays(abstract, arrays)
