"""What settings may be: the numbers that each may take, and what each schedule reads."""

from __future__ import annotations

# What each schedule reads from lr_scheduler_kwargs.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "constant": (),
    "constant_with_warmup": (),
}
RULES = (
    (
        "at least 1",
        lambda v: v >= 1,
        (
            *(
                "per_device_train_batch_size",
                "per_device_eval_batch_size",
                "gradient_accumulation_steps",
                "loss_chunk",
                "batch_size",
                "max_samples",
            ),
            *(
                "save_total_limit",
                "max_skipped_updates",
                "max_length",
                "max_new_tokens",
                "max_eval_samples",
                "pad_to_multiple_of",
                "log_completions_steps",
            ),
            *("num_completions_to_print", "max_completion_length", "max_prompt_length", "num_generations"),
            *("generation_batch_size", "vllm_sync_frequency"),
        ),
    ),
    (
        "greater than 0",
        lambda v: v > 0,
        (
            *("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "adam_epsilon"),
            *("temperature", "uld_student_temperature", "uld_teacher_temperature", "alm_temperature"),
            *("vllm_server_timeout", "process_timeout"),
        ),
    ),
    (
        "at least 0",
        lambda v: v >= 0,
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "top_k", "uld_top_k", "seed"),
            *("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight"),
            *("uld_crossentropy_weight", "uld_distillation_weight"),
        ),
    ),
    ("between 0 and 1", lambda v: 0 <= v <= 1, ("lmbda", "beta", "warmup_ratio")),
    ("greater than 0 and at most 1", lambda v: 0 < v <= 1, ("top_p",)),
    ("at least 0 and smaller than 1", lambda v: 0 <= v < 1, ("adam_beta1", "adam_beta2")),
)
