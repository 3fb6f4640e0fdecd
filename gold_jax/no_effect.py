"""Settings that were named and change nothing beside the others: said, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .loss_spec import LossSpec

# Fields, whether they have an effect on a run with these settings, and what to say where they have none.
Effect = tuple[str, Callable[[Any], bool], str]

_RUN: tuple[Effect, ...] = (
    ("shuffle_dataset", lambda a: not a.shuffle_dataset, "rows always come in a new random order in every epoch"),
    ("pad_to_multiple_of", lambda a: a.pad_to_multiple_of is None, "lengths are always padded to a few buckets"),
    ("num_train_epochs", lambda a: a.max_steps < 0, "no effect with --max_steps"),
    ("eval_steps", lambda a: a.eval_strategy == "steps", "no effect without --eval_strategy steps"),
    ("save_steps", lambda a: a.save_strategy == "steps", "no effect without --save_strategy steps"),
    ("warmup_ratio", lambda a: not a.warmup_steps, "no effect with --warmup_steps"),
    (
        "warmup_ratio warmup_steps",
        lambda a: a.lr_scheduler_type != "constant",
        "no effect with --lr_scheduler_type constant; constant_with_warmup warms up",
    ),
    (
        "log_completions_steps num_completions_to_print",
        lambda a: a.log_completions,
        "no effect without --log_completions",
    ),
    ("run_name project trackio_space_id", lambda a: bool(a.report_to), "no effect without --report_to"),
    ("hub_model_id hub_private_repo", lambda a: a.push_to_hub, "no effect without --push_to_hub"),
)
_SFT: tuple[Effect, ...] = (
    (
        "completion_only_loss",
        lambda a: not a.assistant_only_loss,
        "no effect with --assistant_only_loss, which learns every answer of a conversation",
    ),
    ("log_completions", lambda a: not a.log_completions, "no effect here: nothing is sampled in training"),
)
_SAMPLED = "no effect with --lmbda 0 and without --seq_kd: nothing is sampled in training"
_GOLD: tuple[Effect, ...] = (
    (
        "completion_only_loss assistant_only_loss",
        lambda a: False,
        "no effect in distillation, which learns the completion alone; gold_jax.sft has it",
    ),
    ("top_p top_k generation_batch_size", lambda a: a.lmbda > 0 or a.seq_kd, _SAMPLED),
    ("log_completions", lambda a: a.lmbda > 0 or not a.log_completions, "no effect with --lmbda 0: the student writes nothing"),
    ("seq_kd", lambda a: a.lmbda < 1 or not a.seq_kd, "no effect with --lmbda 1: the student writes every completion"),
    (
        "use_extended_uld uld_use_hybrid_loss",
        lambda a: a.use_uld_loss and a.loss is None,
        "no effect without --use_uld_loss, or with --loss, which names the loss itself",
    ),
    ("use_uld_loss", lambda a: a.loss is None or not a.use_uld_loss, "no effect with --loss, which names the loss itself"),
    (
        "vllm_mode",
        lambda a: a.use_vllm,
        "no effect without --use_vllm: the built-in sampler writes the completions",
    ),
)  # fmt: skip
# The same for settings of the loss, by the loss that they come to.
_LOSS: tuple[tuple[str, Callable[[LossSpec], bool], str], ...] = (
    ("beta", lambda s: s.compare not in ("sorted", "reverse_kl"), "no effect on --compare {compare}"),
    (
        "uld_hybrid_matched_weight uld_hybrid_unmatched_weight",
        lambda s: s.compare == "hybrid",
        "no effect on --compare {compare}",
    ),
    ("uld_top_k uld_sort", lambda s: s.compare in ("sorted", "hybrid"), "no effect on --compare {compare}, which sorts nothing"),
    ("uld_sort", lambda s: not s.top_k, "no effect with --uld_top_k"),
    ("alm_temperature", lambda s: s.compare == "alm", "no effect on --compare {compare}"),
    (
        "uld_student_temperature uld_teacher_temperature",
        lambda s: s.name != "gkd",
        "no effect with gkd, which divides both models' logits by --temperature, as TRL does",
    ),
    ("uld_token_merge_strategy", lambda s: s.name in ("gold", "uld", "uld_extended"), "no effect with {name}"),
    (
        "merge groups compare beta loss",
        lambda s: s.distillation_weight > 0,
        "no effect with --uld_distillation_weight 0",
    ),
)  # fmt: skip


def notices(args: Any, spec: LossSpec | None = None, *, evaluates: bool) -> list[str]:
    """A line for each group of settings that somebody named and that change nothing.

    Args:
      args: an `SFTConfig`, or a `GOLDConfig` with its loss.
      spec: the loss; None where there is no teacher.
      evaluates: whether there are rows to evaluate on.
    """
    said: dict[str, list[str]] = {}

    def named(names: str) -> Iterator[str]:
        return (name for name in names.split() if name in args.given)

    for names, matters, words in (*_RUN, *(_SFT if spec is None else _GOLD)):
        if not matters(args):
            said.setdefault(words, []).extend(named(names))
    if spec is not None:
        for names, matters, words in _LOSS:
            if not matters(spec):
                said.setdefault(words.format(compare=spec.compare, name=spec.name), []).extend(named(names))
        if spec.name != "gkd" and args.lmbda == 0 and not args.seq_kd:
            said.setdefault(_SAMPLED, []).extend(named("temperature"))
        if args.merge is not None:
            said.setdefault("no effect with --merge", []).extend(named("uld_token_merge_strategy"))
    if not evaluates:
        rest = [name for name in named("predict_with_generate per_device_eval_batch_size") if getattr(args, name)]
        said.setdefault("no effect without rows to evaluate on", []).extend(rest)
    return [
        f"{', '.join(f'--{name}' for name in dict.fromkeys(names))}: {words}." for words, names in said.items() if names
    ]
