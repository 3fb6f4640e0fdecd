"""`python -m gold_jax.evaluate`: what given completions cost a model, in bits per byte, comparable across tokenizers."""

import dataclasses
import json
from collections.abc import Sequence

from gold_jax.command import load_reader, run, show
from gold_jax.config import ModelArguments
from gold_jax.fields import Settings, check_fields, flag, flags_dataclass
from gold_jax.flags import parse_args
from gold_jax.mesh_flags import mesh_flag
from gold_jax.rules import RULES


@flags_dataclass(rules=RULES)
class EvaluateArguments(Settings):
    """What `gold_jax.evaluate` measures a model on."""

    dataset_name: str | None = flag(
        None, "Rows with completions: a hub id, or a JSON, JSONL or Parquet file or folder."
    )
    dataset_config: str | None = flag(None, "Which configuration of a hub data set.")
    dataset_split: str = flag("train", "The split; a single file is a train split.")
    dataset_text_field: str = flag("text", "Column that holds plain text.")
    max_samples: int | None = flag(None, "Only the first rows, as many as this; none: all.")
    tokenizer_name_or_path: str | None = flag(None, "The tokenizer; none: the one beside the model.")
    batch_size: int = flag(8, "Rows at a time.")
    special_tokens_in_prompts: bool = flag(
        False, "Read special tokens' strings in plain-text prompts as those tokens; in messages they are always text."
    )
    max_length: int | None = flag(None, "Longest sequence in tokens; none: no limit.")
    bf16: bool | None = flag(None, "Compute in bfloat16; none: on accelerators, but not on CPUs.")
    loss_chunk: int | None = flag(
        None, "Positions whose logits are in memory at once; none: 64 on CPUs, 256 elsewhere."
    )
    predict_with_generate: bool = flag(False, "Also write completions greedily and count exact matches.")
    max_new_tokens: int = flag(128, "Most tokens of a completion that is written for a measure.")
    teacher_model_name_or_path: str | None = flag(
        None, "Also measure the gaps to this teacher: what each model's own text costs the other, in bits per byte."
    )
    teacher_tokenizer_name_or_path: str | None = flag(None, "The teacher's tokenizer; none: the one beside it.")
    seed: int = flag(42, "Seed of sampling, for the gaps.")
    mesh: str | None = mesh_flag()
    json: bool = flag(False, "Print one JSON object.")

    def __post_init__(self):
        check_fields(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, scores the rows, prints the figures (with `--json`, one JSON object)."""
    model, args, notices = parse_args(argv, ModelArguments, EvaluateArguments, prog="gold_jax.evaluate", doc=__doc__)
    if model.model_name_or_path is None or args.dataset_name is None:
        missing = "--model_name_or_path" if model.model_name_or_path is None else "--dataset_name"
        raise ValueError(f"{missing} is missing; gold_jax.evaluate needs a model and rows with completions")
    show(notices)
    from gold_jax.losses.fused_head import chunk_size
    from gold_jax.text.data import load_examples
    from gold_jax.training.evaluation import exact_match, score_completions

    examples = load_examples(
        args.dataset_name,
        config=args.dataset_config,
        split=args.dataset_split,
        text_column=args.dataset_text_field,
    )
    examples = examples[: args.max_samples] if args.max_samples else examples
    who = load_reader(
        model, args.tokenizer_name_or_path, args.bf16, mesh=args.mesh, special_tokens=args.special_tokens_in_prompts
    )
    score = score_completions(
        who.model,
        who.chat_tokenizer,
        examples,
        batch_size=args.batch_size,
        max_length=args.max_length,
        chunk=chunk_size(args.loss_chunk),
    )
    found = {
        "bits_per_byte": score.bits_per_byte,
        "rows": len(examples),
        "bytes": int(score.bytes.sum()),
        "tokens": int(score.tokens.sum()),
        "rows_cut": score.cut,
    }
    if args.predict_with_generate:
        found["exact_match"] = exact_match(
            who.model, who.chat_tokenizer, examples, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size
        )
    if args.teacher_model_name_or_path is not None:
        found |= _gaps(who, model, args, [e.prompt for e in examples])
    if args.json:
        print(json.dumps(found))
        return
    print(f"{who.name} on {len(examples)} rows of {args.dataset_name} ({who.model.dtype})")
    print(f"  bits per byte   {found['bits_per_byte']:.4f}   ({found['bytes']:,} bytes, {found['tokens']:,} tokens)")
    if "exact_match" in found:
        print(f"  exact match     {found['exact_match']:.1%}")
    if "forward_gap" in found:
        print(f"  forward gap     {found['forward_gap']:.4f}   (student less teacher, on the teacher's text)")
        print(f"  reverse gap     {found['reverse_gap']:.4f}   (teacher less student, on the student's text)")
        print(
            f"  ended           {found['ended']:.1%}   of the student's completions within {args.max_new_tokens} tokens"
        )
    if score.cut:
        print(f"  {score.cut} rows were longer than --max_length {args.max_length} and scored as far as they fit")


def _gaps(who, model: ModelArguments, args: EvaluateArguments, prompts: list) -> dict[str, float]:
    import jax

    from gold_jax.losses.fused_head import chunk_size
    from gold_jax.training.evaluation import measure_gaps

    named = ModelArguments(
        model_name_or_path=args.teacher_model_name_or_path,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
    )
    teacher = load_reader(
        named,
        args.teacher_tokenizer_name_or_path,
        args.bf16,
        mesh=args.mesh,
        special_tokens=args.special_tokens_in_prompts,
    )
    gaps = measure_gaps(
        who[:2],
        teacher[:2],
        prompts,
        max_new_tokens=args.max_new_tokens,
        key=jax.random.key(args.seed),
        batch_size=args.batch_size,
        chunk=chunk_size(args.loss_chunk),
    )
    return {"forward_gap": gaps.forward, "reverse_gap": gaps.reverse, "ended": gaps.ended} | dataclasses.asdict(gaps)


if __name__ == "__main__":
    run("gold_jax.evaluate", main)
