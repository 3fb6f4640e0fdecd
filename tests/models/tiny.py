"""Tiny models of every family: config.json and weights that numpy alone makes, the same on every machine."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
CASES = json.loads((GOLDEN / "cases.json").read_text())

_TOKENS, _LENGTH = 40, 16


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [3, 16]: a full row, one padded on the left and one on the right."""
    tokens = np.random.default_rng(7).integers(0, _TOKENS, (3, _LENGTH)).astype(np.int32)
    mask = np.ones((3, _LENGTH), bool)
    mask[1, :5] = False
    mask[2, -4:] = False
    return tokens, mask


def config_of(name: str) -> dict:
    """The config.json of a case."""
    return CASES[name]["config"]


def weights_of(name: str) -> dict[str, np.ndarray]:
    """The tensors of a case, named as in its checkpoint."""
    config = config_of(name)
    prefix, head = CASES[name].get("prefix", "model."), CASES[name].get("head", "lm_head.weight")
    text = config.get("text_config", config)
    kind, width, inner = text["model_type"], text["hidden_size"], text["intermediate_size"]
    head_dim = text.get("head_dim") or width // text["num_attention_heads"]
    q_size, kv_size = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    gemma, post_norms_alone = kind.startswith("gemma"), kind in ("olmo2", "olmo3", "exaone4")
    rng = np.random.default_rng(sum(map(ord, name)))

    def normal(*shape, scale=1.0, shift=0.0):
        return (shift + scale * rng.standard_normal(shape)).astype(np.float32)

    def matrix(rows, columns):
        return normal(rows, columns, scale=columns**-0.5)

    def norm(size):
        return normal(size, scale=0.2, shift=0.0 if gemma else 1.0)

    weights = {f"{prefix}embed_tokens.weight": matrix(_TOKENS, width), f"{prefix}norm.weight": norm(width)}
    for layer in range(text["num_hidden_layers"]):
        at = f"{prefix}layers.{layer}."
        norms = [] if post_norms_alone else ["input_layernorm"]
        norms += ["post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm"] if gemma else []
        norms += ["post_feedforward_layernorm"] if gemma or post_norms_alone else []
        weights |= {f"{at}{part}.weight": norm(width) for part in norms}
        sizes = {"q": (q_size, width), "k": (kv_size, width), "v": (kv_size, width), "o": (width, q_size)}
        for part, shape in sizes.items():
            weights[f"{at}self_attn.{part}_proj.weight"] = matrix(*shape)
            if text.get("attention_bias") or (kind == "qwen2" and part != "o"):
                weights[f"{at}self_attn.{part}_proj.bias"] = normal(shape[0], scale=0.5)
        if kind in ("qwen3", "gemma3_text", "exaone4"):
            weights |= {f"{at}self_attn.{part}_norm.weight": norm(head_dim) for part in "qk"}
        if kind in ("olmo2", "olmo3"):
            weights |= {
                f"{at}self_attn.{part}_norm.weight": norm(size) for part, size in (("q", q_size), ("k", kv_size))
            }
        for part, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            weights[f"{at}mlp.{part}_proj.weight"] = matrix(*shape)
            if text.get("mlp_bias"):
                weights[f"{at}mlp.{part}_proj.bias"] = normal(shape[0], scale=0.5)
        if kind == "phi3":
            fused = {"self_attn.qkv_proj": [f"self_attn.{part}_proj" for part in "qkv"]}
            fused |= {"mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}
            for tensor, parts in fused.items():
                weights[f"{at}{tensor}.weight"] = np.concatenate([weights.pop(f"{at}{x}.weight") for x in parts])
    if not config.get("tie_word_embeddings", gemma or kind == "smollm3"):
        weights[head] = matrix(_TOKENS, width)
    return weights


def write_folder(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Write a case as a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name)))
    save_file(weights_of(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
