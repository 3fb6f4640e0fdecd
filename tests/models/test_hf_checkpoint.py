import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gold_jax.models import safetensors_io
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.hf_checkpoint import load_model, model_folder, save_model

from . import tiny


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


def rewrite(folder: pathlib.Path, change) -> None:
    """Change the tensors of a model folder."""
    found = tensors(folder)
    change(found)
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    (
        "llama",
        "llama_tied",
        "llama_biases",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_old",
        "phi3",
        "granite_biases",
        "olmo2",
    ),
)
def test_loading_and_saving_again_gives_the_same_bits(name, tmp_path):
    source = tiny.write_folder(name, tmp_path / "source")
    save_model(load_model(source), tmp_path / "copy")
    assert_same_bits(tensors(source), tensors(tmp_path / "copy"))
    assert json.loads((tmp_path / "copy/config.json").read_text()) == tiny.config_of(name)


def test_tensors_keep_their_own_dtypes(tmp_path):
    source = tiny.write_folder("llama", tmp_path / "source")

    def to_mixed(found):
        for name in found:
            if "norm" not in name:
                found[name] = found[name].astype(ml_dtypes.bfloat16)

    rewrite(source, to_mixed)
    for param_dtype in ("float32", "auto"):
        save_model(load_model(source, param_dtype=param_dtype), tmp_path / param_dtype)
        assert_same_bits(tensors(source), tensors(tmp_path / param_dtype))


@pytest.mark.parametrize(
    ("param_dtype", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "float16")]
)
def test_parameters_are_kept_in_the_dtype_asked_for(param_dtype, kept, tmp_path):
    source = tiny.write_folder("llama_tied", tmp_path)
    rewrite(source, lambda found: found.update({name: value.astype(np.float16) for name, value in found.items()}))
    model = load_model(source, param_dtype=param_dtype)
    assert model.param_dtype == jnp.dtype(kept)
    assert {leaf.dtype for leaf in nnx.to_flat_state(nnx.state(model)).leaves} == {jnp.dtype(kept)}


def test_saving_in_another_dtype_says_so_in_the_config(tmp_path):
    model = load_model(tiny.write_folder("llama", tmp_path / "source"))
    save_model(model, tmp_path / "copy", dtype="bfloat16")
    assert {value.dtype.name for value in tensors(tmp_path / "copy").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "copy/config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="'int8' is not known"):
        save_model(model, tmp_path / "copy", dtype="int8")


def test_a_multimodal_checkpoint_is_saved_as_its_language_model(tmp_path):
    source = tiny.write_folder("gemma3_multimodal_old", tmp_path / "source")
    rewrite(source, lambda found: found.update({"vision_tower.x.weight": np.zeros((2, 2), np.float32)}))
    model = load_model(source)
    save_model(model, tmp_path / "copy")
    again = load_model(tmp_path / "copy")
    assert json.loads((tmp_path / "copy/config.json").read_text())["model_type"] == "gemma3_text"
    assert again.config == model.config
    np.testing.assert_array_equal(again.layers.down[...], model.layers.down[...])


def test_a_big_model_is_saved_in_shards_and_read_from_them(tmp_path, monkeypatch):
    source = tiny.write_folder("qwen2", tmp_path / "source")
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 30_000)
    save_model(load_model(source), tmp_path / "copy")
    index = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert {path.name for path in (tmp_path / "copy").glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(source).values())
    assert_same_bits(tensors(source), tensors(tmp_path / "copy"))
    np.testing.assert_array_equal(load_model(tmp_path / "copy").layers.up[...], load_model(source).layers.up[...])

    monkeypatch.undo()  # saved anew in one file, nothing of the shards stays
    save_model(load_model(source), tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").glob("*.safetensors*")] == ["model.safetensors"]
    (tmp_path / "copy/model.safetensors").unlink()


def test_a_missing_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 30_000)
    save_model(load_model(tiny.write_folder("qwen2", tmp_path / "source")), tmp_path / "copy")
    sorted((tmp_path / "copy").glob("model-*"))[1].unlink()
    with pytest.raises(ValueError, match="names model-00002-of-.*which is not there"):
        load_model(tmp_path / "copy")


def test_a_trained_model_without_a_checkpoint_is_saved_and_read(tmp_path):
    config = load_model(tiny.write_folder("gemma2", tmp_path / "source")).config
    model = Decoder.from_config(config, 3)
    save_model(model, tmp_path / "copy")
    np.testing.assert_array_equal(load_model(tmp_path / "copy").layers.key[...], model.layers.key[...])
    by_hand = DecoderConfig(**{**vars(config), "source": "{}"})
    with pytest.raises(ValueError, match="made by hand"):
        save_model(Decoder.from_config(by_hand, 0), tmp_path / "hand")


def test_the_generation_config_is_kept(tmp_path):
    source = tiny.write_folder("llama", tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    save_model(load_model(source), tmp_path / "copy")
    assert json.loads((tmp_path / "copy/generation_config.json").read_text()) == {"eos_token_id": [1, 2]}


def test_a_tied_checkpoint_may_store_its_head_as_well(tmp_path):
    source = tiny.write_folder("llama_tied", tmp_path)
    rewrite(source, lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"]}))
    assert load_model(source).config.tied


def test_a_head_that_differs_from_the_embedding_is_not_tied_whatever_the_config_says(tmp_path):
    source = tiny.write_folder("llama_tied", tmp_path / "source")
    rewrite(source, lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"] + 1}))
    model = load_model(source)
    np.testing.assert_array_equal(model.head_weight(), model.embedding[...] + 1)
    save_model(model, tmp_path / "copy")
    assert json.loads((tmp_path / "copy/config.json").read_text())["tie_word_embeddings"] is False
    assert_same_bits(tensors(source), tensors(tmp_path / "copy"))


def test_a_base_model_without_prefix_is_read(tmp_path):
    source = tiny.write_folder("llama_tied", tmp_path)
    expected = load_model(source).layers.query[...]

    def strip(found):
        for name in list(found):
            found[name.removeprefix("model.")] = found.pop(name)

    rewrite(source, strip)
    np.testing.assert_array_equal(load_model(source).layers.query[...], expected)


def test_parameters_lie_where_their_shapes_and_axes_say(tmp_path):
    seen, here = {}, SingleDeviceSharding(jax.devices()[0])

    def sharding(shape, spec):
        seen[spec] = shape
        return here

    folder = tiny.write_folder("llama", tmp_path)
    model = load_model(folder, sharding=sharding)
    assert seen["layers", "embed", "mlp"] == (3, 32, 48) and seen["vocab", "embed"] == (40, 32)
    plain = jax.tree.leaves(nnx.state(load_model(folder)))
    for placed, free in zip(jax.tree.leaves(nnx.state(model)), plain, strict=True):
        assert placed.committed and not free.committed  # as sharded arrays are, and as the default device's are
        np.testing.assert_array_equal(placed, free)


def test_a_model_of_numpy_arrays_is_saved_like_its_original(tmp_path):
    model = load_model(tiny.write_folder("qwen3_biases", tmp_path / "source"), param_dtype="bfloat16")
    graph, state = nnx.split(model)
    save_model(model, tmp_path / "one", dtype="float32")
    save_model(nnx.merge(graph, jax.tree.map(np.array, state)), tmp_path / "other", dtype="float32")
    assert_same_bits(tensors(tmp_path / "one"), tensors(tmp_path / "other"))


def test_every_fault_of_the_tensors_is_in_one_error(tmp_path):
    source = tiny.write_folder("llama", tmp_path)

    def spoil(found):
        del found["model.norm.weight"]
        found["model.layers.1.mlp.up_proj.weight"] = found["model.layers.1.mlp.up_proj.weight"][:-1]
        found["model.layers.7.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        found["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)

    rewrite(source, spoil)
    with pytest.raises(ValueError) as error:
        load_model(source)
    for words in (
        "model.norm.weight is missing (expected [32])",
        "model.layers.1.mlp.up_proj.weight has the shape [47, 32], expected [48, 32]",
        "model.layers.7.mlp.up_proj.weight is unexpected",
        "model.layers.2.mlp.up_proj.weight is I8",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("size", (-1, -4000, 20, 0))
def test_a_truncated_file_is_named(size, tmp_path):
    path = tiny.write_folder("llama", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tiny.write_folder("llama", tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin alone. Pickled weights can run code"):
        load_model(tmp_path)


def test_a_folder_without_weights_or_config_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_model(tmp_path)
    (tiny.write_folder("llama", tmp_path) / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*it holds other.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ("./student", "~/no/such/student", "/no/such/student", "runs/one/student", "tests/nothing")
)
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_folder(name)


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name) or str(tmp_path)
    )
    assert model_folder("some-org/some-model", revision="v1") == tmp_path
    assert asked == {"name": "some-org/some-model", "revision": "v1", "allow_patterns": ["*.json", "*.safetensors"]}


def test_a_hub_id_that_the_hub_does_not_give_says_both(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="not a folder here, and the Hugging Face hub .*no network"):
        model_folder("some-org/some-model")


def test_a_config_that_cannot_be_read_names_its_file(tmp_path):
    tiny.write_folder("llama", tmp_path)
    config = tmp_path / "config.json"
    for text, words in (("{", "not valid JSON"), ('{"model_type": "mamba"}', "'mamba' is not known. Known are llama")):
        config.write_text(text)
        with pytest.raises(ValueError, match=f"config.json.*{words}"):
            load_model(tmp_path)


@pytest.mark.live
@pytest.mark.parametrize("name", ("llama3_old", "qwen2", "gemma3_multimodal_old"))
def test_transformers_opens_what_is_saved(name, tmp_path):
    pytest.importorskip("torch")
    make_model_golden = pytest.importorskip("golden.make_model_golden")
    save_model(load_model(tiny.write_folder(name, tmp_path / "source")), tmp_path / "copy")
    tokens, mask = tiny.batch()
    found = make_model_golden.transformers_logits(tmp_path / "copy", tokens, mask)[mask]
    np.testing.assert_allclose(found, np.load(tiny.GOLDEN / "logits.npz")[name], atol=1e-5, rtol=0)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", ("smollm2-135m-instruct", "smollm2-135m-gpt2tok"))
def test_a_real_model_comes_back_bit_for_bit(assets, name, tmp_path):
    save_model(load_model(assets / name), tmp_path)
    original = load_file(assets / name / "model.safetensors")
    assert_same_bits(original, tensors(tmp_path))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / file).read_text()) == json.loads((assets / name / file).read_text())


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_tensors_are_rounded_to_the_dtype_in_which_they_are_to_be_read(stored, kept, tmp_path):
    source = tiny.write_folder("llama_tied", tmp_path)
    kind = np.dtype(stored)
    rewrite(source, lambda found: found.update({name: value.astype(kind) for name, value in found.items()}))
    as_is = load_model(source, param_dtype=kept)
    rounded = load_model(source, param_dtype=kept, read_dtype="bfloat16")
    exact = load_model(source, param_dtype=kept, read_dtype="float32")
    for one, other, third in zip(*(jax.tree.leaves(nnx.state(m)) for m in (as_is, rounded, exact)), strict=True):
        assert one.dtype == other.dtype == third.dtype
        np.testing.assert_array_equal(one.astype(jnp.bfloat16), other.astype(jnp.bfloat16))
        np.testing.assert_array_equal(other, other.astype(jnp.bfloat16).astype(other.dtype))
        np.testing.assert_array_equal(one, third)
