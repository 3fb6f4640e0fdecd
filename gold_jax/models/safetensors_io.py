"""Folders of safetensors: any slice of a tensor is read alone, and tensors are written one after the other.

Knows names, shapes and bytes; what they mean to a model is in `hf_checkpoint`.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence

import ml_dtypes  # noqa: F401  (importing it teaches numpy, and so safetensors, the name bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in FLOATS.items()}
SHARD_BYTES = 5 * 10**9


class TensorFolder:
    """The tensors of a model folder, found but not yet read.

    Attributes:
        folder: where they are.
        names: of all of them.
    """

    def __init__(self, folder: pathlib.Path):
        """Open the folder's files.

        Raises:
            FileNotFoundError: there are none.
            ValueError: files that are missing, cut short, or not safetensors.
        """
        self.folder = folder
        self._files: dict[str, safe_open] = {}  # tensor name -> open file
        faults = []
        for path in _weight_files(folder, faults):
            try:
                opened = safe_open(path, "np")
                self._files.update(dict.fromkeys(opened.keys(), opened))
            except (SafetensorError, OSError) as error:
                faults.append(f"{path.name} is not a whole safetensors file ({error})")
        if faults:
            raise ValueError(f"The weights in {folder} cannot be read: {listed(faults)}. Copy or download them again.")
        self.names = self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def code(self, name: str) -> str:
        """What the file calls a tensor's dtype; `FLOATS` has those that can be read."""
        return self._files[name].get_slice(name).get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, one step-less `slice` per axis; no more than it is read."""
        return self._files[name].get_slice(name)[index]

    def same(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors hold the same values; looks at some `rows` of each at a time."""
        if self.shape(one) != self.shape(other):
            return False
        end = self.shape(one)[0]
        parts = ((slice(start, min(start + rows, end)),) for start in range(0, end, rows))
        return all(np.array_equal(self.read(one, part), self.read(other, part)) for part in parts)


def _weight_files(folder: pathlib.Path, faults: list[str]) -> list[pathlib.Path]:
    index = read_json(folder / "model.safetensors.index.json")
    if index is not None:
        paths = [folder / name for name in sorted(set(index["weight_map"].values()))]
        faults += [
            f"model.safetensors.index.json names {path.name}, which is not there" for path in paths if not path.exists()
        ]
        return [path for path in paths if path.exists()]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled and not others:
        raise ValueError(
            f"{folder} holds its weights as {listed(pickled)} alone. Pickled weights can run code and are not read; save "
            "the model with safe_serialization=True."
        )
    hint = f" (it holds {listed(others)}, but no index)" if others else ""
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}.")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.itemsize


def write_tensors(folder: pathlib.Path, entries: Sequence[Entry], tensors: Iterator[np.ndarray]) -> None:
    """Write a model's tensors into one file, or into several with an index; those of a model that was here before go.

    Args:
        folder: must be there.
        entries: the tensors in the order of the files.
        tensors: gives the values of each, in any dtype and layout, when it is its turn.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        _write_file(folder / name, shard, tensors)
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards) for entry in shard}
        total = sum(entry.nbytes for entry in entries)
        write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    else:
        index.unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        if path.name not in names:
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
    """What a JSON file holds; None where it is not there and not `required`.

    Raises:
        FileNotFoundError: it is required, and not there.
        ValueError: it is not JSON.
    """
    if not path.exists():
        if required:
            raise FileNotFoundError(
                f"{path.parent} has no {path.name}; a model folder holds one beside its *.safetensors."
            )
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def write_json(path: pathlib.Path, value: dict) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def listed(items: list[str], limit: int = 40) -> str:
    """The first of many, for an error message, and how many more there are."""
    more = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {more} more" if more > 0 else "")


__all__ = [
    "CODES",
    "FLOATS",
    "SHARD_BYTES",
    "Entry",
    "TensorFolder",
    "listed",
    "read_json",
    "write_json",
    "write_tensors",
]
