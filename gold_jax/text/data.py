"""Examples: rows of a data set, in whatever form, as a prompt and a completion."""

import contextlib
import dataclasses
import difflib
import functools
import glob
import itertools
import pathlib
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gold_jax import progress
from gold_jax.quickstart import resolve_embedded
from gold_jax.text.columns import (
    check_texts,
    conversation_extras,
    describe_type,
    frame_rows,
    messages_of,
    text_of,
    what_is_compared,
    without_fill,
)
from gold_jax.text.json_rows import JsonRows, read_json_rows
from gold_jax.text.row_formats import FORM_COLUMNS, READABLE, check_renamed, read_columns
from gold_jax.text.surface import excerpt
from gold_jax.text.template import Conversation
from gold_jax.wording import listed, shortened

if TYPE_CHECKING:
    from gold_jax.text.chat import ChatTokenizer

ACCEPTED = (
    "`messages` (a list of {role, content}), `prompt` with `completion` (texts, or lists of messages), `prompt` alone, "
    "`text`, `conversations` (ShareGPT), `instruction` with `output` (alpaca), `question` with `answer`, or `problem` with "
    "`solution`; --columns says which columns stand for them, such as --columns prompt=query,completion=reply"
)
_CONVERT = (
    "convert it (pandas.read_csv('rows.csv', dtype=str).to_json('rows.jsonl', orient='records', lines=True) makes JSON "
    "lines of CSV), or name a data set of the hub"
)
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One row."""

    prompt: str | list[dict]  # text, or messages: a `Conversation` where the row has tools or template variables
    #: The text that follows the prompt, of messages the last answer's content (see `completion_for`); None where the
    #: row has a prompt alone. Of an answer that calls tools it is what it says beside, see `calls_tools`.
    completion: str | None = None
    messages: list[dict] | None = None  # the whole conversation, its last answer included, where the row is one
    teacher_context: str | None = None  # text that only the teacher reads, before the prompt, see `with_context`
    #: The row's columns that hold something and that nothing reads.
    unread: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    answers: int = (
        1  # of the assistant in the completion, which `sft` learns all; others read those before the last as prompt
    )
    format: str = dataclasses.field(default="", compare=False)  # one of `row_formats.FORMATS`; "" for TRL's own columns

    @property
    def fingerprint(self) -> bytes:
        """All that is learned from the row, the same for rows that are read alike."""
        learned = self.prompt, self.completion, self.messages, self.teacher_context
        learned += (self.answers,) * (self.answers > 1)
        return repr(learned).encode("utf-8", "surrogatepass")

    def completion_for(self, chat_tokenizer: "ChatTokenizer") -> str:
        """What follows the prompt, as a model has to write it: what its chat template writes after the generation prompt.

        That is more than `completion` where the template writes thinking, or an empty block for it, before an answer, or
        the tools that it calls, and less where it strips blanks. A completion of a plain text is as it is, "" where
        there is none. ValueError as `ChatTokenizer.answer`.
        """
        if isinstance(self.prompt, str) or not self.messages:
            return self.completion or ""
        return chat_tokenizer.answer(self.messages).text

    @property
    def calls_tools(self) -> bool:
        """Whether the last answer calls tools. Every template writes calls its own way: `completion_for` has them."""
        return bool(self.completion is not None and self.messages and self.messages[-1].get("tool_calls"))


def join_contexts(*contexts: str | None) -> str:
    """What the teacher alone reads before a prompt: the run's context, then the row's."""
    return "\n\n".join(filter(None, contexts))


def as_examples(rows: Any) -> list[Example]:
    """Rows as examples: those that are already, and dicts as `load_examples` reads them; ValueError as there."""
    rows = list(rows)
    return rows if all(isinstance(row, Example) for row in rows) else list(load_examples(rows))


def as_teacher_reads(examples: Sequence[Example], teacher: "ChatTokenizer", context: str | None) -> list[Example]:
    """The examples with the contexts that the teacher alone reads, the run's and their own, before their prompts."""
    texts = [join_contexts(context, e.teacher_context) for e in examples]
    return [
        dataclasses.replace(e, prompt=teacher.with_context(e.prompt, text)) if text else e
        for e, text in zip(examples, texts)
    ]


class Examples(Sequence):
    """The rows of a data set as examples, converted when they are accessed.

    `rows` is anything with a length whose items are dicts, `source` what messages call it, `features` the columns'
    types, as `datasets.Features` (None: those of the rows, if they say any), and `renamed` as for `read_columns`.
    ValueError where `renamed` names a column that the rows do not have (`check_columns`).
    """

    def __init__(
        self,
        rows,
        source: str,
        text_column: str = "text",
        features: Mapping | None = None,
        check_first: bool = True,
        renamed: Mapping[str, str | None] | None = None,
        notices: Sequence[str] = (),
        check_columns: bool = True,
    ):
        # The caller may change a list afterwards, and the rows in it, but what lies deeper in them (messages) is shared.
        self.rows: Any = [dict(r) if isinstance(r, dict) else r for r in rows] if isinstance(rows, list) else rows
        self.source, self.text_column, self.renamed = source, text_column, dict(renamed or {})
        self.features = features or getattr(rows, "features", None)
        self.notices = [*notices]  # lines about how the rows were read
        if len(rows) == 0:
            raise ValueError(f"{source} is empty: it has no rows")
        if self.renamed and check_columns:
            check_renamed(self.renamed, self.features or self._columns_up_to({*self.renamed.values()} - {None}), source)
        if check_first:
            self[0]

    def _columns_up_to(self, wanted: set) -> list[str]:
        """The columns of the first rows, as many as it takes to find all `wanted` ones: usually one."""
        found: dict[str, None] = {}
        for index in progress.track(range(len(self)), f"looking for {', '.join(sorted(wanted))} in the rows"):
            with contextlib.suppress(ValueError):
                row = self.rows[index]
                found |= dict.fromkeys(map(str, row)) if isinstance(row, Mapping) else {}
            if wanted <= found.keys():
                break
        return list(found)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.source} has {len(self)} rows, none with the number {index}")
        index = int(index) % len(self)
        try:
            row = self.rows[index]
        except ValueError as error:  # a file's line that is no JSON, a column's text that is no UTF-8
            raise ValueError(shortened(f"row {index} of {self.source}: {error}")) from error
        if isinstance(row, Example):  # of a mixture
            return row
        try:
            return to_example(row, index, self.source, self.text_column, self.renamed, self.features)
        except ValueError as error:
            file = getattr(self.rows, "file_of", lambda _: "")(index)
            raise ValueError(shortened(f"{error}{f' (it stands in {file})' if file else ''}")) from error

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def first(self, count: int) -> "Examples":
        """The first `count` rows, or all where there are fewer."""
        count = min(count, len(self))
        rows = self.rows.select(range(count)) if hasattr(self.rows, "select") else self.rows[:count]
        given = rows, self.source, self.text_column, self.features, False, self.renamed, self.notices
        return Examples(*given, check_columns=False)  # which may first come in a later row


def load_examples(
    source,
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming_limit: int | None = None,
    check_first: bool = True,
    renamed: Mapping[str, str | None] | None = None,
    **files: Any,
) -> Examples:
    """Open a data set.

    Args:
        source: a hub id; `embedded:task`; the path of a .json, .jsonl or .parquet file or of a folder of them; a
            `datasets.Dataset`, a `datasets.DatasetDict` (its `split` is taken), a pandas `DataFrame`, or dicts in a list
            or any other iterable, which is read once.
        config: the configuration of a hub data set.
        split: which split, such as "train" or "train[:100]". A single file is a "train" split. Files in a folder whose
            names begin with a split's name (`test.jsonl`, `test-00000-of-00002.parquet`) are that split; if none does,
            they are all "train".
        text_column: the column that stands for `text`, TRL's `dataset_text_field`.
        streaming_limit: how many rows to take of a `datasets.IterableDataset`, which has no length of its own.
        check_first: whether the first row is looked at here.
        renamed: which column stands for another, such as `{"prompt": "question"}`, see `row_formats.read_columns`.
        files: `data_files` and `data_dir`, as `datasets.load_dataset` takes them.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without such files.
        ValueError: an unknown kind of file, an unknown split, an empty data set, or a first row of none of the forms
            that `to_example` takes. Later rows are checked when they are accessed.
    """
    options: dict[str, Any] = dict(check_first=check_first, renamed=renamed)
    if isinstance(source, (str, pathlib.Path)):
        name = f"the data set {str(source)!r}"
        return Examples(_load(str(source), config, split, files), name, text_column, **options)
    if isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"the data set has no split {split!r}; it has {listed(list(map(str, source)), 12)}")
        source = source[split]
    if isinstance(source, Examples):
        return source
    features, pandas = getattr(source, "features", None), sys.modules.get("pandas")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        source = frame_rows(source)
    elif not hasattr(source, "__len__") and hasattr(source, "take"):
        if streaming_limit is None:
            raise ValueError("a streamed data set has no length: pass a loaded one, or say how many rows to take of it")
        source = list(source.take(streaming_limit))
    elif not isinstance(source, Iterable):
        raise ValueError(
            f"the data set is {describe_type(source)}; pass a name, a datasets.Dataset, or dicts in a list"
        )
    elif not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        source = list(source)
        options["notices"] = [
            f"the data set was read from an iterator, once: {len(source):,} rows, which stay in memory"
        ]
    return Examples(source, "the data set", text_column, features, **options)


def _load(name: str, config: str | None, split: str, given: Mapping[str, Any]):
    import datasets

    if (found := local_files(name, split, given)) is None:
        with hub_errors(name):
            return _from_hub(name, config, split, {key: value for key, value in given.items() if value})
    kind, files = found
    if kind == "json":
        return _of_split(read_json_rows(files), split)
    try:
        from pyarrow.parquet import read_schema

        # Files of unlike columns are read each by its own: a column that one lacks is null in its rows.
        groups = [list(group) for _, group in itertools.groupby(files, lambda p: read_schema(p).remove_metadata())]
        read = functools.partial(datasets.load_dataset, "parquet", split="train")
        parts = [read(data_files={"train": [str(p) for p in group]}) for group in groups]
    except Exception as error:  # the builder wraps what its readers raise
        names, reason = listed([p.name for p in files], 3), error.__cause__ or error
        raise ValueError(f"{names} of {name!r} cannot be read as {kind}: {shortened(str(reason))}") from error
    if len(parts) == 1:
        return _of_split(parts[0], split)
    names = [listed([p.name for p in group], 3) for group in groups]
    return _of_split(JsonRows([_Unfilled(part) for part in parts], names=names), split)


class _Unfilled(Sequence):
    """The rows of a `datasets.Dataset` without the nulls that Arrow fills in."""

    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return {name: without_fill(value, self._rows.features[name]) for name, value in self._rows[index].items()}


@contextlib.contextmanager
def hub_errors(name: str) -> Generator[None]:
    """What goes wrong with a data set of the hub, in words."""
    import datasets.exceptions

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name!r} is neither a file, a folder, nor a data set of the hub: {error}") from error
    except ConnectionError as error:
        raise ConnectionError(
            f"there is no file or folder {name!r} here, and the hub, where a data set may have that name, cannot be "
            f"reached: {shortened(str(error))}"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # no such split or configuration, broken files
        raise ValueError(f"the data set {name!r} of the hub cannot be read: {shortened(str(error))}") from error


def local_files(name: str, split: str, given: Mapping[str, Any]) -> tuple[str, list[pathlib.Path]] | None:
    """The kind and the files of a split; None where the name is one of the hub."""
    if len(name) > 4096:
        raise FileNotFoundError(f"there is no file or folder {excerpt(name)}")
    path = pathlib.Path(resolve_embedded(name)).expanduser()
    base = split.split("[")[0]
    given = {key: value for key, value in given.items() if value}
    if "data_dir" in given and path.is_dir():
        path = path / given["data_dir"]
    named = given.get("data_files") if path.is_dir() or name in _FORMATS.values() else None
    if not path.exists() and not named:
        if path.suffix in _FORMATS or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"there is no file or folder {name!r}")
        return None
    if named:
        files = _named_files(path if path.is_dir() else pathlib.Path(), named, base)
    else:
        files = _files_in(path, name, base) if path.is_dir() else [path]
    kind, *others = {_FORMATS.get(p.suffix) for p in files}
    if kind is None or not all(p.is_file() for p in files):
        raise ValueError(f"{name!r} is not a .json, .jsonl or .parquet file; {_CONVERT}")
    if others:
        raise ValueError(f"the folder {name!r} mixes JSON and Parquet files for one split; keep one of the kinds")
    if path.is_file() and base != "train":
        raise ValueError(
            f"the file {name!r} holds the split 'train' alone; the rows of {base!r} need a file of their own (in training, "
            "--eval_dataset_name)"
        )
    return kind, files


def hub_files(name: str, config: str | None, split: str) -> tuple[str | None, dict[str, str]]:
    """ "json" and the addresses of a split of the hub that is streamed, by their names; none where `datasets` reads it."""
    import datasets
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    with hub_errors(name):
        builder: Any = datasets.load_dataset_builder(name, config)
        if isinstance(builder, Csv):
            raise ValueError("files of CSV cannot be streamed; leave --dataset_streaming out")
        given = builder.config.data_files or {}
        if not given or not isinstance(builder, Json) or getattr(builder.config, "field", None):
            return None, {}
        if split not in given:
            raise ValueError(f"{name!r} has no split {split!r}; it has {listed(list(map(str, given)), 8)}")
        return "json", {_in_repository(file): str(file) for file in given[split]}


def _in_repository(file: Any) -> str:
    """The name of a file of the hub."""
    return re.sub(r"hf://datasets/[^/]+/[^/]+/", "", str(file))


def _of_split(rows: Any, split: str):
    """The rows that a split such as "train[:10%]" names, of all those of "train"."""
    import datasets

    if not {"[", "+"} & set(split):
        return rows
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({split.split("[")[0]: len(rows)})
    return rows.select([i for part in parts for i in range(len(rows))[part.from_ : part.to]])


def _from_hub(name: str, config: str | None, split: str, named: Mapping[str, Any] = MappingProxyType({})):
    """A data set of the hub. JSON and CSV files in it are read here: `datasets` guesses what their texts may be."""
    import datasets
    import pandas as pd
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    builder: Any = datasets.load_dataset_builder(name, config, **named)
    given, bases = builder.config.data_files or {}, {part.split("[")[0].strip() for part in split.split("+")}
    if not given or not isinstance(builder, Json | Csv) or getattr(builder.config, "field", None):
        return datasets.load_dataset(name, config, split=split, **named)
    if len(bases) > 1:
        raise ValueError(
            f"the split {split!r} of {name!r} joins several, and files of JSON or CSV are read one split at a time"
        )
    if not (files := given.get(base := bases.pop())):
        raise ValueError(f"{name!r} has no split {base!r}; it has {listed(list(map(str, given)), 8)}")
    manager = datasets.DownloadManager(dataset_name=name)
    paths = list(manager.iter_files(manager.download_and_extract(list(files))))
    if isinstance(builder, Json):
        # In the cache a file has a hash for a name; messages use that in the repository.
        names = [_in_repository(file) for file in files]
        return _of_split(read_json_rows(paths, names if len(names) == len(paths) else None), split)
    # Every cell is text but an empty one, which is null.
    options: Any = builder.config.pd_read_csv_kwargs | dict(dtype=str, keep_default_na=False, na_values=[""])
    options |= dict(chunksize=None, iterator=False)
    tables = [datasets.Dataset.from_pandas(pd.read_csv(path, **options), preserve_index=False) for path in paths]
    return _of_split(datasets.concatenate_datasets(tables), split)


def _named_files(folder: pathlib.Path, named: Any, split: str) -> list[pathlib.Path]:
    """The files that `data_files` names: patterns within a folder, for each split or for "train"."""
    patterns = named.get(split) if isinstance(named, Mapping) else named if split == "train" else None
    if not patterns:
        raise ValueError(f"data_files {named!r} names no file for the split {split!r}")
    found = [
        sorted(glob.glob(pattern, root_dir=folder, recursive=True))
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    if not all(found):
        raise FileNotFoundError(f"there is no file {patterns!r} in {str(folder)!r}")
    return [folder / path for path in dict.fromkeys(itertools.chain(*found))]


def _files_in(folder: pathlib.Path, name: str, split: str) -> list[pathlib.Path]:
    """The files of a split in a folder."""
    files = sorted(p for p in folder.iterdir() if p.suffix in _FORMATS and p.is_file())
    if not files:
        raise FileNotFoundError(f"the folder {name!r} holds no .json, .jsonl or .parquet file; {_CONVERT}")
    named = [p for p in files if p.stem == split or p.stem.startswith((split + "-", split + "_", split + "."))]
    if not named and split != "train":
        found = ", ".join(p.name for p in files)
        raise ValueError(f"the folder {name!r} has no file for the split {split!r}; it has {found}")
    return named or files


def _nearest_column(row: Mapping) -> str:
    """The column of a row whose name is nearest to one that rows are made of, in words; "" where none is near."""
    near = [
        (difflib.SequenceMatcher(None, name.lower(), wanted).ratio(), name, wanted)
        for name in map(str, row)
        for wanted in FORM_COLUMNS
        if name not in READABLE
    ]
    ratio, name, wanted = max(near, default=(0, "", ""))
    return f"; {excerpt(name)} may be meant for {wanted!r}" if ratio >= 0.8 else ""


def to_example(
    row,
    index: int | str,
    source: str,
    text_column: str = "text",
    renamed: Mapping[str, str | None] | None = None,
    features: Mapping | None = None,
) -> Example:
    """One row as an example.

    The forms: `messages` (a list of {role, content}; a last message that is not an assistant's makes it a prompt
    alone); `prompt` and `completion`, each a text or a list of messages; `prompt` alone; `text`, which is a completion
    of an empty prompt; and those of other projects, which are read as messages. Which one it is, and what `renamed` does,
    says `row_formats.read_columns`.

    Beside them a row may have `tools` (a list of JSON schemas) and `chat_template_kwargs` (template variables of this
    row), each also as a string of JSON, which go with messages (a `text` is whole, so that it passes them over), and
    `teacher_context`, a text. All of them may be null. Messages call the row by its `index` and the data set's name,
    `source`. `features` are the columns' types, as `datasets.Features`, for `columns.without_fill`.

    Raises:
        ValueError: the row has none of the forms, it is one of preferences, or something in it is not as
            `columns.messages_of` and `columns.conversation_extras` take it. It names the row and its columns.
    """
    where = f"row {index} of {source}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, not a dict of columns; accepted are {ACCEPTED}")
    if features:
        row = {name: without_fill(value, features.get(name)) for name, value in row.items()}
    try:
        columns, form, format, read = read_columns(row, text_column, renamed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if form is None:
        empty = ", ".join(name for name in ("messages", "prompt", text_column) if name in row)
        hint = f" ({empty} is there but null)" if empty else ""
        has = f"{where} has the columns {listed(list(map(str, row)), 12) or 'none'}{hint}"
        raise ValueError(f"{has}{_nearest_column(row)}; accepted are {ACCEPTED}")
    if compared := what_is_compared(columns):
        raise ValueError(f"{where} has {compared}")
    try:
        for name in read & row.keys():
            check_texts(row[name], name)
        context = columns.get("teacher_context")
        context = None if context is None else text_of(context, "'teacher_context'", "text or null") or None
        if is_chat := form in ("messages", "prompt") and form != text_column:
            prompt, completion, messages = _conversation(columns) if form == "messages" else _prompt(columns)
            extras = conversation_extras(columns)
        else:
            prompt, completion, messages, extras = "", text_of(columns[form], repr(form)), None, {}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if extras:
        if isinstance(prompt, str) and messages is None:
            names = ", ".join(c for c in ("tools", "chat_template_kwargs") if columns.get(c) is not None)
            raise ValueError(
                f"{where} has {names} for the chat template, but its 'prompt' is text, which no template is applied to: make "
                'it a list of messages, [{"role": "user", "content": …}], or leave the column out'
            )
        read_by: Any = prompt, messages
        prompt, messages = (Conversation(m, **extras) if isinstance(m, list) else m for m in read_by)
    unread = tuple(str(name) for name, value in row.items() if name not in read and value is not None)
    said: Any = columns.get("completion") if is_chat and form == "prompt" else None
    answers = sum(m.get("role") == "assistant" for m in said) if isinstance(said, list) else 1
    return Example(prompt, completion, messages, context, unread, answers, format)


def _conversation(row: Mapping) -> tuple[str | list[dict], str | None, list[dict] | None]:
    """Prompt, completion and whole conversation of a row of `messages`."""
    messages = messages_of(row["messages"], "messages")
    if messages[-1]["role"] != "assistant":
        return messages, None, None
    return messages[:-1] or "", messages[-1]["content"], messages


def _prompt(row: Mapping) -> tuple[str | list[dict], str | None, list[dict] | None]:
    """The same of a row of `prompt`, perhaps with a `completion`."""

    def read(column: str):
        value = row.get(column)
        if value is None or isinstance(value, str):
            return value
        return messages_of(value, column, "text or a list of {role, content} messages")

    prompt, completion = read("prompt"), read("completion")
    if completion is None or isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion, None
    if isinstance(completion, str):
        return prompt, completion, [*prompt, {"role": "assistant", "content": completion}]
    if completion[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message of a completion must have the role 'assistant', not {completion[-1]['role']!r}"
        )
    messages = [*([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), *completion]
    return messages[:-1], messages[-1]["content"], messages
