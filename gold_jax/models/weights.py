"""Hugging Face safetensors in and out, tensor by tensor.

The mapping is the table `NAMES`. Reading fills one stacked parameter at a time and hands it to the device, writing fetches
one at a time, so that the host never holds a second copy of the model.
"""

import dataclasses
import json
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (importing it teaches numpy, and so safetensors, the name bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from gold_jax.models.attention import check_model, current_platform
from gold_jax.models.config import FAMILIES, DecoderConfig
from gold_jax.models.decoder import Decoder, ParamInfo, parameters

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
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _FLOATS.items()}
SHARD_BYTES = 5 * 10**9


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype="float32",
    param_dtype="float32",
    remat: bool = False,
    revision: str | None = None,
    place: Callable[[np.ndarray, tuple], jax.Array] | None = None,
    attention: str = "auto",
    platform: str | None = None,
) -> Decoder:
    """Read a model from a folder or from the Hugging Face hub.

    Args:
        name_or_path: a folder with `config.json` and safetensors (one file, or shards with an index), or a hub id.
        dtype: compute dtype, "float32" or "bfloat16".
        param_dtype: dtype in which parameters are kept: "float32", "bfloat16", or "auto" for what the files have.
        remat: recompute layers in the backward pass.
        revision: hub revision.
        place: puts a finished host array on devices, given the array and its logical axes; None: the default device.
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
    files = _Tensors(folder)
    checked = files.check(config)
    untied, config = checked.tied != config.tied, checked
    place = place or (lambda array, spec: jnp.asarray(array))
    values, dtypes = {}, {}
    for path, info in parameters(config).items():
        values[path] = place(files.stack(config, path, info, param_dtype, dtypes), info.spec)
    common = max(set(dtypes.values()), key=list(dtypes.values()).count)
    exceptions = {name: kind for name, kind in dtypes.items() if kind != common}
    source = json.loads(config.source) | {"dtype": common, "dtypes": exceptions, "untied": untied}
    config = dataclasses.replace(config, source=json.dumps(source))
    kept = common if param_dtype == "auto" else param_dtype
    model = Decoder.abstract(config, dtype, kept, remat, attention=attention, platform=platform)
    for path, value in values.items():
        owner = model.layers if len(path) == 2 else model
        getattr(owner, path[-1]).set_value(value)
    return model


def model_folder(name_or_path: str | os.PathLike, *, revision: str | None = None) -> pathlib.Path:
    """The folder of a model: the one named, or a download of the hub's JSON and safetensors files.

    Raises:
        FileNotFoundError: neither a folder nor a model that the hub gave.
    """
    path = pathlib.Path(name_or_path).expanduser()
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
    raw = _read_json(folder / "config.json", required=True)
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
    source = {"config": raw, "generation_config": _read_json(folder / "generation_config.json")}
    return dataclasses.replace(config, source=json.dumps(source))


def save_model(model: Decoder, folder: str | os.PathLike, *, dtype: str = "auto") -> None:
    """Write safetensors and `config.json` that transformers opens.

    A model that came from `load_model` keeps its config, tensor names and generation config. The language part of a
    multimodal model is written as the text model that it is.

    Args:
        model: the decoder; its parameters may lie on several devices of this host.
        folder: made if it is not there; a model already in it is replaced.
        dtype: "float32", "bfloat16" or "float16"; "auto": what each tensor had in the file it came from, else `param_dtype`.

    Raises:
        ValueError: unknown dtype, or a config that was not read from a transformers config.
    """
    if dtype not in ("auto", *_CODES):
        raise ValueError(f"dtype {dtype!r} is not known. Known are auto, {', '.join(_CODES)}.")
    config, source = model.config, json.loads(model.config.source)
    if "config" not in source:
        raise ValueError(
            "The model's DecoderConfig was made by hand and has no config.json to write; use DecoderConfig.from_hf."
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    common = source.get("dtype", str(model.param_dtype)) if dtype == "auto" else dtype
    exceptions = source.get("dtypes", {}) if dtype == "auto" else {}
    entries = []
    for path, info in parameters(config).items():
        for index, (name, shape) in enumerate(_tensors_of(config, path, info)):
            entries.append(_Entry(name, shape, exceptions.get(name, common), path, index))
    entries.sort(key=lambda entry: -entry.itemsize)  # keeps every tensor aligned
    _write_shards(model, folder, entries)
    _write_json(folder / "config.json", _config_to_write(config, source, common))
    if source.get("generation_config"):
        _write_json(folder / "generation_config.json", source["generation_config"])


class _Tensors:
    """The tensors of a model folder, found but not yet read."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.files: dict[str, object] = {}  # tensor name -> open file
        faults = []
        for path in _weight_files(folder, faults):
            try:
                opened = safe_open(path, "np")
                self.files.update(dict.fromkeys(opened.keys(), opened))
            except (SafetensorError, OSError) as error:
                faults.append(f"{path.name} is not a whole safetensors file ({error})")
        if faults:
            raise ValueError(f"The weights in {folder} cannot be read: {_listed(faults)}. Copy or download them again.")
        found = [prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in self.files]
        self.prefix = found[0] if found else PREFIXES[0]
        self.head = next((name for name in HEADS if name in self.files), HEADS[0])

    def check(self, config: DecoderConfig) -> DecoderConfig:
        """Compare names, shapes and dtypes with what the config asks for; gives the config, untied where the files are."""
        if config.tied and self.head in self.files and not self._same(self.head, self.prefix + NAMES["embedding",]):
            # transformers, too, takes the head that is there.
            config = dataclasses.replace(config, tied=False)
        faults, wanted = [], {self.head} if config.tied else set()
        for path, info in parameters(config).items():
            for name, shape in self._names(config, path, info):
                wanted.add(name)
                if name not in self.files:
                    faults.append(f"{name} is missing (expected {list(shape)})")
                    continue
                view = self.files[name].get_slice(name)
                if tuple(view.get_shape()) != shape:
                    faults.append(f"{name} has the shape {view.get_shape()}, expected {list(shape)}")
                if view.get_dtype() not in _FLOATS:
                    faults.append(f"{name} is {view.get_dtype()}, expected one of {', '.join(_FLOATS)}")
        unexpected = sorted(name for name in self.files if name not in wanted and not _IGNORED.search(name))
        faults += [f"{name} is unexpected" for name in unexpected]
        if faults:
            raise ValueError(f"The tensors in {self.folder} do not fit its {config.family} config: {_listed(faults)}.")
        return config

    def stack(self, config: DecoderConfig, path: tuple, info: ParamInfo, dtype: str, dtypes: dict) -> np.ndarray:
        """One parameter, its layers stacked; notes each tensor's dtype by its name when saved."""
        names = [name for name, _ in self._names(config, path, info)]
        kinds = [_FLOATS[self.files[name].get_slice(name).get_dtype()] for name in names]
        dtypes.update(zip((name for name, _ in _tensors_of(config, path, info)), kinds))
        kind = np.result_type(*map(np.dtype, set(kinds))) if dtype == "auto" else np.dtype(dtype)
        array = np.empty(info.shape, kind)
        rows = array if len(path) == 2 else array[None]
        for row, name in zip(rows, names):
            tensor = self.files[name].get_tensor(name)
            row[...] = tensor.T if len(path) == 2 else tensor
        return array

    def _names(self, config: DecoderConfig, path: tuple, info: ParamInfo) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in _tensors_of(config, path, info):
            yield (self.head if path == ("head",) else self.prefix + name.removeprefix("model.")), shape

    def _same(self, first: str, second: str) -> bool:
        one, other = (self.files[name].get_tensor(name) for name in (first, second))
        return one.shape == other.shape and np.array_equal(one, other)


def _tensors_of(config: DecoderConfig, path: tuple, info: ParamInfo) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a text checkpoint of the tensors that make up one parameter."""
    if path == ("head",):
        return [("lm_head.weight", info.shape)]
    name = "model." + (SANDWICH_NAMES.get(path, NAMES.get(path)) if config.sandwich_norms else NAMES[path])
    if len(path) == 1:
        return [(name, info.shape)]
    return [(name.format(index), info.shape[:0:-1]) for index in range(config.layers)]


def _weight_files(folder: pathlib.Path, faults: list[str]) -> list[pathlib.Path]:
    index = _read_json(folder / "model.safetensors.index.json")
    if index is not None:
        paths = [folder / name for name in sorted(set(index["weight_map"].values()))]
        faults += [
            f"model.safetensors.index.json names {path.name}, which is not there" for path in paths if not path.exists()
        ]
        return [path for path in paths if path.exists()]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled and not others:
        raise ValueError(
            f"{folder} holds its weights as {_listed(pickled)} alone. Pickled weights can run code and are not read; save "
            "the model with safe_serialization=True."
        )
    hint = f" (it holds {_listed(others)}, but no index)" if others else ""
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}.")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: tuple[str, ...]
    layer: int

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.itemsize


def _write_shards(model: Decoder, folder: pathlib.Path, entries: list[_Entry]) -> None:
    shards: list[list[_Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        _write_file(model, folder / name, shard)
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards) for entry in shard}
        total = sum(entry.nbytes for entry in entries)
        _write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    else:
        index.unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):  # shards of a model that was here before
        if path.name not in names:
            path.unlink()


def _write_file(model: Decoder, path: pathlib.Path, entries: list[_Entry]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        fetched, array = None, None
        for entry in entries:
            if fetched != entry.path:
                owner = model.layers if len(entry.path) == 2 else model
                fetched, array = entry.path, np.asarray(getattr(owner, entry.path[-1])[...])
            tensor = array[entry.layer].T if len(entry.path) == 2 else array
            file.write(np.ascontiguousarray(tensor).astype(np.dtype(entry.dtype)).reshape(-1).view(np.uint8))
    os.replace(unfinished, path)


def _config_to_write(config: DecoderConfig, source: dict, dtype: str) -> dict:
    raw = dict(source["config"])
    if raw.get("model_type") == "gemma3":
        raw = dict(raw["text_config"]) | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        raw["tie_word_embeddings"] = config.tied  # until here the outer config decided
    if source.get("untied"):
        raw["tie_word_embeddings"] = False
    raw["torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"] = dtype
    return raw


def _read_json(path: pathlib.Path, *, required: bool = False) -> dict | None:
    if not path.exists():
        if required:
            raise FileNotFoundError(
                f"{path.parent} has no {path.name}; a model folder holds one beside its *.safetensors."
            )
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _listed(items: list[str], limit: int = 40) -> str:
    more = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {more} more" if more > 0 else "")


__all__ = ["load_model", "model_folder", "read_config", "save_model"]
