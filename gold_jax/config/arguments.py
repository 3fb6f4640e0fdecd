"""The settings of a run: dataclasses whose fields are the command line's flags, each class a group of `--help`.

A field has the name, type and meaning that TRL and transformers give to the flag, but for what its `differs` says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from gold_jax.config.fields import Effect, Settings, flag, like
from gold_jax.config.trl_compat import nearest, read_attention, read_load_options
from gold_jax.custom_comparisons import load_comparison
from gold_jax.loss_spec import GROUPS, MASKS, MERGES, NORMALIZATIONS, LossSpec, comparisons, presets, read_options
from gold_jax.sharding.axes import LAYOUTS, read_mesh
from gold_jax.step_ranges import read_steps
from gold_jax.values import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, QUANTIZATIONS, SORTS, Range
from gold_jax.wording import quoted

TRACKERS = ("trackio", "wandb", "tensorboard")
# Schedule -> what it reads from lr_scheduler_kwargs.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
    "constant": (),
    "constant_with_warmup": (),
}  # fmt: skip
RAMPS = ("linear", "cosine", "1-sqrt")  # of warmup_stable_decay
# A resumed run refuses another value of a `flag`, says that a `warned_flag` has one, and takes a `free_flag` as it comes.
warned_flag = functools.partial(flag, on_resume="warn")
free_flag = functools.partial(flag, on_resume="ignore")
_BELOW_ONE = Range("at least 0 and smaller than 1", lambda v: 0 <= v < 1)


class RunFacts(NamedTuple):
    """What decides whether a flag changes anything: the argument of `Effect.holds`."""

    args: Any  # an `SFTConfig` or a `GOLDConfig`
    spec: LossSpec | None = None  # None where there is no teacher
    evaluates: bool = True  # whether there are rows to evaluate on
    data: Any = None  # the `DataArguments`; None where only `args` matter
    in_bfloat16: bool = True  # whether the built-in optimizer updates weights that are computed with in bfloat16

    @property
    def samples(self) -> bool:
        """Whether a model writes completions in training."""
        return self.args.lmbda > 0 or self.args.seq_kd

    @property
    def loss(self) -> str:
        """The loss in words, such as `loss gold (chain/all/hybrid)`."""
        return f"loss {self.spec.name} ({self.spec.merge}/{self.spec.groups}/{self.spec.compare})"


# fmt: off
def _option(flag_name: str) -> Effect:
    """Has an effect where the comparison has the option that a flag sets."""
    return Effect(lambda r: any(p.option.flag == flag_name for p in r.spec.comparison.options.values()),
                  "no effect with {loss}")


_EVALUATES = Effect(lambda r: r.evaluates, "no effect without rows to evaluate on")
_REPORTS = Effect(lambda r: bool(r.args.report_to), "no effect without --report_to")
_SHOWS_COMPLETIONS = Effect(lambda r: r.args.log_completions, "no effect without --log_completions")
_WARMS_UP = Effect(lambda r: r.args.lr_scheduler_type != "constant",
                   "no effect with --lr_scheduler_type constant; constant_with_warmup warms up")
_ASKED_TO_EVALUATE = Effect(lambda r: r.evaluates,
                            "no effect without --eval_strategy, --eval_on_start or --eval_dataset_name")
_IN_BFLOAT16 = Effect(lambda r: r.in_bfloat16, "no effect without --bf16, or with an optimizer that is passed in")
_FINE_TUNES = Effect(lambda r: r.spec is None,
                     "no effect in distillation, which learns the completion alone; gold_jax.sft has it")
_NOT_ALL_ANSWERS = Effect(lambda r: r.spec is not None or not r.args.assistant_only_loss,
                          "no effect with --assistant_only_loss, which learns every answer of a conversation")
_NOTHING_SAMPLED = "no effect with --lmbda 0 and without --seq_kd: nothing is sampled in training"
_SAMPLES = Effect(lambda r: r.samples, _NOTHING_SAMPLED)
_STUDENT_WRITES = Effect(lambda r: r.args.lmbda > 0, "no effect with --lmbda 0: the student writes nothing")
_SAMPLED_HERE = Effect(lambda r: r.args.lmbda > 0 and r.args.server_url is None,
                       "no effect where the built-in sampler writes no completion of the student's")
_ASKS_SERVER = Effect(lambda r: r.args.server_url is not None, "no effect without --use_vllm --vllm_mode server")
_DISTILS = Effect(lambda r: r.spec.distillation_weight > 0, "no effect with --uld_distillation_weight 0")
_BY_ULD_FLAGS = Effect(lambda r: r.args.use_uld_loss and r.args.loss is None,
                       "no effect without --use_uld_loss, or with --loss, which names the loss itself")
_OWN_TEMPERATURES = Effect(lambda r: r.spec.name != "gkd",
                           "no effect with gkd, which divides both models' logits by --temperature, as TRL does")


class ModelArguments(Settings):
    """Which model, and how it is read."""

    model_name_or_path: str | None = flag(None, "The model (of a distillation, the student): a folder or a hub id.", important=True)
    model_revision: str | None = flag(None, "Branch, tag or commit of the model on the hub.",
        differs="none is the hub's main branch, as TRL's `main`")
    dtype: str = flag("float32",
        "In which type weights are read (rounded to it) and the trained model is saved; 'auto': as the checkpoint has "
        "it. Training itself always keeps float32 weights.", choices=("auto", "float32", "bfloat16"),
        differs="TRL trains in this type, too; here it is the type on disk, and weights and optimizer are float32")
    attn_implementation: str | None = flag(None, "How attention over whole sequences is computed: auto (by platform, "
        "model and length; so is none), plain, blockwise (long sequences in little memory, anywhere), cudnn (NVIDIA "
        "GPUs) or splash (TPUs).", differs="the names of PyTorch's implementations are taken and mean `auto`")
    compilation_cache: str | None = flag(None, "Folder in which compiled programs are kept for later runs; 'none' keeps "
        "nothing. Default: $JAX_COMPILATION_CACHE_DIR, else ~/.cache/gold_jax/xla; in a run of several processes "
        ".compiled in a --checkpoint_dir that is a bucket, else nothing. All processes must read the same folder.",
        folder=True)

    def __post_init__(self):
        super().__post_init__()
        self.attn_implementation, notices = read_attention("--attn_implementation", self.attn_implementation)
        self.notices += notices


_DATASET_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction", "eval_split")
_ONE_DATASET = Effect(lambda r: not r.data.datasets, "no effect with datasets, where each data set has its own")


def _read_datasets(value: Any) -> list[dict[str, Any]]:
    """The entries of `datasets`, from a list of dicts or its JSON; a ValueError names the entry that is wrong."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"--datasets is {quoted(value)}; it must be a list of data sets, each with a path.")
    for k, entry in enumerate(value):
        is_now, columns, share = f"--datasets: data set {k}", entry.get("columns"), entry.get("fraction")
        if unknown := [str(key) for key in entry if key not in _DATASET_KEYS]:
            near = nearest(unknown[0], _DATASET_KEYS) or f"; it may have {', '.join(_DATASET_KEYS)}"
            raise ValueError(f"{is_now} has {quoted(unknown[0])}{near}.")
        if not isinstance(entry.get("path"), str):
            raise ValueError(f"{is_now} has no path; it must be a hub id, a file or a folder.")
        if not isinstance(columns, Mapping | list | None):
            raise ValueError(f"{is_now} has the columns {quoted(columns)}; they must be a list, or a mapping as --columns.")
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not share > 0):
            raise ValueError(f"{is_now} has the fraction {quoted(share)}; it must be greater than 0.")
    if len({entry.get("fraction") is None for entry in value}) > 1:
        raise ValueError("--datasets: some data sets have a fraction and others none; give it to all or to none.")
    return [dict(entry) for entry in value]


class DataArguments(Settings):
    """Which data it is trained on."""

    dataset_name: str | None = flag(None, "The data set: a hub id, or a JSON, JSONL or Parquet file or folder.",
        important=True, differs="may be a file or a folder too")
    datasets: dict | str | None = flag(None, "Several data sets as one, in a YAML file: a list of entries with path, name, "
        "data_dir, data_files, split, columns, fraction and eval_split (docs/data.md).", reader=_read_datasets,
        differs="an entry may name its columns by a mapping, and an eval_split")
    dataset_config: str | None = flag(None, "Which configuration of a hub data set.",
        effect=Effect(lambda r: not r.data.is_local and not r.data.datasets,
                      "no effect on files and with datasets; only a data set of the hub has configurations"))
    dataset_train_split: str = flag("train", "The split to train on.", effect=_ONE_DATASET)
    dataset_streaming: bool = flag(False, "Read the training rows while they are trained on, in shards, a shuffled window "
        "after another; needs --max_steps.")
    dataset_test_split: str = flag("test", "The split to evaluate on.", effect=(_ASKED_TO_EVALUATE, _ONE_DATASET))
    eval_dataset_name: str | None = flag(None,
        "The data set to evaluate on, all of a single file; none: dataset_test_split of dataset_name.")
    max_eval_samples: int | None = flag(None, "Evaluate on the first rows alone, as many as this; none: on all.",
        range=AT_LEAST_ONE, effect=_ASKED_TO_EVALUATE)

    @property
    def is_local(self) -> bool:
        """Whether the data set is a file or a folder, or comes with the package."""
        name = self.dataset_name
        return name is not None and (os.path.exists(name) or name.startswith("embedded:"))


class RunFlags(Settings):
    """Where a run writes, and how long it is."""

    output_dir: str = free_flag("trainer_output", "Folder for the trained model, its log and its model card.", folder=True,
        important=True)
    seed: int = flag(42, "Seed of the row order and of sampling.",
        range=Range("at least 0 and smaller than 2**63", lambda v: 0 <= v < 2**63))
    per_device_train_batch_size: int = flag(8, "Rows per device in one forward and backward pass.", range=AT_LEAST_ONE,
        important=True)
    gradient_accumulation_steps: int = flag(1, "Passes whose gradients are summed into one update.", range=AT_LEAST_ONE,
        important=True)
    num_train_epochs: float = warned_flag(3.0, "Times that the data set is gone through.", range=POSITIVE, important=True,
        effect=Effect(lambda r: r.args.max_steps < 0, "no effect with --max_steps"))
    max_steps: int = warned_flag(-1, "Updates to make; -1: as many as num_train_epochs needs.",
        range=Range("at least 1, or -1 to go by num_train_epochs", lambda v: v >= 1 or v == -1))


class OptimizerFlags(Settings):
    """AdamW and its learning rate."""

    learning_rate: float = warned_flag(2e-5, "Peak learning rate of AdamW.", range=NOT_NEGATIVE, important=True)
    weight_decay: float = warned_flag(0.0, "Decoupled weight decay; norms and biases are left out of it.",
        range=NOT_NEGATIVE)
    adam_beta1: float = warned_flag(0.9, "Decay of AdamW's first moment.", range=_BELOW_ONE)
    adam_beta2: float = warned_flag(0.999, "Decay of AdamW's second moment.", range=_BELOW_ONE)
    adam_epsilon: float = warned_flag(1e-8, "AdamW's epsilon, added outside the square root.", range=POSITIVE)
    max_grad_norm: float | None = warned_flag(1.0, "Clip gradients to this global norm; 0 or none: no clipping.",
        range=NOT_NEGATIVE)
    lr_scheduler_type: str = warned_flag("linear", "Shape of the learning rate after warm-up.", choices=tuple(SCHEDULES))
    lr_scheduler_kwargs: dict | str | None = warned_flag(None, "JSON for the schedule: num_cycles (cosines), min_lr or "
        "min_lr_rate (those with min_lr; neither: min_lr_rate 0.1, where transformers would stop), warmup_lr_rate "
        "(cosine_warmup_with_min_lr), lr_end and power (polynomial), timescale (inverse_sqrt), num_decay_steps, "
        "num_stable_steps, warmup_type, decay_type and min_lr_ratio (warmup_stable_decay).",
        differs="cosine_with_min_lr without a minimum takes min_lr_rate 0.1, where transformers stops")
    warmup_ratio: float = warned_flag(0.0, "Share of the updates that warm up; warmup_steps wins where both are given.",
        range=FRACTION, effect=(Effect(lambda r: not r.args.warmup_steps, "no effect with --warmup_steps"), _WARMS_UP))
    warmup_steps: float = warned_flag(0, "Updates that warm up; below 1: a share of all.", range=NOT_NEGATIVE,
        effect=_WARMS_UP)


class LoggingFlags(Settings):
    """What is logged, and where."""

    logging_steps: float = free_flag(10, "Updates between two log lines; below 1: a share of all.", range=POSITIVE)
    logging_first_step: bool = free_flag(False, "Log the first update too.")
    disable_tqdm: bool | None = free_flag(None, "Show no progress bars; none: they are shown.")
    report_to: list[str] | None = free_flag(None, "Trackers: trackio, wandb, tensorboard, all (those installed) or none.",
        choices=(*TRACKERS, "all"), differs="the trackers are these three")
    run_name: str | None = free_flag(None, "Name of the run in the tracker.", effect=_REPORTS)
    project: str = free_flag("gold_jax", "Project in the tracker.", alias="trackio_project", effect=_REPORTS,
        differs="another name, so that runs of the two are not mixed")
    trackio_space_id: str | None = free_flag(None, "Space on the hub that shows the Trackio project.", effect=_REPORTS)
    log_completions: bool = free_flag(False, "Show sampled prompts and completions from time to time, and write "
        "all of them, and completions of evaluations with --predict_with_generate, to completions.jsonl.",
        effect=Effect(lambda r: (r.spec is not None and r.args.lmbda > 0) or (r.evaluates and r.args.predict_with_generate),
                      "no effect: the student writes nothing in training, and in evaluations only with --predict_with_generate"))
    log_completions_steps: int = free_flag(100, "Updates between two tables of completions.", range=AT_LEAST_ONE,
        effect=_SHOWS_COMPLETIONS)
    num_completions_to_print: int | None = free_flag(None, "How many completions such a table shows; none: all.",
        range=AT_LEAST_ONE, effect=_SHOWS_COMPLETIONS)
    report: bool = free_flag(False, "Write report.html into output_dir at the end of the run, as gold_jax.report does.")
    profile_steps: list[str] | None = free_flag(None,
        "Trace these steps, such as 3-5,9, into output_dir/profile, and show where their time goes.")


class EvaluationFlags(Settings):
    """When and how the model is evaluated."""

    eval_strategy: str = free_flag("no", "When to evaluate.", choices=("no", "steps", "epoch"), important=True)
    eval_steps: float | None = free_flag(None, "Updates between two evaluations; none: logging_steps.", range=POSITIVE,
        effect=Effect(lambda r: r.args.eval_strategy == "steps", "no effect without --eval_strategy steps"),
        differs="filled in from logging_steps when the settings are made; TRL does so when it trains")
    eval_on_start: bool = free_flag(False, "Evaluate before the first update too, for a before/after table at the end.")
    per_device_eval_batch_size: int = free_flag(8, "Rows per device in one evaluation pass.", range=AT_LEAST_ONE,
        effect=_EVALUATES)
    predict_with_generate: bool = free_flag(False,
        "In evaluation, also write completions greedily and count exact matches.", effect=_EVALUATES)


class CheckpointFlags(Settings):
    """When a run is saved, and going on from a save."""

    save_strategy: str = free_flag("steps", "When to save on the way, and whether to after the last update.",
        choices=("no", "steps", "epoch"))
    save_steps: float = free_flag(500, "Updates between two saves; below 1: a share of all.", range=POSITIVE,
        effect=Effect(lambda r: r.args.save_strategy == "steps", "no effect without --save_strategy steps"))
    save_total_limit: int | None = free_flag(None, "How many saves to keep; none: all.", range=AT_LEAST_ONE)
    checkpoint_dir: str | None = free_flag(None, "Where saves on the way go, each a folder checkpoint-STEP; may be "
        "gs://bucket/folder. None: output_dir.", folder=True)
    resume_from_checkpoint: str | None = free_flag(None, "Resume from a checkpoint: its folder, or latest (true means "
        "the same) for the newest complete one in checkpoint_dir; a new run starts if there is none.", folder=True,
        true_means="latest", important=True, differs="`latest` is taken too, and starts a new run if there is no checkpoint")
    load_best_model_at_end: bool = free_flag(False, "End with the student of the save whose evaluation was best, which "
        "--save_total_limit does not remove.")
    metric_for_best_model: str | None = free_flag(None, "Which measure of an evaluation says how good a model is, such as "
        "bits_per_byte; none: loss, with load_best_model_at_end.", effect=_EVALUATES)
    greater_is_better: bool | None = free_flag(None, "Whether a larger measure is better; none: not for those that end in "
        "loss or bits_per_byte.", effect=_EVALUATES, differs="none takes bits_per_byte, too, for a measure that should fall")
    max_skipped_updates: int = free_flag(10, "Stop after this many updates in a row whose loss or gradients were not "
        "finite; each such update is left out.", range=AT_LEAST_ONE)


class MemoryFlags(Settings):
    """Precision and memory."""

    bf16: bool | None = warned_flag(None, "Compute in bfloat16; none: on accelerators, but not on CPUs.", important=True,
        differs="none chooses by platform")
    bf16_stochastic_round: bool = flag(False, "With bf16: weights are rounded stochastically, so that small updates count on "
        "average; the optimizer keeps them in float32, 4 bytes a weight more. What is saved are the rounded ones.",
        important=True, effect=_IN_BFLOAT16)
    gradient_checkpointing: bool = warned_flag(True, "Recompute activations in the backward pass: less memory.",
        alias="activation_checkpointing")
    loss_chunk: int | None = warned_flag(None,
        "Positions whose logits are in memory at once (of up to four times as many, 1,024 at most, their gradients); "
        "none: 64 on CPUs, 512 on TPUs, 256 elsewhere.", range=AT_LEAST_ONE)


class HubFlags(Settings):
    """Uploading the trained model."""

    push_to_hub: bool = free_flag(False, "Upload the trained model to the hub at the end.")
    hub_strategy: str = free_flag("end", "When to: end, or every_save, for which the run waits.",
        choices=("end", "every_save"), effect=Effect(lambda r: r.args.push_to_hub, "no effect without --push_to_hub"),
        differs="pushes at saves are waited for, so that they must be asked for; checkpoints are not pushed")
    hub_model_id: str | None = free_flag(None, "Repository to push to; none: the name of output_dir under your account.")
    hub_private_repo: bool | None = free_flag(None, "Make the repository private; none: the account's default.")
    hub_token: str | None = free_flag(None, "Token for the hub; none: the one that `hf auth login` stored.", secret=True)


class TextFlags(Settings):
    """How rows become tokens, and which of these are learned."""

    max_length: int | None = flag(1024, "Longest sequence in tokens, prompt and completion; none: no limit.",
        range=AT_LEAST_ONE, important=True)
    truncation_mode: str = flag("keep_start", "What is kept of a row that is too long: its start (a prompt that leaves no "
        "room is left out), or the end of its prompt: the first turns and the beginning of a text are cut, no system message, "
        "nothing of the completion.", choices=("keep_start", "keep_end"),
        effect=Effect(lambda r: r.args.max_length is not None, "no effect with --max_length none"),
        differs="keep_end cuts turns and texts, never a chat template's frame, a system message or the completion")
    dataset_text_field: str = flag("text", "Column that holds plain text.")
    columns: dict | str | None = flag(None, "Which column stands for another, in rows to train and to evaluate on: "
        "prompt=question,completion=answer reads question as prompt and answer as completion (docs/data.md).", pairs=True)
    chat_template_path: str | None = flag(None, "Jinja file, tokenizer folder or hub id whose chat template to use.")
    template_kwargs: dict | str | None = flag(None,
        'JSON with variables for the chat template, such as {"enable_thinking": false}; a row\'s column '
        'chat_template_kwargs goes before it.', alias="chat_template_kwargs")
    special_tokens_in_prompts: bool = flag(False,
        "Read special tokens' strings in plain-text prompts as those tokens; in messages they are always text.")
    on_bad_row: str = free_flag("error", "What to do with a row that cannot be read: end with an error, or skip it, count "
        "it and show the first ones.", choices=("error", "skip"))
    check_rows: str = flag("auto", "When to check all rows: before training, or beside it, in the background, which starts "
        "training at once and needs --max_steps. auto: in the background from 200,000 rows on, where possible.", choices=("auto", "before", "beside"))
    completion_only_loss: bool | None = flag(None, "Learn the completion (of a conversation its last answer) and "
        "nothing else; false: the whole sequence.", effect=(_FINE_TUNES, _NOT_ALL_ANSWERS),
        differs="none learns the last answer of a conversation; TRL learns the whole of it (false)")
    assistant_only_loss: bool = flag(False, "Learn every answer of the assistant's in a conversation.", effect=_FINE_TUNES)
    eos_token: str | None = flag(None, "Token that ends a turn; none: what the chat template writes.")
    length_buckets: int = warned_flag(12, "About how many shapes micro-batches are padded to; each is compiled. More: less "
        "padding.", range=AT_LEAST_ONE)
    pad_to_multiple_of: int | None = free_flag(None, "No effect: lengths are padded to buckets, see --length_buckets.",
        range=AT_LEAST_ONE, effect=Effect(lambda r: False, "lengths are padded to buckets; --length_buckets says how many"),
        differs="no effect: lengths are padded to buckets, --length_buckets says how many")
    shuffle_dataset: bool = free_flag(False, "No effect: rows come in a new random order in every epoch.",
        effect=Effect(lambda r: False, "rows always come in a new random order in every epoch"),
        differs="no effect: rows come in a new random order in every epoch")
    trust_remote_code: bool = free_flag(False, "Allow tokenizers and configurations that ship their own Python code.")
    model_init_kwargs: dict | str | None = warned_flag(None, "JSON with dtype, revision or attn_implementation for the "
        "model.", differs="these three keys; those that place a PyTorch model are answered, others refused")


class MeshFlags(Settings):
    """Over which devices a run is spread, and how its processes find each other."""

    mesh: str | None = free_flag(None, "Sizes of the axes data, fsdp and tensor over which the run is spread, such as "
        "fsdp=4,tensor=2; rows are shared out to data x fsdp. None or auto: fsdp over all devices.")
    layout: str = free_flag("fsdp", "What a model's width is cut over: fsdp; full: data and fsdp; replicated: neither.",
        choices=LAYOUTS)
    coordinator_address: str | None = free_flag(None, "HOST:PORT of process 0, in a run of several processes; none: "
        "found out on TPU pods, under Slurm and Open MPI, or by JAX_COORDINATOR_ADDRESS.")
    num_processes: int | None = free_flag(None, "How many processes the run has; none: as above, JAX_NUM_PROCESSES.")
    process_id: int | None = free_flag(None, "Which of them this is, from 0; none: as above, JAX_PROCESS_ID.")
    process_timeout: float = free_flag(60.0,
        "Seconds after which a process that does not answer is taken for lost, and the others end.", range=POSITIVE)


# fmt: on
class SFTConfig(
    MeshFlags, HubFlags, TextFlags, MemoryFlags, CheckpointFlags, EvaluationFlags, LoggingFlags, OptimizerFlags, RunFlags
):  # fmt: skip
    """Settings of supervised fine-tuning, and of every other kind of training here.

    A value of the wrong type or out of range is a ValueError that names the flag, the value and the range.
    """

    completions_per_row = 1  # of an update, for each row of the data set

    def __post_init__(self):
        super().__post_init__()
        read_mesh(self.mesh)
        if "://" in self.output_dir:
            must = "it must be a local folder. --checkpoint_dir may be in a bucket"
            raise ValueError(f"--output_dir is {quoted(self.output_dir)}; {must}.")
        last = self.max_steps if self.max_steps > 0 else None
        self.profile_steps = read_steps("profile_steps", self.profile_steps, last)
        self.lr_scheduler_kwargs = dict(self.lr_scheduler_kwargs or {})
        self._check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        self._check_best_model()
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            value = getattr(self, name)
            setattr(self, name, int(value) if value >= 1 else value)
        if self.truncation_mode == "keep_end" and self.special_tokens_in_prompts:
            raise ValueError(
                "--truncation_mode keep_end would cut the special tokens with which a prompt of "
                "--special_tokens_in_prompts begins; use messages, or shorten such prompts beforehand."
            )
        self.model_init_kwargs, notices = read_load_options("model_init_kwargs", self.model_init_kwargs)
        self.notices += notices

    def _check_schedule(self, schedule: str, given: Mapping[str, Any]) -> None:
        """ValueError where lr_scheduler_kwargs do not fit the schedule."""
        legal = SCHEDULES[schedule]
        for key, value in given.items():
            if key not in legal:
                reads = f"reads {', '.join(legal)}" if legal else "reads nothing from it"
                raise ValueError(f"--lr_scheduler_kwargs has {quoted(key)}; the schedule {schedule!r} {reads}.")
            if key in ("warmup_type", "decay_type"):
                fits, must = value in RAMPS, f"one of {', '.join(RAMPS)}"
            else:
                fits = not isinstance(value, bool) and isinstance(value, int | float) and value >= 0
                fits, must = fits and (value > 0 or key != "timescale"), "a number of at least 0"
                must = "greater than 0" if key == "timescale" else must
            if not fits:
                raise ValueError(f"--lr_scheduler_kwargs has {key}={quoted(value)}; it must be {must}.")
        if "min_lr" in given and "min_lr_rate" in given:
            raise ValueError("--lr_scheduler_kwargs has both min_lr and min_lr_rate; it must have one of the two.")
        if schedule == "warmup_stable_decay" and "num_decay_steps" not in given:
            raise ValueError("--lr_scheduler_type warmup_stable_decay needs num_decay_steps in --lr_scheduler_kwargs.")
        if schedule == "polynomial" and not given.get("lr_end", 1e-7) < self.learning_rate:
            ends = f"--lr_scheduler_type polynomial ends at lr_end {given.get('lr_end', 1e-7):g} (in --lr_scheduler_kwargs)"
            raise ValueError(f"{ends}, which must be below --learning_rate {self.learning_rate:g}.")

    def _check_best_model(self) -> None:
        """Fills in what says which model is best, as transformers does, and sees that it is evaluated when it is saved."""
        if self.load_best_model_at_end:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            if self.eval_strategy == "no" or self.eval_strategy != self.save_strategy:
                is_now = f"--eval_strategy is {self.eval_strategy}, --save_strategy is {self.save_strategy}"
                raise ValueError(f"--load_best_model_at_end needs every save evaluated, but {is_now}; give both alike.")
            steps = self.eval_steps, self.save_steps
            if self.eval_strategy == "steps" and (min(steps) < 1 or steps[1] % steps[0]) and steps[0] != steps[1]:
                is_now = f"--save_steps is {steps[1]:g}, --eval_steps is {steps[0]:g}"
                raise ValueError(f"--load_best_model_at_end needs every save evaluated, but {is_now}; give a multiple.")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "bits_per_byte"))

    @property
    def rows_per_update(self) -> int:
        """Rows of the data set in an update, per data-parallel shard of the mesh."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps // self.completions_per_row

    def interval(self, name: str, total_steps: int) -> int:
        """Updates between two events: `logging_steps`, `eval_steps` or `save_steps`, a share of `total_steps` below 1."""
        value = getattr(self, name)
        return int(value) if value >= 1 else max(1, math.ceil(total_steps * value))

    def warmup(self, total_steps: int) -> int:
        """Updates of warm-up in a run of `total_steps`, rounded as transformers does."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total_steps * (self.warmup_steps or self.warmup_ratio))


# fmt: off
class TeacherFlags(Settings):
    """The teacher, which is not trained."""

    teacher_model_name_or_path: str | None = warned_flag(None, "The teacher: a folder or a hub id.", important=True,
        alias="teacher_model")
    teacher_model_revision: str | None = warned_flag(None, "Branch, tag or commit of the teacher on the hub.")
    teacher_tokenizer_name_or_path: str | None = warned_flag(None, "The teacher's tokenizer; none: where the teacher is.",
        differs="not needed: none is the one beside the teacher")
    teacher_model_init_kwargs: dict | str | None = warned_flag(None,
        "As model_init_kwargs, for the teacher, which is not saved: dtype rounds its weights when they are read.",
        differs="the keys dtype, revision and attn_implementation")
    teacher_template_kwargs: dict | str | None = flag(None,
        "JSON with variables for the teacher's chat template; none: those of template_kwargs; {}: no variables.")
    teacher_layout: str = free_flag("fsdp",
        "As layout, for the teacher: full spreads one that is much larger than the student.", choices=LAYOUTS)
    teacher_context: str | None = flag(None,
        "Text that the teacher alone reads before the prompt; a row's column teacher_context follows it.")
    eval_gaps: bool = free_flag(False, "In evaluation, also sample completions of the prompts from both models, and measure "
        "the gap between student and teacher on either's, in bits per byte.", effect=_EVALUATES)


class SamplingFlags(Settings):
    """Who writes completions in training, and how."""

    lmbda: float = flag(0.5, "Share of batches whose completions the student writes; 0: data alone, 1: student alone.",
        range=FRACTION, important=True)
    seq_kd: bool = flag(False, "The teacher writes the completions of the batches that the student does not.",
        effect=Effect(lambda r: r.args.lmbda < 1, "no effect with --lmbda 1: the student writes every completion"))
    temperature: float = flag(0.9, "Temperature of the student's sampling (and of both models under gkd, as in TRL).",
        range=POSITIVE, effect=Effect(lambda r: r.samples or r.spec.name == "gkd", _NOTHING_SAMPLED))
    top_p: float = flag(0.95, "Sample from the likeliest tokens that add up to this probability; 1: from all.",
        range=Range("greater than 0 and at most 1", lambda v: 0 < v <= 1), effect=_SAMPLES)
    top_k: int = flag(0, "Sample from this many likeliest tokens; 0: from all.", range=NOT_NEGATIVE, effect=_SAMPLES)
    max_completion_length: int = flag(128, "Most tokens of a sampled completion.", alias="max_new_tokens",
        range=AT_LEAST_ONE, important=True)
    max_prompt_length: int | None = flag(None, "Most tokens of a prompt; none: what max_length leaves.", range=AT_LEAST_ONE)
    num_generations: int = flag(1, "Completions sampled for each prompt.", range=AT_LEAST_ONE)
    generation_batch_size: int | None = free_flag(None, "Most completions sampled at once on all devices, those of an "
        "update together where they fit in; none: 32 a device (a shard of data x fsdp), on GPUs and TPUs up to 128 where "
        "memory is free.", range=AT_LEAST_ONE,
        effect=_SAMPLES, differs="changes how many are sampled at once, never what an update learns")
    rollout_batches: int = flag(1, "Updates whose completions the student draws together, with its weights before the first of "
        "them. More rows are decoded at once; the later updates learn from text of an earlier student.", range=AT_LEAST_ONE,
        effect=_STUDENT_WRITES)
    rollout_importance_cap: float | None = flag(2.0, "What the later updates of rollout_batches learn is weighted by how "
        "much likelier the student of now draws the text before it than that of then, at most by this; none: by any "
        "number; 0: nothing is weighted.", range=Range("0 or at least 1", lambda v: v == 0 or v >= 1),
        effect=(_STUDENT_WRITES, Effect(lambda r: r.args.rollout_batches > 1, "no effect without --rollout_batches")))
    rollout_quantization: str = flag("none", "The student's weights as its completions are sampled: none (its own), or int8, "
        "half the bytes to read for every token, for GPUs and TPUs; int8_kv_cache: keys and values of earlier tokens, too. "
        "What that changes is logged as sampling_logp_difference.", choices=QUANTIZATIONS, effect=_SAMPLED_HERE)


class LossFlags(Settings):
    """What is compared: a preset, or a point of the grid of merges, groups and comparisons (docs/losses.md)."""

    loss: str | None = flag(None, "Preset; none: what TRL's ULD flags say under use_uld_loss, else gkd for one "
        "tokenizer and gold for two. Or MODULE:FUNCTION, as for compare.", choices=presets, loads=load_comparison,
        important=True, effect=_DISTILS)
    merge: str | None = flag(None, "How a group's tokens become one distribution; none: the preset's.", choices=MERGES,
        effect=_DISTILS)
    groups: str | None = flag(None, "Which groups count; none: the preset's.", choices=GROUPS, effect=_DISTILS)
    compare: str | None = flag(None, "How two distributions are compared; none: the preset's. A function of your own is "
        "MODULE:FUNCTION or FILE.py:FUNCTION.", choices=comparisons, loads=load_comparison, effect=_DISTILS)
    loss_kwargs: dict | str | None = flag(None,
        'JSON with options of the comparison that have no flag of their own, such as {"alpha": 0.1}.', effect=_DISTILS)
    normalization: str = flag("groups", "Mean over the global batch's groups, or TRL's over rows.", choices=NORMALIZATIONS)
    beta: float = flag(0.5, "Divergence: 0 is KL(teacher||student), 1 is KL(student||teacher), between: "
        "Jensen-Shannon.", range=FRACTION, effect=(_option("beta"), _DISTILS))
    use_uld_loss: bool = flag(False, "Choose the loss by the ULD flags below, as TRL does.",
        effect=Effect(lambda r: r.args.loss is None, "no effect with --loss, which names the loss itself"))
    use_extended_uld: bool = flag(True, "ULD over aligned groups; off: token by token, cut to the shorter side.",
        effect=_BY_ULD_FLAGS)
    uld_use_hybrid_loss: bool = flag(False, "ULD with a divergence over the matched entries: GOLD.", effect=_BY_ULD_FLAGS)
    uld_token_merge_strategy: str = flag("chain",
        "ULD's merge: chain (bayesian in TRL), or observed (TRL's default, one position late).",
        choices=("chain", "bayesian", "observed"),
        effect=Effect(lambda r: r.args.merge is None and r.spec.name in ("gold", "uld", "uld_extended"), "no effect with {loss}"),
        differs="`observed` reads each logit one position late; `chain` is the chain rule, which TRL calls `bayesian`")
    uld_hybrid_matched_weight: float | None = flag(None, "Weight of matched entries; none: by vocabulary overlap.",
        range=NOT_NEGATIVE, effect=(_option("uld_hybrid_matched_weight"), _DISTILS))
    uld_hybrid_unmatched_weight: float | None = flag(None, "Weight of the others; none: by vocabulary overlap.",
        range=NOT_NEGATIVE, effect=(_option("uld_hybrid_unmatched_weight"), _DISTILS))
    uld_crossentropy_weight: float = flag(0.0, "Weight of the cross-entropy on the completion.", range=NOT_NEGATIVE)
    uld_distillation_weight: float = flag(1.0, "Weight of the distillation.", range=NOT_NEGATIVE)
    uld_student_temperature: float = flag(1.0, "The loss divides the student's logits by it.", range=POSITIVE,
        effect=(_OWN_TEMPERATURES, _DISTILS))
    uld_teacher_temperature: float = flag(1.0, "The loss divides the teacher's logits by it.", range=POSITIVE,
        effect=(_OWN_TEMPERATURES, _DISTILS))
    uld_skip_student_eos: bool = flag(False, "Leave the student's stop token out (TRL does; here stopping is taught).",
        differs="stop tokens are matched by role and taught, so that the student learns when to stop")
    uld_skip_teacher_eos: bool = flag(False, "Leave the teacher's stop token out (TRL does; here stopping is taught).",
        differs="as --uld_skip_student_eos")
    uld_top_k: int = flag(0, "Sort only this many largest probabilities; 0: all, exact.", range=NOT_NEGATIVE,
        effect=_option("uld_top_k"))
    uld_sort: str = warned_flag("auto",
        "Who sorts all of them: host (numpy), xla, or auto: in commands on CPUs the host, where a vocabulary has 8,192 "
        "entries or more, and XLA elsewhere.", choices=SORTS,
        effect=(_option("uld_sort"), Effect(lambda r: not r.spec.options.get("top_k"), "no effect with --uld_top_k")))
    projection_mask: list[str] | None = flag(None, "Unmatched entries that projected and events leave out instead of "
        "giving them to a prefix: whitespace, numerals.", choices=MASKS, effect=_DISTILS)
    alm_temperature: float = flag(100.0, "The loss alm raises probabilities to one over this.", range=POSITIVE,
        effect=_option("alm_temperature"))


class ServerFlags(Settings):
    """A server that writes the student's completions, and how it gets the student's weights; without use_vllm none."""

    use_vllm: bool = flag(False,
        "With --vllm_mode server: have a running server write the student's completions in training.",
        differs="alone it changes nothing: the built-in sampler writes the completions where the student is trained")
    vllm_mode: str = flag("colocate",
        "server: the one at the address below (not TRL's own `trl vllm-serve`, which speaks another language). colocate: "
        "the built-in sampler, which always runs where the student is trained.", choices=("colocate", "server"),
        effect=Effect(lambda r: r.args.use_vllm, "no effect without --use_vllm: the built-in sampler writes the completions"),
        differs="server is `vllm serve` or SGLang itself, not `trl vllm-serve`; colocate is the built-in sampler")
    vllm_server_base_url: str | None = free_flag(None, "The server's address; none: made of host and port.",
        effect=_ASKS_SERVER)
    vllm_server_host: str = free_flag("0.0.0.0", "The server's host.", effect=_ASKS_SERVER)
    vllm_server_port: int = free_flag(8001, "The server's port (vLLM's own default is 8000, SGLang's 30000).",
        range=Range("between 1 and 65535", lambda v: 1 <= v <= 65535), effect=_ASKS_SERVER)
    vllm_server_timeout: float = free_flag(240.0, "Seconds to wait for each of the server's answers, and for a server "
        "that is not up yet.", range=POSITIVE, effect=_ASKS_SERVER)
    vllm_sync_frequency: int = flag(1, "Updates after which the server gets the student's weights anew.",
        range=AT_LEAST_ONE, effect=_ASKS_SERVER)
    rollout_server: str = flag("vllm", "The kind of server: `vllm serve` (0.16 or newer, started with "
        "VLLM_SERVER_DEV_MODE=1 in its environment), or SGLang. If it wants a key, put it into the environment as "
        "VLLM_API_KEY.", choices=("vllm", "sglang"), effect=_ASKS_SERVER)
    rollout_weights_dir: str | None = free_flag(None, "Folder through which weights go to the server, which must be "
        "able to read it under the same absolute path; none: .rollout_weights in output_dir.", effect=_ASKS_SERVER)
    rollout_sync_first: bool = free_flag(True, "Give the server the student's weights before the first completions; "
        "false: it has been started with them.", effect=_ASKS_SERVER)

    @property
    def server_url(self) -> str | None:
        """The address of the server that writes the student's completions; None where the built-in sampler does."""
        if not (self.use_vllm and self.vllm_mode == "server"):
            return None
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"


# fmt: on
class GOLDConfig(ServerFlags, LossFlags, SamplingFlags, TeacherFlags, SFTConfig):
    """Settings of on-policy distillation between any two tokenizers."""

    learning_rate: float = like(SFTConfig, "learning_rate", 1e-7)
    max_length: int | None = like(SFTConfig, "max_length", None,
        help="Longest sequence in tokens; none: room for prompt (512 if max_prompt_length is none) and completion, at least 1024.")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        url = self.vllm_server_base_url
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(
                f"--vllm_server_base_url is {quoted(url)}; it must be an address such as http://localhost:8000."
            )
        if self.use_vllm and self.server_url is None:
            where = "on the training devices and with the current weights"
            server = "--vllm_mode server has a running vLLM or SGLang write them."
            self.notices.append(f"--use_vllm: The built-in sampler writes the completions, {where}; {server}")
        self.loss_kwargs = dict(self.loss_kwargs or {})
        if self.loss_kwargs:
            read_options(self._point(False)[1][2], vars(self), self.loss_kwargs)
        one, other = self.uld_hybrid_matched_weight, self.uld_hybrid_unmatched_weight
        if (one is None) != (other is None):
            given, missing = ("matched", "unmatched") if other is None else ("unmatched", "matched")
            differ = f"{one if other is None else other} but --uld_hybrid_{missing}_weight is none"
            both = "give both as numbers of at least 0, or neither"
            raise ValueError(f"--uld_hybrid_{given}_weight is {differ}; {both}.")
        if self.max_length is None:
            self.max_length = max(1024, (self.max_prompt_length or 512) + self.max_completion_length)
        if self.max_completion_length >= self.max_length:
            full = f"which leaves no room for a prompt in --max_length {self.max_length}"
            must = "it must be smaller than --max_length"
            raise ValueError(f"--max_completion_length is {self.max_completion_length}, {full}; {must}.")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rows % self.num_generations:
            of_update = f"per_device_train_batch_size x gradient_accumulation_steps = {rows}"
            must = f"it must divide the rows of an update on one device, {of_update}"
            raise ValueError(f"--num_generations is {self.num_generations}; {must}.")
        if self.rollout_batches > 1 and self.server_url and self.temperature != 1 and self.rollout_importance_cap != 0:
            is_now = f"--rollout_batches is {self.rollout_batches} and --temperature {self.temperature:g}"
            tells = "a server tells log-probabilities at temperature 1 alone, which importance weights cannot be"
            must = "use --temperature 1, or --rollout_importance_cap 0 for no weights"
            raise ValueError(f"{is_now}; {tells} made of; {must}.")
        name = "teacher_model_init_kwargs"
        self.teacher_model_init_kwargs, notices = read_load_options(name, self.teacher_model_init_kwargs)
        self.notices += notices

    @property
    def completions_per_row(self) -> int:
        """`num_generations`."""
        return self.num_generations

    @property
    def weighs_rollouts(self) -> bool:
        """Whether the loss weights completions that an earlier student drew (`losses.importance`)."""
        return self.rollout_batches > 1 and self.lmbda > 0 and self.rollout_importance_cap != 0

    @property
    def prompt_budget(self) -> int:
        """Most tokens a prompt may keep: max_prompt_length, or what max_length leaves beside the completion."""
        room = self.max_length - self.max_completion_length
        return room if self.max_prompt_length is None else min(self.max_prompt_length, room)

    def _point(self, same_tokenizer: bool) -> tuple[str, tuple[str, str, str]]:
        """The preset that these settings choose, and the point of the grid: (merge, groups, compare)."""
        name = self.loss
        if name is None and self.use_uld_loss:
            name = "gold" if self.uld_use_hybrid_loss else "uld_extended" if self.use_extended_uld else "uld"
        elif name is None:
            name = "gkd" if same_tokenizer else "gold"
        merge, groups, compare = presets()[name]
        if self.use_uld_loss and self.loss is None and not self.use_extended_uld:
            groups = "positional"
        if self.uld_token_merge_strategy == "observed" and name in ("gold", "uld", "uld_extended"):
            merge = "observed"
        return name, (self.merge or merge, self.groups or groups, self.compare or compare)

    def loss_spec(self, same_tokenizer: bool) -> LossSpec:
        """The loss that these settings choose for a student and a teacher; ValueError for one that means nothing for them."""
        name, (merge, groups, compare) = self._point(same_tokenizer)
        if name == "gkd" and not same_tokenizer:
            differ = "compares two models entry by entry, but student and teacher have different tokenizers"
            raise ValueError(f"--loss is 'gkd', which {differ}; use another --loss, such as gold, events or strict.")
        own, theirs = self.uld_student_temperature, self.uld_teacher_temperature
        if name == "gkd":  # TRL divides both models' logits by the sampling temperature there
            own = theirs = self.temperature
        weights = dict(
            crossentropy_weight=self.uld_crossentropy_weight, distillation_weight=self.uld_distillation_weight
        )
        stops = dict(skip_student_stop=self.uld_skip_student_eos, skip_teacher_stop=self.uld_skip_teacher_eos)
        options = dict(student_temperature=own, teacher_temperature=theirs, mask=tuple(self.projection_mask))
        options |= dict(options=read_options(compare, vars(self), self.loss_kwargs), normalization=self.normalization)
        spec = LossSpec(merge=merge, groups=groups, compare=compare, name=name, **weights, **stops, **options)
        spec.check()
        if spec.comparison.on_policy and self.lmbda < 1:
            learns = "learns from what the student itself drew; use --lmbda 1"
            raise ValueError(f"--lmbda is {self.lmbda:g}, but --compare {spec.compare} {learns}.")
        return spec
