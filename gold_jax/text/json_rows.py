"""Rows of JSON files as they stand there: no text is taken for a date, a number or a null, and no key is filled in."""

import bisect
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from gold_jax.json_files import unique_keys
from gold_jax.text.surface import excerpt

# Encodings by the marks that files of theirs begin with; that of the first begins as that of the second does.
_WIDE = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_MOST_HELD = 64  # files that are held open


def read_json_rows(paths: Sequence[str | os.PathLike], names: Sequence[str] | None = None) -> "JsonRows":
    """The rows of JSON files, those of one after those of another; messages call them by `names`, else by their own.

    A file holds an object a line, which is parsed when it is accessed; an array of objects; or one object. ValueError,
    here or at access, where a file or a line of it cannot be read: it names file and line.
    """
    if not paths:
        raise ValueError("there is no file to read rows from")
    files, hold = [pathlib.Path(path) for path in paths], len(paths) <= _MOST_HELD
    names = names or [file.name for file in files]
    return JsonRows([_open(file, name, hold) for file, name in zip(files, names)], names=names)


def read_json_lines(path: str, name: str, first: int = 0) -> Iterator[Any]:
    """The rows of a file of JSON lines, a path or an address, from a row on; for a line that cannot be read its ValueError.

    ValueError where the file holds an array.
    """
    import fsspec

    with fsspec.open(path, "rb", compression="infer") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for k, (number, line) in enumerate(filled):
            if not k and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                raise ValueError(f"{name} is a JSON array, which is read whole: write it as JSON lines to stream it")
            if k >= first:
                try:
                    row = _parse(line, name, number)
                except ValueError as error:
                    row = error
                yield row


class JsonRows(Sequence):
    """The rows of `files` (sequences of them, called by `names`), or those with the numbers `index` of them."""

    def __init__(self, files: Sequence[Sequence], index: Sequence[int] | None = None, names: Sequence[str] = ()):
        self._files, self._ends, self._names = files, list(itertools.accumulate(map(len, files))), names
        self._index = range(self._ends[-1]) if index is None else index

    def select(self, index: Sequence[int]) -> "JsonRows":
        """Some of the rows, by their numbers here."""
        return JsonRows(self._files, [self._index[i] for i in index], self._names)

    def file_of(self, index: int) -> str:
        """The name of the file of a row, where there are several; else ""."""
        return self._names[bisect.bisect_right(self._ends, self._index[index])] if len(self._names) > 1 else ""

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        number = self._index[index]
        file = bisect.bisect_right(self._ends, number)
        return self._files[file][number - (self._ends[file - 1] if file else 0)]

    def digest(self) -> str | None:
        """Of all that the rows are read from, in hexadecimal; None where some are not of files that are read here."""
        index = self._index if isinstance(self._index, range) else [*self._index]
        digest = hashlib.sha256(repr((index, *self._names)).encode())
        for file in self._files:
            if not isinstance(file, _Lines | list):
                return None
            digest.update(file.digest if isinstance(file, _Lines) else repr(file).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class _Lines(Sequence):
    """The lines of a file that are not blank. A file that is held open stays the same one if another is put in its place."""

    def __init__(self, path: pathlib.Path, name: str, hold: bool):
        self._path, self._name = path, name
        self._held = open(path, "rb") if hold else None
        whole = hashlib.sha256()
        with self._opened() as file:
            lines = ((len(line), bool(line.strip()), zlib.crc32(line), whole.update(line)) for line in file)
            table = np.fromiter(itertools.chain.from_iterable(line[:3] for line in lines), np.int64)
        self.digest = whole.digest()
        sizes, filled, sums = table.reshape(-1, 3).T
        self._numbers = np.flatnonzero(filled)
        self._begins, self._sizes, self._sums = (x[self._numbers] for x in (np.cumsum(sizes) - sizes, sizes, sums))

    def _opened(self) -> contextlib.AbstractContextManager[BinaryIO]:
        return open(self._path, "rb") if self._held is None else contextlib.nullcontext(self._held)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        with self._opened() as file:
            line = os.pread(file.fileno(), self._sizes[index], self._begins[index])
        number = int(self._numbers[index]) + 1
        if zlib.crc32(line) != self._sums[index]:
            raise ValueError(
                f"line {number} of {self._name} was changed while it is in use; begin again with a file that stays as it is"
            )
        return _parse(line, self._name, number)


def _open(path: pathlib.Path, name: str, hold: bool) -> Sequence:
    with open(path, "rb") as file:
        begin = file.read(1 << 16)
        for encoding, marks in _WIDE.items():
            if begin.startswith(marks):
                raise ValueError(f"{name} is {encoding}; write it as UTF-8 (iconv -f {encoding} -t UTF-8)")
        begin = begin.removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if begin.startswith(b"["):
            return _parse(file.read(), name)
        lines = _Lines(path, name, hold)
        if len(lines) > 1 and begin.startswith(b"{"):  # perhaps one object over many lines
            try:
                lines[0]
            except ValueError:
                with contextlib.suppress(ValueError):  # what is wrong is said of the line
                    return [_parse(file.read(), name)]
    return lines


def _parse(data: bytes, name: str, line: int | None = None) -> Any:
    """The value of a line, or of a whole file; ValueError where it is not JSON, not UTF-8, or has a key twice."""
    place = f"line {line} of {name}" if line else name
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        begin = data.rfind(b"\n", 0, error.start) + 1
        at = f"byte {error.start - begin} of line {line or data.count(10, 0, begin) + 1} of {name}"
        raise ValueError(
            f"{at} is not valid UTF-8 ({excerpt(data, error.start)}); write the file as UTF-8 (iconv -t UTF-8)"
        ) from None
    except RecursionError:
        raise ValueError(f"{place} cannot be read as json: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno} of {name} cannot be read as json: {error.msg.removesuffix(' at')}"
        at = error.colno if line is None else error.pos + 1
        raise ValueError(f"{place} at character {at} ({excerpt(error.doc, error.pos)})") from None
    except ValueError as error:  # a key twice, a number of thousands of digits
        raise ValueError(f"{place} cannot be read as json: {error}") from None
