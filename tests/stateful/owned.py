"""What a caller hands over, as it was: fingerprints to compare with after a call."""

import copy
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import jax
import numpy as np
import tokenizers
import transformers
from flax import nnx

from gold_jax.loading import LoadedModel
from gold_jax.models.decoder import Decoder
from gold_jax.text.chat import ChatTokenizer


def digest(arrays: Any) -> str:
    """A hash of every array's bits, by the name of its place; arrays that were donated to a program have none."""
    found = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    for name, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        if getattr(leaf, "is_deleted", lambda: False)():
            return "an array was deleted"
        value = np.asarray(leaf)
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:20]


def weights(model: Any) -> str:
    """The `digest` of a `Decoder`'s parameters."""
    return digest(nnx.state(model))


def fingerprint(thing: Any) -> Any:
    """All that a caller could notice about an object, fit for `==`."""
    if isinstance(thing, Decoder):
        beside = {k: repr(v) for k, v in vars(thing).items() if isinstance(v, bool | int | float | str | type(None))}
        kinds = [str(np.dtype(thing.dtype)), str(np.dtype(thing.param_dtype)), repr(thing.placement)]
        return {"arrays": weights(thing), "settings": beside, "kinds": kinds, "config": repr(thing.config)}
    if isinstance(thing, nnx.GraphDef):
        return hash(thing)
    if isinstance(thing, nnx.State):
        return digest(thing)
    if isinstance(thing, LoadedModel):
        return [fingerprint(part) for part in thing]
    if isinstance(thing, ChatTokenizer):
        plain = {k: v for k, v in vars(thing).items() if isinstance(v, bool | int | str | tuple)}
        return {"settings": plain, "tokenizer": fingerprint(thing.tokenizer)}
    if isinstance(thing, tokenizers.Tokenizer):
        return json.loads(thing.to_str())  # with the state of truncation and padding
    if isinstance(thing, transformers.PreTrainedTokenizerBase):
        return {
            "backend": fingerprint(thing.backend_tokenizer) if hasattr(thing, "backend_tokenizer") else None,
            "special": dict(thing.special_tokens_map),
            "template": thing.chat_template,
            "sides": (thing.padding_side, thing.truncation_side, thing.model_max_length),
            "added": {i: repr(token) for i, token in thing.added_tokens_decoder.items()},
            "made with": {k: repr(v) for k, v in thing.init_kwargs.items()},
        }
    if isinstance(thing, datasets.DatasetDict):
        return {name: fingerprint(part) for name, part in thing.items()}
    if isinstance(thing, datasets.Dataset):
        return {"rows": thing.to_list(), "kinds": repr(thing.features), "name": thing._fingerprint}
    if isinstance(thing, jax.Array) and jax.dtypes.issubdtype(thing.dtype, jax.dtypes.prng_key):
        return digest(jax.random.key_data(thing))
    if isinstance(thing, jax.Array | np.ndarray):
        return digest(thing)
    if isinstance(thing, str | bytes | int | float | bool | type(None) | pathlib.Path):
        return (type(thing).__name__, repr(thing))
    if isinstance(thing, Mapping):
        return {k: fingerprint(v) for k, v in thing.items()}
    if isinstance(thing, frozenset):
        return sorted(map(repr, thing))
    if isinstance(thing, Sequence):
        return [type(thing).__name__, *map(fingerprint, thing)]
    return {k: fingerprint(v) for k, v in copy.copy(vars(thing)).items()}


class Owned:
    """Things of a caller's by name, and what they were like when they were handed over."""

    def __init__(self, **things: Any):
        self.things: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        self.add(**things)

    def add(self, **things: Any) -> None:
        """Watches more things."""
        self.things |= things
        self.before |= {name: fingerprint(thing) for name, thing in things.items()}

    def changes(self) -> list[str]:
        """What is no longer as it was: the name of each thing, and where in it."""
        found = []
        for name, thing in self.things.items():
            found += _differences(self.before[name], fingerprint(thing), name)
        return found

    def check(self) -> None:
        """Fails with the changes, if there are any."""
        changes = self.changes()
        assert not changes, f"what the caller handed over was changed: {'; '.join(changes)}"


def _differences(old: Any, new: Any, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            if key not in old or key not in new:
                found.append(f"{where}.{key} {'appeared' if key in new else 'is gone'}")
            else:
                found += _differences(old[key], new[key], f"{where}.{key}")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [change for i, (a, b) in enumerate(zip(old, new)) for change in _differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
