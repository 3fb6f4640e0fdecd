"""`python -m gold_jax.evaluate`: what given completions cost a model, in bits per byte, comparable across tokenizers."""

import functools
import json
from collections.abc import Sequence

from gold_jax.cli import load_reader, require, run, show
from gold_jax.config import GOLDConfig, ModelArguments, SFTConfig
from gold_jax.config.fields import Settings, flag, like
from gold_jax.config.parsing import parse_args
from gold_jax.values import AT_LEAST_ONE
from gold_jax.wording import plural


# fmt: off
class EvaluateArguments(Settings):
    """What `gold_jax.evaluate` measures a model on."""

    dataset_name: str | None = flag(None, "Rows with completions: a hub id, or a JSON, JSONL or Parquet file or folder.")
    dataset_config: str | None = flag(None, "Which configuration of a hub data set.")
    dataset_split: str = flag("train", "The split; a single file is a train split.", alias="dataset_test_split")
    dataset_text_field: str = like(SFTConfig, "dataset_text_field")
    columns: dict | str | None = like(SFTConfig, "columns")
    max_samples: int | None = flag(None, "Only the first rows, as many as this; none: all.", range=AT_LEAST_ONE,
        alias="max_eval_samples")
    tokenizer_name_or_path: str | None = flag(None, "The tokenizer; none: the one beside the model.")
    batch_size: int = flag(8, "Rows at a time.", range=AT_LEAST_ONE)
    special_tokens_in_prompts: bool = like(SFTConfig, "special_tokens_in_prompts")
    max_length: int | None = like(SFTConfig, "max_length", None, help="Longest sequence in tokens; none: no limit.")
    trust_remote_code: bool = like(SFTConfig, "trust_remote_code")
    bf16: bool | None = like(SFTConfig, "bf16")
    loss_chunk: int | None = like(SFTConfig, "loss_chunk")
    predict_with_generate: bool = flag(False, "Also write completions greedily and count exact matches.")
    max_new_tokens: int = flag(128, "Most tokens of a completion that is written for a measure.", range=AT_LEAST_ONE)
    teacher_model_name_or_path: str | None = flag(None,
        "Also measure the gaps to this teacher: what each model's own text costs the other, in bits per byte.")
    teacher_tokenizer_name_or_path: str | None = flag(None, "The teacher's tokenizer; none: the one beside it.")
    teacher_context: str | None = like(GOLDConfig, "teacher_context")
    seed: int = like(SFTConfig, "seed", help="Seed of sampling, for the gaps.")
    mesh: str | None = like(SFTConfig, "mesh")
    json: bool = flag(False, "Print one JSON object.")


# fmt: on
def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, scores the rows, prints the figures (with `--json`, one JSON object)."""
    model, args, notices = parse_args(argv, ModelArguments, EvaluateArguments, prog="gold_jax.evaluate", doc=__doc__)
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", args.dataset_name)):
        require(value, name, "gold_jax.evaluate needs a model and rows with completions")
    if args.teacher_model_name_or_path is None and args.teacher_context is not None:
        notices = [*notices, "--teacher_context: no effect without --teacher_model_name_or_path"]
    show(notices)
    import jax

    from gold_jax.losses.fused_head import chunk_size
    from gold_jax.scoring import exact_match, measure_gaps, score_completions
    from gold_jax.text.data import as_teacher_reads, load_examples

    source = {"config": args.dataset_config, "split": args.dataset_split, "text_column": args.dataset_text_field}
    source |= {"renamed": args.columns}
    examples = load_examples(args.dataset_name, **source)[: args.max_samples]
    load = functools.partial(load_reader, args=args, special_tokens=args.special_tokens_in_prompts)
    student = load(model, tokenizer=args.tokenizer_name_or_path)
    size, chunk = args.batch_size, chunk_size(args.loss_chunk)
    score = score_completions(student, None, examples, batch_size=size, max_length=args.max_length, chunk=chunk)
    found = {
        "bits_per_byte": score.bits_per_byte,
        "rows": len(examples),
        "bytes": int(score.bytes.sum()),
        "tokens": int(score.tokens.sum()),
        "rows_cut": score.cut,
    }
    written = {"max_new_tokens": args.max_new_tokens, "batch_size": size}
    if args.predict_with_generate:
        found["exact_match"] = exact_match(student, None, examples, **written)
    if args.teacher_model_name_or_path is not None:
        named = model.replace(model_name_or_path=args.teacher_model_name_or_path, model_revision=None)
        teacher = load(named, tokenizer=args.teacher_tokenizer_name_or_path, role="teacher")
        key = jax.random.key(args.seed)
        read = as_teacher_reads(examples, teacher.chat_tokenizer, args.teacher_context)
        written |= {"key": key, "chunk": chunk, "teacher_prompts": [e.prompt for e in read]}
        gaps = measure_gaps(student, teacher, [e.prompt for e in examples], **written)
        found |= {"forward_gap": gaps.forward, "reverse_gap": gaps.reverse, "ended": gaps.ended} | vars(gaps)
    if args.json:
        print(json.dumps(found))
        return
    rows = f"{plural(len(examples), 'row')} of {args.dataset_name}, split {args.dataset_split}"
    print(f"{student.name} on {rows} ({student.model.dtype})")
    print(f"  bits per byte   {found['bits_per_byte']:.4f}   ({found['bytes']:,} bytes, {found['tokens']:,} tokens)")
    if "exact_match" in found:
        print(f"  exact match     {found['exact_match']:.1%}")
    if "forward_gap" in found:
        print(
            f"  forward gap     {found['forward_gap']:.4f}   (bits per byte, student minus teacher, on the teacher's text)"
        )
        print(
            f"  reverse gap     {found['reverse_gap']:.4f}   (bits per byte, teacher minus student, on the student's text)"
        )
        within = f"of the student's completions within {args.max_new_tokens} tokens"
        print(f"  ended           {found['ended']:.1%}   {within}")
    if score.cut:
        print(
            f"  cut             {plural(score.cut, 'row')} to --max_length {args.max_length}, scored as far as they fit"
        )


if __name__ == "__main__":
    run("gold_jax.evaluate", main)
