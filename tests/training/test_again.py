"""A trainer that is used more than once: nothing of a call is left behind in the next."""

import collections
import gc
import json
import logging
import os
import re
import shutil
import signal
import sys
import weakref

import jax
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from rich.console import Console
from run_files import lines, metrics, steady
from transformers import TrainerCallback

from gold_jax import GOLDConfig, GOLDTrainer, SFTConfig, SFTTrainer, load_model, save_model
from gold_jax.models.functional import split
from gold_jax.training.step import Step

pytestmark = pytest.mark.usefixtures("own_cache")
ROWS = [tiny.conversation(*row) for row in tiny.ROWS[:4]]
QUICK = {
    "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "no",
    "max_length": 128, "max_completion_length": 8, "lmbda": 0.5, "seq_kd": True, "top_k": 5,
}  # fmt: skip


def console():
    return Console(file=open(os.devnull, "w"), width=200, record=True)


def gold(world, output, student=None, evaluation=ROWS[:2], **changes):
    """A trainer whose teacher has its embedding for a head, and another vocabulary."""
    args = GOLDConfig(output_dir=str(output), **(QUICK | changes))
    models = str(student or world / "student"), str(world / "tied")
    return GOLDTrainer(*models, args, ROWS, evaluation, console=console())


@pytest.fixture(scope="module")
def pair(world):
    tiny.write_model(world / "tied", "llama", tiny.teacher_tokenizer(), seed=2)
    return world


def arrays(trainer):
    return [np.array(x) for x in jax.tree.leaves(trainer.loop.state.params)]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class Compiled(logging.Handler):
    """Counts what JAX says that it compiles, by the program's name and the shapes of its arguments."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.counts = collections.Counter()

    def emit(self, record):
        found = re.match(r"Compiling (\S+) with global shapes and types (.*)\. Argument mapping", record.getMessage())
        if found:
            self.counts[found.groups()] += 1


@pytest.fixture(scope="module")
def compiled():
    """What is compiled from here on."""
    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Compiled()
    level, passed_on = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield handler.counts
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = passed_on


@pytest.fixture(scope="module")
def twice(pair, compiled, tmp_path_factory):
    """A trainer that has trained twice, and what it stood at in between."""
    output = tmp_path_factory.mktemp("twice")
    trainer, programs = gold(pair, output), []
    before = trainer.evaluate()
    assert trainer.evaluate() == before
    closing = trainer.train().metrics
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **more: programs.append(more.get("fun_name")) if "backend_compile" in name else None
    )
    between = {
        "evaluated": trainer.evaluate(),
        "compiled": list(programs),
        "closing": closing,
        "arrays": arrays(trainer),
        "saved": trainer.save_model(output / "between"),
        "log": steady(trainer.log_history),
    }
    trainer.train()
    return trainer, between, output


def test_an_evaluation_after_training_is_that_which_training_ends_with(twice):
    _, between, _ = twice
    closing = {name: value for name, value in between["closing"].items() if name.startswith("eval_")}
    assert between["evaluated"] == closing


def test_an_evaluation_after_training_compiles_nothing(twice):
    _, between, _ = twice
    assert between["compiled"] == []


def test_no_program_is_compiled_twice_for_the_same_shapes(twice, compiled):
    programs = "fused", "loss", "teacher_forward", "prefill_into_slots", "decode_until"
    ours = {key: count for key, count in compiled.items() if key[0].removeprefix("jit(").rstrip(")") in programs}
    assert len({name for name, _ in ours}) >= 4
    assert [key[0] for key, count in ours.items() if count > 1] == []


@pytest.fixture
def backend_compiled():
    """Names of programs that XLA compiles."""
    names = []

    def hear(event, _seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(more["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield names
    jax.monitoring.unregister_event_duration_listener(hear)


def test_a_second_trainer_compiles_nothing_whatever_its_learning_rates(twice, pair, tmp_path, backend_compiled):
    gold(pair, tmp_path / "same").train()
    assert backend_compiled == []
    trainer = gold(pair, tmp_path / "other", learning_rate=3e-3, warmup_steps=1)
    trainer.train()
    assert set(backend_compiled) <= {"jit(learning_rate)"}
    assert trainer.log_history[1]["learning_rate"] == pytest.approx(3e-3)


def test_trainers_of_other_losses_share_what_the_teacher_reads_with(twice, pair, tmp_path, backend_compiled):
    gold(pair, tmp_path, loss="uld").train()
    assert "jit(fused)" in backend_compiled and "jit(teacher_forward)" not in backend_compiled


class Interrupts(TrainerCallback):
    """Presses Ctrl-C at the beginning of an update."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **others):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("ended", ["trained", "interrupted", "never trained"])
def test_a_trainer_that_is_let_go_of_gives_its_arrays_back_at_once(ended, pair, tmp_path):
    gc.collect()
    before, kept = len(jax.live_arrays()), None
    gc.disable()
    try:
        trainer = gold(pair, tmp_path, eval_gaps=True)
        if ended == "interrupted":
            trainer.add_callback(Interrupts(1))
            with pytest.raises(KeyboardInterrupt) as raised:
                trainer.train()
            kept = raised.value  # as IPython keeps it
        elif ended == "trained":
            trainer.train()
        assert len(jax.live_arrays()) > before
        gone = weakref.ref(trainer)
        del trainer
        assert gone() is None and len(jax.live_arrays()) == before
    finally:
        gc.enable()
    assert kept is None or "Interrupted after 2 updates" in str(kept)


def test_an_interrupted_trainer_has_its_log_and_goes_on(pair, tmp_path):
    whole = gold(pair, tmp_path / "whole", evaluation=None, max_steps=3)
    whole.train()
    trainer, interrupts = gold(pair, tmp_path / "out", evaluation=None, max_steps=3), Interrupts(1)
    trainer.add_callback(interrupts)
    with pytest.raises(KeyboardInterrupt, match="Interrupted after 2 updates; .* are saved in .*checkpoint-2"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not trainer.is_in_train
    assert [row["step"] for row in trainer.log_history] == [1, 2] == [row["step"] for row in trainer.state.log_history]
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert same(arrays(trainer), arrays(whole)) and steady(trainer.log_history) == steady(whole.log_history)


def test_an_evaluation_is_the_same_whoever_writes_the_completions_of_training(pair, tmp_path):
    plain = gold(pair, tmp_path / "plain", seq_kd=False).evaluate()
    assert gold(pair, tmp_path / "taught").evaluate() == plain


def test_training_again_goes_on_from_the_weights_with_all_else_new(twice, pair, tmp_path):
    trainer, between, _ = twice
    fresh = gold(pair, tmp_path / "fresh", student=between["saved"])
    fresh.train()
    assert not same(arrays(trainer), between["arrays"])
    assert same(arrays(trainer), arrays(fresh))
    assert steady(trainer.log_history) == steady(fresh.log_history) != between["log"]


def test_a_later_run_in_a_folder_keeps_the_logs_of_an_earlier_one_and_says_so(twice):
    trainer, between, output = twice
    *logged, _ = between["log"]  # the last is of an evaluation after the run
    assert steady(lines(output / "metrics.1.jsonl")) == logged
    assert steady(metrics(output)) == steady(trainer.log_history)
    assert "Renamed metrics.jsonl of another run" in trainer.console.export_text(clear=False)


def test_a_run_that_lacks_a_tracker_is_refused_before_it_touches_what_an_earlier_run_left(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "metrics.jsonl").write_text("an earlier run's")
    with pytest.raises(ValueError, match=r"pip install 'gold_jax\[wandb\]'"):
        gold(pair, tmp_path, report_to="wandb").train()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_going_on_from_a_checkpoint_is_the_same_for_a_trainer_that_has_trained(pair, tmp_path):
    trainer = gold(pair, tmp_path / "out", evaluation=None, save_strategy="steps", save_steps=1)
    trainer.train()
    first, log = arrays(trainer), steady(trainer.log_history)
    trainer.train(resume_from_checkpoint=True)
    assert same(arrays(trainer), first) and steady(trainer.log_history) == log
    assert "Resumed from" in trainer.console.export_text()


def test_a_run_that_finds_checkpoints_of_an_earlier_one_says_what_becomes_of_them(pair, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "evaluation": None, "lmbda": 0.0, "seq_kd": False}
    for expected in (False, True):
        trainer = gold(pair, tmp_path / "out", **settings)
        trainer.train()
        told = "holds checkpoints of an earlier run (checkpoint-1, checkpoint-2)" in trainer.console.export_text()
        assert told == expected


def test_settings_that_were_handed_over_stay_the_callers_and_the_trainers_stay_its_own(pair, tmp_path):
    args = GOLDConfig(output_dir=str(tmp_path / "out"), **QUICK)
    before = args.to_dict()
    trainer = GOLDTrainer(str(pair / "student"), str(pair / "tied"), args, ROWS, console=console())
    assert args.to_dict() == before
    args.lmbda = 1.0
    assert trainer.args.lmbda == 0.5
    with pytest.raises(AttributeError, match="make another trainer"):
        trainer.args.lmbda = 1.0


def test_a_model_that_a_trainer_gives_lasts_and_is_its_own(pair, tmp_path):
    trainer = gold(pair, tmp_path / "out", evaluation=None)
    # The module, its state without it, and one array.
    model, state, embedding = trainer.model, nnx.state(trainer.model), trainer.model.embedding[...]
    before = arrays(trainer)
    trainer.train()
    trainer.train()
    assert same([np.array(x) for x in jax.tree.leaves(nnx.state(model))], before)
    assert same([np.array(x) for x in jax.tree.leaves(state)], before)
    np.testing.assert_array_equal(embedding, model.embedding[...])
    model = trainer.model
    before = arrays(trainer)
    model.final_norm[...] = 0 * model.final_norm[...]
    assert same(arrays(trainer), before)


def crashing(monkeypatch):
    """Lets the first update of a run go wrong."""

    def crash(self, *arguments):
        raise OSError("the device is gone")

    monkeypatch.setattr(Step, "__call__", crash)


def test_a_run_goes_on_from_its_own_checkpoints_and_passes_over_those_of_an_earlier_one(pair, tmp_path, monkeypatch):
    trainer = gold(pair, tmp_path / "out", evaluation=None, save_strategy="steps", save_steps=1)
    trainer.train()
    between, log = arrays(trainer), steady(trainer.log_history)
    with monkeypatch.context() as patch:
        crashing(patch)
        with pytest.raises(OSError, match="the device is gone"):
            trainer.train()
    assert same(arrays(trainer), between)
    trainer.train(resume_from_checkpoint=True)  # the second run has saved nothing
    said = trainer.console.export_text()
    assert "The run that was started last has no checkpoint" in said and "a new run starts" in said
    fresh = gold(pair, tmp_path / "fresh", evaluation=None)
    fresh.train()
    fresh.train()
    assert same(arrays(trainer), arrays(fresh))
    # By its name the checkpoint of the first run is to be had; its log is another than that which lies there now.
    first = gold(pair, tmp_path / "out", evaluation=None, save_strategy="steps", save_steps=1)
    for path in (tmp_path / "out").glob("checkpoint-*"):
        notes = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(notes | {"run_id": "another"}))
    first.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert [row["step"] for row in metrics(tmp_path / "out")] == [2]
    assert log[1]["step"] == 2


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    """A trainer that has trained, and the checkpoint that it saved on the way."""
    output = tmp_path_factory.mktemp("saved")
    trainer = gold(pair, output, evaluation=None, save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer, output / "checkpoint-1"


@pytest.mark.parametrize("wanted", ["missing", "further", "damaged"])
def test_a_refused_resume_leaves_a_trainer_as_it_was(wanted, saved, tmp_path):
    trainer, checkpoint = saved
    before, log = arrays(trainer), trainer.log_history
    path = tmp_path / "nothing"
    if wanted != "missing":
        path = shutil.copytree(checkpoint, tmp_path / f"checkpoint-{9 if wanted == 'further' else 1}")
    if wanted == "further":
        notes = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(notes | {"step": 9}))
    if wanted == "damaged":
        largest = max((p for p in (path / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:64])
    says = {
        "missing": "nothing",
        "further": "is at update 9, and this run makes 2",
        "damaged": "no complete checkpoint is left",
    }[wanted]
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        trainer.train(resume_from_checkpoint=str(path))
    assert same(arrays(trainer), before) and trainer.log_history == log


@pytest.mark.parametrize("settings", [{"eval_strategy": "steps"}, {"eval_strategy": "epoch"}, {"eval_on_start": True}])
def test_an_evaluation_that_is_asked_for_needs_rows(settings, world, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **settings)
    with pytest.raises(ValueError, match=f"--{next(iter(settings))}.* needs rows to evaluate on: pass eval_dataset"):
        SFTTrainer(str(world / "student"), args, ROWS)


def test_stop_tokens_of_one_vocabulary_match_by_role(pair, tmp_path):
    """A copy of the student that ends with another token, the two tokens' embeddings exchanged, is the same model."""
    tokenizer, student = tiny.student_tokenizer(), load_model(pair / "student")
    end, other = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    order = np.arange(student.config.vocab_size)
    order[[end, other]] = other, end
    params = split(student)[1]
    folder = tiny.write_model(tmp_path / "other", "llama", tokenizer)
    save_model(student.replace({**params, "embedding": params["embedding"][order]}), folder, dtype="float32")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    (folder / "chat_template.jinja").write_text(template)
    args = GOLDConfig(output_dir=str(tmp_path / "out"), lmbda=0.0, max_steps=1, save_strategy="no", beta=0.0)
    rows = [{"prompt": question, "completion": answer} for question, answer in tiny.ROWS[:2]]  # read by no template
    trainer = GOLDTrainer(str(pair / "student"), str(folder), args, rows, rows, console=console())
    assert trainer.spec.name == "gkd" and "stop tokens matched by role" in trainer.console.export_text()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-6)


def test_a_log_is_cut_back_for_the_run_alone_that_wrote_it(pair, tmp_path):
    settings = {"evaluation": None, "save_strategy": "steps", "save_steps": 1, "lmbda": 0.0, "seq_kd": False}
    gold(pair, tmp_path / "one", checkpoint_dir=str(tmp_path / "saves"), **settings).train()
    gold(pair, tmp_path / "two", **settings).train()
    other = (tmp_path / "two" / "metrics.jsonl").read_text()
    trainer = gold(pair, tmp_path / "two", checkpoint_dir=str(tmp_path / "saves"), **settings, max_steps=3)
    trainer.train("latest")
    assert (tmp_path / "two" / "metrics.1.jsonl").read_text() == other
    assert [row["step"] for row in metrics(tmp_path / "two")] == [3]


def test_a_setting_without_effect_does_not_keep_a_run_from_going_on(pair, tmp_path):
    settings = {"evaluation": None, "save_strategy": "steps", "save_steps": 1, "lmbda": 0.0, "seq_kd": False}
    gold(pair, tmp_path / "out", **settings).train()
    trainer = gold(pair, tmp_path / "out", **settings, top_p=0.5, completion_only_loss=True)
    assert any("--top_p" in notice for notice in trainer.notices)
    trainer.train("latest")
    assert "Resumed from" in trainer.console.export_text()


@pytest.mark.parametrize(
    "trainer, args", [(GOLDTrainer, SFTConfig()), (GOLDTrainer, {}), (SFTTrainer, GOLDConfig()), (SFTTrainer, {})]
)
def test_settings_of_another_class_are_refused_by_name(trainer, args, pair):
    given = {"teacher_model": str(pair / "tied")} if trainer is GOLDTrainer else {}
    with pytest.raises(TypeError, match=f"args is a {type(args).__name__}; {trainer.__name__} takes a"):
        trainer(str(pair / "student"), args=args, train_dataset=ROWS, **given)
