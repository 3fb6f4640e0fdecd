import json
import shutil
import sys

import pytest
import transformers
from flax import nnx

from gold_jax import GOLDConfig, GOLDTrainer, generate, train
from gold_jax.loading import load_model_and_tokenizer, load_tokenizer
from gold_jax.models.hf_checkpoint import load_model
from gold_jax.training import trainer


def load(world, model, **options):
    return load_model_and_tokenizer(model, world / "student_tokenizer", dtype="float32", **options).model


def test_attention_is_what_was_asked_for_or_auto(world):
    assert load(world, world / "student").attention == "auto"
    assert load(world, world / "student", attention="blockwise").attention == "blockwise"


def test_a_model_in_memory_keeps_its_attention_unless_another_is_asked_for(world):
    model = load_model(world / "student", attention="plain")
    assert load(world, model).attention == load(world, nnx.split(model)).attention == "plain"
    assert load(world, model, attention="blockwise").attention == "blockwise"
    assert model.attention == "plain"


def test_attention_that_cannot_be_computed_is_refused_for_models_by_name_and_in_memory(world):
    for model in (world / "student", load_model(world / "student")):
        with pytest.raises(ValueError, match="The .* model: .*'splash' cannot be used: .* for cpu; blockwise"):
            load(world, model, attention="splash")


@pytest.fixture
def asked(monkeypatch):
    """What attention each model is loaded with, by role; loading the teacher ends the run."""
    found = {}

    def record(*args, **options):
        found[options["role"]] = options["attention"]
        if options["role"] == "teacher":
            raise InterruptedError
        return load_model_and_tokenizer(*args, **options)

    monkeypatch.setattr(trainer, "load_model_and_tokenizer", record)
    return found


def test_the_flag_is_for_student_and_teacher(world, asked):
    names = f"--model_name_or_path {world}/student --teacher_model_name_or_path {world}/teacher"
    with pytest.raises(InterruptedError):
        train.main(f"{names} --dataset_name {world}/data --attn_implementation blockwise".split())
    assert asked == {"student": "blockwise", "teacher": "blockwise"}


def test_each_model_s_own_options_choose_its_attention(world, asked):
    options = {"model_init_kwargs": {"attn_implementation": "sdpa"}}
    options |= {"teacher_model_init_kwargs": {"attn_implementation": "plain"}}
    with pytest.raises(InterruptedError):
        rows = [{"prompt": "a", "completion": "b"}]
        GOLDTrainer(str(world / "student"), str(world / "teacher"), args=GOLDConfig(**options), train_dataset=rows)
    assert asked == {"student": "auto", "teacher": "plain"}


def test_stop_tokens_of_a_file_are_numbers(world, tmp_path):
    shutil.copytree(world / "student", tmp_path / "student")
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps({"eos_token_id": "abc"}))
    with pytest.raises(
        ValueError, match="eos_token_id in generation_config.json is 'abc'; it must be the number of a token"
    ):
        load_model_and_tokenizer(tmp_path / "student")


def test_a_tokenizer_is_found_in_the_home_folder_as_its_model_is(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    assert load_model_and_tokenizer("~/student").chat_tokenizer.stop_ids
    with pytest.raises(FileNotFoundError, match="no tokenizer can be read from '.*/nowhere' .there is no such folder"):
        load_tokenizer("~/nowhere")


def test_a_tokenizer_s_own_code_runs_only_where_it_is_allowed(world, tmp_path, monkeypatch):
    for module in (transformers.dynamic_module_utils, transformers.utils.hub):  # where such code is copied to
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(world / "student", tmp_path / "own")
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "own_tokenizer.py").write_text(code)
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    line = ["--model_name_or_path", str(folder), "--prompt", "Hi", "--max_new_tokens", "2"]
    with pytest.raises(
        ValueError, match="is Python code that comes with the model; read that code, .*--trust_remote_code"
    ):
        generate.main(line)
    generate.main([*line, "--trust_remote_code"])
    assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "Own"
