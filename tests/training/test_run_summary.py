"""`summary.json`: what a folder says of its run."""

import json

import pytest
from run_files import metrics, summary
from transformers import TrainerCallback

from gold_jax import SFTConfig, SFTTrainer
from gold_jax.training.run_summary import RunSummary, settings_beside_defaults
from gold_jax.training.signals import Preempted

ROWS = [{"prompt": f"{n}", "completion": f" {n + 1}"} for n in range(8)]


def test_a_run_leaves_what_was_run_on_what_when_and_how_it_went(world, tmp_path):
    settings = dict(output_dir=tmp_path, max_steps=2, logging_steps=1, eval_strategy="epoch", hub_token="secret")
    command = ["python", "-m", "gold_jax.sft", "--hub_token", "secret"]
    trainer = SFTTrainer(str(world / "student"), SFTConfig(**settings), ROWS, ROWS, command=command)
    trainer.train()
    found = summary(tmp_path)
    assert found["method"] == "supervised fine-tuning" and found["rows"] == 8 and found["total_updates"] == 2
    given = {name: value for name, value in settings.items() if name != "hub_token"}
    assert found["settings"] == given | {"output_dir": str(tmp_path), "eval_steps": 1}  # which follows logging_steps
    assert "secret" not in json.dumps(found)
    assert found["results"]["after training"].keys() >= {"eval_loss", "eval_bits_per_byte"}
    (part,) = found["parts"]
    assert part["how"] == "finished" and (part["from_update"], part["to_update"]) == (0, 2)
    assert part["command"].endswith("--hub_token HIDDEN") and part["device"] == "cpu" and "jax" in part["versions"]
    assert part["seconds"] > 0 and part["compiling_seconds"] >= 0
    rows = metrics(tmp_path)
    assert all(row["time"] > 1.7e9 for row in rows)
    # Another run into the folder keeps the first one's.
    SFTTrainer(str(world / "student"), SFTConfig(output_dir=tmp_path, max_steps=1), ROWS).train()
    assert json.loads((tmp_path / "summary.1.json").read_text()) == found
    assert summary(tmp_path)["total_updates"] == 1


def test_log_lines_and_summary_count_what_was_compiled_and_for_how_long(world, tmp_path, monkeypatch):
    now = [7, 2.0]
    monkeypatch.setattr("gold_jax.progress.compiled", lambda: tuple(now))

    class Compiles(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now[:] = now[0] + state.global_step, now[1] + 0.5

    settings = dict(output_dir=tmp_path, max_steps=3, logging_steps=2, disable_tqdm=True)
    SFTTrainer(str(world / "student"), SFTConfig(**settings), ROWS, callbacks=[Compiles()]).train()
    rows = metrics(tmp_path)
    assert [(row["step"], row["programs_compiled"], row["compiling_seconds"]) for row in rows] == [
        (2, 3, 1),
        (3, 3, 0.5),
    ]
    (part,) = summary(tmp_path)["parts"]
    assert (part["programs_compiled"], part["compiling_seconds"]) == (6, 1.5)


@pytest.mark.parametrize(
    "error, how", [(KeyboardInterrupt(), "interrupted"), (Preempted(), "preempted"), (OSError("full"), "OSError: full")]
)
def test_a_part_says_how_it_ended_and_a_resumed_run_has_one_more(tmp_path, error, how):
    done = iter([3, 3, 5])
    with pytest.raises(type(error)):
        with RunSummary(tmp_path, {"rows": 8}).part("a", 9, lambda: next(done), resumed=False):
            began = summary(tmp_path)
            assert began["parts"][0]["ended"] is None  # what a process that is killed leaves
            raise error
    with RunSummary(tmp_path).part("a", 9, lambda: 9, resumed=True):
        pass
    first, second = summary(tmp_path)["parts"]
    assert (first["how"], first["to_update"], second["how"]) == (how, 5, "finished")
    with RunSummary(tmp_path).part("another run", 9, lambda: 9, resumed=True):
        pass
    assert len(summary(tmp_path)["parts"]) == 1


def test_passwords_are_hidden_and_a_damaged_summary_is_kept_beside(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    facts = {"settings": {"vllm_server_base_url": "http://me:secret@host:8000"}}
    with RunSummary(tmp_path, facts).part("a", 9, lambda: 9, resumed=True):
        pass
    found = summary(tmp_path)
    assert found["settings"] == {"vllm_server_base_url": "http://HIDDEN@host:8000"} and len(found["parts"]) == 1
    assert (tmp_path / "summary.damaged.json").read_text() == "{"


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    with RunSummary(tmp_path / "file").part("a", 9, lambda: 0, resumed=True):
        pass
    with RunSummary(None).part("a", 9, lambda: 0, resumed=False):
        pass


def test_what_is_no_number_and_no_utf_8_is_written_as_json(tmp_path):
    summary = RunSummary(tmp_path, {"output": "x\udcff", "big": [float("inf")]})
    with summary.part("a", 9, lambda: 0, resumed=False):
        summary.add(results={"after": {"eval_loss": float("nan")}})
    refuse = pytest.fail  # of NaN, which is no JSON
    found = json.loads((tmp_path / "summary.json").read_text("utf-8"), parse_constant=refuse)
    assert (found["output"], found["results"]["after"]["eval_loss"], found["big"]) == ("x\udcff", "nan", ["inf"])


def test_settings_are_those_that_are_no_defaults():
    given = dict(seed=3, hub_token="x", learning_rate=SFTConfig().learning_rate)
    given |= dict(model_init_kwargs={"revision": None}, template_kwargs={"date": None})
    assert settings_beside_defaults(SFTConfig(**given)) == {"seed": 3, "template_kwargs": {"date": None}}
    loads = {"revision": None, "dtype": "bfloat16"}
    assert settings_beside_defaults(SFTConfig(model_init_kwargs=loads)) == {"model_init_kwargs": {"dtype": "bfloat16"}}
