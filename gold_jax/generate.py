"""`python -m gold_jax.generate`: completions of prompts by a model, with its chat template and stop tokens.

With `--chat`, a chat in the terminal.
"""

import json
import sys
import time
from collections.abc import Sequence

from gold_jax.cli import load_reader, require, run, show
from gold_jax.config import GOLDConfig, ModelArguments
from gold_jax.config.fields import Settings, flag, like
from gold_jax.config.parsing import parse_args
from gold_jax.values import AT_LEAST_ONE, Range
from gold_jax.wording import plural


# fmt: off
class GenerateArguments(Settings):
    """What `gold_jax.generate` writes, and how."""

    prompt: list[str] | None = flag(None, "Prompts (quote each), each the user's message of a conversation.", verbatim=True)
    chat: bool = flag(False, "Chat with the model in the terminal; /help lists commands.")
    raw: bool = flag(False,
        "Prompts are plain text to continue, without the chat template; strings of special tokens are read as those tokens.")
    dataset_name: str | None = flag(None, "Take prompts from a data set: a hub id, a file or a folder.")
    dataset_split: str = flag("train", "The split; a single file is a train split.")
    columns: dict | str | None = like(GOLDConfig, "columns")
    max_samples: int | None = flag(None, "Only the first rows, as many as this; none: all.", range=AT_LEAST_ONE)
    tokenizer_name_or_path: str | None = flag(None, "The tokenizer; none: the one beside the model.")
    max_new_tokens: int = flag(128, "Most tokens of a completion.", range=AT_LEAST_ONE)
    temperature: float = flag(0.0, "Temperature of sampling; 0: the likeliest token always.",
        range=Range("at least 0 (0: the likeliest token always)", lambda v: v >= 0))
    top_p: float = like(GOLDConfig, "top_p", 1.0)
    top_k: int = like(GOLDConfig, "top_k")
    batch_size: int = flag(8, "Prompts at a time.", range=AT_LEAST_ONE)
    seed: int = like(GOLDConfig, "seed", help="Seed of sampling.")
    trust_remote_code: bool = like(GOLDConfig, "trust_remote_code")
    bf16: bool | None = like(GOLDConfig, "bf16")
    mesh: str | None = like(GOLDConfig, "mesh")
    json: bool = flag(False, "Print one JSON object a line.")


# fmt: on
def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, samples, prints each prompt with its completion (with `--json`, one JSON object a line); or converses."""
    model, args, notices = parse_args(argv, ModelArguments, GenerateArguments, prog="gold_jax.generate", doc=__doc__)
    require(model.model_name_or_path, "model_name_or_path", "a folder or a hub id")
    if args.chat:
        return _chat(model, args, notices)
    if not any(args.prompt) and args.dataset_name is None:
        raise ValueError("there is no prompt: give --prompt TEXT (several are allowed), or --dataset_name, or --chat")
    show(notices)
    import jax

    from gold_jax.scoring import sample_completions
    from gold_jax.text.data import load_examples

    prompts = args.prompt if args.raw else [[{"role": "user", "content": p}] for p in args.prompt]
    if args.dataset_name is not None:
        rows = load_examples(args.dataset_name, split=args.dataset_split, renamed=args.columns)[: args.max_samples]
        prompts = prompts + [e.prompt for e in rows]
    model = load_reader(model, args, args.tokenizer_name_or_path, special_tokens=args.raw)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    size, key = min(args.batch_size, len(prompts)), jax.random.key(args.seed)
    start = time.perf_counter()
    completions = sample_completions(model, None, prompts, key=key, batch_size=size, **options)
    seconds = time.perf_counter() - start
    for prompt, d in zip(prompts, completions):
        if args.json:
            row = {"prompt": prompt, "completion": d.text, "stopped": d.stopped, "tokens": len(d.ids)}
            print(json.dumps(row, ensure_ascii=False))
        else:
            question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            print(f"── {question}\n{d.text}{'' if d.stopped else ' …'}\n")
    tokens = sum(len(d.ids) + d.stopped for d in completions)
    print(f"{plural(tokens, 'token')} in {seconds:.1f} s, compiling included", file=sys.stderr)


def _chat(model: ModelArguments, args: GenerateArguments, notices: Sequence[str]) -> None:
    """Chats with the model; ValueError for flags that do not apply."""
    of_prompts = "prompt raw dataset_name dataset_split columns max_samples batch_size mesh json"
    if unused := args.given.intersection(of_prompts.split()):
        raise ValueError(f"--chat reads messages from the terminal; leave out --{min(unused)}")
    show(notices)
    from gold_jax.serving.batcher import longest_sequence
    from gold_jax.serving.conversation import Chat, converse

    loaded = load_reader(model, args, args.tokenizer_name_or_path, one_device=True)
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    chat = Chat(loaded, max_length=longest_sequence(loaded.model), **sampling)
    try:
        converse(chat)
    finally:
        chat.close()


if __name__ == "__main__":
    run("gold_jax.generate", main)
