"""The report as one self-contained HTML page.

Everything from a run's files is escaped; the content security policy allows the page's own two scripts and no requests.
"""

import base64
import collections
import datetime
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from gold_jax.reporting import plots
from gold_jax.reporting.curves import plots_of
from gold_jax.reporting.run import Completion, Group, Run, Sample, plain
from gold_jax.training.logging import LOGS, shown

PROMPTS = 12  # whose completions are shown
STEPS = 24  # of a prompt
CHARACTERS = 3000  # of a text
PROMPT = 200  # last ones of a prompt, where it is a title
LOST = 20  # texts in the table of lost probability
LEVELS = (0.5, 2.0, 5.0)  # bits at which the steps of the colours begin
_FACTS = ("student", "teacher", "method", "loss", "completions", "vocabularies", "student reads", "teacher reads", "data",
          "rows")  # fmt: skip
_DRAW = """const items = %s, dark = matchMedia("(prefers-color-scheme: dark)");
let text = JSON.stringify(items);
if (dark.matches) for (const [light, other] of Object.entries(%s)) text = text.replaceAll(light, other);
for (const item of JSON.parse(text)) Bokeh.embed.embed_item(item).catch(error => console.error(error));
dark.addEventListener("change", () => location.reload());"""


def page(runs: Sequence[Run]) -> str:
    """The page of one run or of two. ImportError: Bokeh is not installed."""
    found, missing, notes = plots_of(runs)
    items = [plots.draw(plot, f"plot{k}", len(runs)) for k, plot in enumerate(found)]
    scripts = [plots.script(), _DRAW % (htmlsafe_json_dumps(items), htmlsafe_json_dumps(plots.DARK))] if items else []
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    text = _environment().get_template("page.html").render(
        runs=runs, names=_names(runs), plots=found, missing=missing, plot_notes=notes, scripts=map(Markup, scripts),
        allowed=allowed, samples=_samples(runs), compared=_compared(runs), settings=_settings(runs),
        facts=_table([{k: x for k in _FACTS if (x := run.summary.get(k)) is not None} for run in runs]),
        environment=_environments(runs), completions=LOGS[1],
        now=datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes"),
    )  # fmt: skip
    return text.encode("utf-8", "replace").decode()  # lone surrogates cannot be encoded


def page_path(runs: Sequence[Run]) -> pathlib.Path:
    """The default path of the page, in the first run's folder."""
    return runs[0].folder / ("report.html" if len(runs) == 1 else "comparison.html")


def write_page(runs: Sequence[Run], path: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the page atomically; `path` None: to `page_path`. ImportError: Bokeh is not installed."""
    path, text = pathlib.Path(path or page_path(runs)), page(runs)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return path


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.folder.resolve().name or str(run.folder) for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _compared(runs: Sequence[Run]) -> str:
    """Sentences on which of two runs is better by which metrics; "" for one run."""
    if len(runs) < 2:
        return ""
    rows = [run.fact("digests").get("the rows to evaluate on") for run in runs]
    if None in rows or rows[0] != rows[1]:
        return "A and B were measured on different or unknown rows, so their metrics are not compared."
    ahead: dict[str, list[str]] = {"A": [], "B": [], "": []}
    others = {measure.label: measure for measure in runs[1].measures}
    one_loss = runs[0].summary.get("loss") == runs[1].summary.get("loss")
    for one in runs[0].measures:
        other = others.get(one.label)
        if other is None or None in (one.after, other.after, one.more_is_better):
            continue
        if one.label.startswith("loss") and not one_loss:
            continue
        first = one.after > other.after if one.more_is_better else one.after < other.after
        better = "" if one.after == other.after else "A" if first else "B"
        ahead[better].append(f"{one.label} (A {shown(one.after)}, B {shown(other.after)})")
    heads = {"A": "A is better in", "B": "B is better in", "": "Equal in both:"}
    return (
        " ".join(f"{heads[k]} {', '.join(names)}." for k, names in ahead.items() if names)
        or "Nothing was measured of both."
    )


def _samples(runs: Sequence[Run]) -> tuple[list[tuple[Sample | None, ...]], int, int]:
    """The completions of each run for the prompts shown; the number of prompts; the number that all runs have."""
    counts = {prompt: [len(run.samples.get(prompt, ())) for run in runs] for run in runs for prompt in run.samples}
    scored = collections.Counter(prompt for run in runs for _, prompt, _ in run.scored)
    best = sorted(counts, key=lambda prompt: (-min(counts[prompt]), -scored[prompt], -sum(counts[prompt])))[:PROMPTS]
    read = [tuple(run.read(prompt) if prompt in run.samples else None for run in runs) for prompt in best]
    return read, len(counts), sum(min(count) > 0 for count in counts.values())


def _steps(samples: Sequence[Sample | None]) -> tuple[list[int], int]:
    """The updates shown for a prompt, including the first and the last, and the number of all."""
    steps = sorted({step for sample in samples if sample for step in sample.by_step})
    if len(steps) <= STEPS:
        return steps, len(steps)
    return [steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)], len(steps)


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], str, bool]]:
    """Settings that differ from the default in a run: name, values, default, whether the runs differ."""
    rows = []
    defaults = [run.defaults for run in runs]
    for name in dict.fromkeys(name for run in runs for name in run.fact("settings")):
        values = [plain((d | run.fact("settings")).get(name)) for run, d in zip(runs, defaults)]
        rows.append((name, values, plain(defaults[0].get(name)), len(set(values)) > 1))
    return rows


def _table(columns: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Named values of every run, and whether they differ."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [plain(column[name]) if name in column else "—" for column in columns]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _environments(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Devices, versions and digests; values that changed when a run was resumed are joined by ", then "."""
    columns = []
    for run in runs:
        values_of: dict[str, dict[str, None]] = {}
        for part in run.parts:
            versions = part.get("versions") if isinstance(part.get("versions"), dict) else {}
            where = {name: part[name] for name in ("device", "backend", "devices", "processes") if name in part}
            for name, value in (where | versions).items():
                values_of.setdefault(str(name), {})[plain(value)] = None
        digests = {f"digest of {k}": v for k, v in run.fact("digests").items() if isinstance(v, str | int)}
        columns.append({name: ", then ".join(values) for name, values in values_of.items()} | digests)
    return _table(columns)


def _cut(text: str) -> str:
    rest = len(text) - CHARACTERS
    return text if rest <= 0 else f"{text[:CHARACTERS]}… and {rest:,} characters more"


class _Piece(NamedTuple):
    """Text with the class of its colour ("" where the models agree, or nothing is known) and its tooltip."""

    text: str
    style: str
    title: str


def _parts(completion: Completion, reference: str | None) -> tuple[list[_Piece], list[_Piece]]:
    """The pieces of a completion up to where it differs from the reference, and the pieces after that."""
    text = _cut(completion.text)
    same, end = len(os.path.commonprefix([text, reference or text])), 0
    parts: tuple[list[_Piece], list[_Piece]] = [], []
    for group in completion.groups:
        if end >= CHARACTERS:
            break
        begin, end = end, min(end + len(group.text), CHARACTERS)
        for part, a, b in zip(parts, (begin, max(begin, same)), (min(end, same), end)):
            if a < b:
                part.append(_Piece(text[a:b], *_coloured(group)))
    for part, a, b in zip(parts, (min(end, same), max(end, same)), (same, len(text))):
        if a < b:
            part.append(_Piece(text[a:b], "", ""))
    return parts


def _coloured(group: Group) -> tuple[str, str]:
    """Class and title of a group: how far the teacher is from the student there."""
    level = 0 if group.lost is None else sum(abs(group.lost) >= bits for bits in LEVELS)
    if not level:
        return "", ""
    side, word = ("l", "less") if group.lost > 0 else ("m", "more")
    given = f"student {_share(math.exp(group.student))}, teacher {_share(math.exp(group.teacher))}"
    return f"{side}{level}", f"{given}: {abs(group.lost):.1f} bits {word}"


def _share(probability: float) -> str:
    """A probability in per cent."""
    return "under 0.001 %" if probability < 1e-5 else f"{100 * probability:.2g} %".replace("1e+02", "100")


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "assets")
    options = {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, autoescape=True, **options)
    environment.filters |= {
        "value": lambda value: "—" if value is None else shown(value),
        "fact": lambda value: "—" if value is None or isinstance(value, jinja2.Undefined) else plain(value),
        "cut": _cut,
        "end": lambda text: text if len(text) <= PROMPT else f"…{text[-PROMPT:]}",
        "share": _share,
        "bits": lambda bits: "—" if bits is None else f"{bits:z.1f}",  # z: no -0.0
        "visible": lambda text: text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥"),
    }
    environment.globals |= {"parts_of": _parts, "steps_of": _steps, "zip": zip, "levels": LEVELS, "lost_shown": LOST}
    return environment
