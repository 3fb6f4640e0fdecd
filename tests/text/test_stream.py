"""Streams: every row once an epoch, in an order that goes on from any update; one window is held."""

import itertools
import json

import datasets
import pytest
from toy_tokenizers import byte_level

from gold_jax import GOLDConfig, GOLDTrainer, SFTConfig
from gold_jax.cli import training_inputs
from gold_jax.text import stream
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import RowChecker
from gold_jax.text.data import load_examples
from gold_jax.text.stream import ShuffledRows, StreamOrder, open_stream

ROWS = 137


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 10)


@pytest.fixture(params=["jsonl", "parquet", "dataset"])
def source(request, tmp_path):
    rows = [{"prompt": "x", "completion": f"{k}"} for k in range(ROWS)]
    rows[25]["prompt"] = rows[77]["prompt"] = "long " * 100
    parts = [rows[:50], rows[50:60], rows[60:]]
    for k, part in enumerate(parts):
        if request.param == "jsonl":
            (tmp_path / f"train-{k}.jsonl").write_text("\n".join(map(json.dumps, part)))
        else:
            datasets.Dataset.from_list(part).to_parquet(tmp_path / f"train-{k}.parquet")
    if request.param == "dataset":
        files = sorted(str(path) for path in tmp_path.iterdir())
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return str(tmp_path)


def order_of(source, per_step=4, seed=3, said=None, **options):
    options = {"budget": 50, "need_completion": "it is learned"} | options
    rows = open_stream(source)
    checker = RowChecker(ChatTokenizer(byte_level()), **options)
    return StreamOrder(rows, checker, per_step, seed, 100, (said if said is not None else []).append)


def taken(order, steps):
    return [[int(example.completion) for _, example in order.take(step)] for step in steps]


def test_an_epoch_has_every_row_that_can_be_learned_from_once_and_says_what_it_leaves_out(source):
    said = []
    order = order_of(source, said=said)
    updates = taken(order, range(68))
    epochs = [list(itertools.chain(*updates[k : k + 34])) for k in (0, 34)]
    assert [sorted(epoch) for epoch in epochs] == [sorted({*range(ROWS)} - {25, 77})] * 2
    assert epochs[0] != epochs[1] and len(updates[33]) == 3  # an epoch's last update is short
    (line,) = said
    assert "whose prompt is longer than 50 tokens are skipped" in line
    assert order.checker.notices()[0].startswith(f"left out 4 of {2 * ROWS} rows whose prompt")
    assert taken(order_of(source), range(68)) == updates != taken(order_of(source, seed=4), range(68))


def test_a_stream_goes_on_from_any_update(source):
    order = order_of(source)
    updates, positions = [], []
    for step in range(70):
        positions.append(json.loads(json.dumps(order.position(step))))
        updates += taken(order, [step])
    for step in range(0, 70, 7):
        again = order_of(source)
        again.resume(step, positions[step])
        assert taken(again, range(step, 70)) == updates[step:]
    assert taken(order, [69, 70, 69, 70])[::2] == updates[69:] * 2  # one of the last updates comes again as it was
    order.restart()
    assert taken(order, range(5)) == updates[:5]


def test_rows_that_can_be_read_in_any_order_are_shuffled_as_a_whole_and_go_on_from_any_update():
    rows = [{"prompt": "long " * 100 if k in (25, 77) else "x", "completion": f"{k}"} for k in range(ROWS)]

    def order(seed=3):
        checker = RowChecker(ChatTokenizer(byte_level()), budget=50, need_completion="it is learned")
        return StreamOrder(ShuffledRows.of(load_examples(rows)), checker, 4, seed, 100, [].append)

    first = order()
    positions, updates = [], []
    for step in range(68):
        positions.append(json.loads(json.dumps(first.position(step))))
        updates += taken(first, [step])
    epochs = [list(itertools.chain(*updates[k : k + 34])) for k in (0, 34)]
    assert [sorted(epoch) for epoch in epochs] == [sorted({*range(ROWS)} - {25, 77})] * 2
    assert epochs[0] != epochs[1] and taken(order(4), range(34)) != updates[:34]
    assert max(epochs[0][:10]) - min(epochs[0][:10]) > 50  # not only those of a window among each other
    assert first.steps_per_epoch == 35 and "137 rows (checked during training)" == first.describe()
    for step in (1, 20, 33, 34, 50):
        again = order()
        again.resume(step, positions[step])
        assert taken(again, range(step, 68)) == updates[step:]


def test_no_more_than_a_window_is_read_ahead(source, monkeypatch):
    order, read = order_of(source), []
    rows = stream.RowStream.rows

    def counted(self, *at):
        for row in rows(self, *at):
            read.append(row)
            yield row

    monkeypatch.setattr(stream.RowStream, "rows", counted)
    order.restart()
    for step in range(30):
        before = len(taken(order, [step])) and 4 * (step + 1)
        assert len(read) <= before + 10 + 2  # the two that are left out


def test_other_rows_than_at_the_checkpoint_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "x", "completion": f"{k}"}) for k in range(30)]
    file.write_text("\n".join(lines))
    order = order_of(str(file))
    taken(order, range(4))
    position, digest = order.position(4), order.stream.digest
    file.write_text("\n".join([lines[0].replace("0", "31"), *lines[1:]][::-1]))
    with pytest.raises(ValueError, match="holds other rows than when the checkpoint was saved"):
        order_of(str(file)).resume(4, position)
    assert open_stream(str(file)).digest != digest  # its size differs


def test_a_bad_row_is_named_or_skipped(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "x", "completion": f"{k}"}) for k in range(20)]
    lines[3], lines[14] = "{broken", json.dumps({"prompt": 5})
    file.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match="^row 3 of rows.jsonl of the data set '.*': line 4 of rows.jsonl cannot be read"
    ):
        taken(order_of(str(file)), range(3))
    order = order_of(str(file), on_bad_row="skip")
    assert sorted(itertools.chain(*taken(order, range(5)))) == sorted({*range(20)} - {3, 14})
    assert "left out 2 of 20 rows that cannot be read" in order.checker.notices()[0]


def test_what_cannot_be_streamed_or_learned_from_is_an_error(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"prompt": "x", "completion": "y"}]')
    with pytest.raises(ValueError, match="rows.json is a JSON array, which is read whole"):
        order_of(str(file)).take(0)
    with pytest.raises(ValueError, match="a part of a split, 'train.:10.', cannot be streamed"):
        open_stream(str(file), split="train[:10]")
    file.write_text(json.dumps({"prompt": "long " * 100, "completion": "y"}))
    with pytest.raises(ValueError, match="none of 1 row can be learned from"):
        order_of(str(file)).take(0)


def test_columns_are_read_under_other_names(tmp_path):
    rows = [{"query": "x", "reply": f"{k}", "prompt": "other"} for k in range(5)]
    (tmp_path / "rows.jsonl").write_text("{broken\n" + "\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        renamed = {"prompt": "query", "completion": "reply"}
        found = [read for _, _, _, read in open_stream(str(tmp_path / name), renamed=renamed).rows([0])]
        assert [(read().prompt, read().completion) for read in found[-5:]] == [("x", f"{k}") for k in range(5)]
        with pytest.raises(ValueError, match="no column 'answer'; it has query, reply, prompt"):
            open_stream(str(tmp_path / name), renamed={"completion": "answer"})
    file = tmp_path / "late.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"query": "x"}] * 100 + [{"query": "x", "answer": "y"}])))
    stream = open_stream(str(file), renamed={"prompt": "query", "completion": "answer"})
    (notice,) = stream.notices
    assert notice == "--columns says 'completion=answer', and none of the first 100 rows has such a column"
    assert [read().completion for _, _, _, read in stream.rows([0])][-2:] == [None, "y"]


@pytest.mark.parametrize("setting, message", [
    ({"max_steps": -1}, "has no length: say with --max_steps"), ({"save_strategy": "epoch"}, "no epoch ends at an update"),
    ({"truncation_mode": "keep_end"}, "has no length: prompts are not shortened: use --truncation_mode keep_start"),
    ({"rollout_batches": 2}, "completions are drawn for one update: use --rollout_batches 1"),
])  # fmt: skip
def test_settings_that_need_all_rows_are_refused(setting, message):
    rows = datasets.Dataset.from_list([{"prompt": "x"}]).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        GOLDTrainer("a student", "a teacher", GOLDConfig(**({"max_steps": 1} | setting)), rows)


def test_a_mixture_is_not_streamed():
    mixture = json.dumps([{"path": "a"}])
    argv = ["--dataset_streaming", "true", "--datasets", mixture, "--model_name_or_path", "a"]
    with pytest.raises(ValueError, match="--dataset_streaming reads one data set, --dataset_name, and no --datasets"):
        training_inputs(argv, SFTConfig, prog="gold_jax.sft", doc="")
