"""`gold_jax.report`: the page says what a run's files hold, all of it as text, and nothing of them breaks it."""

import html.parser
import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from gold_jax import cli, report, train
from gold_jax.report import Report
from gold_jax.reporting import curves, page
from gold_jax.reporting.curves import plots_of
from gold_jax.reporting.run import read_run

pytest.importorskip("bokeh")
Image = pytest.importorskip("PIL.Image")  # which Bokeh brings along
EVIL = "</script><img src=http://127.0.0.1:9/x onerror=console.error(1)>"
BEFORE, AFTER = (
    {"eval_loss": a, "eval_bits_per_byte": b, "eval_exact_match": c} for a, b, c in [(2, 0.5, 0), (1, 0.3, 0)]
)
RESULTS = {"before training": BEFORE, "after training": AFTER, "teacher": {"eval_bits_per_byte": 0.1}}
RUN = "--model_name_or_path nowhere/s --teacher_model_name_or_path nowhere/t --dataset_name nowhere.jsonl"
START = "2026-01-01T00:00:{:02d}+00:00"
SECONDS = 1767225600  # when START begins


def part(start=0, how="finished", **more):
    versions = {"jax": "0.9"}
    return {
        "command": f"python {EVIL}",
        "started": START.format(start),
        "how": how,
        "to_update": 4,
        "versions": versions,
        **more,
    }


def make(folder, rows=None, completions=(), **summary):
    """A run's folder, four updates long."""
    folder.mkdir(parents=True)
    known = {"method": "on-policy distillation", "student": "s", "loss": "gold", "total_updates": 4, "parts": [part()]}
    known |= {"digests": {"the rows to evaluate on": "d"}, "settings": {"seed": 7}, "results": RESULTS}
    rows = rows or [{"step": 0, "time": SECONDS, **BEFORE}] + [
        {"step": step, "loss": 1 / step, "time": SECONDS + 5 * step} for step in (2, 4)
    ]
    (folder / "summary.json").write_text(json.dumps(known | summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = "step", "prompt", "completion", "reference", "groups", "eval_set"
    lines = (json.dumps(dict(zip(names, row))) + "\n" for row in completions)
    (folder / "completions.jsonl").write_text("".join(lines))
    return folder


class Reader(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._in = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in = tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        self.text += "" if self._in in ("script", "style") else data


def run_command(line):
    cli.run("gold_jax.report", report.main, shlex.split(line))


def refusal(line, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(line)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    return said


def test_the_verdict_says_what_is_better_worse_and_missing(tmp_path):
    run = read_run(make(tmp_path / "a", results=RESULTS | {"after training": AFTER | {"eval_loss": 3, "eval_mine": 1}}))
    assert run.verdict == (
        "Finished after 4 of 4 updates. Better: bits per byte 0.5 → 0.3. Worse: loss 2 → 3. Unchanged: exact match 0. "
        "Measured after alone: mine 1. Not measured: forward gap, reverse gap."
    )
    found = {m.label: m for m in run.measures}
    assert found["bits per byte"][1:4] == (0.5, 0.3, 0.1) and found["forward gap"].outcome == "missing"
    assert (found["mine"].after, found["mine"].more_is_better) == (1, None)


def test_of_a_running_run_the_last_evaluation_counts(tmp_path):
    rows = [{"step": 0, **BEFORE}, {"step": 2, "loss": 1}, {"step": 2, "eval_b_loss": 5, "eval_exact_match": 0.25}]
    run = read_run(make(tmp_path / "a", rows, results=None, parts=[part(how=None, to_update=0)]))
    assert run.verdict.startswith(
        "No end is recorded: it is still running, or was killed; logged up to 2 of 4 updates."
    )
    assert (
        "Better: exact match 0 → 0.25. Measured before alone: bits per byte 0.5, loss 2. Measured after" in run.verdict
    )
    assert "Measured after alone: loss (b) 5. Not measured: forward gap, reverse gap." in run.verdict
    assert "Ended by an error after 4 of 4 updates (OSError: full)." in read_run(
        make(tmp_path / "b", parts=[part(how="OSError: full")])
    ).verdict  # fmt: skip


def test_time_per_update_leaves_out_evaluations_and_stops(tmp_path, monkeypatch):
    times = [(0, 0, 0), (2, 10, 1), (2, 30, 0), (4, 34, 1), (6, 54, 1)]  # the second part begins at 50
    rows = [{"step": s, "time": SECONDS + t, **({"loss": 1} if trains else {"eval_loss": 1})} for s, t, trains in times]
    run = read_run(make(tmp_path / "a", rows, parts=[part(), part(50)]))
    plots, missing, _ = plots_of([run])
    (line,) = next(plot for plot in plots if plot.title == "time per update").lines
    assert (line.steps, line.values) == ([2, 4], [5.0, 2.0])
    assert "entropy" in missing and "loss" not in missing
    monkeypatch.setattr(curves, "MOST_POINTS", 2)
    plots, _, notes = plots_of([run])
    assert [line.values for line in plots[0].lines] == [[1, 1], [1, 1]] and "3 points drawn as means" in notes[0]


def test_whatever_the_files_hold_is_text(tmp_path):
    said = [(2, f"p{EVIL}", f"c{EVIL}\ud800", f"r{EVIL}")]
    folder = make(
        tmp_path / EVIL, completions=said, settings={"run_name": f"s{EVIL}", EVIL: 1}, student=EVIL, notices=[EVIL]
    )
    for text in (Report(folder).to_html(), Report(folder, folder).to_html()):
        reader = Reader(text)
        tags = [tag for tag, _ in reader.elements]
        assert tags.count("script") == 2 and "img" not in tags
        assert not any("onerror" in attributes for _, attributes in reader.elements)
        assert all(f"{letter}{EVIL}" in reader.text for letter in "ps") and str(folder) in reader.text
        assert f"c{EVIL}?" in reader.text
    (frame,) = Reader(Report(folder)._repr_html_()).elements
    assert frame[0] == "iframe" and frame[1]["srcdoc"].startswith("<!DOCTYPE html>") and "onerror" not in frame[1]


def test_what_is_damaged_is_counted_and_the_rest_is_shown(tmp_path, capsys):
    folder = make(tmp_path / "a", completions=[(2, "ask", "answer", None)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo\n[]\n{"step": "x"}\n{"step": 6, "loss": null, "nonfinite": {"loss": "nan"}}\n')
    with open(folder / "completions.jsonl", "ab") as file:
        file.write(b'{"step": 3, "prompt": 4}\n\xff\n')
    (folder / "summary.json").write_text("{")
    run_command(str(folder))
    said, text = capsys.readouterr().err, Reader((folder / "report.html").read_text()).text
    for note in (
        "summary.json is damaged",
        "metrics.jsonl: 3 lines are damaged and left out; the first is line 4.",
        "completions.jsonl: 2 lines are damaged and left out; the first is line 2.",
    ):
        assert note in said and note in text
    assert "1 values that are not finite are left out" in text and "answer" in text


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [3], {"a": 3}])
def test_facts_of_another_kind_break_nothing(tmp_path, value):
    names = "parts digests settings results notices student total_updates loss method".split()
    assert Report(make(tmp_path / "a", **dict.fromkeys(names, value))).to_html()
    bad = make(tmp_path / "b", parts=[{"versions": value, "started": value, "how": value}], results={"teacher": value})
    assert Report(bad, tmp_path / "a").to_html()


def test_without_a_summary_a_checkpoint_has_the_settings(tmp_path):
    folder = make(tmp_path / "a")
    (folder / "summary.json").unlink()
    for step in (9, 10):
        (folder / f"checkpoint-{step}").mkdir()
        kept = {"seed": step, "teacher_model_name_or_path": "t", "lmbda": 0.5, "the training data": "d"}
        (folder / f"checkpoint-{step}/run.json").write_text(json.dumps({"step": step, "run": kept}))
    run = read_run(folder)
    assert run.fact("settings") == {"seed": 10, "teacher_model_name_or_path": "t"} and run.fact("digests") == {
        "the training data": "d"
    }
    assert "Settings and digests are those of checkpoint-10/run.json." in run.notes


def test_a_prompt_is_shown_step_by_step_beside_its_reference(tmp_path, monkeypatch):
    rows = [(4, "ask", "an answer", "an answer"), (2, "ask", "an ox", "an answer"), (2, "once", "b", None)]
    one, other = make(tmp_path / "a", completions=rows), make(tmp_path / "b", completions=[(3, "once", "c", None)])
    run = read_run(one)
    assert run.read("ask") == ("ask", "an answer", {2: [("an ox", ())], 4: [("an answer", ())]}, "")
    assert "an <mark>ox</mark>" in page.page([run])
    shown, count, common = page._samples([run, read_run(other)])
    assert [samples[0].prompt for samples in shown] == ["once", "ask"] and (count, common) == (2, 1)
    monkeypatch.setattr(page, "STEPS", 3)
    assert page._steps([run.read("ask")._replace(by_step=dict.fromkeys(range(10)))]) == ([0, 4, 9], 10)


def bits(text, student, teacher):
    """A group of a line, of probabilities."""
    return [text, math.log(student), math.log(teacher)]


def test_groups_are_coloured_by_what_the_teacher_gives_less_or_more(tmp_path):
    groups = [bits("a", 0.5, 0.5), bits(" b", 0.5, 0.2), bits("c", 0.1, 0.8), bits("<d", 1, 1e-7), ["e", None, -1.0]]
    folder = make(tmp_path / "a", completions=[(2, "ask", "a bc<de", "a x", groups, ""), (2, "plain", "a y", "a x")])
    text = Report(folder).to_html()
    assert (
        'a<i class="l1" title="student 50 %, teacher 20 %: 1.3 bits less"> </i><mark>'
        '<i class="l1" title="student 50 %, teacher 20 %: 1.3 bits less">b</i>'
        '<i class="m2" title="student 10 %, teacher 80 %: 3.0 bits more">c</i>'
        '<i class="l3" title="student 100 %, teacher under 0.001 %: 23.3 bits less">&lt;d</i>e</mark>'
    ) in text
    assert "a <mark>y</mark>" in text and "evaluation, 1 update<" in text and "gives a group of tokens" in text
    said = Reader(Report(make(tmp_path / "b", completions=[(2, "ask", "a", "a")])).to_html()).text
    assert "gives a group of tokens" not in said and "Tokens by lost probability" not in said


@pytest.mark.parametrize(
    "groups", [3, [["a", 1]], [["a", "x", 0]], [["b", -1, -1]], [["a", 1e308, -1e308]], [["a", 900, -1]], {"a": 1}]
)
def test_groups_that_are_none_make_a_damaged_line(tmp_path, groups):
    folder = make(tmp_path / "a", completions=[(2, "ask", "a", None), (2, "ask", "a", None, groups)])
    run = read_run(folder)
    assert run.notes == ("completions.jsonl: 1 line is damaged and left out; the first is line 2.",)
    assert run.read("ask").by_step == {2: [("a", ())]} and Report(folder).to_html()


def test_tokens_are_ranked_by_the_probability_that_is_lost(tmp_path):
    lines = [
        (0, "p", " twoone", None, [bits(" two", 0.5, 0.125), bits("one", 0.5, 0.5)]),
        (4, "p", " twoone", None, [bits(" two", 0.5, 0.25), bits("one", 1, 2**-8)]),
        (5, "q", " two two", None, [bits(" two", 0.5, 2**-8), bits(" two", 0.25, 0.25)], ""),
        (5, "r", "more?", None, [bits("more", 0.1, 0.9), ["?", None, None]]),
    ]
    run = read_run(make(tmp_path / "a", completions=lines))
    assert [lost[:2] for lost in run.lost_probability] == [
        ("one", 1),
        (" two", 3),
    ]  # what the teacher gives more is lost nowhere
    one, two = run.lost_probability
    assert one[2:] == pytest.approx((1, 2**-8, 8, 0)) and two[2:] == pytest.approx((2 ** (-4 / 3), 2**-4, 8, 2))
    text = "".join(Reader(Report(tmp_path / "a").to_html()).text.split())
    assert "one1100%0.39%8.08.00.0␣two340%6.2%8.02.72.02of2texts;4completionswerescored." in text


def test_what_rounds_to_nothing_has_no_sign(tmp_path):
    lines = [(step, "p", "a", None, [bits("a", 0.5, teacher)]) for step, teacher in ((0, 0.501), (4, 0.25))]
    text = "".join(Reader(Report(make(tmp_path / "a", completions=lines)).to_html()).text.split())
    assert "a150%25%1.01.00.01of1texts" in text and "-0.0" not in text


def test_a_run_without_completions_stands_beside_one_whose_are_scored(tmp_path):
    scored = make(tmp_path / "a", completions=[(2, "ask", "a", None, [bits("a", 0.5, 0.25)])])
    other = make(tmp_path / "b")
    (other / "completions.jsonl").unlink()
    assert read_run(other).notes == ()  # --log_completions was not given
    assert "None: completions.jsonl is not there or holds none." in Report(other).to_html()
    assert read_run(other).lost_probability == [] and "No completion was scored." in Report(scored, other).to_html()


def test_a_prompt_is_of_an_evaluation_where_nothing_was_written_for_it_in_training(tmp_path):
    lines = [(step, prompt, "x", None, [], of) for step, prompt, of in [(1, "a", "one"), (2, "a", "two"), (1, "b", "")]]
    run = read_run(make(tmp_path / "a", completions=[*lines, (1, "both", "x"), (2, "both", "x", None, [], "one")]))
    assert [run.read(prompt).source for prompt in "ab"] == ["evaluation one, evaluation two", "evaluation"]
    assert run.read("both").source == ""


def test_two_runs_stand_side_by_side(tmp_path, capsys):
    one = make(tmp_path / "a")
    other = make(
        tmp_path / "b", settings={"seed": 8}, results=RESULTS | {"after training": AFTER | {"eval_bits_per_byte": 0.2}}
    )
    run_command(f"{one} {other} --output {tmp_path}/both.html")
    text = " ".join(Reader((tmp_path / "both.html").read_text()).text.split())
    assert (
        "B is better in bits per byte (A 0.3, B 0.2). Equal in both: exact match (A 0, B 0), loss (A 1, B 1)." in text
    )
    assert [line.label for line in plots_of(Report(one, other).runs)[0][0].lines] == [
        "A training", "A evaluation", "B training", "B evaluation",
    ]  # fmt: skip
    assert "differs" in page.page(Report(one, other).runs) and "seed" in text
    unlike = make(tmp_path / "c", digests={"the rows to evaluate on": "e"}, loss="events")
    assert "measured on different or unknown rows" in page._compared([read_run(one), read_run(unlike)])


def test_what_cannot_be_done_is_one_line(tmp_path, capsys, monkeypatch):
    one = make(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    looked = "holds none of summary.json, metrics.jsonl, completions.jsonl and checkpoint-STEP/run.json"
    assert looked in refusal(f"{tmp_path}/empty", capsys)
    assert "is no folder; give the --output_dir of a run" in refusal(f"{tmp_path}/none", capsys)
    assert "no runs are named" in refusal("", capsys) and "3 runs are named" in refusal("a b c", capsys)
    assert "--output is" in refusal(f"{one} --output {tmp_path}/no/x.html", capsys)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert "pip install 'gold_jax[report]'" in refusal(str(one), capsys)
    assert Report(one)._repr_html_().startswith("<pre>a report draws its curves with Bokeh: pip install")
    with pytest.raises(SystemExit):  # before rows or models are looked for
        cli.run("gold_jax.train", train.main, shlex.split(f"{RUN} --report"))
    assert "a report draws its curves with Bokeh" in capsys.readouterr().err
    assert sorted(os.listdir(one)) == ["completions.jsonl", "metrics.jsonl", "summary.json"]


def test_training_writes_the_report(world, tmp_path, capsys, monkeypatch):
    line = f"--model_name_or_path {world}/student --teacher_model_name_or_path {world}/teacher --dataset_name {world}/data "
    line += (
        "--max_steps 1 --max_completion_length 8 --per_device_train_batch_size 2 --save_strategy no --lmbda 1 --report "
    )
    line += f"--log_completions --logging_steps 1 --output_dir {tmp_path}/out"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "bokeh", None)
        with pytest.raises(SystemExit):
            cli.run("gold_jax.train", train.main, shlex.split(line))
    assert "pip install 'gold_jax[report]'" in capsys.readouterr().err and not (tmp_path / "out/metrics.jsonl").exists()
    cli.run("gold_jax.train", train.main, shlex.split(line))
    text = Reader((tmp_path / "out/report.html").read_text()).text
    assert f"The report is in {tmp_path}/out/report.html" in capsys.readouterr().out
    assert "Finished after 1 of 1 updates. Not measured: bits per byte" in text and "1 update" in text
    assert text.count("gold: chain/all/hybrid, beta 0.5") == 2  # in the head and among the settings
    run = read_run(tmp_path / "out")
    assert run.fact("settings")["report"] is True and len(run.samples) == 2 and run.notes == ()


@pytest.mark.slow
def test_a_browser_opens_it_without_errors_and_without_a_request(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium here to open the page with (apt-get install chromium)")

    def opened(path):
        """Complaints of the page, requests that it made, its text, and the colours of the picture."""
        options = "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr"
        options += f" --user-data-dir={tmp_path}/profile --virtual-time-budget=4000 --window-size=1600,2600"
        options += f" --log-net-log={tmp_path}/net.json --screenshot={tmp_path}/page.png --dump-dom"
        called = [chromium, *options.split(), "--host-resolver-rules=MAP * ~NOTFOUND", path.as_uri()]
        done = subprocess.run(called, capture_output=True, text=True, timeout=120, check=True)
        events = json.loads((tmp_path / "net.json").read_text())["events"]
        made = [event.get("params") or {} for event in events]  # of what the browser does by itself no origin is known
        urls = {p["url"] for p in made if p.get("initiator", "not an origin") != "not an origin"}
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "setting log level" not in line]
        with Image.open(tmp_path / "page.png") as picture:
            colours = {colour[:3]: count for count, colour in picture.getcolors(2**24)}
        return console, urls, Reader(done.stdout).text, colours

    (tmp_path / "blank.html").write_text(f"<body>{EVIL}</body>")
    console, urls, _, colours = opened(tmp_path / "blank.html")
    assert console and urls == {"http://127.0.0.1:9/x"}  # what the page must not do is seen
    assert max(colours.values()) > 0.99 * sum(colours.values())
    said = [(2, EVIL, EVIL, EVIL, [bits(EVIL, 0.5, 1e-4)])]
    folder = make(tmp_path / EVIL, completions=said, settings={"run_name": EVIL})
    for name, runs in {"one.html": [folder], "two.html": [folder, make(tmp_path / "b", completions=said)]}.items():
        run_command(f"{shlex.join(map(str, runs))} --output {tmp_path}/{name}")
    (tmp_path / "notebook.html").write_text(f"<!DOCTYPE html><meta charset='utf-8'>{Report(folder)._repr_html_()}")
    orange, blue = (239, 161, 102), (0, 114, 178)  # of a group that the teacher gives far less, and of a curve
    for name in ("one", "two", "notebook"):
        console, urls, text, colours = opened(tmp_path / f"{name}.html")
        assert not console and not urls
        assert max(colours.values()) < 0.95 * sum(colours.values()) and colours.get(blue, 0) > 100
        if name != "notebook":  # whose page lies in a frame
            assert "Tokens by lost probability" in text and EVIL in text and "bits per byte 0.5 → 0.3" in text
            assert colours.get(orange, 0) > 1000
