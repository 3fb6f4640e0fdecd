"""Checks the alignment of real tokenizers on very many strings, in all ordered pairs.

    python tests/text/alignment_at_scale.py --assets FOLDER --strings 1000000

For every string and pair: the spans of either side follow each other and cover the text; where the tokenizer changes
nothing, every token's surface is what stands at its span; every token is in one group; the groups are numbered in order,
hold the same bytes on both sides, cover the text, and none could be cut in two. A batch of strings is checked as one
text, the strings' ends being boundaries like others; a few strings of each are also checked by themselves, against a
plain walk along both sides. One line is printed for each pair, and at the end how many strings failed.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import multiprocessing
import pathlib
import random
import sys
import time
from collections import Counter

import numpy as np
import real_tokenizers as real
import toy_tokenizers as toys
from strings import mixed_strings

from gold_jax.text.align import group_ends
from gold_jax.text.encode import Encoded, PlainEncoder
from gold_jax.text.surface import backend_of

REAL = {
    "qwen3": "tokenizers/qwen3",
    "llama3_2": "tokenizers/llama3_2",
    "llama2": "tokenizers/llama2",
    "gemma3": "tokenizers/gemma3",
    "gpt2": "tokenizers/gpt2",
    "smollm2": "smollm2-135m-instruct",
}
TRAINED = ("unigram blanks", "wordpiece")


class Side:
    """A tokenizer to check.

    Attributes:
        encoder: encodes plain text.
        forgets: whether the tokenizer forgets white space, so that surfaces are compared without it.
        lacks: the bytes that a byte-level vocabulary lacks, which the tokenizer drops (SmolLM2: U+0004 and others).
    """

    def __init__(self, tokenizer):
        self.encoder = PlainEncoder(tokenizer)
        self._tokenizer, self._backend = tokenizer, copy.deepcopy(backend_of(tokenizer))
        surfaces = self.encoder.surfaces
        self.forgets = not surfaces.reversible or "WhitespaceSplit" in str(getattr(self._backend, "pre_tokenizer", ""))
        self._marks_blanks = "▁" in surfaces.strings
        found = {entry[0] for entry in surfaces.table if entry and len(entry) == 1}
        by_bytes = surfaces.reversible and not self._marks_blanks
        self.lacks = bytes(set(range(256)) - found) if by_bytes else b""

    def decode(self, ids: list[list[int]]) -> list[str]:
        """What the tokenizer's own decoder makes of ids."""
        if self._backend is None:
            return [self._tokenizer.decode(row) for row in ids]
        return self._backend.decode_batch(ids, skip_special_tokens=False)

    def changes(self, text: str) -> bool:
        """Whether the tokenizer reads a text as another one, so that surfaces need not be what stands there."""
        read = text
        if self._backend is not None and self._backend.normalizer is not None:
            read = self._backend.normalizer.normalize_str(text)
        elif hasattr(self._tokenizer, "sp_model"):
            read = self._tokenizer.sp_model.normalize(text)
        return (read.replace("▁", " ") if self._marks_blanks else read) not in (text, " " + text)


@functools.cache
def real_sides(assets: pathlib.Path) -> dict[str, Side]:
    """The real tokenizers, and two that are trained here."""
    return {name: Side(real.tokenizer(assets / path)) for name, path in REAL.items()} | toy_sides(TRAINED)


def toy_sides(names=tuple(toys.EVERY)) -> dict[str, Side]:
    return {name: Side(toys.EVERY[name]()) for name in names}


def make_strings(sides: dict[str, Side], count: int, seed: int) -> list[str]:
    """Three quarters made up, one quarter what the tokenizers' decoders make of random ids."""
    rng = np.random.default_rng(seed)
    strings = mixed_strings(count - count // 4, seed)
    share = -(-(count // 4) // len(sides))
    for side in sides.values():
        ids = [
            [i for i in rng.integers(0, len(side.encoder.surfaces), size).tolist() if side.encoder.surfaces.strings[i]]
            for size in rng.integers(1, 24, share)
        ]
        strings += [text[:120] or "x" for text in side.decode(ids)]
    return strings[:count]


@dataclasses.dataclass
class Flat:
    """A batch of strings as one text; `N` strings, `K` tokens.

    Attributes:
        row: [K], the string of each token.
        ends: [K], the byte of the whole text at which it ends.
        leading: bool [K], tokens without bytes at their string's start, which belong to its first group.
        boundary: bool [bytes + 1], where a token ends.
        surfaceless: the number of tokens that stand for text without a surface.
    """

    row: np.ndarray
    ends: np.ndarray
    leading: np.ndarray
    boundary: np.ndarray
    surfaceless: int

    def marked(self, mark: int) -> np.ndarray:
        """Ends in quarters of a byte: a string's leading empty tokens end after the string before, each side apart."""
        return self.ends * 4 + self.leading * mark


def flatten(side: Side, encoded: list[Encoded], texts: list[str], bases: np.ndarray, lead: bool) -> tuple[Flat, set]:
    """One side of a batch, and the strings in which its spans are wrong."""
    counts = np.array([len(e.ids) for e in encoded])
    if not counts.all():
        raise ValueError(f"no token for {texts[int(np.argmin(counts))]!r}")
    row = np.repeat(np.arange(len(texts)), counts)
    spans = np.concatenate([e.spans for e in encoded]).astype(np.int64)
    ids, unknown = np.concatenate([e.ids for e in encoded]), np.concatenate([e.unknown for e in encoded])
    last = np.cumsum(counts) - 1
    first = last - counts + 1
    before = np.roll(spans[:, 1], 1)
    before[first] = 0
    wrong = (spans[:, 0] != before) | (spans[:, 1] < spans[:, 0])
    wrong[last] |= spans[last, 1] != np.diff(bases)
    surfaceless = ~side.encoder.surfaces.spells[ids] & (spans[:, 1] > spans[:, 0])
    wrong |= surfaceless != unknown
    places, data = spans + bases[row][:, None], "".join(texts).encode()
    exact = spelled_there(side, ids, places, data) | surfaceless
    exact |= spans[:, 0] == 0 if lead or side.encoder.prefix == "forced" else False  # a blank that is not in the text
    failed = set(row[wrong].tolist())
    changed = {r: side.changes(texts[r]) for r in set(row[~exact].tolist())}
    for k in np.flatnonzero(~exact).tolist():
        there, spelled = data[places[k, 0] : places[k, 1]], side.encoder.surfaces.spelling[ids[k]]
        dropped = side.lacks and (not there.isascii() or not there or there.translate(None, side.lacks) == spelled)
        if not dropped and not changed[int(row[k])]:
            failed.add(int(row[k]))
    ends = spans[:, 1] + bases[row]
    leading = spans[:, 1] == 0
    boundary = np.zeros(bases[-1] + 1, np.bool_)
    boundary[ends[~leading]] = True
    return Flat(row, ends, leading, boundary, int(unknown.sum())), failed


def spelled_there(side: Side, ids: np.ndarray, spans: np.ndarray, data: bytes) -> np.ndarray:
    """Bool [K]: whether each token's surface is what stands at its span."""
    surfaces = side.encoder.surfaces
    if side.forgets:
        found = [data[a:b].decode(errors="replace").strip() for a, b in spans.tolist()]
        return np.array(
            [surfaces.spelling[i].decode(errors="replace").strip() == f for i, f in zip(ids.tolist(), found)]
        )
    sizes = surfaces.lengths[ids].astype(np.int64)
    same = sizes == spans[:, 1] - spans[:, 0]
    text, spelled = (np.frombuffer(part, np.uint8) for part in (data, surfaces.join(ids.tolist())))
    kept = np.where(same, sizes, 0)
    token = np.repeat(np.arange(len(ids)), kept)
    within = np.arange(len(token)) - (np.cumsum(kept) - kept)[token]
    differ = text[spans[token, 0] + within] != spelled[(np.cumsum(sizes) - sizes)[token] + within]
    same[token[differ]] = False
    return same


def check_pair(ours: Flat, theirs: Flat, bases: np.ndarray) -> tuple[int, int, set]:
    """Groups, groups of one token on either side, and the strings in which something is wrong."""
    student_group, teacher_group, count = group_ends(ours.marked(1), theirs.marked(2))
    failed: set[int] = set()
    closing = []  # bool [bytes + 1], where groups end, by either side
    for flat, group in ((ours, student_group), (theirs, teacher_group)):
        step = np.diff(group, prepend=-1)
        step[0] += group[0] > 0
        failed |= set(flat.row[(step < 0) | (step > 1)].tolist())
        closing.append(np.zeros_like(flat.boundary))
        closing[-1][flat.ends[np.append(step[1:] > 0, True)]] = True
    # Groups end at the same bytes, and wherever both sides end a token: none could be cut in two.
    off = (closing[0] != closing[1]) | (closing[0] != (ours.boundary & theirs.boundary))
    off[bases[1:]] |= ~closing[0][bases[1:]]
    failed |= set((np.searchsorted(bases, np.flatnonzero(off), side="left") - 1).tolist())
    if not failed and not student_group[-1] + 1 == teacher_group[-1] + 1 == np.count_nonzero(closing[0]) == count:
        failed.add(len(bases) - 2)
    sizes = [np.bincount(group[group >= 0], minlength=count)[:count] for group in (student_group, teacher_group)]
    return count, int(((sizes[0] == 1) & (sizes[1] == 1)).sum()), failed


def slow_groups(student, teacher):
    """The reference: walk along both lists of ends and close a group wherever both stand at the same byte."""
    groups, i, j = [], 0, 0
    while i < len(student) or j < len(teacher):
        ours, theirs = [], []
        while not (ours and theirs and student[i - 1] == teacher[j - 1] and student[i - 1] > 0):
            if not theirs or (ours and teacher[j - 1] <= student[i - 1]):
                theirs.append(j)
                j += 1
            else:
                ours.append(i)
                i += 1
        while i < len(student) and student[i] == student[i - 1]:
            ours.append(i)
            i += 1
        while j < len(teacher) and teacher[j] == teacher[j - 1]:
            theirs.append(j)
            j += 1
        groups.append((ours, theirs))
    return groups


def walk_agrees(student: np.ndarray, teacher: np.ndarray) -> bool:
    """Whether `group_ends` gives the groups of the walk."""
    student_group, teacher_group, count = group_ends(student, teacher)
    expected = slow_groups(student.tolist(), teacher.tolist())
    return (
        count == len(expected)
        and student_group.tolist() == [g for g, (ours, _) in enumerate(expected) for _ in ours]
        and teacher_group.tolist() == [g for g, (_, theirs) in enumerate(expected) for _ in theirs]
    )


@dataclasses.dataclass
class Report:
    """Counts by pair (`strings`, `tokens`, `groups`, `one`, `failed`) and by tokenizer (`unknown`), and failing strings."""

    counts: Counter = dataclasses.field(default_factory=Counter)
    failures: list = dataclasses.field(default_factory=list)

    def add(self, where, texts: list[str], failed: set[int]):
        self.counts[where, "failed"] += len(failed)
        if failed and len(self.failures) < 100:
            self.failures.append((where, texts[min(failed)]))

    def merge(self, other: "Report"):
        self.counts += other.counts
        self.failures += other.failures

    def failed(self) -> int:
        return sum(n for (_, what), n in self.counts.items() if what == "failed")

    def lines(self, names) -> list[str]:
        head = f"{'student':16}{'teacher':16}{'strings':>10}{'tokens':>12}{'groups':>12}{'1:1':>8}{'failed':>8}"
        lines = [head]
        for pair in itertools.permutations(names, 2):
            n = {what: self.counts[pair, what] for what in ("strings", "tokens", "groups", "one", "failed")}
            share = n["one"] / max(1, n["groups"])
            lines.append(
                f"{pair[0]:16}{pair[1]:16}{n['strings']:10}{n['tokens']:12}{n['groups']:12}{share:8.1%}{n['failed']:8}"
            )
        for name in names:
            unknown, failed = self.counts[name, "unknown"], self.counts[name, "failed"]
            lines.append(f"{name}: {unknown} tokens without a surface stand for text; spans wrong in {failed} strings")
        lines.append(f"{self.failed()} failures")
        return lines + [f"first failing string, {where}: {text!r}" for where, text in self.failures[:1]]


def check_strings(sides: dict[str, Side], texts: list[str], report: Report, *, lead: bool, seed: int, sample: int = 4):
    """Encode strings with every tokenizer and check every ordered pair, all strings at once and a sample one by one."""
    bases = np.concatenate([[0], np.cumsum([len(text.encode()) for text in texts])])
    encoded = {name: side.encoder.encode(texts, lead=lead) for name, side in sides.items()}
    flats = {}
    for name, side in sides.items():
        flats[name], failed = flatten(side, encoded[name], texts, bases, lead)
        report.add(name, texts, failed)
        report.counts[name, "unknown"] += flats[name].surfaceless
    rows = random.Random(seed).sample(range(len(texts)), min(sample, len(texts)))
    for pair in itertools.permutations(sides, 2):
        ours, theirs = (flats[name] for name in pair)
        groups, one, failed = check_pair(ours, theirs, bases)
        ends = [[encoded[name][row].spans[:, 1] for name in pair] for row in rows]
        failed |= {row for row, (a, b) in zip(rows, ends) if not walk_agrees(a, b)}
        report.add(pair, texts, failed)
        report.counts.update(
            {
                (pair, "strings"): len(texts),
                (pair, "tokens"): len(ours.row),
                (pair, "groups"): groups,
                (pair, "one"): one,
            }
        )


def run(
    sides: dict[str, Side], strings: int, *, seed: int = 0, batch: int = 2000, part: int = 0, parts: int = 1
) -> Report:
    """Check `strings` strings in batches; of several parts, only every so manieth batch. A third have a blank before."""
    report, begun = Report(), time.monotonic()
    sizes = [min(batch, strings - start) for start in range(0, strings, batch)]
    for k in range(part, len(sizes), parts):
        texts = make_strings(sides, sizes[k], seed + k)
        check_strings(sides, texts, report, lead=k % 3 == 2, seed=seed + k)
        if k % 50 < parts:
            print(f"batch {k + 1} of {len(sizes)}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return report


def _worker(task) -> Report:
    assets, strings, options = task
    return run(real_sides(assets), strings, **options)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=pathlib.Path, required=True, help="the folder that tests/fetch_assets.py made")
    parser.add_argument("--strings", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(arguments)
    parts = [
        (args.assets, args.strings, {"seed": args.seed, "batch": args.batch, "part": part, "parts": args.workers})
        for part in range(args.workers)
    ]
    total = Report()
    if args.workers == 1:
        total.merge(_worker(parts[0]))
    else:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            for report in pool.map(_worker, parts):
                total.merge(report)
    print("\n".join(total.lines([*REAL, *TRAINED])))
    return int(total.failed() > 0)


if __name__ == "__main__":
    sys.exit(main())
