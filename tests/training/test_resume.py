"""Runs that end midway and go on: nothing is lost, nothing comes twice."""

import functools
import json
import os
import pathlib
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import tiny_models as tiny
import transformers
from rich.console import Console
from run_files import completions, lines, metrics, steady

from gold_jax import GOLDConfig, GOLDTrainer, SFTConfig, SFTTrainer
from gold_jax.models.config import DecoderConfig
from gold_jax.models.hf_checkpoint import load_model
from gold_jax.text import stream
from gold_jax.text.checks import check_examples
from gold_jax.training import loop, resume
from gold_jax.training import rows as rows_module
from gold_jax.training.batches import TokenBatchBuilder
from gold_jax.training.nonfinite import Diverged, NonFiniteCounter, describe_divergence
from gold_jax.training.resume import check_run, truncate_log
from gold_jax.training.signals import Preempted
from gold_jax.training.step import Step

pytestmark = pytest.mark.usefixtures("own_cache")
QUICK = {
    "max_steps": 6, "logging_steps": 2, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2,
    "max_length": 64, "seed": 7,
}  # fmt: skip


def sft(world, output, **changes):
    console = Console(file=open(os.devnull, "w"), width=200, record=True)
    args = SFTConfig(output_dir=str(output), **(QUICK | changes))
    return SFTTrainer(str(world / "student"), args, str(world / "data" / "train.jsonl"), console=console)


def gold(world, output, callbacks=None, **changes):
    rows = [tiny.conversation(*row) for row in tiny.ROWS]
    console = Console(file=open(os.devnull, "w"), width=200, record=True)
    settings = QUICK | {"lmbda": 0.5, "max_completion_length": 8, "max_length": 128} | changes
    args = GOLDConfig(output_dir=str(output), **settings)
    return GOLDTrainer(
        str(world / "student"), str(world / "teacher"), args, rows[:5], rows[4:], callbacks=callbacks, console=console
    )


def stopped_in(monkeypatch, update, number=signal.SIGTERM):
    """Sends this process a signal during an update, be it made or left out."""
    calls = []

    def stopping(make):
        def made(self, *arguments):
            metrics = make(self, *arguments)
            calls.append(1)
            if len(calls) == update:
                os.kill(os.getpid(), number)
            return metrics

        return made

    for name in ("__call__", "skip"):
        monkeypatch.setattr(Step, name, stopping(getattr(Step, name)))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run of fine-tuning that nothing stopped, with saves after updates 2, 4 and, at its end, 6."""
    output = tmp_path_factory.mktemp("finished")
    trainer = sft(world, output)
    trainer.train()
    return output, held(trainer)


def held(trainer):
    state = trainer.loop.state
    return [np.array(x) for x in jax.tree.leaves((state.params, state.optimizer))]


def copied(finished, tmp_path):
    """What the run had left, had it been killed after its save of update 4."""
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(copy / "checkpoint-6")
    return copy


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def damage(checkpoint):
    """Changes some bytes in the middle of the largest file of the arrays."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    largest.write_bytes(content)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not_to_the_last_bit(world, tmp_path, monkeypatch):
    flags = dict(
        max_steps=14, logging_steps=3, save_strategy="no", eval_strategy="steps", eval_steps=7, log_completions=True,
        log_completions_steps=4, predict_with_generate=True, eval_on_start=True,
    )  # fmt: skip
    whole = gold(world, tmp_path / "whole", **flags)
    whole.train()
    with monkeypatch.context() as patch:
        stopped_in(patch, 7)
        first = gold(world, tmp_path / "parts", **flags)
        with pytest.raises(Preempted) as end:
            first.train()
    assert end.value.exit_code == 75
    assert "Preempted after 7 updates" in first.console.export_text()
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-7"]
    # An evaluation was due after this update and had to wait.
    assert not [row for row in metrics(tmp_path / "parts") if row["step"] == 7]
    second = gold(world, tmp_path / "parts", **flags)
    second.train(resume_from_checkpoint=True)
    assert same(held(second), held(whole))
    logs = [steady(metrics(tmp_path / name)) for name in ("parts", "whole")]
    assert logs[0] == logs[1] and len(logs[0]) == 1 + 4 + 1 + 2
    drawn = [completions(tmp_path / name) for name in ("parts", "whole")]
    assert drawn[0] == drawn[1] and {"eval_set" in row for row in drawn[0] if "groups" in row} == {True, False}
    assert steady(second.log_history) == steady(whole.log_history)


def test_resuming_from_any_save_gives_the_same_student_and_the_same_log(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    trainer = sft(world, output, resume_from_checkpoint=str(output / "checkpoint-2"))
    trainer.train()
    assert same(held(trainer), finished[1])
    assert steady(metrics(output)) == steady(metrics(finished[0]))
    assert "Resumed from" in trainer.console.export_text()


def test_a_streamed_run_that_goes_on_makes_the_updates_of_one_that_was_not_stopped(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 3)

    def streamed(output, **changes):
        console = Console(file=open(os.devnull, "w"), width=200, record=True)
        args = SFTConfig(output_dir=str(output), **(QUICK | changes))
        rows = stream.open_stream(str(world / "data" / "train.jsonl"))
        return SFTTrainer(str(world / "student"), args, rows, console=console)

    whole = streamed(tmp_path / "whole")
    whole.train()
    assert "a stream of 1 shard" in repr(whole) and "a stream of 1 shard" in whole.console.export_text()
    for step in (2, 4):
        again = streamed(tmp_path / f"again-{step}")
        again.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert all(np.array_equal(a, b) for a, b in zip(held(whole), held(again), strict=True))
    with pytest.raises(ValueError, match="the training data differ"):
        sft(world, tmp_path / "other").train(str(tmp_path / "whole" / "checkpoint-2"))
    with pytest.raises(ValueError, match="has no length: say with --max_steps"):
        streamed(tmp_path / "endless", max_steps=-1)
    with pytest.raises(ValueError, match="no epoch ends at an update: use steps"):
        streamed(tmp_path / "epochs", save_strategy="epoch")


def test_a_run_that_checks_its_rows_beside_training_goes_on_as_it_began(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 3)
    whole = sft(world, tmp_path / "whole", check_rows="beside")
    whole.train()
    said, count = whole.console.export_text(), len(whole.train_examples.examples)
    assert f"{count} rows (checked during training)" in said
    assert f"All {count} rows are checked: {count} can be learned from." in said
    for step in (2, 4):
        again = sft(world, tmp_path / f"again-{step}", check_rows="beside")
        again.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(held(again), held(whole))
    with pytest.raises(ValueError, match="--check_rows is before and was beside"):
        sft(world, tmp_path / "other").train(str(tmp_path / "whole" / "checkpoint-2"))
    with pytest.raises(ValueError, match="does not know all rows when training begins: say with --max_steps"):
        sft(world, tmp_path / "endless", check_rows="beside", max_steps=-1)
    monkeypatch.setattr(rows_module, "_BACKGROUND_FROM", count)
    assert isinstance(sft(world, tmp_path / "auto").train_examples, stream.ShuffledRows)
    for other in ({"check_rows": "before"}, {"max_steps": -1}, {"save_strategy": "epoch"}):
        assert not isinstance(sft(world, tmp_path / "auto", **other).train_examples, stream.ShuffledRows)


def test_a_bad_row_that_is_found_beside_training_ends_the_run_and_loses_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 3)
    rows, made, check = [{"prompt": "x", "completion": "ab"}] * 400 + [{"prompt": 5}], threading.Event(), check_examples
    monkeypatch.setattr(rows_module, "check_examples", lambda *a, **k: made.wait(60) and check(*a, **k))

    class Made(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            made.set()
            if state.global_step == 39:  # so that it is through before the run ends
                skipped.loop.data.background._thread.join(60)

    def trainer(output, **changes):
        console = Console(file=open(os.devnull, "w"), width=200, record=True)
        args = SFTConfig(output_dir=str(output), **(QUICK | {"check_rows": "beside", "save_steps": 10_000} | changes))
        return SFTTrainer(str(world / "student"), args, rows, console=console, callbacks=[Made()])

    ended = trainer(tmp_path / "ended", max_steps=10_000, logging_steps=100)
    with pytest.raises(ValueError, match="^row 400 of the data set"):
        ended.train()
    assert list((tmp_path / "ended").glob("checkpoint-*"))
    skipped = trainer(tmp_path / "skipped", max_steps=40, on_bad_row="skip")
    skipped.train()
    said = skipped.console.export_text()
    assert (
        "All 401 rows are checked: 400 can be learned from." in said and "left out 1 of 401 rows that cannot be" in said
    )


def test_a_bad_row_that_is_found_after_the_last_update_costs_no_student(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 3)
    rows, ended, check = (
        [{"prompt": "x", "completion": "ab"}] * 400 + [{"prompt": 5}],
        threading.Event(),
        check_examples,
    )
    monkeypatch.setattr(rows_module, "check_examples", lambda *a, **k: ended.wait(60) and check(*a, **k))

    class Ended(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == args.max_steps:
                ended.set()
                trainer.loop.data.background._thread.join(60)

    args = SFTConfig(output_dir=str(tmp_path), **(QUICK | {"check_rows": "beside"}))
    trainer = SFTTrainer(str(world / "student"), args, rows, console=tiny.quiet_console(), callbacks=[Ended()])
    trainer.train()
    said = trainer.console.export_text()
    assert "found a bad row, which no update has learned from: row 400 of the data set" in said
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "checkpoint-6").is_dir()
    trainer.loop.data.background._error = OSError("the file is gone")
    assert trainer.loop.data.closing_notices()[0] == "The background check failed: OSError: the file is gone"


def test_a_resumed_run_pads_its_batches_as_the_one_that_was_not_stopped(world, tmp_path):
    trainer = sft(world, tmp_path / "out", length_buckets=1)
    trainer.train()
    metadata = json.loads((tmp_path / "out" / "checkpoint-2" / "run.json").read_text())
    assert metadata["shapes"]
    again = sft(world, tmp_path / "out", length_buckets=1)
    again.train(str(tmp_path / "out" / "checkpoint-2"))
    assert again.loop.run_state.shapes == trainer.loop.run_state.shapes and same(held(again), held(trainer))


def test_a_finished_run_that_is_made_again_from_an_earlier_update_keeps_its_logs(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    logs = {name: (output / name).read_bytes() for name in ("metrics.jsonl", "summary.json")}
    again = sft(world, output)
    again.train(resume_from_checkpoint=True)
    assert {name: (output / name.replace(".", ".1.")).read_bytes() for name in logs} == logs
    said = again.console.export_text()
    assert "This run had finished at update 6 and is repeated from update 4 on; its earlier logs are kept" in said
    assert same(held(again), finished[1])
    longer = sft(world, output, max_steps=8)
    longer.train(resume_from_checkpoint=True)
    assert not (output / "metrics.2.jsonl").exists() and "repeated from" not in longer.console.export_text()


def test_a_save_is_also_a_student_that_opens_by_itself(finished):
    assert load_model(finished[0] / "checkpoint-2").config.layers == 2
    assert (finished[0] / "checkpoint-2" / "tokenizer.json").is_file()
    assert not list(finished[0].glob("*orbax*"))


@pytest.mark.parametrize(
    "fault",
    [
        "damaged arrays",
        "half of an index",
        "no notes",
        "half of the notes",
        "no arrays",
        "a file missing",
        "types",
        "date",
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_it_is_taken(fault, world, finished, tmp_path):
    output = copied(finished, tmp_path)
    newest = output / "checkpoint-4"
    if fault == "damaged arrays":
        damage(newest)
    elif fault == "half of an index":
        index = newest / "state" / "manifest.ocdbt"
        index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    elif fault == "no notes":
        (newest / "run.json").unlink()
    elif fault == "half of the notes":
        text = (newest / "run.json").read_text()
        (newest / "run.json").write_text(text[: len(text) // 2])
    elif fault in ("types", "date"):
        change = {
            "types": ("run.json", {"means": [1]}),
            "date": ("_CHECKPOINT_METADATA", {"commit_timestamp_nsecs": "?"}),
        }
        name, wrong = change[fault]
        text = json.dumps(json.loads((newest / name).read_text()) | wrong)
        (newest / name).write_text(text.replace('"?"', "1e400"))
        if fault == "date":
            damage(newest)
    elif fault == "no arrays":
        shutil.rmtree(newest / "state")
    else:
        shutil.rmtree(newest / "state" / "ocdbt.process_0" / "d")
    trainer = sft(world, output, resume_from_checkpoint="latest")
    trainer.train()
    said = trainer.console.export_text()
    assert f"{newest} is incomplete or damaged" in said and f"Resumed from {output / 'checkpoint-2'}" in said
    assert same(held(trainer), finished[1])
    # The bad one has been written anew.
    again = sft(world, output, resume_from_checkpoint=str(newest))
    again.train()
    assert same(held(again), finished[1])


def test_where_no_checkpoint_is_whole_the_run_says_so_and_does_not_begin_anew(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    for step in (2, 4):
        damage(output / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="no complete checkpoint is left.*checkpoint-4.*checkpoint-2"):
        sft(world, output).train("latest")


def test_a_checkpoint_asked_for_by_name_is_not_replaced_by_another(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    damage(output / "checkpoint-4")
    with pytest.raises(ValueError, match="others are there: checkpoint-2"):
        sft(world, output).train(str(output / "checkpoint-4"))


def test_latest_begins_anew_where_there_is_nothing_and_says_so(world, tmp_path):
    trainer = sft(world, tmp_path / "out", max_steps=1, resume_from_checkpoint="latest")
    trainer.train()
    assert "no checkpoint in" in trainer.console.export_text() and trainer.loop.done == 1


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_path_without_a_checkpoint_is_an_error(name, world, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"--resume_from_checkpoint names .*{name}"):
        sft(world, tmp_path / "out").train(str(tmp_path / name))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"seed": 8}, "--seed is 8 and was 7"),
        ({"per_device_train_batch_size": 1}, "--per_device_train_batch_size is 1 and was 2.*rows of an update is 1"),
        ({"max_length": 32}, "--max_length is 32 and was 64"),
        ({"completion_only_loss": False}, "--completion_only_loss is False and was None"),
    ],
)
def test_a_run_of_other_settings_cannot_go_on_and_says_which(change, says, world, finished, tmp_path):
    with pytest.raises(ValueError, match=says):
        sft(world, copied(finished, tmp_path), **change).train("latest")


def test_other_rows_or_another_model_are_noticed(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    rows = [tiny.conversation(*row) for row in tiny.ROWS]
    args = SFTConfig(output_dir=str(output), **QUICK)
    with pytest.raises(ValueError, match="rows to learn from is 6 and was 4"):
        SFTTrainer(str(world / "student"), args, rows).train("latest")
    with pytest.raises(ValueError, match="the training data"):
        SFTTrainer(str(world / "student"), args, rows[1:5]).train("latest")
    larger = tiny.write_student(tmp_path / "larger", rows=600)
    with pytest.raises(ValueError, match="student.s config differs in vocab_size: now 600, before 419"):
        SFTTrainer(str(larger), args, str(world / "data" / "train.jsonl")).train("latest")


def with_rope_theta(model, folder, theta):
    """A copy of a model's folder that differs in what the weights do not show."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": theta, "rope_parameters": None}))
    return folder


def test_a_student_of_the_same_shapes_that_computes_in_another_way_is_refused(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    other = with_rope_theta(world / "student", tmp_path / "other", 77.0)
    args = SFTConfig(output_dir=str(output), **QUICK)
    with pytest.raises(ValueError, match="the student's config differs in ropes: now .*77.*, before"):
        SFTTrainer(str(other), args, str(world / "data" / "train.jsonl")).train("latest")


_LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_length": 16}
_LINEAR = {"kind": "linear", "factor": 8.0}
# fmt: off
DESCRIBED = {
    "llama3_new": dict(
        family="llama", head_dim=8, activation="silu", ropes=[{"theta": 500.0, **_LLAMA3}] * 2, sliding=[False] * 3,
        window=None, tied=False, query_scale=8**-0.5,
    ),
    "qwen3_biases": dict(
        family="qwen3", head_dim=16, activation="silu", ropes=[{"theta": 1e4}] * 2, sliding=[False] * 3, window=None,
        tied=True, query_scale=0.25, qkv_bias=True, out_bias=True, qk_norm=True,
    ),
    "gemma3_old": dict(
        family="gemma3_text", head_dim=16, activation="gelu_pytorch_tanh", ropes=[{"theta": 1e6, **_LINEAR}, {"theta": 100.0}],
        sliding=[True, False, True], window=4, tied=True, query_scale=24**-0.5, norm_offset=1.0, qk_norm=True,
        sandwich_norms=True, embedding_scale=32**0.5,
    ),
}
# fmt: on


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_description_of_a_model_is_that_of_earlier_versions(name):
    """Another one, by a field renamed or made anew, would refuse to resume from all checkpoints that there are."""
    raw = json.loads((pathlib.Path(__file__).parents[1] / "golden/models/cases.json").read_text())[name]["config"]
    found = resume.describe_config(DecoderConfig.from_hf(transformers.AutoConfig.for_model(**raw)))
    shape = dict(vocab_size=40, width=32, mlp_width=48, layers=3, heads=4, kv_heads=2, norm_eps=1e-6)
    assert found == shape | DESCRIBED[name]


def test_harmless_differences_pass_and_those_that_matter_later_are_told(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    trainer = sft(
        world, output, learning_rate=1e-3, logging_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    trainer.train("latest")
    said = trainer.console.export_text()
    assert "--learning_rate is now 0.001; the checkpoint was saved with 0.01" in said and "logging_steps" not in said
    assert not same(held(trainer), finished[1])


def test_a_resumed_run_may_clip_where_it_did_not(world, finished, tmp_path):
    trainer = sft(world, copied(finished, tmp_path), max_grad_norm=0.0)
    assert trainer.train("latest").global_step == 6
    assert "--max_grad_norm is now 0.0; the checkpoint was saved with 1.0" in trainer.console.export_text()


def test_a_measure_of_other_rows_is_not_compared_with_the_closing_one(world, tmp_path, monkeypatch):
    def made(count, **changes):
        console = Console(file=open(os.devnull, "w"), width=200, record=True)
        args = SFTConfig(output_dir=str(tmp_path / "run"), **(QUICK | changes))
        rows = [tiny.conversation(*row) for row in tiny.ROWS]
        return SFTTrainer(str(world / "student"), args, rows[:4], rows[:count], console=console)

    made(2, eval_on_start=True).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # so that the next run saves one, too
    for count, told in (3, True), (3, True), (2, False):
        trainer = made(count, eval_on_start=True)
        shown: list = []
        monkeypatch.setattr(loop, "before_after", functools.partial(lambda to, _, rows: to.extend(rows), shown))
        trainer.train("latest")
        assert all((before is None) == told for _, before, *_ in shown) and shown
        assert ("the rows to evaluate on differ" in trainer.console.export_text()) == told


def test_an_evaluation_that_was_due_and_is_not_wanted_any_more_is_left_out(world, tmp_path, monkeypatch):
    rows = [tiny.conversation(*row) for row in tiny.ROWS]
    with monkeypatch.context() as patch:
        stopped_in(patch, 3)
        args = SFTConfig(output_dir=str(tmp_path), **(QUICK | {"eval_strategy": "steps", "eval_steps": 3}))
        with pytest.raises(Preempted):
            SFTTrainer(str(world / "student"), args, rows[:4], rows[4:]).train()
    trainer = SFTTrainer(str(world / "student"), SFTConfig(output_dir=str(tmp_path), **QUICK), rows[:4])
    assert trainer.train("latest").global_step == 6


def test_how_an_update_is_split_matters_where_the_student_writes_a_share_of_the_parts():
    saved = {"gradient_accumulation_steps": 1, "rows of an update": 4, "lmbda": 0.5}
    now = saved | {"gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="--gradient_accumulation_steps is 2 and was 1"):
        check_run(saved, now, "here")
    assert len(check_run(saved | {"lmbda": 1}, now | {"lmbda": 1}, "here")) == 1


def test_another_mesh_matters_where_it_makes_other_micro_batches():
    saved = {
        "per_device_train_batch_size": 1,
        "rows of an update": 8,
        "rows of a micro-batch": 8,
        "lmbda": 0.5,
        "mesh": "fsdp=8",
    }
    now = saved | {"per_device_train_batch_size": 2, "mesh": "fsdp=4"}
    (line,) = check_run(saved, now, "here")
    assert "--per_device_train_batch_size is now 2" in line
    other = saved | {"gradient_accumulation_steps": 2, "rows of a micro-batch": 4}
    with pytest.raises(ValueError, match="--gradient_accumulation_steps is 2 and was 1"):
        check_run(saved | {"gradient_accumulation_steps": 1}, other, "here")


def test_fewer_updates_than_the_checkpoint_has_seen_are_refused(world, finished, tmp_path):
    with pytest.raises(ValueError, match="at update 4.*makes 3.*--max_steps"):
        sft(world, copied(finished, tmp_path), max_steps=3).train("latest")


def test_checkpoints_may_lie_elsewhere(world, finished, tmp_path):
    elsewhere = tmp_path / "bucket"
    sft(world, tmp_path / "out", checkpoint_dir=str(elsewhere), save_total_limit=1).train()
    assert [path.name for path in elsewhere.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    trainer = sft(world, tmp_path / "another", checkpoint_dir=str(elsewhere))
    trainer.train("latest")
    assert same(held(trainer), finished[1])


def test_what_a_killed_save_left_behind_is_removed(world, finished, tmp_path):
    output = copied(finished, tmp_path)
    left = output / "checkpoint-6.orbax-checkpoint-tmp"
    left.mkdir()
    sft(world, output).train("latest")
    assert not left.exists()


def test_a_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "eval_loss": 1}\n{"step": 4, "lo')
    assert [row["step"] for row in truncate_log(log, 2)] == [1, 2, 2]
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n'
    separators = "\u2028 \u2029 \x85 \x0b"  # ends of lines to `str.splitlines`, and text to JSON
    log.write_text(json.dumps({"step": 1, "completion": separators}, ensure_ascii=False) + "\n")
    assert [row["completion"] for row in truncate_log(log, 2)] == [separators]
    log.write_text('{"step": 1}\n' + '{"step": ' * 100_000 + '\n{"step": 1e400}\n[1]\n')
    assert truncate_log(log, 2) == [{"step": 1}]
    assert truncate_log(tmp_path / "none.jsonl", 2) == [] and not (tmp_path / "none.jsonl").exists()


def test_a_full_disk_ends_no_run_and_the_last_whole_checkpoint_stays(world, finished, tmp_path, monkeypatch):
    save, calls = loop.save_final_model, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # the second checkpoint
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(loop, "save_final_model", full)
    trainer = sft(world, tmp_path / "out")
    trainer.train()
    said = trainer.console.export_text()
    assert "checkpoint-4 could not be written" in said and "no space left on the disk" in said
    assert f"the last whole one is {tmp_path / 'out' / 'checkpoint-2'}" in said
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]
    assert same(held(trainer), finished[1])


def test_completions_that_could_not_be_written_are_when_the_run_goes_on(world, tmp_path):
    flags = dict(lmbda=1.0, max_steps=4, save_strategy="no", log_completions=True, log_completions_steps=100)
    gold(world, tmp_path / "whole", **flags).train()
    path = tmp_path / "parts" / "completions.jsonl"

    class Full(transformers.TrainerCallback):
        """From the third update on there is only room for a part of what the student wrote."""

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                path.rename(path.with_suffix(".kept"))
                path.symlink_to("/dev/full")

    trainer = gold(world, tmp_path / "parts", callbacks=[Full()], **flags)
    with pytest.raises(OSError, match="completions.jsonl cannot be written: no space left on the disk"):
        trainer.train()
    path.unlink()
    path.with_suffix(".kept").rename(path)
    with open(path, "a") as file:
        file.write(json.dumps({"step": 3, "prompt": "a part", "completion": "of it"}) + '\n{"step": 3, "pro')
    gold(world, tmp_path / "parts", **flags).train("latest")
    assert lines(path) == completions(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_end_is_an_error_that_says_where_the_student_is(world, tmp_path, monkeypatch):
    save = loop.save_final_model

    def full(model, tokenizer, folder, **options):
        if str(folder) == str(tmp_path / "out"):
            raise OSError(28, "No space left on device")
        return save(model, tokenizer, folder, **options)

    monkeypatch.setattr(loop, "save_final_model", full)
    trainer = sft(world, tmp_path / "out")
    with pytest.raises(OSError, match="no space left.*after 6 updates.*checkpoint-6.*--resume_from_checkpoint latest"):
        trainer.train()


def endless(x):
    return x * np.float32(np.inf) if x.dtype == np.float32 else x


def poisoned(monkeypatch, updates):
    """Batches whose loss is not finite in some updates (counted from 1)."""
    build = TokenBatchBuilder.build

    def with_poison(self, step, examples, params, shapes=()):
        made = build(self, step, examples, params, shapes)
        if step + 1 in updates:
            made.batches = [jax.tree.map(endless, batch) for batch in made.batches]
        return made

    monkeypatch.setattr(TokenBatchBuilder, "build", with_poison)


def test_updates_that_are_not_finite_are_left_out_and_counted(world, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2, 3})
    trainer = sft(world, tmp_path / "out", logging_steps=1, lr_scheduler_type="linear")
    trainer.train()
    rows = metrics(tmp_path / "out")
    assert [row.get("skipped") for row in rows] == [None, 1, 2, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, True, True, False, False, False]
    assert all(np.isfinite(x).all() for x in held(trainer))
    counts = [x for x in held(trainer) if x.dtype == np.int32]
    assert counts and all(count == 4 for count in counts)
    # An update that was left out used up no learning rate.
    assert rows[3]["learning_rate"] == rows[1]["learning_rate"] == pytest.approx(1e-2 * 5 / 6)


def test_a_run_that_makes_no_more_updates_stops_with_a_diagnosis_and_can_go_on(world, tmp_path, monkeypatch):
    poisoned(monkeypatch, {3, 4, 5})
    trainer = sft(world, tmp_path / "out", max_skipped_updates=2, save_strategy="no")
    with pytest.raises(Diverged) as end:
        trainer.train()
    said = str(end.value)
    assert "2 updates in a row, up to update 4" in said and "The parameters are finite, the loss is " in said
    assert "it read rows" in said and "lower --learning_rate than 0.01" in said and "checkpoint-4" in said
    after = sft(world, tmp_path / "out", max_skipped_updates=2, learning_rate=1e-3)
    after.train("latest")
    assert after.loop.done == 6 and after.loop.run_state.nonfinite.total == 3


def test_broken_parameters_are_told_from_a_broken_loss():
    params = {"embedding": np.array([1.0, np.nan]), "norm": np.ones(2)}
    metrics = {"loss": np.float32(np.nan), "grad_norm": np.float32(np.nan)}
    args = SFTConfig(max_skipped_updates=4, learning_rate=1e-3, max_grad_norm=0, bf16=None)
    said = describe_divergence(4, NonFiniteCounter(4, 4), metrics, params, range(20), args)
    assert "parameters themselves are not finite (embedding)" in said and "--max_grad_norm 1" in said
    assert "rows 0, 1, 2, 3, 4, 5, 6, 7, …" in said
    fine = {"embedding": np.ones(2)}
    metrics = {"loss": 1.5, "grad_norm": np.inf}
    said = describe_divergence(4, NonFiniteCounter(4, 4), metrics, fine, [1], args)
    assert "finite, the gradient's norm is inf" in said


# What a run depends on


@pytest.fixture(scope="module")
def distilled(world, tmp_path_factory):
    """A distillation with a save after update 1, and how to make a trainer that goes on from it."""
    rows = [tiny.conversation(*row) | {"teacher_context": f"note {n}"} for n, row in enumerate(tiny.ROWS[:4])]

    def made(output, rows=rows, teacher=world / "teacher", **changes):
        console = Console(file=open(os.devnull, "w"), width=200, record=True)
        settings = QUICK | {"lmbda": 0.0, "max_steps": 2, "max_completion_length": 8, "max_length": 128} | changes
        args = GOLDConfig(output_dir=str(output), **settings)
        return GOLDTrainer(str(world / "student"), str(teacher), args, rows, console=console)

    output = tmp_path_factory.mktemp("distilled")
    made(output, save_steps=1).train()
    return output, rows, made


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row | {"teacher_context": "another"},
        lambda row: row | {"messages": [{"role": "user", "content": "Hello."}, *row["messages"]]},
        lambda row: row | {"chat_template_kwargs": {"a": 1}},
    ],
)
def test_any_change_of_what_is_learned_from_any_row_is_noticed(change, distilled, tmp_path):
    output, rows, made = distilled
    folder = shutil.copytree(output, tmp_path / "copy")
    with pytest.raises(ValueError, match="the training data"):
        made(folder, [*rows[:3], change(rows[3])]).train("latest")


def test_another_template_is_noticed(distilled, tmp_path):
    output, _, made = distilled
    folder = shutil.copytree(output, tmp_path / "copy")
    (tmp_path / "other.jinja").write_text("{# another #}" + tiny.student_tokenizer().chat_template)
    with pytest.raises(ValueError, match="the student's template and tokenizer"):
        made(folder, chat_template_path=str(tmp_path / "other.jinja")).train("latest")


def test_another_teacher_is_told(distilled, tmp_path):
    output, _, made = distilled
    folder = shutil.copytree(output, tmp_path / "copy")
    teacher = tiny.write_model(tmp_path / "teacher", "qwen3", tiny.teacher_tokenizer(), seed=5)
    trainer = made(folder, teacher=teacher)
    trainer.train("latest")
    assert "the teacher's weights differ from what the checkpoint was saved with" in trainer.console.export_text()


def test_a_teacher_that_computes_in_another_way_is_told(distilled, world, tmp_path):
    output, _, made = distilled
    folder = shutil.copytree(output, tmp_path / "copy")
    trainer = made(folder, teacher=with_rope_theta(world / "teacher", tmp_path / "other", 77.0))
    trainer.train("latest")
    assert "the teacher's config differs in ropes: now" in trainer.console.export_text()


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_was_not_compared(distilled, tmp_path):
    output, _, made = distilled
    folder = shutil.copytree(output, tmp_path / "copy")
    for notes in folder.glob("checkpoint-*/run.json"):
        row = json.loads(notes.read_text())
        row["run"] = {k: v for k, v in row["run"].items() if not k.startswith("the ")} | {
            "the text of the training data": "x"
        }
        notes.write_text(json.dumps(row))
    trainer = made(folder)
    trainer.train("latest")
    assert "was saved by an earlier version" in trainer.console.export_text()


def test_processes_agree_on_the_checkpoints_that_they_find_and_on_what_they_read_of_each(
    world, finished, tmp_path, monkeypatch
):
    output, compared = copied(finished, tmp_path), []
    monkeypatch.setattr(resume, "assert_same_across_processes", lambda what, value: compared.append((what, value)))
    (output / "checkpoint-4" / "run.json").write_text("{")
    sft(world, output).train("latest")
    (_, found), (_, broken), (_, whole) = compared
    assert found == [str(output / f"checkpoint-{step}") for step in (4, 2)]
    assert "run.json is damaged" in broken and whole["step"] == 2
