"""Hugging Face safetensors in and out, tensor by tensor.

The mapping is the table `NAMES`. Reading fills one device's shard of one parameter at a time and hands it over; writing
fetches one layer of it at a time where devices share it. So no host ever holds a full model, nor the stacked layers of a sharded one.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from transformers import AutoConfig

from gold_jax.models.attention import check_model, current_platform
from gold_jax.models.config import DecoderConfig, check_family, check_sizes
from gold_jax.models.decoder import Decoder
from gold_jax.models.parameters import parameters
from gold_jax.models.safetensors_io import CODES, FLOATS, Entry, TensorFolder, read_json, write_json, write_tensors
from gold_jax.models.staged_save import check_complete
from gold_jax.quickstart import resolve_embedded
from gold_jax.wording import listed, quoted

# Parameter -> tensor, after the prefix and, of a layer, its number; of `query_bias` the name is that of `query`. Matrices
# of layers are [out, in] in the file.
NAMES = {
    "embedding": "embed_tokens",
    "final_norm": "norm",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "query_norm": "self_attn.q_norm",
    "key": "self_attn.k_proj",
    "key_norm": "self_attn.k_norm",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "mlp_norm": "post_attention_layernorm",
}
# With norms after attention and MLP `post_attention_layernorm` means what it says.
OUT_NORM_NAMES = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
# Tensors that hold several parameters (Phi 3), one's rows after the other's.
FUSED = {"self_attn.qkv_proj": ("query", "key", "value"), "mlp.gate_up_proj": ("gate", "up")}
# The last is a bare base model. Gemma 3's multimodal checkpoints exist in two layouts.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.")


class Stored(NamedTuple):
    """Where a file holds a parameter, or one layer of it: in a tensor from its row `start` on."""

    name: str
    shape: tuple[int, ...]  # of the tensor
    start: int = 0


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
    read = read_config(folder)
    check_model(read, dtype, attention, current_platform() if platform is None else platform)
    files = TensorFolder(folder)
    config, own = _match(files, read)
    values, dtypes, saved = {}, {}, _tensors(config)
    for path, (shape, spec, _) in parameters(config).items():
        found = [FLOATS[files.info(stored.name)[1]] for stored in own[path]]
        dtypes |= {stored.name: kind for stored, kind in zip(saved[path], found)}
        widest = np.result_type(*map(np.dtype, set(found)))
        kept = widest if param_dtype == "auto" else np.dtype(param_dtype)
        rounded = widest if read_dtype == "auto" else np.dtype(read_dtype)
        # What loses nothing by it is read into the kept dtype at once.
        rounded = kept if np.can_cast(widest, rounded) else rounded
        part = functools.partial(_read, files, own[path], len(path) == 2, rounded, kept)
        if sharding is None:
            values[path] = jnp.asarray(part(tuple(slice(0, size) for size in shape)))
        else:
            values[path] = _read_sharded(part, shape, kept, sharding(shape, spec))
    common = max(set(dtypes.values()), key=list(dtypes.values()).count)
    exceptions = {name: kind for name, kind in dtypes.items() if kind != common}
    source = json.loads(config.source) | {"dtype": common, "dtypes": exceptions, "untied": config.tied != read.tied}
    config = dataclasses.replace(config, source=json.dumps(source))
    settings = {"dtype": dtype, "param_dtype": common if param_dtype == "auto" else param_dtype, "remat": remat}
    return Decoder.from_params(config, unflatten_dict(values), **settings, attention=attention, platform=platform)


def model_folder(name_or_path: str | os.PathLike, *, revision: str | None = None) -> pathlib.Path:
    """The folder named, or one with the hub's JSON and safetensors files of a model; a FileNotFoundError if neither is."""
    path = pathlib.Path(resolve_embedded(name_or_path)).expanduser()
    if path.is_dir():
        check_complete(path)
        return path
    name = str(name_or_path)
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not ("/" in name and path.parent.is_dir())
    if not looks_like_id:
        what = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"Model folder {name!r} {what}; give one with config.json and *.safetensors in it.")
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise FileNotFoundError(
            f"Model {name!r} is not a folder here, and the Hugging Face hub did not give it either "
            f"({type(error).__name__}: {reason})."
        ) from error


def read_config(name_or_path: str | os.PathLike) -> DecoderConfig:
    """The `DecoderConfig` of a model folder or hub id, with what `save_model` needs to write it back."""
    folder = model_folder(name_or_path)
    path = folder / "config.json"
    raw = read_json(path, required=True)
    try:
        check_family(raw.get("model_type"))
        for part in (raw, raw.get("text_config")):
            if isinstance(part, dict):
                check_sizes(part, raw["model_type"])
        config = DecoderConfig.from_hf(AutoConfig.from_pretrained(folder), raw=raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # transformers' own validation
        reason = quoted(f"{type(error).__name__}: {error}", plain=True)
        raise ValueError(f"{path}: transformers cannot read it ({reason}).") from error
    source = {"config": raw, "generation_config": read_json(folder / "generation_config.json")}
    return dataclasses.replace(config, source=json.dumps(source))


def save_model(model: Decoder, folder: str | os.PathLike, *, dtype: str = "auto", stop_ids: Sequence[int] = ()) -> None:
    """Write safetensors and `config.json` that transformers opens.

    A model that came from `load_model` keeps its config, tensor names and generation config. The language part of a
    multimodal model is written as the text model that it is. Where a run has several processes all of them call this
    together, the first one writes, and each returns when that is done.

    Args:
        model: the decoder; its parameters may be on any devices of the run, or be numpy arrays.
        folder: made if it is not there; a model already in it is replaced.
        dtype: "float32", "bfloat16" or "float16"; "auto": what each tensor had in the file it came from, else
            `param_dtype`.
        stop_ids: the `eos_token_id` of both configs, in place of what they have.

    Raises:
        ValueError: unknown dtype, or a config that was not read from a transformers config.
        OSError: the folder cannot be written; said by the process that writes.
    """
    if dtype not in ("auto", *CODES):
        raise ValueError(f"dtype {dtype!r} is not known. Known are auto, {', '.join(CODES)}.")
    config, source = model.config, json.loads(model.config.source)
    if "config" not in source:
        raise ValueError(
            "The DecoderConfig was made by hand and has no config.json to write; use DecoderConfig.from_hf."
        )
    common = source.get("dtype", str(model.param_dtype)) if dtype == "auto" else dtype
    exceptions = source.get("dtypes", {}) if dtype == "auto" else {}
    sources: dict[Stored, list[tuple[tuple, int]]] = {}  # of each tensor the parameters and their layer that it holds
    for path, tensors in _tensors(config).items():
        for layer, stored in enumerate(tensors):
            sources.setdefault(stored._replace(start=0), []).append((path, layer))
    plan = [(Entry(name, shape, exceptions.get(name, common)), held) for (name, shape, _), held in sources.items()]
    plan.sort(key=lambda planned: -np.dtype(planned[0].dtype).itemsize)  # keeps every tensor aligned
    tensors = _to_host(model, [held for _, held in plan])
    try:
        if jax.process_index() == 0:
            folder = pathlib.Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder, [entry for entry, _ in plan], tensors)
            stops = {"eos_token_id": stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)} if stop_ids else {}
            write_json(folder / "config.json", _config_to_write(config, source, common) | stops)
            if generation := (source.get("generation_config") or {}) | stops:
                write_json(folder / "generation_config.json", generation)
    finally:
        if jax.process_count() > 1:
            for _ in tensors:  # to fetch takes all processes, whether or not the first one could write
                pass
            multihost_utils.sync_global_devices("save_model")


def _tensors(config: DecoderConfig, prefix: str = "model.", head: str = "lm_head.weight") -> dict[tuple, list[Stored]]:
    """The tensors that make up each parameter, by its path; as a text checkpoint has them."""
    names, fused, infos = dict(NAMES), {}, parameters(config)
    if config.post_norms:
        names |= OUT_NORM_NAMES
    for tensor, held in FUSED.items() if config.fused_projections else ():
        rows = [infos["layers", name].shape[-1] for name in held]
        fused |= {name: (tensor, sum(rows), sum(rows[:i])) for i, name in enumerate(held)}
    found = {}
    for path, info in infos.items():
        if path == ("head",):
            found[path] = [Stored(head, info.shape)]
            continue
        *layers, name = path
        if not layers:
            found[path] = [Stored(f"{prefix}{names[name]}.weight", info.shape)]
            continue
        rows, *columns = info.shape[:0:-1]
        tensor, rows, start = fused.get(name, (names[name.removesuffix("_bias")], rows, 0))
        tensor += ".bias" if name.endswith("_bias") else ".weight"
        numbers = range(config.layers)
        found[path] = [Stored(f"{prefix}layers.{i}.{tensor}", (rows, *columns), start) for i in numbers]
    return found


def _match(files: TensorFolder, config: DecoderConfig) -> tuple[DecoderConfig, dict[tuple, list[Stored]]]:
    """The config, untied where the files are, and `_tensors` as they call them, names, shapes and dtypes compared."""
    names = files.names
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in names), PREFIXES[0])
    head = next((name for name in HEADS if name in names), HEADS[0])
    embedding = f"{prefix}embed_tokens.weight"
    if config.tied and {head, embedding} <= names and not files.same(head, embedding):
        config = dataclasses.replace(config, tied=False)  # transformers, too, takes the head that is there
    own = _tensors(config, prefix, head)
    wanted = {stored.name: stored.shape for stored in itertools.chain(*own.values())}
    faults = []
    for name, shape in wanted.items():
        if name not in names:
            faults.append(f"{name} is missing (expected {list(shape)})")
            continue
        found, code = files.info(name)
        if found != shape:
            faults.append(f"{name} has the shape {quoted(list(found))}, expected {list(shape)}")
        if code not in FLOATS:
            faults.append(f"{name} is {code}, expected one of {', '.join(FLOATS)}")
    unexpected = names - wanted.keys() - ({head} if config.tied else set())
    faults += [f"{quoted(name, plain=True)} is unexpected" for name in sorted(unexpected) if not _IGNORED.search(name)]
    if faults:
        faults = listed(faults, 40, "; ", "; and")
        raise ValueError(f"The tensors in {files.folder} do not fit its {config.family} config: {faults}.")
    return config, own


def _read(files: TensorFolder, own: list[Stored], stacked: bool, rounded, kept, index: tuple[slice, ...]) -> np.ndarray:
    """The part of one parameter, its layers stacked, that `index` cuts out; of each tensor only that is read."""
    array = np.empty([part.stop - part.start for part in index], rounded)
    if stacked:
        own = own[index[0]]
        for row, (name, _, start) in zip(array, own):
            rows, *columns = index[:0:-1]
            row[...] = files.read(name, (slice(rows.start + start, rows.stop + start), *columns)).T
    else:
        array[...] = files.read(own[0].name, index)
    array = array.astype(kept, copy=False)
    for row, stored in zip(array if stacked else [array], own):
        files.check_finite(stored.name, row)
    return array


def _read_sharded(read: Callable, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """One parameter as `sharding` says, each of its parts that this process's devices hold read once."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        holders.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*ends) for ends in bounds))
        places = [SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in devices]
        # Waits: else the host would read ahead, and hold all that is on its way.
        pieces += jax.block_until_ready([jax.device_put(part, place) for place in places])
        del part
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces, dtype=dtype)


def _to_host(model: Decoder, plan: Sequence[list[tuple[tuple, int]]]) -> Iterator[np.ndarray]:
    """The tensors one by one, as in the file, each of the parameters and layers in it; processes that share some must all
    iterate alike."""
    for paths, group in itertools.groupby(plan, key=lambda held: tuple(path for path, _ in held)):
        values = [getattr(model.layers if len(path) == 2 else model, path[-1])[...] for path in paths]
        on_device = isinstance(values[0], jax.Array)
        # Of several parameters, or of one that devices share, a layer at a time is fetched.
        by_layer = on_device and (len(values) > 1 or len(values[0].sharding.device_set) > 1)
        values = values if by_layer else list(map(np.asarray, values))
        for held in group:
            if len(paths[0]) == 2:
                layers = [(_unshard(_layer(x, i)) if by_layer else x[i]).T for x, (_, i) in zip(values, held)]
                yield layers[0] if len(layers) == 1 else np.concatenate(layers)
            else:
                yield _unshard(jnp.copy(values[0])) if by_layer else values[0]
        del values  # no two at a time


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
    raw.pop("auto_map", None)  # of modules that stay where they are; the model's type is transformers' own
    if source.get("untied"):
        raw["tie_word_embeddings"] = False
    raw["torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"] = dtype
    return raw
