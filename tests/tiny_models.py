"""Tiny model folders and data for tests of whole runs: random weights, toy tokenizers, all made in a moment."""

import copy
import json
import os
import pathlib

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file
from text.toy_tokenizers import CHATML, LLAMA2, byte_level, sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
}
# What log lines of two runs that are alike differ in.
TIMED = ("tokens_per_second", "time", "programs_compiled", "compiling_seconds")
ROWS = [
    ("What is 24 + 48?", "The answer is 72."),
    ("Which dog jumps?", "The other dog, over the fox."),
    ("Sag ein Wort.", "größer"),
    ("Write code.", "def there(x):\n    return x + 1\n"),
    ("Greet me.", "Привет, мир 😀"),
    ("How many foxes?", "48 foxes; 24 dogs"),
]


def student_tokenizer():
    """Byte-level BPE with ChatML: every prompt is read, whatever its roles."""
    return byte_level(template=CHATML)


def teacher_tokenizer():
    """BPE over blanks with byte fallback and Llama 2's template, which takes users and assistants alone."""
    return sentencepiece(template=LLAMA2)


def beginning_tokenizer():
    """The student's tokenizer without a template, which here puts a token before every text."""
    backend = copy.deepcopy(student_tokenizer().backend_tokenizer)
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def config(kind: str, rows: int, **changes) -> dict:
    """The config.json of a model with as many rows of its head."""
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(kind, "Unknown")
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": rows,
        "tie_word_embeddings": kind == "llama",
        **_SHAPE,
        **changes,
    }


def tensors(settings: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for such a config, named as in a checkpoint."""
    rng = np.random.default_rng(seed)
    width, inner, size = settings["hidden_size"], settings["intermediate_size"], settings["head_dim"]
    queries, keys = settings["num_attention_heads"] * size, settings["num_key_value_heads"] * size
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    ones = {"input_layernorm": width, "post_attention_layernorm": width}
    if settings["model_type"] == "qwen3":
        ones |= {"self_attn.q_norm": size, "self_attn.k_norm": size}
    found = {"model.embed_tokens.weight": rng.normal(0, 0.5, (settings["vocab_size"], width))}
    for layer in range(settings["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {f"{at}{name}.weight": rng.normal(0, width**-0.5, shape) for name, shape in shapes.items()}
        found |= {f"{at}{name}.weight": np.ones(length) for name, length in ones.items()}
    found["model.norm.weight"] = np.ones(width)
    if not settings["tie_word_embeddings"]:
        found["lm_head.weight"] = rng.normal(0, 0.5, (settings["vocab_size"], width))
    return {name: value.astype(np.float32) for name, value in found.items()}


def write_model(folder: pathlib.Path, kind: str, tokenizer, *, rows: int | None = None, seed: int = 0) -> pathlib.Path:
    """A whole model folder; `rows` of the head, by default a few more than the tokenizer has ids."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(kind, len(tokenizer) + 5 if rows is None else rows)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors(settings, seed), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def write_student(folder: pathlib.Path, **options) -> pathlib.Path:
    """A tied Llama with the student's tokenizer."""
    return write_model(folder, "llama", student_tokenizer(), **options)


def write_teacher(folder: pathlib.Path, **options) -> pathlib.Path:
    """An untied Qwen 3 with the teacher's tokenizer."""
    return write_model(folder, "qwen3", teacher_tokenizer(), seed=1, **options)


def conversation(question: str, answer: str) -> dict:
    """A row of `messages`."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: pathlib.Path, rows) -> pathlib.Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """A folder with train.jsonl (four rows of `messages`) and test.jsonl (two)."""
    rows = [conversation(*row) for row in ROWS]
    write_rows(folder / "train.jsonl", rows[:4])
    write_rows(folder / "test.jsonl", rows[4:])
    return folder


def cpu_devices(number: int) -> dict[str, str]:
    """What a process needs in its environment to see so many devices of this machine's CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def quiet_console():
    """A console that shows nothing and keeps what it was to show (`export_text`)."""
    return Console(file=open(os.devnull, "w"), width=200, record=True)
