"""Folders of safetensors: any slice of a tensor is read alone, and tensors are written one after the other.

Knows names, shapes and bytes; what they mean to a model is in `hf_checkpoint`.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (importing it teaches numpy, and so safetensors, the name bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from gold_jax.json_files import read_json_object, regular_file
from gold_jax.models.staged_save import WEIGHTS
from gold_jax.wording import listed, quoted

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in FLOATS.items()}
SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


class TensorFolder:
    """The tensors of a model folder, found but not yet read; `names` has the names of all.

    Raises:
        FileNotFoundError: there are none.
        ValueError: files that are missing, cut short, or not safetensors.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._files: dict[str, tuple[pathlib.Path, safe_open]] = {}  # by tensor name
        faults = []
        for path in _weight_files(folder):
            if not os.path.exists(path):
                faults.append(f"{INDEX} names {quoted(path.name, plain=True)}, which is not there")
                continue
            try:
                opened = safe_open(regular_file(path), "np")
                names = opened.keys()
            except (SafetensorError, ValueError, OSError) as error:
                faults.append(f"{path.name} is not a whole safetensors file ({quoted(str(error), plain=True)})")
                continue
            twice = sorted(self._files.keys() & names)
            faults += [f"{quoted(name)} is in {self._files[name][0].name} and in {path.name}" for name in twice]
            self._files |= dict.fromkeys(names, (path, opened))
        if faults:
            faults = listed(faults, 40, "; ", "; and")
            raise ValueError(f"The weights in {folder} cannot be read: {faults}. Copy or download them again.")
        self.names = self._files.keys()

    def info(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape of a tensor, and what the file calls its dtype; `FLOATS` has those that can be read."""
        tensor = self._files[name][1].get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, one step-less `slice` per axis; no more than it is read."""
        return self._files[name][1].get_slice(name)[index]

    def check_finite(self, name: str, values: np.ndarray) -> None:
        """Raises a ValueError where values that were read of a tensor, then perhaps rounded, are NaN or infinite."""
        if not is_finite(values):
            dtype = np.dtype(FLOATS[self.info(name)[1]])
            raise ValueError(
                f"{self._files[name][0]}: {name} holds NaN or infinite values (it is {dtype}, read as {values.dtype}), so that "
                "whatever the model computes would be NaN; copy or download the weights again, or take an earlier save."
            )

    def same(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors hold the same values; looks at some `rows` of each at a time."""
        (end, *shape), _ = self.info(one)
        if (end, *shape) != self.info(other)[0]:
            return False
        parts = ((slice(start, min(start + rows, end)),) for start in range(0, end, rows))
        return all(np.array_equal(self.read(one, part), self.read(other, part)) for part in parts)


def is_finite(values: np.ndarray) -> bool:
    """Whether no float of an array is NaN or infinite, by the bits: no array is made of it, and ml_dtypes' are as fast.

    A magnitude counts up with its bits as an integer, to infinity and beyond it NaN; the sign is the highest bit.
    """
    size, infinity = values.dtype.itemsize, np.array(np.inf, values.dtype)
    bits = values.reshape(-1)
    return not bits.size or bool(
        bits.view(f"i{size}").max() < infinity.view(f"i{size}")  # of the positive ones
        and bits.view(f"u{size}").max() < (-infinity).view(f"u{size}")  # of the negative ones, where there are any
    )


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that should hold a model's tensors."""
    index = read_json(folder / INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{folder / INDEX}: weight_map must be an object that gives every tensor a file's name.")
        names = sorted(set(names))
        for name, path in zip(names, map(pathlib.PurePath, names)):
            if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
                wrong = f"weight_map names {quoted(name)}"
                raise ValueError(f"{folder / INDEX}: {wrong}; it must name *.safetensors files in this folder.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled and not others:
        raise ValueError(
            f"{folder} holds its weights as {listed(pickled, 40)} alone. Pickled weights can run code and are not read; save "
            "the model with safe_serialization=True."
        )
    hint = f" (it holds {listed(others, 40)}, but no index)" if others else ""
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor {INDEX}{hint}.")


class Entry(NamedTuple):
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(folder: pathlib.Path, entries: Sequence[Entry], tensors: Iterator[np.ndarray]) -> None:
    """Write a model's tensors into one file, or into several with an index; those of a model that was here before go.

    `entries` are in the order of the files; `tensors` gives the values of each, in any dtype and layout, at its turn.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        _write_file(folder / name, shard, tensors)
    if count > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards) for entry in shard}
        total = sum(entry.nbytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        if path.name not in names and WEIGHTS.fullmatch(path.name):
            path.unlink()


def _write_file(path: pathlib.Path, entries: Sequence[Entry], tensors: Iterator[np.ndarray]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for entry in entries:
            file.write(np.ascontiguousarray(next(tensors), np.dtype(entry.dtype)).reshape(-1).view(np.uint8))
    os.replace(unfinished, path)


def read_json(path: pathlib.Path, *, required: bool = False) -> dict | None:
    """`read_json_object`; if there is no file None, or where it is `required` a FileNotFoundError."""
    if path.exists():
        return read_json_object(path)
    if required:
        raise FileNotFoundError(f"{path.parent} has no {path.name}; a model folder has one beside its *.safetensors.")
    return None


def write_json(path: pathlib.Path, value: dict) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
