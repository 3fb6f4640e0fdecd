"""What values show of themselves in a notebook: what they hold, escaped, and no arrays."""

import html.parser
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_models as tiny

import gold_jax
from gold_jax.models.functional import merge, split
from gold_jax.notebook import table, token_table
from gold_jax.reporting.run import read_run

STUDENT, TEACHER = "embedded:student", "embedded:teacher"
ROWS = [
    {"prompt": f"How do you say {n}?", "completion": f"{n} is {word}."} for n, word in [(5, "five"), (17, "seventeen")]
]


class Page(html.parser.HTMLParser):
    """The texts of a page's cells, line by line, and all tags, which must close."""

    def __init__(self, text):
        super().__init__()
        self.lines, self.open, self.tags, self.styles = [], [], set(), []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.styles += [(tag, dict(attrs).get("style", ""))]
        if tag == "tr":
            self.lines.append([])
        elif tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open:
            self.lines[-1][-1] += data


def test_an_alignment_shows_groups_under_groups_and_marks_the_merged():
    made = gold_jax.align(STUDENT, TEACHER, "<b>is\ntwo")
    found = Page(made._repr_html_())
    student, teacher = found.lines
    assert [student[0], teacher[0]] == ["student", "teacher"] and len(student) == len(teacher)
    assert "".join(student[1:]).replace("·", "") == "<b>is\\ntwo" == "".join(teacher[1:]).replace("·", "")
    assert (student[-1], teacher[-1]) == ("t·w·o", "two")
    marked = [style for tag, style in found.styles if tag == "td" and "background" in style]
    assert len(marked) == 2 * int((~made.one_to_one()).sum()) > 0
    assert found.tags == {"div", "p", "b", "table", "tbody", "tr", "td", "span"}


def test_long_texts_have_several_lines_and_what_is_left_out_is_counted():
    groups = [["ab"]] * 100
    found = Page(token_table("long", {"one": groups, "other": groups}, 60))
    assert sum(len(line) - 1 for line in found.lines) == 2 * 60 and len(found.lines) > 2
    assert "… and 40 more groups" in token_table("long", {"one": groups, "other": groups}, 60)


def test_tables_escape_what_they_hold():
    found = Page(table("<i>", [("<script>", 1234, "&")], ("a", "b", "c")))
    assert found.lines == [["a", "b", "c"], ["<script>", "1,234", "&"]]
    assert "script" not in found.tags and "i" not in found.tags


def test_a_batch_shows_its_sizes_and_no_arrays():
    loss = gold_jax.DistillationLoss(STUDENT, TEACHER)
    batch = loss.batch(ROWS)
    head, student, teacher = Page(batch._repr_html_()).lines
    counted = int((batch.weight > 0).sum())
    assert f"Batch of 2 rows, {counted} groups" in batch._repr_html_()
    for line, side in ((student, batch.student.packed), (teacher, batch.teacher.packed)):
        tokens, stored, padding = map(int, line[1:4])
        lengths = side.mask.sum(-1)[0]
        index = side.gather_index[0]
        assert tokens == lengths.sum() and stored + padding == side.tokens.size
        assert stored == len({int(i) for row, n in zip(index, lengths) for i in row[:n]}) < tokens
    assert repr(batch) == f"Batch(weight={batch.weight.shape}, student={batch.student.packed.tokens.shape}, " + (
        f"teacher={batch.teacher.packed.tokens.shape})"
    )
    assert repr(jax.tree.map(lambda _: "leaf", batch)) == "Batch(weight=leaf, student=leaf, teacher=leaf)"
    seen = []
    shapes = jax.eval_shape(lambda batch: seen.append(batch._repr_html_()) or batch, batch)
    donated = jax.tree.map(jax.numpy.array, batch)
    donated.weight.delete()
    with_hidden = batch._replace(teacher=batch.teacher._replace(packed=np.zeros((1, 2, 3))))
    assert [*seen, shapes._repr_html_(), donated._repr_html_(), with_hidden._repr_html_()] == [None] * 4
    assert repr(shapes) == repr(donated) == repr(batch) and repr(with_hidden).endswith("teacher=(1, 2, 3))")


def test_a_vocabulary_map_shows_how_many_entries_go_where():
    found = gold_jax.match_vocabularies(STUDENT, TEACHER)
    _, student, teacher = Page(found._repr_html_()).lines
    for line, order, route in (
        (student, found.student_order, found.student_prefix_of_unmatched),
        (teacher, found.teacher_order, found.teacher_prefix_of_unmatched),
    ):
        rows, _, matched, routed, none = map(int, line[1:])
        assert (rows, matched) == (len(order), found.matched) and rows == matched + routed + none
        assert routed == (route < found.matched).sum()


@pytest.mark.parametrize("place", [lambda x: x, jax.device_get], ids=["device", "host"])
def test_a_model_shows_shapes_and_no_numbers(place):
    graph, params = split(gold_jax.load_model(STUDENT))
    shown = repr(merge(graph, place(params)))
    assert "shape=(576, 96)" in shown and len(shown) < 5000 and not hasattr(gold_jax.Decoder, "_repr_html_")
    with np.printoptions(threshold=10**9):
        assert repr(merge(graph, place(params))) == shown


def test_a_trainer_and_its_run_show_how_they_went(tmp_path):
    config = gold_jax.GOLDConfig(
        output_dir=str(tmp_path), max_steps=1, lmbda=0.0, max_length=48, max_completion_length=24
    )
    trainer = gold_jax.GOLDTrainer(STUDENT, TEACHER, config, ROWS, ROWS, console=tiny.quiet_console())
    before = trainer._repr_html_()
    assert "0 of 1 updates done" in before and "Logged last" not in before
    assert ["Loss", trainer.spec.describe()] in Page(before).lines
    trainer.train()
    assert "1 of 1 updates done" in trainer._repr_html_() and "Logged last" in trainer._repr_html_()
    run = read_run(tmp_path)
    assert repr(run) == f"Run({str(tmp_path)!r}, Finished after 1 of 1 updates)"
    names = [line[0] for line in Page(run._repr_html_()).lines]
    assert names == ["", *(measure.label for measure in run.measures)] and "bits per byte" in names


def test_importing_says_nothing_of_pytorch_and_lets_other_warnings_through():
    code = """import json, logging, sys, gold_jax; gold_jax.load_model
import transformers
logger = logging.getLogger("transformers")
logger.warning("another warning")
print(json.dumps([logger.level, transformers.logging.get_verbosity()]))"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS")}  # commands set it
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    assert "PyTorch" not in done.stderr and "another warning" in done.stderr
    assert json.loads(done.stdout) == [30, 30]
