"""Make tests/golden/models: run with an environment that has torch and transformers.

python tests/golden/make_model_golden.py                     the tiny models' configs and logits
python tests/golden/make_model_golden.py --greedy FOLDER     also greedy continuations by the real models under FOLDER
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent / "models"
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention"]


def configs() -> dict[str, dict]:
    """Every case: `config`, and where they are not the usual ones the `prefix` and `head` of its tensor names."""

    def case(model_type, **changes):
        return {"config": {"model_type": model_type, **SMALL, **changes}}

    gemma = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 4}
    old_gemma3 = {
        **gemma,
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    new_gemma3 = {
        **gemma,
        "layer_types": SLIDING_THEN_FULL,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    multimodal = {
        "model_type": "gemma3",
        "dtype": "float32",
        "text_config": case("gemma3_text", **old_gemma3)["config"],
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "mm_tokens_per_image": 4,
        "image_token_index": 39,
        "boi_token_index": 38,
        "eoi_token_index": 37,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
    longrope = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 5.0, 30.0]}
    granite = {
        "embedding_multiplier": 3,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    }
    old_olmo3 = {"rope_theta": 100.0, "rope_scaling": {name: yarn[name] for name in yarn if name != "rope_theta"}}
    return {
        "llama": case("llama", head_dim=None, hidden_act="silu"),
        "llama_tied": case("llama", tie_word_embeddings=True, head_dim=16),
        "llama_biases": case("llama", attention_bias=True, mlp_bias=True),
        "llama3_old": case("llama", rope_theta=500.0, rope_scaling={"rope_type": "llama3", **LLAMA3}),
        "llama3_new": case("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}),
        "llama_linear": case("llama", rope_scaling={"type": "linear", "factor": 4.0}),
        "llama_yarn": case("llama", rope_parameters=yarn),
        "mistral_window": case("mistral", sliding_window=4, head_dim=12),
        "mistral_no_window": case("mistral", sliding_window=None),
        "qwen2": case("qwen2", tie_word_embeddings=True),
        "qwen2_window": case("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "qwen2_layer_types": case("qwen2", use_sliding_window=True, sliding_window=3, layer_types=SLIDING_THEN_FULL),
        "qwen3": case("qwen3", head_dim=16),
        "qwen3_biases": case("qwen3", head_dim=16, attention_bias=True, tie_word_embeddings=True),
        "gemma2": case("gemma2", **gemma, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        "gemma2_no_caps": case("gemma2", **gemma, attn_logit_softcapping=None, final_logit_softcapping=None),
        "gemma3_old": case("gemma3_text", **old_gemma3),
        "gemma3_new": case("gemma3_text", **new_gemma3, final_logit_softcapping=3.0),
        "gemma3_multimodal_old": {
            "config": multimodal,
            "prefix": "language_model.model.",
            "head": "language_model.lm_head.weight",
        },
        "gemma3_multimodal_new": {"config": multimodal, "prefix": "model.language_model."},
        "ministral": case("ministral", head_dim=12, sliding_window=4, layer_types=SLIDING_THEN_FULL),
        "phi3": case("phi3", pad_token_id=0, sliding_window=4),
        "phi3_longrope": case(
            "phi3",
            pad_token_id=0,
            rope_scaling=longrope,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=32,
            tie_word_embeddings=True,
        ),
        "phi3_longrope_beyond": case(
            "phi3",
            pad_token_id=0,
            rope_scaling=longrope,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=12,
        ),
        "smollm3": case("smollm3", pad_token_id=0, no_rope_layers=[1, 0, 1], rope_theta=100.0),
        "smollm3_window": case(
            "smollm3",
            pad_token_id=0,
            no_rope_layers=[0, 1, 1],
            use_sliding_window=True,
            sliding_window=4,
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
        ),
        "granite": case("granite", **granite, tie_word_embeddings=True),
        "granite_biases": case("granite", **granite, attention_bias=True, mlp_bias=True),
        "olmo2": case("olmo2", rope_theta=100.0),
        "olmo2_biases": case("olmo2", attention_bias=True, tie_word_embeddings=True, num_key_value_heads=4),
        "olmo3": case("olmo3", **old_olmo3, sliding_window=4, layer_types=SLIDING_THEN_FULL),
        "exaone4": case("exaone4", sliding_window=4, layer_types=SLIDING_THEN_FULL, tie_word_embeddings=True),
        "exaone4_no_window": case("exaone4", sliding_window=None, layer_types=["full_attention"] * 3),
    }


def transformers_logits(folder: pathlib.Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] of a model folder by transformers' eager attention.

    Rows are read one by one where a batch's longest one decides how all of them are rotated (longrope).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        if "longrope" in (folder / "config.json").read_text():
            logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
            for row, own in enumerate(mask):
                logits[row, own] = model(torch.tensor(tokens[row : row + 1, own], dtype=torch.long)).logits[0].numpy()
            return logits
        ids, attention = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
        return model(input_ids=ids, attention_mask=attention).logits.numpy()


def greedy(folder: pathlib.Path, prompts: list[str], new: int) -> list[list[int]]:
    """Greedy continuations by transformers, each up to `new` tokens and through its stop token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


PROMPTS = [
    "Name three colours.",
    "What is 17 plus 25?",
    "Write one line about the sea.",
    "How many legs do two spiders have?",
    "Translate 'good morning' into French.",
    "List the first five prime numbers.",
    "Why is the sky blue?",
    "Tom has 3 bags with 4 marbles each. How many marbles has he?",
    "Give me a word that rhymes with light.",
    "What comes after Wednesday?",
]


def main() -> None:
    """Write cases.json, logits.npz and, on request, greedy.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--greedy", type=pathlib.Path, help="folder that holds smollm2-135m-instruct and smollm2-135m-gpt2tok"
    )
    arguments = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    (HERE / "cases.json").write_text(json.dumps(configs(), indent=1) + "\n")

    sys.path.insert(0, str(HERE.parents[1]))
    from models import tiny

    tokens, mask = tiny.batch()
    logits = {}
    for name in tiny.CASES:
        with tempfile.TemporaryDirectory() as folder:
            logits[name] = transformers_logits(tiny.write_folder(name, pathlib.Path(folder)), tokens, mask)[mask]
        print(name, logits[name].shape, "largest", np.abs(logits[name]).max())
    np.savez_compressed(HERE / "logits.npz", **logits)

    if arguments.greedy:
        names = ("smollm2-135m-instruct", "smollm2-135m-gpt2tok")
        answers = {name: greedy(arguments.greedy / name, PROMPTS, 32) for name in names}
        (HERE / "greedy.json").write_text(json.dumps({"new": 32, "prompts": PROMPTS, "answers": answers}) + "\n")


if __name__ == "__main__":
    main()
