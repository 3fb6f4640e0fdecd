"""Reads a run's folder: its summary, metrics and completions. Does not import JAX."""

import dataclasses
import datetime
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.json_files import parse_json_object, read_json_object, regular_file
from gold_jax.notebook import table
from gold_jax.training.logging import LOGS, SUMMARY, shown

METADATA = "run.json"  # of a checkpoint
# Metrics with their labels, and whether higher is better.
MEASURES = {
    "bits_per_byte": ("bits per byte", False),
    "forward_gap": ("forward gap", False),
    "reverse_gap": ("reverse gap", False),
    "exact_match": ("exact match", True),
    "loss": ("loss", False),
}


class Measure(NamedTuple):
    """A metric before and after training; None: not measured."""

    label: str
    before: float | None
    after: float | None
    teacher: float | None
    more_is_better: bool | None  # None: not known

    @property
    def outcome(self) -> str:
        """One of better, worse, unchanged, before alone, after alone and missing; "" if not known."""
        if self.before is None or self.after is None:
            return "after alone" if self.after is not None else "missing" if self.before is None else "before alone"
        if self.before == self.after or self.more_is_better is None:
            return "" if self.more_is_better is None else "unchanged"
        return "better" if (self.after > self.before) is self.more_is_better else "worse"


class Group(NamedTuple):
    """A group of a completion, with the log-probabilities in nats that both models give it; None: not known."""

    text: str
    student: float | None
    teacher: float | None

    @property
    def lost(self) -> float | None:
        """The student's log-probability less the teacher's, in bits; None: not known."""
        return None if None in self else (self.student - self.teacher) / math.log(2)


class Completion(NamedTuple):
    """A completion by the student."""

    text: str
    groups: tuple[Group, ...] = ()  # of the whole text; empty if it was not scored


class Sample(NamedTuple):
    """The student's completions of one prompt."""

    prompt: str
    reference: str | None  # the row's own completion
    by_step: Mapping[int, list[Completion]]
    source: str = ""  # "" for training, else "evaluation" with the names of several sets


class LostProbability(NamedTuple):
    """The probability that the teacher gives less than the student to a text of groups, in the later half of the scored updates."""

    text: str
    times: int
    student: float  # probability: the geometric mean over these times
    teacher: float
    bits: float  # sum of `Group.lost` over these times
    earlier: float | None  # mean of `Group.lost` in the earlier half; None: it did not occur


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished or running run; made by `read_run`."""

    folder: pathlib.Path
    summary: Mapping[str, Any]  # summary.json; {} if there is none
    rows: tuple[Mapping[str, Any], ...]  # the lines of metrics.jsonl
    samples: Mapping[str, tuple[int, ...]]  # prompt -> where in completions.jsonl its lines begin
    scored: tuple[tuple[int, str, int], ...]  # of the lines there that have groups: update, prompt and where it begins
    notes: tuple[str, ...]  # what could not be read, one sentence each

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.state})"

    def _repr_html_(self) -> str:
        """What notebooks show: how it went, and the measures."""
        found = ((m.label, (m.before, m.after, m.teacher), m.outcome) for m in self.measures)
        rows = [(label, *("" if x is None else shown(x) for x in values), end) for label, values, end in found]
        title = f"{self.folder}: {self.state}. Trained with {self.summary.get('loss', 'an unknown loss')}"
        return table(title, rows, ("", "before", "after", "teacher", ""))

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """Each time that the run was started or resumed."""
        found = self.summary.get("parts")
        return [part for part in found if isinstance(part, Mapping)] if isinstance(found, list) else []

    def fact(self, name: str) -> Mapping[str, Any]:
        """An object in the summary; {} if it is not an object."""
        found = self.summary.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def state(self) -> str:
        """The state of the run, such as "Finished after 200 of 200 updates"."""
        part = self.parts[-1] if self.parts else {}
        how, total = part.get("how"), self.summary.get("total_updates", "an unknown number of")
        last = max((row["step"] for row in self.rows), default=0)
        of = f"{max(whole(part.get('to_update')) or 0, last)} of {total} updates"
        if how is None:
            return f"No end is recorded: it is still running, or was killed; logged up to {of}"
        known = how in ("finished", "interrupted", "preempted")
        return f"{how.capitalize()} after {of}" if known else f"Ended by an error after {of} ({how})"

    @functools.cached_property
    def measures(self) -> list[Measure]:
        """The metrics before and after training; those that every run should have come first."""
        results, evaluations = self.fact("results"), [row for row in self.rows if "eval_loss" in row or _evaluates(row)]
        first = next((row for row in evaluations if row["step"] == 0), {})
        last = evaluations[-1] if evaluations and evaluations[-1]["step"] else {}
        columns = [
            results.get("before training") or first,
            results.get("after training") or last,
            results.get("teacher"),
        ]
        columns = [{k: number(v) for k, v in c.items()} if isinstance(c, Mapping) else {} for c in columns]
        names = dict.fromkeys(name for column in columns for name in column if name.startswith("eval_"))
        found = []
        for measure, (label, better) in MEASURES.items():
            sets = [(name, part) for name in names if (part := of_set(name, measure)) is not None]
            sets = sets or [("", "")] * (measure != "loss")  # reported if missing
            for name, part in sets:
                names.pop(name, None)
                found.append(Measure(f"{label} ({part})" if part else label, *(c.get(name) for c in columns), better))
        rest = [Measure(name[5:].replace("_", " "), *(c.get(name) for c in columns), None) for name in names]
        return found + [measure for measure in rest if measure.after is not None]

    @property
    def verdict(self) -> str:
        """A paragraph: how the run ended, which metrics are better, worse, unchanged or missing."""
        by: dict[str, list[str]] = {}
        for m in self.measures:
            values = [shown(value) for value in dict.fromkeys((m.before, m.after)) if value is not None]
            by.setdefault(m.outcome, []).append(f"{m.label} {' → '.join(values)}".strip())
        heads = {"better": "Better", "worse": "Worse", "unchanged": "Unchanged"}
        heads |= {k: f"Measured {k}" for k in ("before alone", "after alone")} | {"missing": "Not measured"}
        return " ".join([f"{self.state}.", *(f"{head}: {', '.join(by[k])}." for k, head in heads.items() if k in by)])

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of this kind of run."""
        return (SFTConfig if self.summary.get("method") == "supervised fine-tuning" else GOLDConfig)().to_dict()

    @property
    def started(self) -> list[float]:
        """The start times of the parts, in seconds since 1970."""
        return [when for part in self.parts if (when := _timestamp(part.get("started"))) is not None]

    def read(self, prompt: str) -> Sample:
        """All that was written for a prompt."""
        by_step: dict[int, list[Completion]] = {}
        reference, sources = None, []
        for row in self._rows_at(self.samples.get(prompt, ())):
            by_step.setdefault(row["step"], []).append(_completion(row))
            reference = row["reference"] if isinstance(row.get("reference"), str) else reference
            sources.append(f"evaluation {row['eval_set']}".strip() if isinstance(row.get("eval_set"), str) else "")
        source = "" if "" in sources else ", ".join(dict.fromkeys(sources))
        return Sample(prompt, reference, dict(sorted(by_step.items())), source)

    def _rows_at(self, offsets: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The lines of completions.jsonl that begin at `offsets`; without any, the file need not be there."""
        if not (offsets := list(offsets)):
            return
        with open(self.folder / LOGS[1], "rb") as file:
            for offset in offsets:
                file.seek(offset)
                yield parse_json_object(file.readline(), LOGS[1])

    @functools.cached_property
    def lost_probability(self) -> list[LostProbability]:
        """The texts of groups that the teacher gives less probability than the student, the most bits first."""
        steps = sorted({step for step, _, _ in self.scored})
        sums: dict[str, list[list[float]]] = {}  # of either half: times, log-probability of the student, of the teacher
        for row in self._rows_at(offset for _, _, offset in self.scored):
            later = row["step"] >= steps[len(steps) // 2]
            for group in _completion(row).groups:
                if group.lost is not None:
                    held = sums.setdefault(group.text, [[0, 0.0, 0.0], [0, 0.0, 0.0]])[later]
                    held[:] = held[0] + 1, held[1] + group.student, held[2] + group.teacher
        found = []
        for text, ((before, ours, theirs), (times, student, teacher)) in sums.items():
            if times and student > teacher:
                means = math.exp(student / times), math.exp(teacher / times)
                earlier = (ours - theirs) / before / math.log(2) if before else None
                found.append(LostProbability(text, int(times), *means, (student - teacher) / math.log(2), earlier))
        return sorted(found, key=lambda lost: -lost.bits)


def read_run(folder: Any) -> Run:
    """Reads a run's folder; damaged data is left out and counted in `notes`.

    FileNotFoundError: the folder does not exist or has no files of a run.
    """
    folder, notes, summary = pathlib.Path(folder).expanduser(), [], {}
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{METADATA}")]
    checkpoints.sort(key=lambda path: (len(path.name), path.name))
    if not checkpoints and not any((folder / name).exists() for name in (SUMMARY, *LOGS)):
        what = f"is no run's folder: it holds none of {SUMMARY}, {', '.join(LOGS)} and checkpoint-STEP/{METADATA}"
        raise FileNotFoundError(
            f"{folder} {what if folder.is_dir() else 'is no folder; give the --output_dir of a run'}."
        )
    try:
        summary = read_json_object(folder / SUMMARY)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        notes.append(f"{SUMMARY} is {'not there' if missing else f'damaged: {error}'}".rstrip(".") + ".")
        for checkpoint in checkpoints[-1:]:
            try:
                summary = _of_checkpoint(read_json_object(checkpoint / METADATA))
                notes.append(f"Settings and digests are those of {checkpoint.name}/{METADATA}.")
            except (OSError, ValueError) as why:
                notes.append(f"{checkpoint.name}/{METADATA} is damaged: {why}")
    rows = tuple(row for _, row in _lines(folder / LOGS[0], notes, lambda row: None))
    samples: dict[str, list[int]] = {}
    scored = []
    for offset, row in _lines(folder / LOGS[1], notes, _completion):
        samples.setdefault(row["prompt"], []).append(offset)
        scored += [(row["step"], row["prompt"], offset)] * ("groups" in row)
    where = {prompt: tuple(offsets) for prompt, offsets in samples.items()}
    return Run(folder, summary, rows, where, tuple(scored), tuple(notes))


def _completion(row: Mapping[str, Any]) -> Completion:
    """A line of completions.jsonl; ValueError where it is none."""
    text, groups = row.get("completion"), row.get("groups", [])
    if not (isinstance(row.get("prompt"), str) and isinstance(text, str) and isinstance(groups, list)):
        raise ValueError("no prompt with a completion")
    found = []
    for group in groups:
        if not (isinstance(group, list) and len(group) == 3 and isinstance(group[0], str)):
            raise ValueError("no text with two numbers")
        if not all(value is None or (number(value) is not None and -1e9 < value < 1e-3) for value in group[1:]):
            raise ValueError("no log-probabilities")
        found.append(Group(*group))
    if found and "".join(group.text for group in found) != text:
        raise ValueError("groups of another text")
    return Completion(text, tuple(found))


def _lines(
    path: pathlib.Path, notes: list[str], check: Callable[[Mapping[str, Any]], Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a log with where they begin; those that are damaged, also as `check` says, are counted in `notes`."""
    offset, damaged, first = 0, 0, 0
    try:
        with open(regular_file(path), "rb") as file:
            for count, line in enumerate(file, 1):
                try:
                    row = parse_json_object(line, path.name)
                    if whole(row.get("step")) is None:
                        raise ValueError
                    check(row)
                except ValueError:
                    damaged, first = damaged + 1, first or count
                else:
                    yield offset, row
                offset += len(line)
    except FileNotFoundError:
        if path.name != LOGS[1]:  # which a run without --log_completions does not write
            notes.append(f"{path.name} is not there.")
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}")
    if damaged:
        lines = "1 line is" if damaged == 1 else f"{damaged:,} lines are"
        notes.append(f"{path.name}: {lines} damaged and left out; the first is line {first}.")


def _of_checkpoint(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a summary that a checkpoint's metadata has."""
    known = metadata.get("run") if isinstance(metadata.get("run"), Mapping) else {}
    method = {} if "teacher_model_name_or_path" in known else {"method": "supervised fine-tuning"}
    defaults = (SFTConfig if method else GOLDConfig)().to_dict()
    settings = {name: value for name, value in known.items() if name in defaults and value != defaults[name]}
    return {**method, "settings": settings, "digests": {k: v for k, v in known.items() if k not in defaults}}


def of_set(name: str, measure: str) -> str | None:
    """The evaluation set of a metric such as `eval_NAME_loss`, "" for a single set; None if it is another metric.

    >>> of_set("eval_loss", "loss"), of_set("eval_easy_loss", "loss"), of_set("eval_loss", "exact_match")
    ('', 'easy', None)
    """
    match = re.fullmatch(rf"eval_(?:(.+)_)?{measure}", name)
    return (match[1] or "") if match else None


def _evaluates(row: Iterable[str]) -> bool:
    return any(name.startswith("eval_") for name in row)


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    try:
        return (
            value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
        )
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """The value if it can be a number of updates, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _timestamp(text: Any) -> float | None:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def plain(value: Any) -> str:
    """A setting or fact as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
