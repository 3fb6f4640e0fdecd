"""Trainers take TRL's arguments by their names, or say what stands in their place."""

import json
import subprocess
import sys

import datasets
import jax
import numpy as np
import optax
import pytest
import tiny_models as tiny
from run_files import completions
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from gold_jax import GOLDConfig, GOLDTrainer, SFTConfig, SFTTrainer, measure_gaps, score_completions
from gold_jax.loading import load_model_and_tokenizer
from gold_jax.scoring import score_groups
from gold_jax.text.chat import ChatTokenizer
from gold_jax.training import callbacks, export
from gold_jax.training.nonfinite import Diverged

pytestmark = pytest.mark.usefixtures("own_cache")
ROWS = [tiny.conversation(*row) for row in tiny.ROWS[:4]]
QUICK = {
    "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_length": 128,
    "save_strategy": "no",
}  # fmt: skip


def sft(world, output, evaluation=None, changes=(), **options):
    args = SFTConfig(output_dir=str(output), **(QUICK | dict(changes)))
    return SFTTrainer(str(world / "student"), args, ROWS, evaluation, console=tiny.quiet_console(), **options)


class Recorder(TrainerCallback):
    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args, state, control, **values):
            self.events.append((name, state.global_step, sorted(values)))
            if name == "on_step_end" and state.global_step == self.stop_at:
                control.should_training_stop = True
            return control

        return record


def test_a_callback_of_any_process_ends_the_run_of_all(monkeypatch):
    none = callbacks.Callbacks(None, SFTConfig(), lambda: None)
    for stops in (False, True):
        elsewhere = np.array([stops, False, False, False, False])  # another process has callbacks of its own
        monkeypatch.setattr(callbacks, "all_reduce_max", lambda values: np.maximum(values, True))
        none.call("on_train_begin")
        monkeypatch.setattr(callbacks, "all_reduce_max", lambda values, elsewhere=elsewhere: values | elsewhere)
        none.agree()
        assert none.control.should_training_stop == stops


def test_more_updates_than_can_be_counted_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="--num_train_epochs is 1e.300, which is .* updates"):
        sft(world, tmp_path, ROWS[:2], {"max_steps": -1, "num_train_epochs": 1e300})


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    """A run with a callback, evaluated and saved after update 2."""
    recorder = Recorder()
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = sft(world, tmp_path_factory.mktemp("watched"), ROWS[:2], changes, callbacks=[recorder])
    return trainer, trainer.train(), recorder.events


def test_train_gives_steps_loss_and_metrics_as_transformers_does(watched):
    trainer, output, _ = watched
    assert isinstance(output, TrainOutput) and output.global_step == 3
    losses = [row["loss"] for row in trainer.log_history if "loss" in row]
    assert output.training_loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert output.metrics["train_loss"] == output.training_loss and output.metrics["train_steps_per_second"] > 0
    assert trainer.evaluate().items() <= output.metrics.items()


def test_the_state_says_where_training_stands(watched):
    trainer, _, _ = watched
    state = trainer.state
    assert (state.global_step, state.max_steps, state.epoch) == (3, 3, 1.5)
    assert state.log_history == trainer.log_history


def test_callbacks_are_called_at_the_events_of_a_run(watched):
    _, _, events = watched
    names = [name for name, _, _ in events]
    assert names[:4] == ["on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin"]
    assert "on_train_end" in names
    steps = [step for name, step, _ in events if name == "on_step_end"]
    assert steps == [1, 2, 3] and [step for name, step, _ in events if name == "on_save"] == [2, 3]
    assert [step for name, step, _ in events if name == "on_evaluate"][:2] == [2, 3]
    assert any(name == "on_log" and "logs" in values for name, _, values in events)


def test_a_callback_ends_a_run_after_an_update(world, tmp_path):
    trainer = sft(world, tmp_path / "out", callbacks=[Recorder(stop_at=2)])
    assert trainer.train().global_step == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_optax_transformation_stands_in_the_place_of_the_settings(world, tmp_path):
    still = sft(world, tmp_path / "still", optimizers=(optax.sgd(0.0), None))
    before = [np.array(x) for x in jax.tree.leaves(still.loop.state.params)]
    still.train()
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(still.loop.state.params), strict=True))
    assert "learning_rate" not in still.log_history[0]
    schedule = optax.constant_schedule(0.5)
    named = sft(world, tmp_path / "named", optimizers=(optax.sgd(schedule), schedule))
    named.train()
    assert named.log_history[0]["learning_rate"] == 0.5


RATE = 0.0


def test_an_optimizer_is_traced_for_each_trainer_as_its_globals_may_have_changed(world, tmp_path, monkeypatch):
    def update(gradients, state, params=None):
        return jax.tree.map(lambda g: -RATE * g, gradients), state

    optimizer, found = optax.GradientTransformation(lambda params: (), update), []
    for k, rate in enumerate((0.0, 0.5)):
        monkeypatch.setitem(globals(), "RATE", rate)
        trainer = sft(world, tmp_path / str(k), optimizers=(optimizer, None))
        before = [np.array(x) for x in jax.tree.leaves(trainer.loop.state.params)]
        trainer.train()
        after = jax.tree.leaves(trainer.loop.state.params)
        found.append(all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)))
    assert found == [True, False]


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"compute_metrics": print}, ValueError, "set predict_with_generate=True"),
        ({"peft_config": object()}, ValueError, "adapters are not trained here"),
        ({"optimizers": ("adam", None)}, TypeError, "optimizers takes .an optax.GradientTransformation"),
        ({"optimizers": (None, print)}, TypeError, "a schedule without an optimizer"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_what_stands_in_its_place(world, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        sft(world, tmp_path, **options)
    with pytest.raises(error, match=words):
        models = str(world / "student"), str(world / "teacher")
        GOLDTrainer(*models, GOLDConfig(output_dir=str(tmp_path)), ROWS, **options)


def test_nothing_is_begun_by_making_a_trainer_of_several_processes(world, tmp_path):
    with pytest.raises(ValueError, match="num_processes is 2, and this process runs alone"):
        sft(world, tmp_path, changes={"num_processes": 2, "process_id": 0, "coordinator_address": "localhost:1"})


def test_several_evaluation_sets_are_measured_by_their_names(world, tmp_path):
    sets = {"easy": ROWS[:2], "hard": datasets.Dataset.from_list(ROWS[2:])}
    trainer = sft(world, tmp_path, sets, {"max_steps": 1, "eval_strategy": "steps"})
    found = trainer.evaluate()
    for name, rows in sets.items():
        alone = trainer.loop.evaluate(trainer.eval_examples[name])
        assert {
            f"eval_{name}_{key.removeprefix('eval_')}": value for key, value in alone.items()
        }.items() <= found.items()
        assert len(trainer.eval_examples[name]) == len(rows)
    assert set(found) == {f"eval_{name}_{key}" for name in sets for key in ("loss", "token_accuracy", "bits_per_byte")}
    assert trainer.evaluate("hard") == alone  # by its name, as transformers has it
    assert trainer.train().metrics.keys() >= found.keys() == trainer.loop.results["after training"].keys()
    with pytest.raises(ValueError, match="eval_dataset 'hard': no row of the evaluation data has a completion"):
        sft(world, tmp_path, {"easy": ROWS, "hard": [{"prompt": "x"}]})
    with pytest.raises(ValueError, match="eval_dataset is an empty dict"):
        sft(world, tmp_path, {})
    best = {"max_steps": 1, "eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    best |= {"eval_steps": 1, "save_steps": 1}
    can_be = "give easy_loss, easy_bits_per_byte, hard_loss, hard_bits_per_byte, or another measure"
    with pytest.raises(
        ValueError, match=f"is 'loss', and each of the 2 evaluation sets is measured by its name: {can_be}"
    ):
        sft(world, tmp_path / "best", sets, best)
    trained = sft(world, tmp_path / "best", sets, best | {"metric_for_best_model": "eval_hard_loss"})
    assert trained.train().metrics["eval_hard_loss"] == trained.state.best_metric
    with pytest.raises(ValueError, match="two names that are written alike: 1, '1'"):
        sft(world, tmp_path, {1: ROWS, "1": ROWS})


@pytest.mark.parametrize(
    "changes, rest",
    [
        ({}, []),
        ({"max_length": 32}, [3]),
        ({"completion_only_loss": False}, [0, 1, 2, 3]),
        ({"lmbda": 0.5, "max_completion_length": 8}, []),
    ],
)
def test_an_evaluation_goes_over_its_rows_once_and_finds_the_bits_that_score_completions_finds(
    changes, rest, world, tmp_path
):
    rows = [*ROWS, {"prompt": "", "completion": "Nothing stands before this."}]
    if "lmbda" in changes:
        args = GOLDConfig(output_dir=str(tmp_path), **(QUICK | changes))
        models = str(world / "student"), str(world / "teacher")
        trainer = GOLDTrainer(*models, args, ROWS, rows, console=tiny.quiet_console())
    else:
        trainer = sft(world, tmp_path, rows, changes)
    assert trainer.loop.run.batches.build_evaluation(trainer.eval_examples).rest == rest
    wanted = score_completions(trainer.model, trainer.student.chat_tokenizer, rows)
    assert trainer.evaluate()["eval_bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)


# What a run does about rows that teach nothing, and about errors


def gold(world, output, rows=ROWS, changes=(), **options):
    args = GOLDConfig(output_dir=str(output), **(QUICK | {"lmbda": 0.0, "max_completion_length": 24} | dict(changes)))
    models = str(world / "student"), str(world / "teacher")
    return GOLDTrainer(*models, args, rows, console=tiny.quiet_console(), **options)


def test_rows_cut_before_their_completion_are_left_out_and_all_of_them_are_an_error(world, tmp_path):
    long = tiny.conversation("one two three four " * 8, "five")
    with pytest.raises(
        ValueError, match="none of 1 row can be learned from: 1 of which --max_length 24 leaves nothing"
    ):
        args = SFTConfig(output_dir=str(tmp_path), **QUICK | {"max_length": 24}, assistant_only_loss=True)
        SFTTrainer(str(world / "student"), args, [long], console=tiny.quiet_console())
    question, answer = "How many?", "thirty thousand four hundred and fifty-six and a half. " * 3
    trainer = gold(
        world, tmp_path, [tiny.conversation(question, answer)], {"max_length": 64, "max_completion_length": 8}
    )
    assert any("--max_length 64 cuts 1 of 1 row" in notice for notice in trainer.notices)


def test_an_update_without_anything_that_counts_is_left_out(world, tmp_path, monkeypatch):
    trainer = gold(world, tmp_path, changes={"max_skipped_updates": 2})
    builder = trainer.loop.run.batches
    build = type(builder).build

    def nothing(self, step, examples, params, shapes=()):
        batch = build(self, step, examples, params, shapes)
        batch.counted = 0 if step else batch.counted
        return batch

    monkeypatch.setattr(type(builder), "build", nothing)
    said = []
    monkeypatch.setattr(trainer.loop, "say", said.append)
    with pytest.raises(
        Diverged, match="2 updates in a row, up to update 3.*Nothing in the rows of the last one .* counts"
    ):
        trainer.train()
    assert [line for line in said if "is skipped" in line] == [
        f"Update {step} is skipped: nothing in its rows counts in the loss." for step in (2, 3)
    ]
    assert int(trainer.loop.state.step) == 3 and trainer.log_history[-1]["skipped"] == 2


def test_an_error_leaves_the_last_update_saved(world, tmp_path, monkeypatch):
    trainer = gold(world, tmp_path)
    build = type(trainer.loop.run.batches).build

    def fails(self, step, examples, params, shapes=()):
        if step == 2:
            raise OSError("the server does not answer")
        return build(self, step, examples, params, shapes)

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.loop.run.batches), "build", fails)
        said = []
        patch.setattr(trainer.loop, "say", said.append)
        with pytest.raises(OSError, match="does not answer"):
            trainer.train()
        assert "An error ended the run after" in said[-1] and "checkpoint-2" in said[-1]
    again = gold(world, tmp_path).train(resume_from_checkpoint="latest")
    assert again.global_step == 3


def test_a_student_that_can_draw_nothing_any_more_has_diverged(world, tmp_path, monkeypatch):
    trainer, said = gold(world, tmp_path, ROWS, {"lmbda": 1.0, "max_completion_length": 4}), []
    build = type(trainer.loop.run.batches).build

    def overflows(self, step, examples, params, shapes):
        return build(self, step, examples, jax.tree.map(lambda x: x * np.nan, params) if step == 1 else params, shapes)

    monkeypatch.setattr(type(trainer.loop.run.batches), "build", overflows)
    monkeypatch.setattr(trainer.loop, "say", said.append)
    broken = "After 1 update no completions can be drawn, .*logits for completion [01] are not finite.*--learning_rate than 0.01"
    with pytest.raises(Diverged, match=broken + r".* The last checkpoint is .*checkpoint-1\.$"):
        trainer.train()
    assert "An error ended the run after 1 update" in said[-1]


def test_one_bad_row_need_not_end_a_run(world, tmp_path):
    rows = [*ROWS, {"prompt": "no answer"}]
    with pytest.raises(ValueError, match="row 4 of the data set"):
        gold(world, tmp_path, rows)
    trainer = gold(world, tmp_path, rows, {"on_bad_row": "skip"})
    assert any("left out 1 of 5 rows that cannot be read" in notice for notice in trainer.notices)


@pytest.mark.parametrize("flag", ["output_dir", "checkpoint_dir"])
def test_a_folder_in_which_a_run_is_under_way_is_refused(flag, world, tmp_path):
    (tmp_path / flag).mkdir()
    code = (
        "import pathlib, sys, time\nfrom gold_jax.training.folder_lock import locked\n"
        f"with locked(pathlib.Path({str(tmp_path / flag)!r})):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    trainer = gold(world, tmp_path / "output_dir", changes={"checkpoint_dir": str(tmp_path / "checkpoint_dir")})
    with pytest.raises(ValueError, match=f"in use by another run .process {other.pid} on .*another --{flag}"):
        trainer.train()
    other.kill()
    other.wait()
    assert trainer.train().global_step == 3 and not list(tmp_path.rglob(".lock"))


def test_checkpoints_may_go_to_the_output_folder_by_name(world, tmp_path):
    assert gold(world, tmp_path, changes={"checkpoint_dir": f"{tmp_path}/../{tmp_path.name}"}).train().global_step == 3


# What leaves


def test_the_hub_token_is_in_no_file_that_a_run_writes(world, tmp_path):
    secret = "hf_nobodyshouldreadthis"
    changes = {"hub_token": secret, "save_strategy": "steps", "save_steps": 1}
    command = ["python", "-m", "gold_jax.sft", "--hub_token", secret, f"--hub_token={secret}"]
    trainer = sft(world, tmp_path, ROWS[:2], changes, command=command)
    trainer.train()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "README.md", "metrics.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in repr(trainer.args) + json.dumps(trainer.args.to_dict(), default=str)


def test_a_saved_student_is_asked_in_the_form_that_it_was_taught(world, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if not enable_thinking %}{{ 'Briefly: ' }}{% endif %}{% endif %}"
    )
    path = tmp_path / "template.jinja"
    path.write_text(template)
    changes = {"chat_template_path": str(path), "template_kwargs": {"enable_thinking": False}, "max_steps": 1}
    trainer = gold(
        world, tmp_path / "out", changes=changes | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    )
    trainer.train()
    chat_tokenizer = trainer.student.chat_tokenizer
    messages = ROWS[0]["messages"][:-1]
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == chat_tokenizer.encode_prompt(messages).tolist()
        thinking = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=True
        )
        assert thinking.endswith("<|assistant|>")
        for name in ("config.json", "generation_config.json"):
            stops = json.loads((folder / name).read_text())["eos_token_id"]
            assert tuple(np.atleast_1d(stops).tolist()) == chat_tokenizer.stop_ids
        assert load_model_and_tokenizer(folder).chat_tokenizer.stop_ids == chat_tokenizer.stop_ids


@pytest.mark.assets
@pytest.mark.parametrize("name", ["qwen3", "llama3_2", pytest.param("gemma3", marks=pytest.mark.long), "llama2"])
def test_real_tokenizers_are_saved_with_the_template_in_force(assets, tmp_path, name):
    kwargs = {"enable_thinking": False}
    chat_tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(assets / "tokenizers" / name), template_kwargs=kwargs)
    export._save_tokenizer(chat_tokenizer.tokenizer, tmp_path, chat_tokenizer.template.portable)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        == chat_tokenizer.encode_prompt(messages).tolist()
    )
    assert ChatTokenizer(saved).stop_ids == chat_tokenizer.stop_ids


def test_a_teacher_with_added_tokens_has_the_students_vocabulary(world, tmp_path):
    teacher = AutoTokenizer.from_pretrained(world / "sibling")
    student = AutoTokenizer.from_pretrained(world / "student")
    rows = json.loads((world / "student" / "config.json").read_text())["vocab_size"]
    assert len(student) < rows, "the heads have padding rows"
    teacher.add_tokens(["<only the teacher's>"])
    args = GOLDConfig(output_dir=str(tmp_path), **QUICK | {"lmbda": 0.0, "max_completion_length": 24})
    models, quiet = (str(world / "student"), str(world / "sibling")), tiny.quiet_console()
    trainer = GOLDTrainer(*models, args, ROWS, None, student, teacher, console=quiet)
    match = trainer.loop.run.match
    assert trainer.spec.name == "gkd" and match.same and match.vocabulary.matched == rows - 1
    assert np.isfinite(trainer.train().training_loss)
    student.add_tokens(["<only the student's>"])  # its text is no token of the teacher's: both read it for themselves
    trainer = GOLDTrainer(*models, args, ROWS, None, student, teacher, console=quiet)
    match = trainer.loop.run.match
    assert trainer.spec.name == "gkd" and match.related and not match.same
    assert np.isfinite(trainer.train().training_loss)


def test_an_evaluation_with_gaps_measures_what_measure_gaps_does(world, tmp_path):
    settings = QUICK | {"lmbda": 0.0, "max_completion_length": 8, "eval_gaps": True, "max_steps": 2, "seed": 5}
    settings |= {"eval_on_start": True, "per_device_eval_batch_size": 2, "teacher_context": "Be brief."}
    settings |= {"log_completions": True, "predict_with_generate": True}
    names, args = (
        [str(world / name) for name in ("student", "teacher")],
        GOLDConfig(output_dir=str(tmp_path), **settings),
    )
    trainer = GOLDTrainer(*names, args, ROWS[:2], ROWS[2:], console=tiny.quiet_console())
    trainer.train()
    prompts = [row["messages"][:-1] for row in ROWS[2:]]
    teacher_prompts = [[{"role": "user", "content": f"Be brief.\n\n{prompt[0]['content']}"}] for prompt in prompts]
    before, after = (row for row in trainer.log_history if "eval_loss" in row)
    for student, line in ((names[0], before), (str(tmp_path), after)):
        options = dict(max_new_tokens=8, key=5, batch_size=2, teacher_prompts=teacher_prompts)
        found = measure_gaps(student, names[1], prompts, **options)
        expected = found.forward, found.reverse, found.student_on_student
        assert [line[f"eval_{name}"] for name in ("forward_gap", "reverse_gap", "entropy")] == pytest.approx(
            expected, 1e-5
        )
    assert before["eval_forward_gap"] != after["eval_forward_gap"]
    alone = measure_gaps(student, names[1], prompts, max_new_tokens=8, key=5, batch_size=2)
    assert alone.student_on_student == found.student_on_student and alone.reverse != found.reverse
    rows = [{"prompt": prompt, "completion": row["messages"][-1:]} for prompt, row in zip(teacher_prompts, ROWS[2:])]
    scored = score_completions(names[1], rows=rows).bits_per_byte
    assert trainer.loop.teacher.score(trainer.eval_examples)["eval_bits_per_byte"] == pytest.approx(scored, 1e-5)
    assert "forward gap" in trainer.console.export_text()
    # What the student wrote in them is kept, with what both models give its groups, each with its own prompt.
    written, theirs = completions(tmp_path), load_model_and_tokenizer(names[1])
    told = [theirs.chat_tokenizer.with_context(prompt, "Be brief.") for prompt in prompts]
    assert [row["step"] for row in written] == [0] * len(prompts) + [2] * len(prompts)
    for student, part in ((names[0], written[: len(prompts)]), (str(tmp_path), written[len(prompts) :])):
        texts = [row["completion"] for row in part]
        found = score_groups(student, theirs, prompts, texts, teacher_prompts=told)
        for row, groups in zip(part, found):
            assert [text for text, *_ in row["groups"]] == [group.text for group in groups] and row["eval_set"] == ""
            logp = [value for _, *pair in row["groups"] for value in pair]
            assert logp == pytest.approx([value for group in groups for value in group[1:]], abs=2e-4)
    assert written[0]["reference"] == ROWS[2]["messages"][-1]["content"] and any(row["groups"] for row in written)


def test_checkpoints_hold_no_passwords_of_addresses(world, tmp_path):
    trainer = sft(world, tmp_path, changes={"template_kwargs": {"site": "http://me:secret@host"}})
    assert trainer.loop.data.description["template_kwargs"] == {"site": "http://HIDDEN@host"}
