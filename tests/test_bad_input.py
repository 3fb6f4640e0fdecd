"""What is wrong with the input ends a command with one paragraph and exit code 2; what only looks wrong trains."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_models as tiny
from run_files import metrics
from safetensors.numpy import load_file, save_file
from test_commands import call, distil, shell

from gold_jax import GOLDTrainer, SFTTrainer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def refused(world, tmp_path, capsys):
    """Runs a distillation that must end in an error; gives the one paragraph that it says."""

    def run(line: str = "", **flags) -> str:
        with pytest.raises(SystemExit) as end:
            distil(world, tmp_path / "out", line, **flags)
        return told(end.value.code, capsys.readouterr().err)

    return run


def told(code: int, err: str) -> str:
    """The paragraph of an error, checked for its form."""
    assert code == 2 and "Traceback" not in err
    # Lines before it are progress bars of libraries.
    (said,) = (line for line in err.splitlines() if line.startswith("gold_jax."))
    assert err.endswith(f"{said}\n")
    return said


@pytest.fixture
def broken(world, tmp_path):
    """A copy of the student to break."""
    return pathlib.Path(shutil.copytree(world / "student", tmp_path / "broken"))


def rows_file(tmp_path, *rows) -> pathlib.Path:
    return tiny.write_rows(tmp_path / "rows.jsonl", rows)


def contains(text: str, *parts: object) -> bool:
    missing = [str(part) for part in parts if str(part) not in text]
    assert not missing, f"{missing} not in: {text}"
    return True


# Models and tokenizers


def test_a_missing_model_folder(refused, tmp_path):
    contains(refused(model_name_or_path=tmp_path / "nowhere" / "student"), "nowhere", "does not exist", "config.json")


def test_a_missing_teacher_folder(refused, tmp_path):
    contains(refused(teacher_model_name_or_path=tmp_path / "nowhere" / "teacher"), "nowhere", "does not exist")


def test_no_teacher_at_all(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        call("train", f"--model_name_or_path {world}/student --dataset_name {world}/data --output_dir {tmp_path}/out")
    contains(told(end.value.code, capsys.readouterr().err), "--teacher_model_name_or_path", "a folder or a hub id")


def test_an_unknown_model_type(refused, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    contains(refused(model_name_or_path=broken), broken / "config.json", "'mamba'", "llama, mistral, ministral, qwen2")


def test_a_config_that_is_not_json(refused, broken):
    (broken / "config.json").write_text("{")
    contains(refused(model_name_or_path=broken), broken / "config.json", "JSON")


def test_a_weight_file_cut_short(refused, broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    contains(refused(model_name_or_path=broken), broken, "model.safetensors is not a whole", "download")


def test_a_tensor_of_the_wrong_shape_and_one_missing(refused, broken):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    said = refused(model_name_or_path=broken)
    contains(said, "model.layers.1.mlp.up_proj.weight has the shape [48, 31], expected [48, 32]")
    contains(said, "model.norm.weight is missing")


def test_a_model_folder_without_a_tokenizer(refused, broken):
    for path in broken.glob("tokenizer*"):
        path.unlink()
    contains(refused(model_name_or_path=broken), broken, "tokenizer.json")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(refused, tmp_path):
    folder = tiny.write_student(tmp_path / "short", rows=len(tiny.student_tokenizer()) - 3)
    contains(refused(model_name_or_path=folder), "the student's tokenizer has 3 ids beyond", "411 rows", "never fewer")


def test_a_model_with_more_rows_than_its_tokenizer_has_ids_trains(world, tmp_path):
    folder = tiny.write_student(tmp_path / "long", rows=len(tiny.student_tokenizer()) + 5)
    distil(world, tmp_path / "out", model_name_or_path=folder, lmbda=1)
    assert metrics(tmp_path / "out")[0]["loss"] > 0


def test_a_bare_tokenizer_in_python(world):
    with pytest.raises(TypeError, match="PreTrainedTokenizerFast"):
        SFTTrainer(
            str(world / "student"),
            train_dataset=[{"text": "a"}],
            processing_class=tiny.student_tokenizer().backend_tokenizer,
        )


def test_a_model_in_memory_needs_its_tokenizer(world):
    from gold_jax import load_model

    with pytest.raises(ValueError, match="the student is a model in memory, so its tokenizer must be given"):
        GOLDTrainer(load_model(world / "student"), str(world / "teacher"), train_dataset=[{"text": "a"}])


# Data


def test_an_empty_data_set(refused, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    contains(refused(dataset_name=path), "empty.jsonl")


def test_a_missing_data_file(refused, tmp_path):
    contains(refused(dataset_name=tmp_path / "nowhere.jsonl"), "there is no file or folder", "nowhere.jsonl")


def test_a_data_file_that_is_not_json(refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("question,answer\nHello,Hi\n")
    contains(refused(dataset_name=path), "rows.jsonl", "cannot be read as json")


def test_a_row_without_a_column_of_any_form(refused, tmp_path):
    said = refused(dataset_name=rows_file(tmp_path, {"query": "a", "reply": "b"}))
    contains(said, "row 0", "rows.jsonl", "query, reply", "messages", "prompt", "text")


def test_a_later_row_without_content(refused, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}]
    contains(refused(dataset_name=rows_file(tmp_path, *rows)), "row 1", "null")


def test_a_row_without_its_completion(refused, world, tmp_path):
    data = rows_file(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None})
    contains(refused(dataset_name=data, lmbda=0.5), "row 1", "no completion", "--lmbda 1")


def test_prompts_longer_than_the_window(refused, world, tmp_path, capsys):
    long = {"prompt": "the dog jumps over the fox " * 8, "completion": "yes"}
    flags = {"max_length": 24, "max_completion_length": 8, "lmbda": 0}
    said = refused(dataset_name=rows_file(tmp_path, long, long), **flags)
    contains(said, "none of 2 rows", "longer than 16 tokens", "--max_prompt_length")
    distil(world, tmp_path / "out", dataset_name=rows_file(tmp_path, long, long | {"prompt": "Hi"}), **flags)
    contains(capsys.readouterr().out, "note: left out 1 of 2 rows whose prompt is longer than 16 tokens")


def test_completions_of_no_token_teach_stopping_alone(world, tmp_path):
    empty = tiny.conversation("Say nothing.", "")
    full = tiny.conversation(*tiny.ROWS[0])
    for name, rows in {"mixed": [empty, full], "empty": [empty, empty]}.items():
        data = tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
        distil(world, tmp_path / name, dataset_name=data, lmbda=0, eval_dataset_name=data)
        row, measured = metrics(tmp_path / name)
        assert row["loss"] > 0 and np.isfinite(row["grad_norm"])
        assert row["groups"] == 2 if name == "empty" else row["groups"] > 2
        # Nothing was said, so that there are no bits per byte.
        assert (measured["eval_bits_per_byte"] is None) == (name == "empty")


def test_an_update_of_rows_without_any_target_is_left_out(world, tmp_path):
    data = rows_file(tmp_path, {"text": ""}, {"text": ""})
    for name, more in {"train": {"teacher_model_name_or_path": world / "teacher", "lmbda": 0}, "sft": {}}.items():
        line = (
            f"--model_name_or_path {world}/student --dataset_name {data} --output_dir {tmp_path / name} --max_steps 1"
        )
        call(name, line, **more)
        (row,) = metrics(tmp_path / name)
        assert "loss" not in row and row["skipped"] == 1


def test_prompts_of_no_token_can_be_sampled_from(world, tmp_path):
    distil(world, tmp_path / "out", dataset_name=rows_file(tmp_path, {"prompt": ""}, {"prompt": "Hi"}), lmbda=1)
    assert np.isfinite(metrics(tmp_path / "out")[0]["loss"])


def test_an_evaluation_split_that_is_missing(refused, tmp_path):
    said = refused(dataset_name=rows_file(tmp_path, {"prompt": "a", "completion": "b"}), eval_strategy="steps")
    contains(said, "rows.jsonl", "'test'")
    folder = tiny.write_rows(tmp_path / "folder" / "train.jsonl", [{"text": "a"}]).parent
    contains(refused(dataset_name=folder, eval_strategy="steps"), folder, "no file for the split 'test'", "train.jsonl")


def test_evaluation_rows_are_looked_at_before_training(refused, world, tmp_path):
    alone = tiny.write_rows(tmp_path / "alone.jsonl", [{"prompt": "a"}])
    said = refused(eval_dataset_name=alone, eval_strategy="steps")
    contains(said, "no row of the evaluation data has a completion")
    assert not (tmp_path / "out").exists()


def test_evaluation_rows_are_looked_at_as_they_are_measured(world, tmp_path, capsys):
    mews = "('meow' if 'cat' in m['content'] and not loop.last else '') + '<|im_end|>'"
    changes = tiny.student_tokenizer().chat_template.replace("'<|im_end|>'", mews)
    (tmp_path / "changes.jinja").write_text(changes)
    good, turns = tiny.conversation(*tiny.ROWS[0]), [*tiny.conversation("Hi.", "A cat.")["messages"]] * 2
    train, measured = rows_file(tmp_path, good), tiny.write_rows(tmp_path / "eval.jsonl", [good, {"messages": turns}])
    line = f"--model_name_or_path {world}/student --dataset_name {train} --eval_dataset_name {measured} --assistant_only_loss"
    with pytest.raises(SystemExit) as end:
        call("sft", f"{line} --output_dir {tmp_path}/out --chat_template_path {tmp_path}/changes.jinja --max_steps 1")
    contains(told(end.value.code, capsys.readouterr().err), "row 1 of the evaluation data", "cannot be located")


def test_a_conversation_that_a_template_refuses(refused, world, tmp_path):
    good = tiny.conversation(*tiny.ROWS[0])
    bad = {"messages": [{"role": "system", "content": "Be brief."}, *good["messages"]]}
    data = rows_file(tmp_path, good, bad)
    # The student's template takes a system's turn, the teacher's does not: no update may come before that shows.
    said = refused(dataset_name=data)
    contains(said, "row 1 of the data set", "system, user", "Only user and assistant roles are supported!")
    said = refused(eval_dataset_name=data, eval_strategy="steps")
    contains(said, "row 1 of the evaluation data", "Only user and assistant")
    said = refused(model_name_or_path=world / "teacher", dataset_name=data)
    contains(said, "row 1 of the data set")


# Flags


def test_a_value_out_of_range(refused):
    contains(refused(lmbda=1.5), "--lmbda is 1.5", "between 0 and 1")


@pytest.mark.parametrize("name", ["output_dir", "checkpoint_dir"])
def test_a_folder_of_the_run_that_is_a_file(refused, tmp_path, name):
    path = rows_file(tmp_path, {"text": "a"})
    contains(refused(**{name: path}), f"--{name} is '{path}', which is a file")


def test_an_unknown_flag_and_its_nearest(refused):
    contains(refused("--learning_rat 1e-3"), "there is no flag --learning_rat", "--learning_rate")


@pytest.mark.parametrize("name", ["evaluate", "generate", "sft"])
def test_the_other_commands_say_what_is_missing(name, world, tmp_path, capsys):
    for line in ("", f"--model_name_or_path {world}/student", f"--model_name_or_path {tmp_path}/no/model --prompt a"):
        with pytest.raises(SystemExit) as end:
            if name != "generate":
                line = line.replace("--prompt a", f"--dataset_name {world}/data")
            call(name, line)
        contains(told(end.value.code, capsys.readouterr().err), f"{name}: ")


def test_rows_without_answers_cannot_be_evaluated(world, tmp_path, capsys):
    data = rows_file(tmp_path, {"prompt": "a"})
    with pytest.raises(SystemExit) as end:
        call("evaluate", f"--model_name_or_path {world}/student --dataset_name {data}")
    contains(told(end.value.code, capsys.readouterr().err), "row 0", "no completion")


def test_a_process_ends_with_2_and_without_a_traceback():
    process = shell("gold_jax.train", "--model_name_or_path", "s", "--lmbda", "1.5")
    _, err = process.communicate(timeout=120)
    contains(told(process.returncode, err), "--lmbda is 1.5")
