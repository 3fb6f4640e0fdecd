"""What a model folder holds is not believed: one sentence names the file, and nothing hangs or goes on quietly."""

import json
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gold_jax
from gold_jax.json_files import MOST_BYTES, parse_json_object, read_json_object
from gold_jax.loading import as_chat_tokenizer, load_tokenizer
from gold_jax.models.hf_checkpoint import read_config
from gold_jax.models.safetensors_io import INDEX, TensorFolder, is_finite
from gold_jax.quickstart import resolve_embedded
from gold_jax.text.surface import surfaces_of

STUDENT = pathlib.Path(resolve_embedded("embedded:student"))


@pytest.fixture
def folder(tmp_path):
    return pathlib.Path(shutil.copytree(STUDENT, tmp_path / "model"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ("[1]", r"holds \[1\]; it must hold a JSON object"),
        ("null", "holds None"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' is there twice"),
        ('{"a": 1e400}', "1e400 is too large"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        (b'\xff{"a": 1}', "not valid JSON"),
        (json.dumps(["x" * 10**6]), "holds"),
    ],
)
def test_a_text_that_is_no_plain_object_is_one_short_sentence(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_json_object(text, "folder/some.json")
    assert str(error.value).startswith("folder/some.json ") and len(str(error.value)) < 400


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge"])
def test_what_is_no_file_of_a_sane_size_is_not_opened(kind, tmp_path):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"config\.json (is no regular file|is a folder|has 100,000,001 bytes)"):
        read_json_object(path)


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map} if weight_map is not None else {}))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "weight_map must be an object"),
        ({}, "weight_map must be an object"),
        ("x", "weight_map must be an object"),
        ({"a": 1}, "weight_map must be an object"),
        ({"a": ["b"]}, "weight_map must be an object"),
        ({"a": "../other/model.safetensors"}, "must name .* files in this folder"),
        ({"a": "/etc/passwd"}, "must name .* files in this folder"),
        ({"a": "/elsewhere/x.safetensors"}, "must name .* files in this folder"),
        ({"a": "pytorch_model.bin"}, "must name .* files in this folder"),
        ({"a": "x" * 10**5 + ".safetensors"}, "which is not there"),
        ({"a": "pipe.safetensors"}, "pipe.safetensors is no regular file"),
        ({"a": "folder.safetensors"}, "folder.safetensors is a folder"),
    ],
)
def test_an_index_names_files_of_its_own_folder(weight_map, words, folder):
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    write_index(folder, weight_map)
    with pytest.raises(ValueError, match=words) as error:
        gold_jax.load_model(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 700


def test_a_tensor_that_is_in_two_files_is_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    write_index(folder, {"a": "model.safetensors", "b": "other.safetensors"})
    with pytest.raises(ValueError, match=r"is in model.safetensors and in other.safetensors"):
        TensorFolder(folder)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_single_value_that_is_not_finite_is_seen_by_its_bits(dtype, value):
    info = ml_dtypes.finfo(dtype)
    values = np.array([[0.0, -0.0, info.max], [info.min, info.tiny, -1.0]], dtype)
    assert is_finite(values) and is_finite(values[:0])
    values[1, 0] = value
    assert not is_finite(values) and not is_finite(values[1, :1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_are_refused_with_tensor_and_file(name, value, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: {name} holds NaN or infinite values"):
        gold_jax.load_model(folder)


def test_weights_that_are_too_large_for_the_dtype_they_are_kept_in_are_refused(folder):
    tensors = {name: x.astype("float32") for name, x in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"][0] = 3.4e38
    save_file(tensors, folder / "model.safetensors")
    gold_jax.load_model(folder)
    with pytest.raises(ValueError, match="model.norm.weight .*it is float32, read as bfloat16"):
        gold_jax.load_model(folder, param_dtype="bfloat16")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},  # transformers would make lists of that length
        {"num_hidden_layers": 10**400},
        {"vocab_size": [1]},
        {"rope_theta": [1]},
        {"rope_theta": 10**400},
        {"rope_theta": 1e-300},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": float("nan")}},
        {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
        {"layer_types": "x" * 10**5},
        {"model_type": "y" * 10**5},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
        {"model_type": "gemma2", "query_pre_attn_scalar": 0},
        {"model_type": "gemma2", "attn_logit_softcapping": float("nan")},
    ],
)
def test_a_config_whose_numbers_cannot_be_is_one_short_sentence(changes, folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_config(folder)
    assert len(str(error.value)) < 700


def tokenizer_with(folder, change, file="tokenizer.json"):
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))
    return path


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("i", [5, 10**9])
def test_an_added_token_whose_id_cannot_be_is_refused(file, i, folder):
    change = {
        "tokenizer.json": lambda c: c["added_tokens"].append({"id": i, "content": "<new>", **ADDED}),
        "tokenizer_config.json": lambda c: c.setdefault("added_tokens_decoder", {}).update({i: {"content": "<new>"}}),
        "added_tokens.json": lambda c: c.update({"<new>": i}),
    }
    path = tokenizer_with(folder, change[file], file)
    with pytest.raises(ValueError, match=f"{path} gives the added token '<new>' the id {i}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("i", "words"), [(300, "two entries the id 300"), (10**9, "has the id 1000000000")])
def test_an_entry_whose_id_cannot_be_is_refused(i, words, folder):
    tokenizer_with(folder, lambda c: c["model"]["vocab"].update({"zzz": i}))
    tokenizer = load_tokenizer(folder)
    for source in (folder, tokenizer):
        with pytest.raises(ValueError, match=words):
            as_chat_tokenizer(source)
    with pytest.raises(ValueError, match=words):
        surfaces_of(tokenizer)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": "1.0"', b"\xff\xfe", '{"a": ' * 100_000])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_file_of_a_tokenizer_is_named(file, text, folder):
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=str(folder / file)) as error:
        load_tokenizer(folder)
    assert len(str(error.value)) < 700


def test_what_the_library_of_tokenizers_refuses_names_the_file(folder):
    path = tokenizer_with(folder, lambda c: c["model"].update(vocab=[1, 2]))
    with pytest.raises(ValueError, match=f"{path} is not the file of a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_does_not_hang(file, folder):
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(ValueError, match="no regular file"):
        load_tokenizer(folder)


def test_a_config_without_a_vocabulary_is_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(FileNotFoundError, match="no vocabulary"):
        load_tokenizer(folder)
