"""The settings of a run: dataclasses whose fields are the command line's flags.

A field has the name, type and meaning that TRL and transformers give to the flag; where the default differs, the
field's help says so. The same checks hold on the command line, in a YAML file and in Python. Flags that TRL has and
this project has not are answered by `gold_jax.trl_flags`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .fields import Settings, check_fields, check_folder, flag, flags_dataclass, read_attention, read_load_options
from .loss_spec import GROUPS, MASKS, MERGES, NORMALIZATIONS, SORTS, LossSpec, Names, comparisons, presets, read_options
from .mesh_flags import LAYOUTS, MeshFlags
from .rules import RULES, SCHEDULES
from .server_flags import ServerFlags
from .step_ranges import read_steps

__all__ = ["DataArguments", "GOLDConfig", "LossSpec", "ModelArguments", "SFTConfig"]

TRACKERS = ("trackio", "wandb", "tensorboard")


@flags_dataclass
class ModelArguments(Settings):
    """Which model is trained."""

    model_name_or_path: str | None = flag(None, "The model to train: a folder or a hub id.")
    model_revision: str | None = flag(None, "Branch, tag or commit of the model on the hub.")
    dtype: str = flag(
        "float32",
        "In which type weights are read (rounded to it) and the trained model is saved; 'auto': as the checkpoint has it. "
        "Training itself always keeps float32 weights.",
        choices=("auto", "float32", "bfloat16"),
    )
    attn_implementation: str | None = flag(
        None,
        "How attention over whole sequences is computed: auto (by platform, model and length; so is none), plain, blockwise "
        "(long sequences in little memory, anywhere), cudnn (NVIDIA GPUs) or splash (TPUs).",
    )

    def __post_init__(self):
        check_fields(self)
        self.attn_implementation, notices = read_attention("--attn_implementation", self.attn_implementation)
        self.notices += notices


@flags_dataclass(rules=RULES)
class DataArguments(Settings):
    """Which data it is trained on."""

    dataset_name: str | None = flag(None, "The data set: a hub id, or a JSON, JSONL or Parquet file or folder.")
    dataset_config: str | None = flag(None, "Which configuration of a hub data set.")
    dataset_train_split: str = flag("train", "The split to train on.")
    dataset_test_split: str = flag("test", "The split to evaluate on.")
    eval_dataset_name: str | None = flag(
        None, "The data set to evaluate on, all of a single file; none: dataset_test_split of dataset_name."
    )
    max_eval_samples: int | None = flag(None, "Evaluate on the first rows alone, as many as this; none: on all.")

    def __post_init__(self):
        check_fields(self)


@flags_dataclass(rules=RULES)
class SFTConfig(MeshFlags, Settings):
    """Settings of supervised fine-tuning, and of every other kind of training here.

    Raises:
        ValueError: for a value of the wrong type or out of range; the text names the flag, the value and the range.
    """

    output_dir: str = flag("trainer_output", "Folder for the trained model, its log and its model card.")
    seed: int = flag(42, "Seed of the row order and of sampling.")
    # length of the run
    per_device_train_batch_size: int = flag(8, "Rows per device in one forward and backward pass.")
    per_device_eval_batch_size: int = flag(8, "Rows per device in one evaluation pass.")
    gradient_accumulation_steps: int = flag(1, "Passes whose gradients are summed into one update.")
    num_train_epochs: float = flag(3.0, "Times that the data set is gone through.")
    max_steps: int = flag(-1, "Updates to make; -1: as many as num_train_epochs needs.")
    # optimizer
    learning_rate: float = flag(2e-5, "Peak learning rate of AdamW.")
    weight_decay: float = flag(0.0, "Decoupled weight decay; norms and biases are left out of it.")
    adam_beta1: float = flag(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = flag(0.999, "Decay of AdamW's second moment.")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon, added outside the square root.")
    max_grad_norm: float | None = flag(1.0, "Clip gradients to this global norm; 0 or none: no clipping.")
    lr_scheduler_type: str = flag("linear", "Shape of the learning rate after warm-up.", choices=tuple(SCHEDULES))
    lr_scheduler_kwargs: dict | str | None = flag(
        None,
        "JSON for the schedule: num_cycles (cosines), min_lr or min_lr_rate (cosine_with_min_lr; "
        "neither: min_lr_rate 0.1, where transformers would stop).",
    )
    warmup_ratio: float = flag(0.0, "Share of the updates that warm up; warmup_steps wins where both are given.")
    warmup_steps: float = flag(0, "Updates that warm up; below 1: a share of all.")
    # what is logged, evaluated and saved, and when
    logging_steps: float = flag(10, "Updates between two log lines; below 1: a share of all.")
    logging_first_step: bool = flag(False, "Log the first update too.")
    eval_strategy: str = flag("no", "When to evaluate.", choices=("no", "steps", "epoch"))
    eval_steps: float | None = flag(None, "Updates between two evaluations; none: logging_steps.")
    eval_on_start: bool = flag(False, "Evaluate before the first update too, for a before/after table at the end.")
    predict_with_generate: bool = flag(False, "In evaluation, also write completions greedily and count exact matches.")
    save_strategy: str = flag("steps", "When to save on the way.", choices=("no", "steps", "epoch"))
    save_steps: float = flag(500, "Updates between two saves; below 1: a share of all.")
    save_total_limit: int | None = flag(None, "How many saves to keep; none: all.")
    checkpoint_dir: str | None = flag(
        None, "Where saves on the way go, each a folder checkpoint-STEP; may be gs://bucket/folder. None: output_dir."
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Go on from a save: its folder, or latest (true means the same) for the newest whole one of checkpoint_dir, where a run "
        "that has none begins anew.",
    )
    max_skipped_updates: int = flag(
        10,
        "Stop after this many updates in a row whose loss or gradients were not finite; each such update is left out.",
    )
    report_to: list[str] | None = flag(None, "Trackers: trackio, wandb, tensorboard, all (those installed) or none.")
    run_name: str | None = flag(None, "Name of the run in the tracker.")
    project: str = flag("gold_jax", "Project in the tracker.", aliases=["trackio_project"])
    trackio_space_id: str | None = flag(None, "Space on the hub that shows the Trackio project.")
    log_completions: bool = flag(False, "Show sampled prompts and completions from time to time.")
    log_completions_steps: int = flag(100, "Updates between two tables of completions.")
    num_completions_to_print: int | None = flag(None, "How many completions such a table shows; none: all.")
    profile_steps: list[str] | None = flag(
        None, "Trace these steps, such as 3-5,9, into output_dir/profile, and show where their time goes."
    )
    # precision and memory
    bf16: bool | None = flag(None, "Compute in bfloat16; none: on accelerators, but not on CPUs.")
    gradient_checkpointing: bool = flag(
        True, "Recompute activations in the backward pass: less memory.", aliases=["activation_checkpointing"]
    )
    # the hub
    push_to_hub: bool = flag(False, "Upload the trained model to the hub at the end.")
    hub_model_id: str | None = flag(None, "Repository to push to; none: the name of output_dir under your account.")
    hub_private_repo: bool | None = flag(None, "Make the repository private; none: the account's default.")
    hub_token: str | None = flag(None, "Token for the hub; none: the one that `hf auth login` stored.", secret=True)
    # data
    max_length: int | None = flag(1024, "Longest sequence in tokens, prompt and completion; none: no limit.")
    dataset_text_field: str = flag("text", "Column that holds plain text.")
    chat_template_path: str | None = flag(None, "Jinja file, tokenizer folder or hub id whose chat template to use.")
    template_kwargs: dict | str | None = flag(
        None,
        'JSON with variables for the chat template, such as {"enable_thinking": false}; a row\'s column '
        "chat_template_kwargs goes before it.",
        aliases=["chat_template_kwargs"],
    )
    special_tokens_in_prompts: bool = flag(
        False, "Read special tokens' strings in plain-text prompts as those tokens; in messages they are always text."
    )
    completion_only_loss: bool | None = flag(
        None, "Learn the completion (of a conversation its last answer) and nothing else; false: the whole sequence."
    )
    assistant_only_loss: bool = flag(False, "Learn every answer of the assistant's in a conversation.")
    eos_token: str | None = flag(None, "Token that ends a turn; none: what the chat template writes.")
    pad_to_multiple_of: int | None = flag(None, "No effect: lengths are always padded to a few buckets.")
    shuffle_dataset: bool = flag(False, "No effect: rows come in a new random order in every epoch.")
    trust_remote_code: bool = flag(False, "Allow tokenizers and configurations that ship their own Python code.")
    model_init_kwargs: dict | str | None = flag(None, "JSON with dtype, revision or attn_implementation for the model.")
    loss_chunk: int | None = flag(
        None, "Positions whose logits are in memory at once; none: 64 on CPUs, 256 elsewhere."
    )

    def __post_init__(self):
        check_fields(self)
        self._check()

    def _check(self) -> None:
        self.check_mesh()
        for name in ("output_dir", "checkpoint_dir", "resume_from_checkpoint"):
            check_folder(name, getattr(self, name))
        if self.seed >= 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be smaller than 2**63.")
        if "://" in self.output_dir:
            raise ValueError(
                f"--output_dir is {self.output_dir!r}; it must be a local folder. --checkpoint_dir may be in a bucket."
            )
        self.report_to = [] if self.report_to in (None, ["none"]) else self.report_to
        for name in self.report_to:
            if name not in (*TRACKERS, "all"):
                legal = ", ".join((*TRACKERS, "all"))
                raise ValueError(f"--report_to is {name!r}; it must be none or some of {legal}.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"--max_steps is {self.max_steps}; it must be at least 1, or -1 to go by num_train_epochs."
            )
        last = self.max_steps if self.max_steps > 0 else None
        self.profile_steps = read_steps("profile_steps", self.profile_steps, last)
        given = self.lr_scheduler_kwargs = dict(self.lr_scheduler_kwargs or {})
        legal = SCHEDULES[self.lr_scheduler_type]
        for key, value in given.items():
            if key not in legal:
                reads = f"reads {', '.join(legal)}" if legal else "reads nothing from it"
                raise ValueError(f"--lr_scheduler_kwargs has {key!r}; the schedule {self.lr_scheduler_type!r} {reads}.")
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"--lr_scheduler_kwargs has {key}={value!r}; it must be a number of at least 0.")
        if "min_lr" in given and "min_lr_rate" in given:
            raise ValueError("--lr_scheduler_kwargs has both min_lr and min_lr_rate; it must have one of the two.")
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            value = getattr(self, name)
            setattr(self, name, int(value) if value >= 1 else value)
        self.model_init_kwargs, notices = read_load_options("model_init_kwargs", self.model_init_kwargs)
        self.notices += notices

    def interval(self, name: str, total_steps: int) -> int:
        """Updates between two events: `logging_steps`, `eval_steps` or `save_steps`, a share of `total_steps` below 1."""
        value = getattr(self, name)
        return int(value) if value >= 1 else max(1, math.ceil(total_steps * value))

    def warmup(self, total_steps: int) -> int:
        """Updates of warm-up in a run of `total_steps`, rounded as transformers does."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total_steps * (self.warmup_steps or self.warmup_ratio))

    def to_dict(self) -> dict[str, Any]:
        """Every field, fit for JSON; the hub token is left out."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hub_token"}


@flags_dataclass(rules=RULES)
class GOLDConfig(ServerFlags, SFTConfig):
    """Settings of on-policy distillation between any two tokenizers."""

    learning_rate: float = flag(1e-7, "Peak learning rate of AdamW.")
    max_length: int | None = flag(
        None, "Longest sequence in tokens; none: room for prompt (512 if max_prompt_length is none) and completion."
    )
    # the teacher
    teacher_model_name_or_path: str | None = flag(None, "The teacher: a folder or a hub id.")
    teacher_model_revision: str | None = flag(None, "Branch, tag or commit of the teacher on the hub.")
    teacher_tokenizer_name_or_path: str | None = flag(None, "The teacher's tokenizer; none: where the teacher is.")
    teacher_model_init_kwargs: dict | str | None = flag(
        None, "As model_init_kwargs, for the teacher, which is not saved: dtype rounds its weights when they are read."
    )
    teacher_template_kwargs: dict | str | None = flag(
        None, "JSON with variables for the teacher's chat template; none: those of template_kwargs; {}: no variables."
    )
    teacher_layout: str = flag(
        "fsdp", "As layout, for the teacher: full spreads one that is much larger than the student.", choices=LAYOUTS
    )
    teacher_context: str | None = flag(
        None, "Text that the teacher alone reads before the prompt; a row's column teacher_context follows it."
    )
    # sampling
    temperature: float = flag(0.9, "Temperature of the student's sampling (and of both models under gkd, as in TRL).")
    top_p: float = flag(0.95, "Sample from the likeliest tokens that add up to this probability; 1: from all.")
    top_k: int = flag(0, "Sample from this many likeliest tokens; 0: from all.")
    lmbda: float = flag(0.5, "Share of batches whose completions the student writes; 0: data alone, 1: student alone.")
    seq_kd: bool = flag(False, "The teacher writes the completions of the batches that the student does not.")
    max_completion_length: int = flag(128, "Most tokens of a sampled completion.", aliases=["max_new_tokens"])
    max_prompt_length: int | None = flag(None, "Most tokens of a prompt; none: what max_length leaves.")
    generation_batch_size: int | None = flag(
        None,
        "Most completions sampled at once on all devices, those of an update together where they fit in; none: 32 a device "
        "(a shard of data x fsdp).",
    )
    num_generations: int = flag(1, "Completions sampled for each prompt.")
    # the loss
    loss: str | None = flag(
        None,
        "Preset; none: what TRL's ULD flags say under use_uld_loss, else gkd for one tokenizer and gold for two.",
        choices=Names(presets),
    )
    merge: str | None = flag(None, "How a group's tokens become one distribution; none: the preset's.", choices=MERGES)
    groups: str | None = flag(None, "Which groups count; none: the preset's.", choices=GROUPS)
    compare: str | None = flag(
        None, "How two distributions are compared; none: the preset's.", choices=Names(comparisons)
    )
    loss_kwargs: dict | str | None = flag(
        None, 'JSON with options of the comparison that have no flag of their own, such as {"alpha": 0.1}.'
    )
    normalization: str = flag(
        "groups", "Mean over the global batch's groups, or TRL's over rows.", choices=NORMALIZATIONS
    )
    beta: float = flag(
        0.5, "Divergence: 0 is KL(teacher||student), 1 is KL(student||teacher), between: Jensen-Shannon."
    )
    use_uld_loss: bool = flag(False, "Choose the loss by the ULD flags below, as TRL does.")
    use_extended_uld: bool = flag(True, "ULD over aligned groups; off: token by token, cut to the shorter side.")
    uld_use_hybrid_loss: bool = flag(False, "ULD with a divergence over the matched entries: GOLD.")
    uld_token_merge_strategy: str = flag(
        "chain",
        "ULD's merge: chain (bayesian in TRL), or observed (TRL's default, one position late).",
        choices=("chain", "bayesian", "observed"),
    )
    uld_hybrid_matched_weight: float | None = flag(None, "Weight of matched entries; none: by vocabulary overlap.")
    uld_hybrid_unmatched_weight: float | None = flag(None, "Weight of the others; none: by vocabulary overlap.")
    uld_crossentropy_weight: float = flag(0.0, "Weight of the cross-entropy on the completion.")
    uld_distillation_weight: float = flag(1.0, "Weight of the distillation.")
    uld_student_temperature: float = flag(1.0, "The loss divides the student's logits by it.")
    uld_teacher_temperature: float = flag(1.0, "The loss divides the teacher's logits by it.")
    uld_skip_student_eos: bool = flag(False, "Leave the student's stop token out (TRL does; here stopping is taught).")
    uld_skip_teacher_eos: bool = flag(False, "Leave the teacher's stop token out (TRL does; here stopping is taught).")
    uld_top_k: int = flag(0, "Sort only this many largest probabilities; 0: all, exact.")
    uld_sort: str = flag(
        "auto",
        "Who sorts all of them: host (numpy), xla, or auto: in commands the host on CPUs, XLA elsewhere.",
        choices=SORTS,
    )
    projection_mask: list[str] | None = flag(
        None,
        "Unmatched entries that projected and events leave out instead of giving them to a prefix: whitespace, numerals.",
    )
    alm_temperature: float = flag(100.0, "The loss alm raises probabilities to one over this.")

    def _check(self) -> None:
        super()._check()
        self.notices += self.check_server()
        self.projection_mask = [] if self.projection_mask in (None, ["none"]) else self.projection_mask
        self.loss_kwargs = dict(self.loss_kwargs or {})
        if self.loss_kwargs:
            read_options(self._point(False)[1][2], vars(self), self.loss_kwargs)
        for kind in self.projection_mask:
            if kind not in MASKS:
                raise ValueError(f"--projection_mask is {kind!r}; it must be none or some of {', '.join(MASKS)}.")
        one, other = self.uld_hybrid_matched_weight, self.uld_hybrid_unmatched_weight
        if (one is None) != (other is None):
            given, missing = ("matched", "unmatched") if other is None else ("unmatched", "matched")
            raise ValueError(
                f"--uld_hybrid_{given}_weight is {one if other is None else other} but --uld_hybrid_{missing}_weight is "
                "none; give both as numbers of at least 0, or neither."
            )
        if self.max_length is None:
            self.max_length = max(1024, (self.max_prompt_length or 512) + self.max_completion_length)
        if self.max_completion_length >= self.max_length:
            raise ValueError(
                f"--max_completion_length is {self.max_completion_length}, which leaves no room for a prompt in "
                f"--max_length {self.max_length}; it must be smaller than --max_length."
            )
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rows % self.num_generations:
            raise ValueError(
                f"--num_generations is {self.num_generations}; it must divide the rows of an update on one device, "
                f"per_device_train_batch_size x gradient_accumulation_steps = {rows}."
            )
        self.teacher_model_init_kwargs, notices = read_load_options(
            "teacher_model_init_kwargs", self.teacher_model_init_kwargs
        )
        self.notices += notices

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
        if self.use_uld_loss and self.loss is None:
            groups = "all" if self.use_extended_uld else "positional"
        if self.uld_token_merge_strategy == "observed" and name in ("gold", "uld", "uld_extended"):
            merge = "observed"
        return name, (self.merge or merge, self.groups or groups, self.compare or compare)

    def loss_spec(self, same_tokenizer: bool) -> LossSpec:
        """The loss that these settings choose for a student and a teacher.

        Args:
            same_tokenizer: whether both models have one and the same vocabulary.

        Raises:
            ValueError: for gkd with two tokenizers.
        """
        name, (merge, groups, compare) = self._point(same_tokenizer)
        if name == "gkd" and not same_tokenizer:
            raise ValueError(
                "--loss is 'gkd', which compares two models entry by entry, but student and teacher have different "
                "tokenizers; use another --loss, such as gold, events or strict."
            )
        gkd = name == "gkd"  # TRL divides both models' logits by the sampling temperature there
        spec = LossSpec(
            merge=merge,
            groups=groups,
            compare=compare,
            options=read_options(compare, vars(self), self.loss_kwargs),
            crossentropy_weight=self.uld_crossentropy_weight,
            distillation_weight=self.uld_distillation_weight,
            student_temperature=self.temperature if gkd else self.uld_student_temperature,
            teacher_temperature=self.temperature if gkd else self.uld_teacher_temperature,
            skip_student_stop=self.uld_skip_student_eos,
            skip_teacher_stop=self.uld_skip_teacher_eos,
            mask=tuple(self.projection_mask),
            normalization=self.normalization,
            name=name,
        )
        spec.check()
        if spec.comparison.on_policy and self.lmbda < 1:
            raise ValueError(
                f"--lmbda is {self.lmbda:g}, but --compare {spec.compare} learns from what the student itself drew; use --lmbda 1."
            )
        return spec
