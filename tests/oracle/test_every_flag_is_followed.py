"""A table of every setting: which test compares it with the oracle, or why it cannot reach the numbers."""

import ast
import dataclasses
import pathlib
import re

import pytest

from gold_jax.config import DataArguments, GOLDConfig, ModelArguments, SFTConfig

LOSS = "test_losses.test_a_setting_of_the_loss_means_what_the_mathematics_say"
UPDATE = "test_updates.test_three_updates_are_adamw_s_on_the_gradient_of_the_loss"
DRAWN = "test_sampling.test_a_student_s_own_completions_keep_the_tokens_that_it_drew"
TOGETHER = "test_sampling.test_later_updates_weigh_what_was_drawn_before_them_by_how_likely_the_student_of_now_draws_it"
TAUGHT = "test_sampling.test_what_the_teacher_wrote_is_learned_as_the_student_s_tokenizer_writes_it"
ROUNDED = "test_reading.test_weights_are_rounded_when_they_are_read_where_dtype_says_so"
VARIABLES = "test_reading.test_template_variables_go_to_both_unless_the_teacher_has_its_own"
MODE = "test_sft.test_each_mode_learns_what_it_says_up_to_the_longest_length"
SORT = "test_losses.test_who_sorts_changes_no_value"
LONG = "test_updates.test_rows_with_a_long_prompt_are_left_out_of_training_alone"

COMPARED = {
    "model_name_or_path": UPDATE,
    "dtype": "test_reading.test_training_keeps_float32_weights_however_they_were_read",
    "attn_implementation": "test_losses.test_how_attention_is_computed_changes_no_value",
    "dataset_name": UPDATE,
    "eval_dataset_name": UPDATE,
    "max_eval_samples": LONG,
    "seed": UPDATE,
    "per_device_train_batch_size": UPDATE,
    "per_device_eval_batch_size": "test_losses.test_rows_of_an_evaluation_are_normalised_together_however_many_are_read_at_once",
    "gradient_accumulation_steps": UPDATE,
    "num_train_epochs": "test_updates.test_an_epoch_ends_with_the_rows_that_are_left_and_the_next_is_shuffled_anew",
    "max_steps": UPDATE,
    "learning_rate": UPDATE,
    "weight_decay": UPDATE,
    "adam_beta1": UPDATE,
    "adam_beta2": UPDATE,
    "adam_epsilon": UPDATE,
    "max_grad_norm": UPDATE,
    "lr_scheduler_type": "test_updates.test_every_schedule_has_the_learning_rate_of_transformers",
    "lr_scheduler_kwargs": "test_updates.test_every_schedule_has_the_learning_rate_of_transformers",
    "warmup_ratio": "test_updates.test_every_schedule_has_the_learning_rate_of_transformers",
    "warmup_steps": "test_updates.test_every_schedule_has_the_learning_rate_of_transformers",
    "logging_steps": UPDATE,
    "predict_with_generate": "test_sampling.test_exact_matches_are_counted_of_greedy_completions",
    "bf16": "test_losses.test_computing_in_bfloat16_stays_near",
    "gradient_checkpointing": UPDATE,
    "max_length": LOSS,
    "dataset_text_field": "test_reading.test_another_column_may_hold_the_text",
    "columns": "test_reading.test_another_column_may_hold_the_text",
    "chat_template_path": "test_reading.test_another_chat_template_is_the_student_s_alone",
    "template_kwargs": VARIABLES,
    "special_tokens_in_prompts": "test_reading.test_special_tokens_in_plain_prompts_are_tokens_where_that_is_asked_for",
    "completion_only_loss": MODE,
    "assistant_only_loss": MODE,
    "eos_token": "test_reading.test_another_end_token_ends_the_student_s_turns_and_counts_as_one_with_the_old",
    "model_init_kwargs": ROUNDED,
    "loss_chunk": LOSS,
    "teacher_model_name_or_path": UPDATE,
    "teacher_tokenizer_name_or_path": "test_reading.test_a_tokenizer_of_the_teacher_s_may_lie_elsewhere",
    "teacher_model_init_kwargs": ROUNDED,
    "teacher_template_kwargs": VARIABLES,
    "teacher_context": "test_reading.test_a_teacher_s_context_comes_before_that_of_a_row",
    "temperature": "test_losses.test_one_tokenizer_is_compared_token_by_token",
    "top_k": DRAWN,
    "rollout_batches": TOGETHER,
    "rollout_importance_cap": TOGETHER,
    "lmbda": "test_sampling.test_an_update_s_share_of_own_completions_follows_lmbda_seed_and_step",
    "seq_kd": TAUGHT,
    "max_completion_length": "test_sampling.test_a_completion_that_is_cut_by_its_limit_has_no_stop_token",
    "max_prompt_length": LONG,
    "num_generations": "test_sampling.test_every_prompt_is_answered_num_generations_times",
    "uld_sort": SORT,
    "projection_mask": "test_losses.test_masked_entries_are_left_out_of_a_projection",
    **dict.fromkeys(
        "loss merge groups compare normalization beta use_uld_loss use_extended_uld uld_use_hybrid_loss "
        "uld_token_merge_strategy uld_hybrid_matched_weight uld_hybrid_unmatched_weight uld_crossentropy_weight "
        "uld_distillation_weight uld_student_temperature uld_teacher_temperature uld_skip_student_eos uld_skip_teacher_eos "
        "uld_top_k alm_temperature".split(),
        LOSS,
    ),
}

SPLITS = "It says where arrays lie or who computes them, and splits sums only: see the tests of meshes and processes."
HUB = "It says which version the hub is asked for; the same file has the same numbers wherever it comes from."
WHEN = "It says when something is measured, shown or saved, not what."
NAMES = "It names a folder, a tracker or a repository."
SERVER = "It says how a server is spoken to, whose draws no oracle repeats: see the tests of the server."
REASONS = {
    **dict.fromkeys("mesh layout teacher_layout".split(), SPLITS),
    **dict.fromkeys("coordinator_address num_processes process_id process_timeout".split(), SPLITS),
    **dict.fromkeys("model_revision teacher_model_revision dataset_config".split(), HUB),
    **dict.fromkeys("dataset_train_split dataset_test_split".split(), "It chooses rows, which are compared as rows."),
    **dict.fromkeys("logging_first_step eval_strategy eval_steps eval_on_start".split(), WHEN),
    **dict.fromkeys("save_strategy save_steps save_total_limit hub_strategy".split(), WHEN),
    **dict.fromkeys(
        "log_completions log_completions_steps num_completions_to_print profile_steps report disable_tqdm".split(), WHEN
    ),
    **dict.fromkeys("output_dir checkpoint_dir report_to run_name project trackio_space_id".split(), NAMES),
    **dict.fromkeys("push_to_hub hub_model_id hub_private_repo hub_token".split(), NAMES),
    **dict.fromkeys(
        "load_best_model_at_end metric_for_best_model greater_is_better".split(),
        "It chooses between students that are there: tests/test_trl_surface.py.",
    ),
    "resume_from_checkpoint": "A resumed run is compared with the one that nothing stopped, bit for bit: see the tests of resuming.",
    "datasets": "It joins data sets, whose rows are compared as rows: tests/text/test_mixture.py.",
    "truncation_mode": "It shortens texts before they are read: tests/text/test_truncation.py.",
    "compilation_cache": "It says where compiled programs are kept: tests/test_compilation_cache.py.",
    "on_bad_row": "Rows that cannot be read end a run or are left out before it begins: tests/text/test_checks.py.",
    "max_skipped_updates": "It ends a run whose numbers are not finite, which has nothing to compare.",
    "eval_gaps": "It measures more, and changes nothing that is trained: tests/training/test_trainer.py.",
    "check_rows": "It says which rows come when, and nothing of what is made of them: see the tests of resuming.",
    "dataset_streaming": "It says which rows come when, and nothing of what is made of them: see the tests of streams.",
    "length_buckets": "It says what batches are padded to, and padding counts for nothing: see the tests of batches.",
    "pad_to_multiple_of": "Lengths are padded to buckets in any case, nothing reads the flag, and a run says so.",
    "shuffle_dataset": "Rows come in shuffled order in any case, and nothing reads the flag, and a run says so.",
    "trust_remote_code": "It lets a tokenizer run code of its own; the embedded ones have none.",
    "loss_kwargs": "It sets options of comparisons that somebody adds; those that are here have flags: see the tests of comparing.",
    "top_p": "It bounds draws, which depend on JAX's keys: see the tests of drawing.",
    "bf16_stochastic_round": "Its masters are the weights without it: see the tests of precision.",
    "rollout_quantization": "It rounds what completions are drawn from, and the log says by how much: see the tests of the sampler.",
    "generation_batch_size": "It splits sampling into calls, and a row's draws do not depend on the others.",
    **dict.fromkeys(
        "use_vllm vllm_mode vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_sync_frequency "
        "rollout_server rollout_weights_dir rollout_sync_first".split(),
        SERVER,
    ),
}

FIELDS = sorted(
    {f.name for kind in (ModelArguments, DataArguments, SFTConfig, GOLDConfig) for f in dataclasses.fields(kind)}
)


def found_here() -> set[str]:
    """`module.function` of every test beside this one."""
    return {
        f"{path.stem}.{node.name}"
        for path in pathlib.Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_compared_with_the_oracle_or_cannot_reach_the_numbers(name):
    assert (name in COMPARED) != (name in REASONS), f"{name} must stand in one of the two tables"
    if name in COMPARED:
        assert COMPARED[name] in found_here()


def test_the_table_names_no_setting_that_is_gone():
    assert set(COMPARED) | set(REASONS) == set(FIELDS)


@pytest.mark.parametrize("name", sorted(COMPARED))
def test_a_test_that_compares_a_setting_sets_it(name):
    """As a key, a keyword or a flag, in the test's module or in what that runs."""
    folder = pathlib.Path(__file__).parent
    text = "".join((folder / file).read_text() for file in (f"{COMPARED[name].split('.')[0]}.py", "cases.py"))
    assert re.search(rf"""["']{name}["']\s*[:\]]|(?<!\w){name}=|--{name}(?!\w)""", text)
