"""Names and values of TRL and transformers that this project has not: what stands in their place, or why not."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gold_jax.wording import quoted

# Values that switch a flag off: nothing is lost, so nothing is said.
_OFF = ("false", "none", "null", "no", "off", "0", "0.0", "", "[]", "{}")

# "auto", and the implementations of gold_jax.models.attention.
ATTENTION = ("auto", "plain", "blockwise", "cudnn", "splash")
# Shell patterns of what PyTorch's transformers calls its own; with a slash: kernels on the hub.
_TORCH_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_*", "paged|*", "*/*")

# Options of from_pretrained that place or speed up a PyTorch model and change no number here.
_PLACEMENT = ("device_map", "low_cpu_mem_usage", "use_cache", "trust_remote_code")


class Answer(NamedTuple):
    """What a run says to a flag it does not have."""

    text: str  # what stands in the flag's place (a notice), or what to do instead (a refusal)
    refused: bool  # whether the flag would change the result, so that the run must not go on without it
    silent: tuple[str, ...]  # values that ask for what happens anyway


def answer(name: str, value: Any = True) -> list[str]:
    """Notices (none or one) for a flag of `ANSWERS` that was given this value; ValueError where it is refused."""
    said = ANSWERS[name]
    text = str(value).strip().lower()
    if text in said.silent:
        return []
    if said.refused:
        shown = "" if value is True or text == "true" or "token" in name else f" {quoted(value, plain=True)}"
        raise ValueError(f"--{name}{shown} is not supported here: {said.text}")
    return [f"--{name}: {said.text}"]


def nearest(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """`; the nearest is X` for the name that is nearest, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; the nearest is {prefix}{close[0]}" if close else ""


def read_attention(where: str, value: str | None) -> tuple[str | None, list[str]]:
    """One of `ATTENTION` (else a ValueError) or None, and a notice where "auto" stands for PyTorch's name."""
    value = None if value is None or str(value).lower() in ("none", "null") else str(value)
    if value is None or value in ATTENTION:
        return value, []
    if any(fnmatch.fnmatchcase(value, pattern) for pattern in _TORCH_ATTENTION):
        taken = "plain, blockwise, cudnn or splash, by platform, model and length"
        return "auto", [f"{where}: {value} is PyTorch's; in its place stands auto ({taken})."]
    legal = f"one of {', '.join(ATTENTION)} (PyTorch's names, such as sdpa, count as auto)"
    raise ValueError(f"{where} is {quoted(value)}; it must be {legal}{nearest(value, ATTENTION)}.")


def read_load_options(name: str, given: dict | None) -> tuple[dict[str, Any], list[str]]:
    """What `model_init_kwargs` of TRL holds of `dtype`, `revision` and `attn_implementation`, and notices about the rest.

    An option that would change the model and is not there is a ValueError.
    """
    options, notices = {}, []
    for key, value in (given or {}).items():
        if value is None and (key in _PLACEMENT or key in ("quantization_config", "dtype", "torch_dtype")):
            continue  # as if it were not there
        if key in ("dtype", "torch_dtype"):
            dtype = str(value).removeprefix("torch.")
            if dtype not in ("auto", "float32", "bfloat16"):
                raise ValueError(f"--{name} has {key}={quoted(value)}; it must be one of auto, float32, bfloat16.")
            options["dtype"] = dtype
        elif key == "revision":
            options["revision"] = value
        elif key == "attn_implementation":
            options[key], said = read_attention(f"--{name}: {key}", value)
            notices += said
        elif key in _PLACEMENT:
            notices.append(f"--{name}: {key} has no part here; JAX places and compiles the model.")
        else:
            raise ValueError(f"--{name} has {quoted(key)}; it must hold only dtype, revision and attn_implementation.")
    return options, notices


# What is answered -> the flags, each with the values that need no answer: `name`, those that switch it off; `name=value`, these
# and its default in TRL, which asks for what happens anyway; `name==value|value`, these values alone.
# fmt: off
_NOTICES: Mapping[str, str] = {
    "The loss never holds all logits and XLA fuses the layers, which is what these kernels are for.":
        "use_liger_kernel liger_kernel_config",
    "Every step is compiled by jax.jit.":
        "torch_compile torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval use_ipex",
    "All devices that JAX sees form one mesh, over which the arrays are sharded.":
        "fsdp fsdp_config deepspeed accelerator_config parallelism_config local_rank=-1 ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout ignore_bias_buffers "
        "tpu_num_cores mp_parameters ray_scope",
    "JAX picks the platform; set JAX_PLATFORMS=cpu (or cuda, tpu) in the environment.": "use_cpu no_cuda use_mps_device",
    "XLA chooses; set JAX_DEFAULT_MATMUL_PRECISION in the environment for another precision.": "tf32",
    "The host prepares the next batch while the device computes; there are no worker processes.":
        "dataloader_num_workers dataloader_pin_memory=true dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order=true dataset_num_proc",
    "Only the columns that hold prompts and answers are read.": "remove_unused_columns=true label_names",
    "--gradient_checkpointing recomputes activations; they are not moved to the host.": "activation_offloading",
    "jax.checkpoint has no such options.": "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    "XLA owns the device's memory.": "torch_empty_cache_steps skip_memory_metrics=true",
    "The built-in sampler needs none of it, and a server (--vllm_mode server) is started with settings of its own.":
        "vllm_group_port vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_max_model_length vllm_model_impl "
        "vllm_enable_sleep_mode",
    "The sampler keeps its key-value cache; training needs none.": "use_cache",
    "The models here have no dropout.": "disable_dropout=true",
    "Rows always lie end to end, so nothing is computed on padding between them.": "padding_free",
    "Rows of a micro-batch always lie end to end, each seeing itself alone, as TRL's bfd has them. "
    "--per_device_train_batch_size counts rows; where TRL packs it counts blocks of --max_length tokens, so that its updates "
    "hold more rows.": "packing eval_packing",
    "Padding is masked; which token stands there does not matter.": "pad_token",
    "The loss is always a mean over the whole global batch.": "average_tokens_across_devices=true",
    "Losses that are not finite are always shown.": "logging_nan_inf_filter=true",
    "The row order and the sampling both follow --seed.": "data_seed",
    "The same seed repeats a run on the same machine; on GPUs also set XLA_FLAGS=--xla_gpu_deterministic_ops=true.":
        "full_determinism",
    "One line is printed for each log, by the first process alone; --logging_steps says how often.":
        "log_level=passive log_level_replica=passive log_on_each_node",
    "Every log line has num_tokens and tokens_per_second.": "include_num_input_tokens_seen include_tokens_per_second",
    "Metrics are written to the folder of the run.": "logging_dir",
    "Training is what this command does; --eval_strategy says when to evaluate.": "do_train=true do_eval",
    "Evaluation adds up losses on the device and keeps no predictions.":
        "prediction_loss_only=true eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
        "batch_eval_metrics",
    "Evaluation computes in the same type as training.": "bf16_full_eval",
    "Completions are printed and logged as they are, repeated prompts too.": "wandb_log_unique_prompts",
    "Trackio's own defaults hold.": "trackio_bucket_id trackio_static_space_id",
    "Weights are always safetensors, written by the first process.": "save_safetensors=true save_on_each_node",
    "A checkpoint always has everything needed to resume too; --save_total_limit says how many are kept.": "save_only_model",
    "SIGTERM always has the run save a checkpoint and end with exit code 75.": "enable_jit_checkpoint",
    "Checkpoints hold no state of callbacks.": "restore_callback_states_from_checkpoint",
    "Every push is waited for.": "hub_always_push",
    "Rows are not grouped by length.": "length_column_name",
    "A later run in --output_dir replaces the model; an earlier run's logs stay under other names.": "overwrite_output_dir",
    "It has no effect without LoRA, which this version has not.":
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
        "lora_task_type use_rslora use_dora",
    "It has no effect without quantization, which this version has not.":
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
}

_REFUSALS: Mapping[str, str] = {
    "LoRA is not in this version; leave the flag out to train all weights.": "use_peft",
    "quantized weights are not in this version; --dtype bfloat16 halves the memory of weights that are read.":
        "load_in_4bit load_in_8bit",
    "float16 would need loss scaling; use --bf16, which has float32's range.":
        "fp16 fp16_full_eval fp16_backend fp16_opt_level half_precision_backend",
    "rows are neither split nor cut to fill a block, and none sees another's tokens; leave it out, bfd is what is done.":
        "packing_strategy==bfd",
    "a resumed run continues with the next rows, which takes no time; leave it out.": "ignore_data_skip",
    "several data sets are read whole; leave it out, or stream one data set with --dataset_streaming.": "streaming",
    "name an eval_split in a data set of datasets, or --eval_dataset_name.": "test_split_size",
    "noise on the embeddings is not supported; leave it out.": "neftune_noise_alpha",
    "the targets are not smoothed; leave it out.": "label_smoothing_factor",
    "the batch must be chosen beforehand; lower --per_device_train_batch_size if memory runs out.": "auto_find_batch_size",
    "rows that do not fill a batch are never dropped; leave it out.": "dataloader_drop_last",
    "evaluation comes with --eval_strategy alone, at every --eval_steps.": "eval_delay=0 do_predict",
    "texts are all that compute_metrics is given, the student's and the data set's.": "include_for_metrics",
    "models with experts are not in this version.": "router_aux_loss_coef",
    "rows are prepared in one way; bring messages, prompt and completion, or text.": "dataset_kwargs",
    "completions are not held to a pattern; leave it out.": "vllm_structured_outputs_regex",
    "callbacks are objects: pass them to the trainer in Python (callbacks=[…]).": "callbacks",
    "AdamW has no further options; its own flags are --adam_beta1, --adam_beta2 and --adam_epsilon.":
        "optim_args optim_target_modules",
    "push to the main branch, or move the revision on the hub afterwards.": "hub_revision",
    "it is --model_revision here.": "student_model_revision",
    "it is --hub_model_id here.": "push_to_hub_model_id push_to_hub_organization",
    "it is --hub_token here.": "push_to_hub_token",
    "--rollout_importance_cap truncates the weights of text that an earlier student drew, or (0) leaves them out.":
        "vllm_importance_sampling_correction==true vllm_importance_sampling_mode vllm_importance_sampling_cap "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "it is --eval_strategy here.": "evaluation_strategy",
    "rows come in shuffled order; sort the data set and leave it out.": "group_by_length",
    "PyTorch's debugging hooks do not exist here; set JAX_DEBUG_NANS=true in the environment.": "debug",
    "AdamW is the optimizer; leave it out.": "optim==adamw_torch|adamw_torch_fused|adamw_hf",
    "SFT learns by negative log-likelihood; leave it out.": "loss_type==nll|chunked_nll",
    "logs come every --logging_steps.": "logging_strategy==steps",
    "rows come in shuffled order; leave it out.": "train_sampling_strategy==random",
}
# fmt: on


def _answers(refused: bool, rows: Mapping[str, str]) -> Mapping[str, Answer]:
    found = {}
    for text, flags in rows.items():
        for flag in flags.split():
            name, _, values = flag.partition("=")
            silent = tuple(values[1:].split("|")) if values.startswith("=") else (*_OFF, values)
            found[name] = Answer(text, refused, silent)
    return found


ANSWERS: Mapping[str, Answer] = {**_answers(False, _NOTICES), **_answers(True, _REFUSALS)}


def value_in_force(name: str) -> Any:
    """What a flag of `ANSWERS` reads as: the value that asks for what happens anyway; None where that is to be off."""
    value = ANSWERS[name].silent[-1 if ANSWERS[name].silent[:1] == _OFF[:1] else 0]
    return {"true": True, "": None}.get(value, int(value) if value.lstrip("-").isdigit() else value)


def _spread(rows: Mapping[str, str]) -> Mapping[str, str]:
    return {name: text for text, names in rows.items() for name in names.split()}


# fmt: off
# What stands in the place of arguments that TRL's trainers take, or took, and these do not.
TRAINER_ARGUMENTS = _spread({
    "rows are encoded and padded here; bring messages, prompt and completion, or text": "data_collator",
    "map the rows beforehand, as in dataset.map(lambda row: {'text': formatting_func(row)})": "formatting_func",
    "logits of whole batches are never held; compute_metrics is given texts": "preprocess_logits_for_metrics",
    "adapters are not trained here, all parameters are; leave it out": "peft_config",
    "it is processing_class here": "tokenizer",
    "make a trainer for each model": "model_init",
    "a loss is a function of arrays: --loss names one, docs/add-a-loss.md says how another is written":
        "compute_loss_func",
    "pass an optax transformation: optimizers=(…, schedule or None)": "optimizer_cls_and_kwargs",
    "rows carry no images": "image_processor",
})

# What stands in the place of attributes and methods of TRL's trainers (with transformers' under them).
MEMBERS = _spread({
    "an update is a compiled function of arrays, without modules or steps to override; trainer.loop.run.step is what runs":
        "autocast_smart_context_manager can_return_loss compute_loss_context_manager "
        "current_gradient_accumulation_steps evaluation_loop gather_function get_batch_samples label_smoother "
        "loss_is_scaled_for_ga maybe_activation_offload_context model_accepts_loss_kwargs model_wrapped prediction_step "
        "preprocess_logits_for_metrics training_step",
    "a loss is a function of arrays: --loss names one, docs/add-a-loss.md says how another is written":
        "compute_loss compute_loss_func generalized_jsd_loss uld_loss_fn aux_loss_enabled",
    "all devices that JAX sees form one mesh (--mesh); trainer.placement is it":
        "accelerator create_accelerator_and_postprocess deepspeed get_cp_size get_sp_size get_tp_size "
        "is_deepspeed_enabled is_distributed_loading_by_transformers is_fsdp_enabled is_fsdp_xla_enabled "
        "is_fsdp_xla_v1_enabled is_fsdp_xla_v2_enabled is_model_parallel place_model_on_device",
    "the optimizer is an optax transformation: optimizers=(…, …) passes one, trainer.optimizer is the run's":
        "create_optimizer create_optimizer_and_scheduler create_scheduler get_decay_parameter_names "
        "get_optimizer_cls_and_kwargs get_optimizer_group optimizer_cls_and_kwargs",
    "the host builds batches as the run goes, without data loaders; trainer.train_dataset is what was passed":
        "data_collator get_eval_dataloader get_test_dataloader get_train_dataloader num_examples",
    "make a trainer for each choice of settings: args.replace(…)":
        "call_model_init compute_objective hp_name hp_search_backend hp_space hyperparameter_search model_init objective",
    "python -m gold_jax.plan says what an update computes": "current_flos floating_point_ops store_flos",
    "gold_jax.sample_completions(trainer.model, trainer.processing_class, prompts) writes completions":
        "generate_on_policy_outputs generation_config generation_kwargs vllm_generation",
    "train and push_to_hub make the repository": "init_hf_repo push_in_progress",
    "the run's first lines and its end say what it measured": "end metrics_format model_preparation_time",
    "noise on the embeddings is not supported": "neftune_hook_handle",
    "train counts its updates itself": "set_initial_training_values",
})

# What stands in the place of properties and methods of transformers' TrainingArguments that are no flags.
SETTINGS_MEMBERS = _spread({
    "jax.devices() lists the devices, jax.process_index() and jax.process_count() count the processes":
        "ddp_timeout_delta device local_process_index main_process_first n_gpu parallel_mode place_model_on_device "
        "process_index world_size",
    "trainer.is_world_process_zero() says which process writes": "should_log should_save get_process_log_level",
    "settings are keyword arguments; args.replace(…) makes a changed copy":
        "set_dataloader set_evaluate set_logging set_lr_scheduler set_optimizer set_push_to_hub set_save set_testing "
        "set_training",
    "args.to_dict() gives all fields": "to_json_string to_sanitized_dict",
    "--per_device_train_batch_size and --per_device_eval_batch_size are per device, trainer.get_total_train_batch_size() "
    "counts an update's rows": "eval_batch_size train_batch_size",
    "args.warmup(total_steps) gives them": "get_warmup_steps",
    "there is no PyTorch": "default_optim is_torch_greater_or_equal_than_2_8",
})

# What stands in the place of what TRL logs.
METRICS = _spread({
    "in an update it would take a pass over the vocabulary; --eval_gaps measures eval_entropy, in bits per byte of what the student writes": "entropy",
    "it is logged by gold_jax.sft, and in distillation with a cross-entropy (--uld_crossentropy_weight)":
        "mean_token_accuracy",
    "models with experts are not in this version": "aux_loss",
    "num_tokens counts them, trainer.state.num_input_tokens_seen too": "num_input_tokens_seen",
})

# What stands in the place of events that cannot happen around a compiled update.
EVENTS = _spread({
    "an update is one compiled function; on_step_end comes after it":
        "on_pre_optimizer_step on_optimizer_step on_substep_end",
})

# Values of flags that TRL or transformers has and this project has not, with what to do.
VALUES: Mapping[str, Mapping[str, str]] = {
    "lr_scheduler_type": _spread({
        "it follows what an evaluation measures, and rates here follow from the update's number": "reduce_lr_on_plateau greedy",
    }),
    "hub_strategy": _spread({"checkpoints are not pushed; keep them in a bucket by --checkpoint_dir": "checkpoint all_checkpoints"}),
    "save_strategy": _spread({"the best is kept beside others; use steps or epoch with --load_best_model_at_end": "best"}),
}
# fmt: on
