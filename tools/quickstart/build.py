"""`python -m tools.quickstart.build`, in a checkout: makes the embedded task, tokenizers and models again, from nothing.

Text and tokenizers come out the same on every machine, weights up to rounding. It takes a few minutes on two CPU cores.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import random
import tempfile
from collections.abc import Sequence

import jax
from transformers import AutoConfig, PreTrainedTokenizerFast

from gold_jax.config import SFTConfig
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.hf_checkpoint import save_model
from gold_jax.quickstart import ASSETS
from gold_jax.training.trainer import SFTTrainer
from tools.quickstart.language import lessons, task_rows
from tools.quickstart.tokenization import make_student_tokenizer, make_teacher_tokenizer

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one of the two models is made.

    Attributes:
        config: what its `config.json` says; sizes of the vocabulary and ids of special tokens come from the tokenizer.
        right: whether its lessons give the right answers.
        steps: updates, of `BATCH` lessons each.
        learning_rate: the peak.
    """

    config: dict
    right: bool
    steps: int
    learning_rate: float


RECIPES = {
    "teacher": Recipe(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 112,
            "intermediate_size": 224,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 28,
        },
        right=True,
        steps=400,
        learning_rate=4e-3,
    ),
    "student": Recipe(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        right=False,
        steps=250,
        learning_rate=3e-3,
    ),
}
_SHARED = {
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def build_task(folder: pathlib.Path) -> None:
    """Writes train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in task_rows(split)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_tokenizer(role: str, folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """Writes the files of a tokenizer and returns it; `role` is "teacher" or "student"."""
    tokenizer = make_teacher_tokenizer() if role == "teacher" else make_student_tokenizer()
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def build_model(role: str, tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path) -> None:
    """Trains the teacher or the student and writes config.json and model.safetensors."""
    recipe = RECIPES[role]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    raw = recipe.config | _SHARED | {"vocab_size": len(tokenizer)} | ids
    config = DecoderConfig.from_hf(AutoConfig.for_model(**raw), raw=raw)
    source = lessons(random.Random(f"lessons of the {role}"), right=recipe.right, stories=0.1)
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=recipe.learning_rate,
            warmup_steps=30,
            lr_scheduler_type="cosine_with_min_lr",
            adam_beta2=0.98,
            weight_decay=0.01,
            save_strategy="no",
            logging_steps=50,
            gradient_checkpointing=False,
            loss_chunk=1024,
        )
        trainer = SFTTrainer(
            Decoder.from_config(config, jax.random.key(0)),
            args,
            list(itertools.islice(source, recipe.steps * BATCH)),
            processing_class=tokenizer,
        )
        trainer.train()
        save_model(trainer.model, folder, dtype="bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Builds everything into the package, or into another folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.quickstart.build", description=__doc__)
    parser.add_argument(
        "--output", type=pathlib.Path, default=ASSETS, help="where to write; the package itself if not given"
    )
    parser.add_argument("--only", choices=("task", "teacher", "student"), help="make this alone")
    args = parser.parse_args(argv)
    if args.only in (None, "task"):
        build_task(args.output / "task")
    for role in RECIPES:
        if args.only in (None, role):
            build_model(role, build_tokenizer(role, args.output / role), args.output / role)


if __name__ == "__main__":
    main()
