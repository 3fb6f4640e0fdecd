"""Settings that were named and change nothing beside the others: told, not ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .loss_spec import LossSpec, option_flags
from .server_flags import ServerFlags


class _Run(NamedTuple):
    """What decides whether a setting has an effect."""

    args: Any  # an `SFTConfig` or a `GOLDConfig`
    spec: LossSpec | None  # None where there is no teacher
    evaluates: bool  # whether there are rows to evaluate on


def _distils(run: _Run) -> bool:
    return run.spec is not None and run.spec.distillation_weight > 0


def _samples(run: _Run) -> bool:
    return run.spec is not None and (run.args.lmbda > 0 or run.args.seq_kd)


# Fields, whether they have an effect in a run, and what to say where they have none.
_ALWAYS: tuple[tuple[str, Callable[[_Run], bool], str], ...] = (
    ("shuffle_dataset", lambda r: False, "rows always come in a new random order in every epoch"),
    ("pad_to_multiple_of", lambda r: False, "lengths are always padded to a few buckets"),
    ("num_train_epochs", lambda r: r.args.max_steps < 0, "no effect with --max_steps"),
    ("eval_steps", lambda r: r.args.eval_strategy == "steps", "no effect without --eval_strategy steps"),
    ("save_steps", lambda r: r.args.save_strategy == "steps", "no effect without --save_strategy steps"),
    ("warmup_ratio", lambda r: not r.args.warmup_steps, "no effect with --warmup_steps"),
    (
        "warmup_ratio warmup_steps",
        lambda r: r.args.lr_scheduler_type != "constant",
        "no effect with --lr_scheduler_type constant; constant_with_warmup warms up",
    ),
    ("run_name project trackio_space_id", lambda r: bool(r.args.report_to), "no effect without --report_to"),
    (
        "predict_with_generate per_device_eval_batch_size",
        lambda r: r.evaluates,
        "no effect without rows to evaluate on",
    ),
    (
        "log_completions_steps num_completions_to_print",
        lambda r: r.args.log_completions,
        "no effect without --log_completions",
    ),
)
_SFT = (
    (
        "completion_only_loss",
        lambda r: not r.args.assistant_only_loss,
        "no effect with --assistant_only_loss, which learns every answer of a conversation",
    ),
    ("log_completions", lambda r: False, "no effect here: nothing is sampled in training"),
)
_DISTILLATION = (
    (
        "completion_only_loss assistant_only_loss",
        lambda r: False,
        "no effect in distillation, which learns the completion alone; gold_jax.sft has it",
    ),
    (
        "top_p top_k generation_batch_size",
        _samples,
        "no effect with --lmbda 0 and without --seq_kd: nothing is sampled in training",
    ),
    (
        "temperature",
        lambda r: _samples(r) or r.spec.name == "gkd",
        "no effect with --lmbda 0 and without --seq_kd: nothing is sampled in training",
    ),
    ("log_completions", lambda r: r.args.lmbda > 0, "no effect with --lmbda 0: the student writes nothing"),
    ("seq_kd", lambda r: r.args.lmbda < 1, "no effect with --lmbda 1: the student writes every completion"),
    ("vllm_mode", lambda r: r.args.use_vllm, "no effect without --use_vllm: the built-in sampler writes the completions"),
    (
        " ".join(f.name for f in dataclasses.fields(ServerFlags) if f.name not in ("use_vllm", "vllm_mode")),
        lambda r: r.args.server_url is not None,
        "no effect without --use_vllm --vllm_mode server",
    ),
    ("use_uld_loss", lambda r: r.args.loss is None, "no effect with --loss, which names the loss itself"),
    (
        "use_extended_uld uld_use_hybrid_loss",
        lambda r: r.args.use_uld_loss and r.args.loss is None,
        "no effect without --use_uld_loss, or with --loss, which names the loss itself",
    ),
    (
        "uld_token_merge_strategy",
        lambda r: r.args.merge is None and r.spec.name in ("gold", "uld", "uld_extended"),
        "no effect with {loss}",
    ),
    ("uld_sort", lambda r: not r.spec.options.get("top_k"), "no effect with --uld_top_k"),
    (
        "uld_student_temperature uld_teacher_temperature",
        lambda r: r.spec.name != "gkd",
        "no effect with gkd, which divides both models' logits by --temperature, as TRL does",
    ),
    (
        "loss merge groups compare loss_kwargs beta projection_mask uld_hybrid_matched_weight uld_hybrid_unmatched_weight "
        "uld_student_temperature uld_teacher_temperature",
        _distils,
        "no effect with --uld_distillation_weight 0",
    ),
)  # fmt: skip


def fields(args: Any, spec: LossSpec | None = None, *, evaluates: bool) -> frozenset[str]:
    """The settings that change nothing, whether or not somebody named them. Arguments as `notices`."""
    return frozenset(name for names, _ in _without_effect(_Run(args, spec, evaluates)) for name in names)


def notices(args: Any, spec: LossSpec | None = None, *, evaluates: bool) -> list[str]:
    """A line for each group of settings that somebody named and that change nothing.

    Settings that were named only to be off (false, none, zero where that is the default) are no matter.

    Args:
        args: an `SFTConfig`, or a `GOLDConfig` with its loss.
        spec: the loss; None where there is no teacher.
        evaluates: whether there are rows to evaluate on.
    """
    off = {f.name for f in dataclasses.fields(args) if not getattr(args, f.name) and getattr(args, f.name) == f.default}
    lines: dict[str, list[str]] = {}
    for names, words in _without_effect(_Run(args, spec, evaluates)):
        lines.setdefault(words, []).extend(name for name in names if name in args.given - off)
    return [
        f"{', '.join(f'--{name}' for name in dict.fromkeys(names))}: {words}."
        for words, names in lines.items()
        if names
    ]


def _without_effect(run: _Run) -> Iterator[tuple[list[str], str]]:
    """Settings without an effect, and why."""
    spec = run.spec
    loss = "" if spec is None else f"loss {spec.name} ({spec.merge}/{spec.groups}/{spec.compare})"
    for names, matters, words in (*_ALWAYS, *(_SFT if spec is None else _DISTILLATION)):
        if not matters(run):
            yield names.split(), words.replace("{loss}", loss)
    if spec is not None:  # flags of other comparisons' options
        own = {parameter.option.flag for parameter in spec.comparison.options.values()}
        yield sorted(option_flags() - own), f"no effect with {loss}"
