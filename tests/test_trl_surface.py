"""Whoever exchanges the import of TRL's GOLD trainer finds each name that it has, or a sentence that says what stands there."""

import json
import os
import pathlib
import re
import subprocess

import pytest
import tiny_models as tiny
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import PredictionOutput

from gold_jax import GOLDConfig, GOLDTrainer
from gold_jax.config import trl_compat
from gold_jax.training import hub
from gold_jax.training import trainer as trainer_module
from gold_jax.training.optimizer import make_schedule

pytestmark = pytest.mark.usefixtures("own_cache")
GOLDEN = pathlib.Path(__file__).parent / "golden"
TRL = json.loads((GOLDEN / "trl_trainer.json").read_text())
ROWS = [tiny.conversation(*row) for row in tiny.ROWS[:4]]
QUICK = {
    "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_length": 128,
    "max_completion_length": 8, "lmbda": 0.0, "save_strategy": "no", "loss": "gold",
}  # fmt: skip


def gold(world, output, evaluation=None, changes=(), **options):
    args = GOLDConfig(output_dir=str(output), **(QUICK | dict(changes)))
    models = str(world / "student"), str(world / "teacher")
    options = {"console": tiny.quiet_console()} | options
    return GOLDTrainer(*models, args, ROWS, evaluation, **options)


class Everything(TrainerCallback):
    """Records the events, and sets switches of the control at some."""

    def __init__(self, **switches):
        self.events, self.switches = [], switches  # "on_step_end_2": "should_save"

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args, state, control, **values):
            self.events.append((name, state.global_step))
            assert args.output_dir and state.max_steps and values["processing_class"] and values["model"].config
            if switch := self.switches.get(f"{name}_{state.global_step}"):
                setattr(control, switch, True)

        return record


class Never(TrainerCallback):
    def on_pre_optimizer_step(self, *given, **values):
        raise AssertionError


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run that has trained, evaluated, saved, predicted, with the callbacks' events."""
    seen = Everything()
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "seq_kd": True}
    changes |= {"lmbda": 0.5, "report_to": "none"}
    trainer = gold(world, tmp_path_factory.mktemp("trained"), ROWS[:2], changes, callbacks=[seen])
    output = trainer.train()
    predicted = trainer.predict(ROWS[:2])
    return trainer, output, predicted, seen.events


def answered(thing, name, table):
    """Whether an attribute that is not there says what the table says, and one that is there is in no table."""
    try:
        getattr(thing, name)
    except AttributeError as error:
        return table.get(name, "nothing") in str(error)
    return name not in table


def test_every_member_of_the_trainer_and_its_settings_is_there_or_answered(trained):
    trainer = trained[0]
    assert [name for name in TRL["members"] if not answered(trainer, name, trl_compat.MEMBERS)] == []
    assert [name for name in TRL["settings"] if not answered(trainer.args, name, trl_compat.SETTINGS_MEMBERS)] == []
    with pytest.raises(AttributeError, match="GOLDTrainer has no evaluat; the nearest is evaluate"):
        trainer.evaluat  # noqa: B018


def test_every_argument_is_taken_or_answered_and_none_is_taken(world, tmp_path):
    given = {"model": str(world / "student"), "teacher_model": str(world / "teacher"), "train_dataset": ROWS}
    given |= {"args": GOLDConfig(output_dir=str(tmp_path), **QUICK), "console": tiny.quiet_console()}
    default = {"optimizers": (None, None), "callbacks": []}
    GOLDTrainer(**(dict.fromkeys({*TRL["arguments"], *trl_compat.TRAINER_ARGUMENTS}) | default | given))
    for name, text in trl_compat.TRAINER_ARGUMENTS.items():
        with pytest.raises(ValueError, match=re.escape(f"{name} is not supported here: {text}")):
            GOLDTrainer(**given, **{name: object()})


def test_arguments_of_another_kind_are_answered_in_one_sentence(world, tmp_path):
    given = [str(world / "student"), str(world / "teacher")]
    with pytest.raises(TypeError, match="has no argument 'dataset'; the nearest is "):
        GOLDTrainer(*given, GOLDConfig(), ROWS, dataset=ROWS)
    with pytest.raises(TypeError, match="args is a dict; GOLDTrainer takes a GOLDConfig of gold_jax"):
        GOLDTrainer(*given, {}, ROWS)
    with pytest.raises(ValueError, match="eval_dataset is an empty dict; pass data sets by their names"):
        gold(world, tmp_path, {})
    with pytest.raises(ValueError, match="compute_metrics is given the texts .* set predict_with_generate=True"):
        gold(world, tmp_path, ROWS, compute_metrics=print)
    torch_model = type("LlamaForCausalLM", (), {"name_or_path": "meta-llama/Llama-3.2-1B"})()
    with pytest.raises(TypeError, match="not LlamaForCausalLM; pass its name, 'meta-llama/Llama-3.2-1B'"):
        GOLDTrainer(torch_model, given[1], GOLDConfig(), ROWS, processing_class=tiny.student_tokenizer())
    with pytest.raises(TypeError, match="not LlamaForCausalLM; pass its name, 'meta-llama/Llama-3.2-1B'"):
        GOLDTrainer(given[0], torch_model, GOLDConfig(), ROWS)
    assert (
        GOLDConfig(teacher_model="a").teacher_model_name_or_path == GOLDConfig(teacher_model="a").teacher_model == "a"
    )


def test_every_metric_is_logged_and_every_event_happens_or_is_answered(trained):
    logged = {key for row in trained[0].log_history for key in row}
    assert set(TRL["metrics"]) - logged == set(trl_compat.METRICS)
    happened = {event for event, _ in trained[3]} | {"on_push_begin"}  # which the test of pushing sees
    assert set(TRL["events"]) - happened == set(trl_compat.EVENTS)


def test_every_schedule_is_there_or_answered():
    answers, given = trl_compat.VALUES["lr_scheduler_type"], {"warmup_stable_decay": {"num_decay_steps": 2}}
    for name in TRL["schedules"]:
        if name in answers:
            with pytest.raises(ValueError, match=re.escape(answers[name])):
                GOLDConfig(lr_scheduler_type=name)
        else:
            args = GOLDConfig(learning_rate=1.0, lr_scheduler_type=name, lr_scheduler_kwargs=given.get(name))
            assert 0 <= float(make_schedule(args, 4)(1)) <= 1


def test_no_answer_stands_for_what_trl_has_not():
    assert trl_compat.MEMBERS.keys() <= set(TRL["members"]) and trl_compat.SETTINGS_MEMBERS.keys() <= set(
        TRL["settings"]
    )


@pytest.mark.live
def test_the_list_is_trl_s(tmp_path):
    python = os.environ.get("GOLD_JAX_TRL_PYTHON")
    if python is None:
        pytest.skip("GOLD_JAX_TRL_PYTHON names no Python that has TRL")
    command = [python, str(GOLDEN / "make_trl_trainer.py"), "--print"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert json.loads(found) == TRL


# What the members do


def test_what_transformers_trainer_has_is_had_here(trained, tmp_path):
    trainer, output, predicted, _ = trained
    assert trainer.is_world_process_zero() and not trainer.is_in_train and len(trainer.get_learning_rates()) == 1
    assert trainer.get_num_trainable_parameters() > 1000 and trainer.get_total_train_batch_size() == 2
    assert trainer.train_dataset is ROWS and trainer.beta == 0.5 and trainer.pad_token_id is not None
    assert trainer.teacher_model.config.vocab_size != trainer.model.config.vocab_size
    assert trainer.teacher_tokenizer.get_vocab() != trainer.processing_class.get_vocab()
    assert re.fullmatch(r"GOLDTrainer\('.*student' from '.*teacher', 4 rows, 4 of 4 updates done\)", repr(trainer))
    assert {"train_runtime", "train_loss", "train_samples_per_second", "eval_loss"} <= output.metrics.keys()
    assert isinstance(predicted, PredictionOutput) and len(predicted.predictions) == 2
    assert predicted.label_ids == [row["messages"][-1]["content"] for row in ROWS[:2]]
    assert predicted.metrics.keys() >= {"test_loss", "test_bits_per_byte", "test_exact_match"}
    trainer.save_metrics("train", output.metrics)
    trainer.save_state()
    folder = pathlib.Path(trainer.args.output_dir)
    assert json.loads((folder / "all_results.json").read_text())["train_loss"] == output.training_loss
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4
    trainer.create_model_card("A name", "some/rows", ["tag"])
    card = (folder / "README.md").read_text()
    assert "# A name" in card and "- tag" in card and "some/rows" in card


def test_other_rows_are_measured_under_their_own_names(trained):
    trainer = trained[0]
    found = trainer.evaluate({"one": ROWS[:2], "two": ROWS[2:]}, metric_key_prefix="held")
    assert found["held_one_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert found["held_two_loss"] != found["held_one_loss"] and "held_two_loss" in trainer.log_history[-2]


def test_callbacks_come_and_go(trained, world):
    trainer = trained[0]
    with pytest.raises(ValueError, match="trial is not supported here: make a trainer for each choice of settings"):
        trainer.train(trial=object())
    trainer.add_callback(Never)
    never = trainer.pop_callback(Never)
    assert isinstance(never, Never) and trainer.pop_callback(Never) is None
    trainer.add_callback(never)
    trainer.remove_callback(Never)
    assert never not in trainer.callback_handler.callbacks


def test_an_event_that_cannot_happen_is_said_once(world, tmp_path):
    console = tiny.quiet_console()
    gold(world, tmp_path, callbacks=[Never()], console=console)
    said = console.export_text()
    assert said.count("on_pre_optimizer_step of Never is never called: an update is one compiled function") == 1


def test_events_come_in_transformers_order(trained):
    names = [name for name, step in trained[3] if step in (0, 1)]
    assert names[:6] == ["on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log"]
    assert [step for name, step in trained[3] if name == "on_epoch_end"] == [2, 4]
    assert [step for name, step in trained[3] if name == "on_save"] == [2, 4]


def test_callbacks_have_a_run_log_evaluate_save_and_stop_when_they_want(world, tmp_path):
    seen = Everything(on_step_end_1="should_save", on_step_end_2="should_log", on_step_begin_2="should_evaluate")
    seen.switches["on_step_end_3"] = "should_training_stop"
    trainer = gold(world, tmp_path, ROWS[:2], {"logging_steps": 100}, callbacks=[seen])
    assert trainer.train().global_step == 3
    assert (tmp_path / "checkpoint-1").is_dir()
    assert [row["step"] for row in trainer.log_history if "loss" in row] == [2]
    assert [step for name, step in seen.events if name == "on_evaluate"] == [3]  # the closing one, too
    seen.switches.clear()
    assert trainer.train().global_step == 4  # a stop is of the training that it was asked for in


def test_an_epoch_is_not_cut_short(world, tmp_path):
    trainer = gold(world, tmp_path, callbacks=[Everything(on_step_end_1="should_epoch_stop")])
    with pytest.raises(ValueError, match="should_epoch_stop.*should_training_stop ends the run"):
        trainer.train()


def test_early_stopping_ends_a_run_that_gets_worse_and_the_best_student_is_kept(world, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.6, 2.0])  # the last one of the best, loaded
    measure = {"save_steps": 1, "eval_steps": 1, "save_strategy": "steps", "eval_strategy": "steps"}
    measure |= {"load_best_model_at_end": True, "metric_for_best_model": "bits_per_byte", "save_total_limit": 1}
    changes = measure | {"max_steps": 6}
    trainer = gold(world, tmp_path, ROWS[:2], changes, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)])
    predict = trainer.loop.predict

    def measured(*given):
        output = predict(*given)
        return output._replace(metrics=output.metrics | {"eval_bits_per_byte": next(values)})

    monkeypatch.setattr(trainer.loop, "predict", measured)
    output = trainer.train()
    state = trainer.state
    assert (output.global_step, state.best_metric, state.best_global_step) == (4, 2.0, 2)
    measured_at = [row["step"] for row in trainer.log_history if "eval_loss" in row]
    assert measured_at == sorted(set(measured_at))  # the last one is the closing one, too
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "checkpoint-2")]
    assert weights[0] == weights[1]
    resumed = gold(world, tmp_path, ROWS[:2], changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.best_global_step >= 2


BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}


def measuring(trainer, *values):
    """Has the evaluations of a trainer measure these losses."""
    predict, values = trainer.loop.predict, iter(values)

    def measured(*given):
        output = predict(*given)
        return output._replace(metrics=output.metrics | {"eval_loss": next(values)})

    trainer.loop.predict = measured
    return trainer


def test_the_best_is_the_best_of_the_saves(world, tmp_path):
    changes = BEST | {"max_steps": 3, "save_steps": 2, "eval_steps": 1, "save_total_limit": 1}
    trainer = measuring(gold(world, tmp_path, ROWS[:2], changes), 1.0, 5.0, 6.0, 5.0)
    trainer.train()
    state = trainer.state
    assert (state.best_metric, state.best_global_step) == (1.0, 1)  # as transformers has it
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert "The best of all is" in (said := trainer.console.export_text()) and "(loss 5)" in said
    # What goes on from there knows both, and compares saves with the save.
    longer = measuring(gold(world, tmp_path, ROWS[:2], changes | {"max_steps": 4}), 6.0, 4.0)
    longer.train("latest")
    assert (longer.state.best_metric, longer.state.best_global_step) == (1.0, 1)
    assert longer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_a_longer_run_knows_how_good_the_end_of_the_shorter_one_was(world, tmp_path):
    changes = BEST | {"max_steps": 2, "save_steps": 1, "eval_steps": 1}
    measuring(gold(world, tmp_path, ROWS[:2], changes), 3.0, 2.0).train()
    longer = measuring(gold(world, tmp_path, ROWS[:2], changes | {"max_steps": 3}), 2.0, 4.0, 2.0)
    longer.train("latest")
    assert (longer.state.best_metric, longer.state.best_global_step) == (2.0, 2)
    steps = [row["step"] for row in longer.log_history if "eval_loss" in row]
    assert steps == [1, 2, 3]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "checkpoint-2")]
    assert weights[0] == weights[1]


def test_a_callback_that_saves_and_stops_does_both(world, tmp_path):
    seen = Everything(on_step_end_1="should_training_stop", on_log_1="should_save")
    gold(world, tmp_path, changes={"save_strategy": "no"}, callbacks=[seen]).train()
    assert (tmp_path / "checkpoint-1").is_dir() and ("on_save", 1) in seen.events


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"load_best_model_at_end": True}, "--eval_strategy is no, --save_strategy is steps; give both alike"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
          "save_steps": 3}, "--save_steps is 3, --eval_steps is 2; give a multiple"),
        ({"hub_strategy": "checkpoint"}, "checkpoints are not pushed"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        GOLDConfig(**changes)


def test_a_measure_that_is_none_is_named(world, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy"}
    with pytest.raises(ValueError, match="--metric_for_best_model is 'accuracy', which no evaluation measures"):
        gold(world, tmp_path, ROWS[:2], changes).train()


def test_metrics_of_a_caller_are_computed_of_texts(world, tmp_path):
    seen = []

    def lengths(given):
        seen.append(given)
        return {"written": sum(map(len, given.predictions)), "wanted": sum(map(len, given.label_ids))}

    trainer = gold(world, tmp_path, ROWS[:2], {"predict_with_generate": True}, compute_metrics=lengths)
    found = trainer.evaluate()
    assert seen[0].label_ids == [row["messages"][-1]["content"] for row in ROWS[:2]]
    assert found["eval_wanted"] == sum(map(len, seen[0].label_ids)) and "eval_written" in found


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(world, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3}
    gold(world, tmp_path, changes=changes).train()
    longer = gold(world, tmp_path, changes=changes | {"max_steps": 6})
    longer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in longer.log_history] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4", "checkpoint-6"}
    assert longer.state.num_input_tokens_seen > 0


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_a_student_is_pushed_when_the_strategy_says(strategy, world, tmp_path, monkeypatch):
    pushed = []

    def push(folder, name, private, token, message="Trained with gold_jax"):
        assert (pathlib.Path(folder) / "model.safetensors").exists() and (name, token) == ("me/m", "hf_t")
        pushed.append(message)
        if message == "Update 2":
            raise hub.HubError("The push to the hub failed")
        return "https://hub/commit"

    monkeypatch.setattr(trainer_module, "create_hub_repository", lambda *given: "me/m")
    monkeypatch.setattr(trainer_module, "push_to_hub", push)
    changes = {
        "push_to_hub": True,
        "hub_token": "hf_t",
        "hub_strategy": strategy,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    seen = Everything()
    trainer = gold(world, tmp_path, changes=changes, callbacks=[seen])
    trainer.train()
    ended = ["Trained with gold_jax"]
    assert pushed == (["Update 1", "Update 2", "Update 3"] if strategy == "every_save" else []) + ended
    assert sum(name == "on_push_begin" for name, _ in seen.events) == len(pushed)
    early = gold(
        world, tmp_path / "early", changes=changes, callbacks=[Everything(on_step_end_2="should_training_stop")]
    )
    before = len(pushed)
    early.train()
    assert pushed[before:] == (["Update 1"] if strategy == "every_save" else []) + ended
    with pytest.raises(ValueError, match="revision is 'v1': pushes go to the main branch"):
        trainer.push_to_hub("message", revision="v1")
    assert trainer.push_to_hub("message", tags=["mine"]) if strategy == "every_save" else True


# Scripts

SCRIPT = """
from datasets import load_dataset
from transformers import AutoTokenizer, GenerationConfig
from gold_jax.trl import (
    GOLDConfig, GOLDTrainer, LogCompletionsCallback, ModelConfig, ScriptArguments, TrlParser, get_kbit_device_map,
    get_peft_config, get_quantization_config,
)

script, training, model = TrlParser((ScriptArguments, GOLDConfig, ModelConfig)).parse_args_and_config()
quantization = get_quantization_config(model)
kwargs = dict(
    revision=model.model_revision or training.student_model_revision, trust_remote_code=model.trust_remote_code,
    attn_implementation=model.attn_implementation, torch_dtype=model.dtype, use_cache=not training.gradient_checkpointing,
    device_map=get_kbit_device_map() if quantization is not None else None, quantization_config=quantization,
)
training.model_init_kwargs = kwargs
training.teacher_model_init_kwargs = dict(kwargs)
if training.teacher_tokenizer_name_or_path is None and training.use_uld_loss:
    training.teacher_tokenizer_name_or_path = training.teacher_model_name_or_path
tokenizer = AutoTokenizer.from_pretrained(
    model.model_name_or_path, revision=model.model_revision, trust_remote_code=model.trust_remote_code, padding_side="left"
)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
data = load_dataset(script.dataset_name, name=script.dataset_config)
trainer = GOLDTrainer(
    model=model.model_name_or_path, teacher_model=training.teacher_model_name_or_path, args=training,
    train_dataset=data[script.dataset_train_split],
    eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
    processing_class=tokenizer, peft_config=get_peft_config(model),
)
if training.eval_strategy != "no":
    generation = GenerationConfig(
        max_new_tokens=training.max_new_tokens, do_sample=True, temperature=training.temperature
    )
    trainer.add_callback(LogCompletionsCallback(trainer, generation, num_prompts=2))
trainer.train()
trainer.save_model(training.output_dir)
if training.push_to_hub:
    trainer.push_to_hub(dataset_name=script.dataset_name)
"""


def test_a_script_in_the_manner_of_trl_s_runs_with_its_import_exchanged(world, tmp_path, monkeypatch, capsys):
    flags = f"--model_name_or_path {world / 'student'} --teacher_model_name_or_path {world / 'teacher'} --dataset_name "
    flags += f"{world / 'data'} --output_dir {tmp_path / 'out'} --max_steps 2 --eval_strategy steps --eval_steps 1 "
    flags += "--per_device_train_batch_size 2 --max_completion_length 8 --use_uld_loss --trust_remote_code --top_p 0.9"
    monkeypatch.setattr("sys.argv", ["gold.py", *flags.split(), "--lora_r", "64"])
    names: dict = {}
    exec(SCRIPT, names)
    assert names["trainer"].state.global_step == 2 and names["model"].trust_remote_code is True
    assert (tmp_path / "out" / "model.safetensors").exists()
    said = capsys.readouterr().out
    assert "Completions at step 1" in said and "Completions at step 2" in said and "--lora_r: It has no effect" in said


@pytest.mark.parametrize(
    "flags, code, says",
    [
        ("--use_peft", 2, "--use_peft is not supported here: LoRA is not in this version"),
        ("--load_in_4bit", 2, "--load_in_4bit is not supported here"),
        ("--nonsense", 2, "there is no flag --nonsense"),
        ("--help", 0, "--learning_rate"),
    ],
)
def test_the_parser_ends_a_script_with_one_paragraph(flags, code, says, capsys):
    from gold_jax import trl

    with pytest.raises(SystemExit) as ended:
        trl.TrlParser((trl.ScriptArguments, trl.GOLDConfig, trl.ModelConfig)).parse_args_and_config(flags.split())
    found = capsys.readouterr()
    assert ended.value.code == code and says in found.out + found.err
    with pytest.raises(TypeError, match="TrlParser reads ScriptArguments, .* not builtins.dict"):
        trl.TrlParser((trl.GOLDConfig, dict))
