"""Hugging Face safetensors in and out, tensor by tensor.

The mapping is the table `NAMES`. Reading fills one device's shard of one parameter at a time and hands it over; writing
fetches one layer of it at a time where devices share it. So no host ever holds a full model, nor the stacked layers of a sharded one.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from transformers import AutoConfig

from gold_jax.models.attention import check_model, current_platform
from gold_jax.models.config import FAMILIES, DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.parameters import ParamInfo, nested, parameters
from gold_jax.models.safetensors_io import (
    CODES,
    FLOATS,
    Entry,
    TensorFolder,
    listed,
    read_json,
    write_json,
    write_tensors,
)
from gold_jax.quickstart import resolve_embedded

# Parameter path -> tensor name after the prefix; {} is the layer. Matrices of layers are [out, in] in the file.
NAMES = {
    ("embedding",): "embed_tokens.weight",
    ("final_norm",): "norm.weight",
    ("layers", "attention_norm"): "layers.{}.input_layernorm.weight",
    ("layers", "query"): "layers.{}.self_attn.q_proj.weight",
    ("layers", "query_bias"): "layers.{}.self_attn.q_proj.bias",
    ("layers", "query_norm"): "layers.{}.self_attn.q_norm.weight",
    ("layers", "key"): "layers.{}.self_attn.k_proj.weight",
    ("layers", "key_bias"): "layers.{}.self_attn.k_proj.bias",
    ("layers", "key_norm"): "layers.{}.self_attn.k_norm.weight",
    ("layers", "value"): "layers.{}.self_attn.v_proj.weight",
    ("layers", "value_bias"): "layers.{}.self_attn.v_proj.bias",
    ("layers", "out"): "layers.{}.self_attn.o_proj.weight",
    ("layers", "out_bias"): "layers.{}.self_attn.o_proj.bias",
    ("layers", "gate"): "layers.{}.mlp.gate_proj.weight",
    ("layers", "gate_bias"): "layers.{}.mlp.gate_proj.bias",
    ("layers", "up"): "layers.{}.mlp.up_proj.weight",
    ("layers", "up_bias"): "layers.{}.mlp.up_proj.bias",
    ("layers", "down"): "layers.{}.mlp.down_proj.weight",
    ("layers", "down_bias"): "layers.{}.mlp.down_proj.bias",
    ("layers", "mlp_norm"): "layers.{}.post_attention_layernorm.weight",
}
# With sandwich norms (Gemma) `post_attention_layernorm` means what it says.
SANDWICH_NAMES = {
    ("layers", "attention_out_norm"): "layers.{}.post_attention_layernorm.weight",
    ("layers", "mlp_norm"): "layers.{}.pre_feedforward_layernorm.weight",
    ("layers", "mlp_out_norm"): "layers.{}.post_feedforward_layernorm.weight",
}
# The last is a bare base model. Gemma 3's multimodal checkpoints exist in two layouts.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.")


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype="float32",
    param_dtype="float32",
    read_dtype: str = "auto",
    remat: bool = False,
    revision: str | None = None,
    sharding: Callable[[tuple[int, ...], tuple[str | None, ...]], Sharding] | None = None,
    attention: str = "auto",
    platform: str | None = None,
) -> Decoder:
    """Read a model from a folder or from the Hugging Face hub.

    Args:
        name_or_path: a folder with `config.json` and safetensors (one file, or shards with an index), a hub id,
            `embedded:student` or `embedded:teacher`.
        dtype: compute dtype, "float32" or "bfloat16".
        param_dtype: dtype in which parameters are kept: "float32", "bfloat16", or "auto" for what the files have.
        read_dtype: dtype to which tensors are rounded when they are read, whatever they are kept in: "float32",
            "bfloat16", or "auto" for none but that of the files.
        remat: recompute layers in the backward pass.
        revision: hub revision.
        sharding: of a parameter, given its shape, layers stacked, and its logical axes (`ParamInfo.spec`);
            each process reads what its own devices hold. None: all on the default device.
        attention: how whole sequences are attended to: "auto", or one of `models.attention.IMPLEMENTATIONS`.
        platform: the one of `models.attention.PLATFORMS` that the model is to run on; None: where JAX runs now.

    Raises:
        FileNotFoundError: no such folder, or the folder lacks a file.
        ValueError: config or tensors that do not fit; every fault found is in the one message. Or attention that cannot
            be computed so.
    """
    folder = model_folder(name_or_path, revision=revision)
    config = read_config(folder)
    check_model(config, dtype, attention, current_platform() if platform is None else platform)
    files = _ModelFiles(folder)
    checked = files.check(config)
    untied, config = checked.tied != config.tied, checked
    values, dtypes = {}, {}
    for path, info in parameters(config).items():
        found = files.dtypes(config, path, info)
        dtypes |= found
        own = np.result_type(*map(np.dtype, set(found.values())))
        kind = own if param_dtype == "auto" else np.dtype(param_dtype)
        rounded = own if read_dtype == "auto" else np.dtype(read_dtype)
        # What loses nothing by it is read into the kept dtype at once.
        rounded = kind if np.can_cast(own, rounded) else rounded
        read = functools.partial(_rounded, functools.partial(files.read, config, path, info, rounded), kind)
        if sharding is None:
            values[path] = jnp.asarray(read(tuple(slice(0, size) for size in info.shape)))
        else:
            values[path] = _read_sharded(read, info.shape, kind, sharding(info.shape, info.spec))
    common = max(set(dtypes.values()), key=list(dtypes.values()).count)
    exceptions = {name: kind for name, kind in dtypes.items() if kind != common}
    source = json.loads(config.source) | {"dtype": common, "dtypes": exceptions, "untied": untied}
    config = dataclasses.replace(config, source=json.dumps(source))
    kept = common if param_dtype == "auto" else param_dtype
    settings = {"dtype": dtype, "param_dtype": kept, "remat": remat, "attention": attention, "platform": platform}
    return Decoder.from_params(config, nested(values), **settings)


def model_folder(name_or_path: str | os.PathLike, *, revision: str | None = None) -> pathlib.Path:
    """The folder of a model: the one named, or a download of the hub's JSON and safetensors files.

    Raises:
        FileNotFoundError: neither a folder nor a model that the hub gave.
    """
    path = pathlib.Path(resolve_embedded(name_or_path)).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not ("/" in name and path.parent.is_dir())
    if not looks_like_id:
        what = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"Model folder {name!r} {what}; give a folder with config.json and *.safetensors in it."
        )
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(
            f"Model {name!r} is not a folder here, and the Hugging Face hub did not give it either "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})."
        ) from error


def read_config(name_or_path: str | os.PathLike) -> DecoderConfig:
    """The `DecoderConfig` of a model folder or hub id, with what `save_model` needs to write it back."""
    folder = model_folder(name_or_path)
    raw = read_json(folder / "config.json", required=True)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {kind!r} is not known. Known are {', '.join(FAMILIES)}."
        )
    try:
        config = DecoderConfig.from_hf(AutoConfig.from_pretrained(folder), raw=raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    except (KeyError, TypeError) as error:  # transformers' own validation
        raise ValueError(
            f"{folder / 'config.json'}: transformers cannot read it ({type(error).__name__}: {error})."
        ) from error
    source = {"config": raw, "generation_config": read_json(folder / "generation_config.json")}
    return dataclasses.replace(config, source=json.dumps(source))


def save_model(model: Decoder, folder: str | os.PathLike, *, dtype: str = "auto") -> None:
    """Write safetensors and `config.json` that transformers opens.

    A model that came from `load_model` keeps its config, tensor names and generation config. The language part of a
    multimodal model is written as the text model that it is. Where a run has several processes all of them call this
    together, the first one writes, and each returns when that is done.

    Args:
        model: the decoder; its parameters may be on any devices of the run, or be numpy arrays.
        folder: made if it is not there; a model already in it is replaced.
        dtype: "float32", "bfloat16" or "float16"; "auto": what each tensor had in the file it came from, else
            `param_dtype`.

    Raises:
        ValueError: unknown dtype, or a config that was not read from a transformers config.
        OSError: the folder cannot be written; said by the process that writes.
    """
    if dtype not in ("auto", *CODES):
        raise ValueError(f"dtype {dtype!r} is not known. Known are auto, {', '.join(CODES)}.")
    config, source = model.config, json.loads(model.config.source)
    if "config" not in source:
        raise ValueError(
            "The model's DecoderConfig was made by hand and has no config.json to write; use DecoderConfig.from_hf."
        )
    common = source.get("dtype", str(model.param_dtype)) if dtype == "auto" else dtype
    exceptions = source.get("dtypes", {}) if dtype == "auto" else {}
    plan = []
    for path, info in parameters(config).items():
        for layer, (name, shape) in enumerate(_tensors_of(config, path, info)):
            plan.append((Entry(name, shape, exceptions.get(name, common)), path, layer))
    plan.sort(key=lambda planned: -planned[0].itemsize)  # keeps every tensor aligned
    tensors = _to_host(model, [(path, layer) for _, path, layer in plan])
    try:
        if jax.process_index() == 0:
            folder = pathlib.Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder, [entry for entry, _, _ in plan], tensors)
            write_json(folder / "config.json", _config_to_write(config, source, common))
            if source.get("generation_config"):
                write_json(folder / "generation_config.json", source["generation_config"])
    finally:
        if jax.process_count() > 1:
            for _ in tensors:  # to fetch takes all processes, whether or not the first one could write
                pass
            multihost_utils.sync_global_devices("save_model")


class _ModelFiles:
    """The tensors of a model folder by the parameters that they make up."""

    def __init__(self, folder: pathlib.Path):
        self.tensors = TensorFolder(folder)
        names = self.tensors.names
        found = [prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in names]
        self.prefix = found[0] if found else PREFIXES[0]
        self.head = next((name for name in HEADS if name in names), HEADS[0])

    def check(self, config: DecoderConfig) -> DecoderConfig:
        """Compare names, shapes and dtypes with what the config asks for; gives the config, untied where the files are."""
        tensors, embedding = self.tensors, self.prefix + NAMES["embedding",]
        if config.tied and {self.head, embedding} <= tensors.names and not tensors.same(self.head, embedding):
            # transformers, too, takes the head that is there.
            config = dataclasses.replace(config, tied=False)
        faults, wanted = [], {self.head} if config.tied else set()
        for path, info in parameters(config).items():
            for name, shape in self._names(config, path, info):
                wanted.add(name)
                if name not in tensors.names:
                    faults.append(f"{name} is missing (expected {list(shape)})")
                    continue
                if tensors.shape(name) != shape:
                    faults.append(f"{name} has the shape {list(tensors.shape(name))}, expected {list(shape)}")
                if tensors.code(name) not in FLOATS:
                    faults.append(f"{name} is {tensors.code(name)}, expected one of {', '.join(FLOATS)}")
        unexpected = sorted(name for name in tensors.names if name not in wanted and not _IGNORED.search(name))
        faults += [f"{name} is unexpected" for name in unexpected]
        if faults:
            raise ValueError(
                f"The tensors in {tensors.folder} do not fit its {config.family} config: {listed(faults)}."
            )
        return config

    def dtypes(self, config: DecoderConfig, path: tuple, info: ParamInfo) -> dict[str, str]:
        """The dtypes that one parameter's tensors have, by their names when saved."""
        saved = [name for name, _ in _tensors_of(config, path, info)]
        return {name: FLOATS[self.tensors.code(own)] for name, (own, _) in zip(saved, self._names(config, path, info))}

    def read(
        self, config: DecoderConfig, path: tuple, info: ParamInfo, dtype: np.dtype, index: tuple[slice, ...]
    ) -> np.ndarray:
        """The part of one parameter, its layers stacked, that `index` cuts out; of each tensor only that is read."""
        array = np.empty([part.stop - part.start for part in index], dtype)
        names = [name for name, _ in self._names(config, path, info)]
        if len(path) == 1:
            array[...] = self.tensors.read(names[0], index)
            return array
        for row, name in zip(array, names[index[0]]):
            row[...] = self.tensors.read(name, index[:0:-1]).T
        return array

    def _names(self, config: DecoderConfig, path: tuple, info: ParamInfo) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in _tensors_of(config, path, info):
            yield (self.head if path == ("head",) else self.prefix + name.removeprefix("model.")), shape


def _rounded(read: Callable, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    return read(index).astype(dtype, copy=False)


def _read_sharded(read: Callable, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """One parameter as `sharding` says, each of its parts that this process's devices hold read once."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        holders.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        pieces += _replicate_to_devices(read(tuple(slice(*ends) for ends in bounds)), devices, sharding.memory_kind)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces, dtype=dtype)


def _replicate_to_devices(part: np.ndarray, devices: list[jax.Device], memory_kind: str | None) -> list[jax.Array]:
    """Copies on devices. Waits for them: else the host would read ahead, and hold all that is on its way."""
    there = [jax.device_put(part, SingleDeviceSharding(device, memory_kind=memory_kind)) for device in devices]
    return jax.block_until_ready(there)


def _tensors_of(config: DecoderConfig, path: tuple, info: ParamInfo) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a text checkpoint of the tensors that make up one parameter."""
    if path == ("head",):
        return [("lm_head.weight", info.shape)]
    name = "model." + (SANDWICH_NAMES.get(path, NAMES.get(path)) if config.sandwich_norms else NAMES[path])
    if len(path) == 1:
        return [(name, info.shape)]
    return [(name.format(index), info.shape[:0:-1]) for index in range(config.layers)]


def _to_host(model: Decoder, plan: Sequence[tuple[tuple, int]]) -> Iterator[np.ndarray]:
    """The tensors of parameters and layers, one by one, in the layout of the file.

    Of parameters that several processes share, each process must iterate over all, in the same order.
    """
    last, value = None, None
    for path, layer in plan:
        if path != last:
            last, value = path, None  # no two at a time
            value = getattr(model.layers if len(path) == 2 else model, path[-1])[...]
            if not (isinstance(value, jax.Array) and len(value.sharding.device_set) > 1):
                value = np.asarray(value)
        if isinstance(value, np.ndarray):
            yield value[layer].T if len(path) == 2 else value
        else:
            yield _unshard(_layer(value, layer)).T if len(path) == 2 else _unshard(jnp.copy(value))


@jax.jit
def _layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer, cut as the stack is. (If the axis of layers is cut, each device gathers its part of all of them.)"""
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _unshard(array: jax.Array) -> np.ndarray:
    """An array from several devices, whole. It keeps what was fetched as long as it lives: give none that stays."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _config_to_write(config: DecoderConfig, source: dict, dtype: str) -> dict:
    raw = dict(source["config"])
    if raw.get("model_type") == "gemma3":
        raw = dict(raw["text_config"]) | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        raw["tie_word_embeddings"] = config.tied  # until here the outer config decided
    if source.get("untied"):
        raw["tie_word_embeddings"] = False
    raw["torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"] = dtype
    return raw


__all__ = ["load_model", "model_folder", "read_config", "save_model"]
