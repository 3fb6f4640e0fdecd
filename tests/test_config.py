import copy
import dataclasses
import importlib.util
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import pytest

from gold_jax import cli, train
from gold_jax.config import (
    DataArguments,
    GOLDConfig,
    ModelArguments,
    RunFacts,
    SFTConfig,
    fields_with,
    named_without_effect,
)
from gold_jax.config.fields import field_names, groups
from gold_jax.config.parsing import FlagError, HelpRequested, group_name, parse_args
from gold_jax.config.trl_compat import ANSWERS, answer
from gold_jax.loss_spec import LossSpec

GOLDEN = pathlib.Path(__file__).parent / "golden"

# The two commands of section 5 of the design.
GOLD_COMMAND = """
  --model_name_or_path S --teacher_model_name_or_path T --dataset_name D --dataset_train_split train
  --dtype auto --attn_implementation kernels-community/flash-attn --bf16 --learning_rate 1e-7 --gradient_checkpointing
  --per_device_train_batch_size 1 --gradient_accumulation_steps 64 --num_train_epochs 1 --eval_strategy steps --eval_steps 100
  --temperature 1.0 --top_p 0.95 --top_k 0 --max_new_tokens 2048 --max_prompt_length 512 --lmbda 0.25 --beta 0.0
  --use_uld_loss --use_extended_uld --uld_use_hybrid_loss --uld_crossentropy_weight 0.0 --uld_distillation_weight 1.0
  --uld_student_temperature 1.0 --uld_teacher_temperature 1.0 --uld_hybrid_unmatched_weight 1.0 --uld_hybrid_matched_weight 1.0
  --logging_steps 1 --push_to_hub --hub_model_id U/M --report_to trackio --trackio_project P --seed 42 --warmup_ratio 0.05
  --lr_scheduler_type cosine_with_min_lr
""".split()
SFT_COMMAND = """
  --model_name_or_path M --dtype auto --attn_implementation kernels-community/flash-attn --dataset_name D
  --dataset_config C --bf16 --gradient_checkpointing --per_device_train_batch_size 1 --gradient_accumulation_steps 32
  --learning_rate 1e-5 --num_train_epochs 1 --max_length 16384 --logging_steps 1 --report_to trackio --trackio_project P
  --output_dir O --push_to_hub --hub_model_id U/M --seed 42 --warmup_ratio 0.05 --lr_scheduler_type cosine_with_min_lr --use_liger_kernel
""".split()


def gold(*argv):
    return parse_args(argv, ModelArguments, DataArguments, GOLDConfig)


def config(*argv):
    return gold(*argv)[2]


def unused(settings, evaluates=False):
    """What is said of the settings that were named and change nothing."""
    spec = settings.loss_spec(False) if isinstance(settings, GOLDConfig) else None
    return named_without_effect(settings, RunFacts(settings, spec, evaluates))


def assert_fields(settings, expected):
    assert {name: getattr(settings, name) for name in expected} == expected


def test_the_gold_command_of_the_design_lands_in_its_fields():
    model, data, settings, notices = gold(*GOLD_COMMAND)
    assert_fields(model, {"model_name_or_path": "S", "dtype": "auto"})
    assert_fields(data, {"dataset_name": "D", "dataset_config": None, "dataset_train_split": "train"})
    assert_fields(
        settings,
        dict(teacher_model_name_or_path="T", bf16=True, learning_rate=1e-7, gradient_checkpointing=True)
        | dict(per_device_train_batch_size=1, gradient_accumulation_steps=64, num_train_epochs=1.0)
        | dict(eval_strategy="steps", eval_steps=100, temperature=1.0, top_p=0.95, top_k=0, max_completion_length=2048)
        | dict(max_prompt_length=512, max_length=2560, lmbda=0.25, beta=0.0, use_uld_loss=True, use_extended_uld=True)
        | dict(uld_use_hybrid_loss=True, uld_crossentropy_weight=0.0, uld_distillation_weight=1.0)
        | dict(uld_student_temperature=1.0, uld_teacher_temperature=1.0)
        | dict(uld_hybrid_unmatched_weight=1.0, uld_hybrid_matched_weight=1.0, logging_steps=1, push_to_hub=True)
        | dict(hub_model_id="U/M", report_to=["trackio"], project="P", seed=42, warmup_ratio=0.05)
        | dict(lr_scheduler_type="cosine_with_min_lr", output_dir="trainer_output"),
    )
    assert [notice.split(":")[0] for notice in notices] == ["--attn_implementation"]
    assert settings.loss_spec(same_tokenizer=False) == LossSpec(
        options={"beta": 0.0, "matched_weight": 1.0, "unmatched_weight": 1.0}
    )


def test_the_sft_command_of_the_design_lands_in_its_fields():
    model, data, settings, notices = parse_args(SFT_COMMAND, ModelArguments, DataArguments, SFTConfig)
    assert_fields(model, {"model_name_or_path": "M", "dtype": "auto"})
    assert_fields(data, {"dataset_name": "D", "dataset_config": "C", "dataset_train_split": "train"})
    assert_fields(
        settings,
        dict(bf16=True, gradient_checkpointing=True, per_device_train_batch_size=1, gradient_accumulation_steps=32)
        | dict(learning_rate=1e-5, num_train_epochs=1.0, max_length=16384, logging_steps=1, report_to=["trackio"])
        | dict(project="P", output_dir="O", push_to_hub=True, hub_model_id="U/M", seed=42, warmup_ratio=0.05)
        | dict(lr_scheduler_type="cosine_with_min_lr"),
    )
    assert [notice.split(":")[0] for notice in notices] == ["--use_liger_kernel", "--attn_implementation"]


def test_defaults_are_trl_s_except_where_the_help_says_so():
    trl = json.loads((GOLDEN / "trl_flags.json").read_text())
    ours = {
        "GOLDConfig": GOLDConfig,
        "SFTConfig": SFTConfig,
        "ModelConfig": ModelArguments,
        "ScriptArguments": DataArguments,
    }
    # None where TRL says None, and words for "nothing" that this project reads into an empty value
    same = {"[]": "none", "{}": "None", "None": "auto", "0.0": "0", "trainer_output": "None"}
    differing = {
        name
        for cls, flags in trl.items()
        for name, default in flags.items()
        if name in {f.name for f in dataclasses.fields(ours[cls])}
        and default not in (value := str(getattr(ours[cls](), name)), same.get(value))
    }
    assert differing == {
        *("project", "model_revision", "eval_steps", "hub_strategy"),
        *("uld_token_merge_strategy", "uld_skip_student_eos", "uld_skip_teacher_eos"),
    }
    assert differing.isdisjoint(fields_with(GOLDConfig, differs="")), "docs/coming-from-trl.md says why"


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--no_bf16"], "bf16", False),
        (["--no-gradient-checkpointing"], "gradient_checkpointing", False),
        (["--no_activation_checkpointing"], "gradient_checkpointing", False),
        (["--use-uld-loss", "true"], "use_uld_loss", True),
        (["--max_length", "none"], "max_length", 1024),
        (["--max_grad_norm=none"], "max_grad_norm", None),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--max_new_tokens=7"], "max_completion_length", 7),
        (["--report_to", "trackio", "wandb"], "report_to", ["trackio", "wandb"]),
        (["--report_to", "trackio,wandb"], "report_to", ["trackio", "wandb"]),
        (["--report_to", "none"], "report_to", []),
        (
            ["--lr_scheduler_type=cosine", "--lr_scheduler_kwargs", '{"num_cycles": 1}'],
            "lr_scheduler_kwargs",
            {"num_cycles": 1},
        ),
        (["--template_kwargs", '{"enable_thinking": false}'], "template_kwargs", {"enable_thinking": False}),
        (["--pad_to_multiple_of", "auto"], "pad_to_multiple_of", None),
        (["--pad_to_multiple_of", "64"], "pad_to_multiple_of", 64),
        (["--run_name", "two words"], "run_name", "two words"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--save_strategy", "no"], "save_strategy", "no"),
        (["--warmup_steps", "0.5"], "warmup_steps", 0.5),
    ],
)
def test_a_flag_is_read_in_every_spelling(argv, name, value):
    assert getattr(config(*argv), name) == value


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--max_step", "3"], ["--max_step;", "nearest is --max_steps"]),
        (["--qqq"], ["--qqq", "--help"]),
        (["--max_steps", "abc"], ["--max_steps", "'abc'", "whole number"]),
        (["--max_steps", "2.5"], ["--max_steps", "'2.5'", "whole number"]),
        (["--max_steps", "0"], ["--max_steps", "at least 1, or -1"]),
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "a number"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan", "at least 0"]),
        (["--bf16", "maybe"], ["--bf16", "'maybe'", "true or false"]),
        (["--no_bf16", "true"], ["--no_bf16", "takes no value"]),
        (["--seed"], ["--seed needs a value"]),
        (["--seed", "none"], ["--seed", "whole number"]),
        (["--run_name", "two", "words"], ["--run_name", "'words'"]),
        (["data.json"], ["'data.json'", "before any flag"]),
        (["--lmbda", "1.5"], ["--lmbda is 1.5", "between 0 and 1"]),
        (["--beta", "-0.1"], ["--beta is -0.1", "between 0 and 1"]),
        (["--temperature", "0"], ["--temperature", "greater than 0"]),
        (["--uld_teacher_temperature", "-1"], ["--uld_teacher_temperature", "greater than 0"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size is 0", "at least 1"]),
        (["--max_completion_length", "64", "--max_length", "64"], ["--max_completion_length", "64", "smaller"]),
        (["--uld_hybrid_matched_weight", "1"], ["--uld_hybrid_unmatched_weight is none", "both"]),
        (["--num_generations", "3"], ["--num_generations", "= 8"]),
        (["--loss", "glod"], ["--loss", "'glod'", "gold, uld, uld_extended, gkd, strict"]),
        (["--eval_strategy", "best"], ["--eval_strategy", "no, steps, epoch"]),
        (["--dtype", "float16"], ["--dtype", "auto, float32, bfloat16"]),
        (["--report_to", "mlflow"], ["--report_to", "'mlflow'", "trackio"]),
        (["--lr_scheduler_kwargs", "{"], ["--lr_scheduler_kwargs", "JSON object"]),
        (["--lr_scheduler_kwargs", '{"min_lr": 0}'], ["min_lr", "'linear'", "reads nothing"]),
        (
            ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 0, "min_lr_rate": 0}'],
            ["one of the two"],
        ),
        (["--teacher_model_init_kwargs", '{"load_in_4bit": true}'], ["--teacher_model_init_kwargs", "'load_in_4bit'"]),
        (
            ["--attn_implementation", "blokwise"],
            ["--attn_implementation", "'blokwise'", "cudnn", "nearest is blockwise"],
        ),
        (["--model_init_kwargs", '{"attn_implementation": "x"}'], ["--model_init_kwargs: attn_implementation", "'x'"]),
        (["--fp16"], ["--fp16", "--bf16"]),
        (["--use_peft"], ["--use_peft", "LoRA is not in this version"]),
        (["--load_in_4bit"], ["--load_in_4bit", "not in this version"]),
        (["--projection_mask", "words"], ["--projection_mask", "'words'", "whitespace, numerals"]),
        (["--alm_temperature", "0"], ["--alm_temperature", "greater than 0"]),
        (["--ignore_data_skip"], ["--ignore_data_skip", "continues with the next rows"]),
        (["--output_dir", "gs://bucket/run"], ["--output_dir", "local folder", "--checkpoint_dir"]),
        (["--max_skipped_updates", "0"], ["--max_skipped_updates", "at least 1"]),
        (["--packing_strategy", "wrapped"], ["--packing_strategy wrapped", "none sees another's tokens"]),
        (["--optim", "lion"], ["--optim lion", "AdamW"]),
        (["--neftune_noise_alpha", "5"], ["--neftune_noise_alpha 5"]),
    ],
)
def test_a_wrong_flag_is_an_error_that_says_what_would_be_right(argv, parts):
    with pytest.raises(FlagError) as error:
        gold(*argv)
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text


def test_a_wrong_command_line_prints_one_paragraph_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run("gold_jax.train", train.main, ["--max_step", "3"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "gold_jax.train: there is no flag --max_step; the nearest is --max_steps.\n"


def help_of(*argv, classes=(ModelArguments, DataArguments, GOLDConfig)):
    with pytest.raises(HelpRequested) as wanted:
        parse_args(argv, *classes, doc="What it does.")
    return str(wanted.value)


def test_help_of_all_lists_every_field_with_its_default():
    text = help_of("--help", "all")
    assert "What it does." in text and "Updates between two log lines; below 1: a share of all. [10]" in " ".join(
        text.split()
    )
    assert all(f"--{name}" in text for cls in (ModelArguments, DataArguments, GOLDConfig) for name in field_names(cls))


def test_help_shows_the_flags_that_matter_first_and_names_the_groups_of_the_others():
    for text in (help_of("--help"), help_of("-h"), help_of("--beta", "0", "--help")):
        assert "--lmbda" in text and "--learning_rate" in text and "--config" in text and "--adam_beta1" not in text
        assert text.count("\n  --") < 20 and len(text) < 4000
        assert all(
            group_name(owner) in text for cls in (ModelArguments, DataArguments, GOLDConfig) for owner in groups(cls)
        )
    optimizer = help_of("--help", "optimizer")
    assert "--adam_beta1" in optimizer and "--lmbda" not in optimizer
    assert "--dataset_test_split" in help_of(
        "--help", classes=(ModelArguments, DataArguments)
    )  # few flags: all of them
    with pytest.raises(
        FlagError, match="--help optimiser is not a group; the nearest is optimizer; there are model, data, run"
    ):
        gold("--help", "optimiser")


def test_help_of_a_command_ends_it_as_if_all_was_well(capsys):
    assert cli.run("gold_jax.train", train.main, ["--help"]) is None
    assert capsys.readouterr().out.startswith("usage: gold_jax.train")


@pytest.mark.parametrize("argv", [("--run_name", "-x"), ("--run_name=-x",), ("--run_name=--x",)])
def test_a_value_may_begin_with_a_dash(argv):
    assert config(*argv).run_name == argv[-1].removeprefix("--run_name=")
    with pytest.raises(FlagError, match="--learning_rate is -0.001; it must be at least 0"):
        config("--learning_rate", "-1e-3")


def test_of_several_classes_the_first_that_has_every_named_field_is_made():
    def kind(*argv):
        return type(parse_args(argv, ModelArguments, (SFTConfig, GOLDConfig))[1])

    assert kind() is kind("--learning_rate", "1", "--use_liger_kernel") is SFTConfig
    assert kind("--lmbda", "1") is kind("--max_new_tokens", "5") is GOLDConfig
    with pytest.raises(FlagError, match="there is no flag --lmbd; the nearest is --lmbda"):
        kind("--lmbd", "1")


def test_flags_of_pytorch_are_accepted_and_each_is_answered_once():
    *_, notices = gold(
        "--use_vllm", "--deepspeed", "ds.json", "--fsdp", "full_shard", "auto_wrap", "--tf32", "true", "--tf32=true"
    )
    assert [notice.split(":")[0] for notice in notices] == ["--deepspeed", "--fsdp", "--tf32", "--use_vllm"]
    assert "built-in sampler" in notices[-1]


@pytest.mark.parametrize("name", ("eager", "sdpa", "flash_attention_2", "paged|sdpa", "kernels-community/flash-attn"))
def test_pytorch_s_attention_is_accepted_and_answered(name):
    model, *_, notices = gold("--attn_implementation", name)
    assert model.attn_implementation == "auto"
    assert len(notices) == 1 and all(word in notices[0] for word in (name, "auto", "blockwise", "cudnn", "splash"))
    args = GOLDConfig(model_init_kwargs={"attn_implementation": name})
    assert args.model_init_kwargs == {"attn_implementation": "auto"} and len(args.notices) == 1


def test_attention_of_this_project_is_taken_without_a_word():
    for name in ("auto", "plain", "blockwise", "cudnn", "splash"):
        model, *_, notices = gold("--attn_implementation", name)
        assert model.attn_implementation == name and not notices
    assert (
        ModelArguments().attn_implementation is ModelArguments(attn_implementation="none").attn_implementation is None
    )


def test_what_is_switched_off_or_happens_anyway_is_not_mentioned():
    *_, notices = gold(
        *("--use_liger_kernel", "false", "--no_packing", "--fp16", "false", "--optim", "adamw_torch"),
        *("--label_smoothing_factor", "0", "--remove_unused_columns", "true"),
    )
    assert notices == []


def test_packing_is_what_happens_anyway_and_what_a_batch_counts_is_said():
    *_, notices = gold("--packing", "--packing_strategy", "bfd")
    (line,) = notices
    assert line.startswith("--packing: Rows of a micro-batch always lie end to end") and "counts rows" in line


def test_a_yaml_file_gives_the_same_fields_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: S\nlearning_rate: 1e-5\nmax_new_tokens: 7\neval_strategy: no\nbf16: true\nreport_to: [wandb]\n"
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}\nuse-liger-kernel: true\nseed: 1\ntorch_compile: true\n"
    )
    model, _, settings, notices = gold(
        "--seed", "2", "--config", str(path), "--max_completion_length", "9", "--no_torch_compile"
    )
    assert model.model_name_or_path == "S"
    assert_fields(
        settings,
        dict(learning_rate=1e-5, max_completion_length=9, eval_strategy="no", bf16=True, report_to=["wandb"], seed=2)
        | dict(lr_scheduler_kwargs={"num_cycles": 2}),
    )
    assert "--use_liger_kernel" in [notice.split(":")[0] for notice in notices]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("learnin_rate: 1", ["'learnin_rate'", "nearest is learning_rate"]),
        ("seed: [1]", ["--seed", "whole number"]),
        ("seed: 'x", ["not YAML"]),
        ("- seed", ["list", "learning_rate: 1e-7"]),
        ("lmbda: 2", ["--lmbda is 2", "between 0 and 1"]),
        ("packing_strategy: bfd_split", ["--packing_strategy"]),
    ],
)
def test_a_wrong_yaml_file_is_an_error_that_names_the_file(tmp_path, text, parts):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(FlagError) as error:
        gold("--config", str(path))
    assert all(part in str(error.value) for part in [*parts, str(path)]), str(error.value)


def test_a_yaml_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FlagError, match="not a file"):
        gold("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(FlagError, match="path of one YAML file"):
        gold("--config")


def test_python_gets_the_same_checks_and_answers_as_the_command_line():
    with pytest.raises(ValueError, match="--lmbda is 2.0; it must be between 0 and 1"):
        GOLDConfig(lmbda=2)
    with pytest.raises(ValueError, match="--fp16 is not supported here"):
        SFTConfig(fp16=True)
    with pytest.raises(TypeError, match="'lamda'; the nearest is lmbda"):
        GOLDConfig(lamda=0.5)
    with pytest.raises(TypeError, match="twice"):
        GOLDConfig(max_new_tokens=1, max_completion_length=2)
    settings = GOLDConfig(
        output_dir="gold-model", use_uld_loss=True, use_liger_kernel=True, max_new_tokens=5, report_to="wandb"
    )
    assert settings.max_completion_length == 5 and settings.report_to == ["wandb"]
    assert [notice.split(":")[0] for notice in settings.notices] == ["--use_liger_kernel"]
    assert dataclasses.replace(settings, seed=3).seed == 3


def test_room_for_prompt_and_completion_follows_from_the_two_lengths():
    assert GOLDConfig().max_length == 1024
    assert GOLDConfig(max_completion_length=1000).max_length == 1512
    assert GOLDConfig(max_completion_length=1000, max_prompt_length=600).max_length == 1600
    assert GOLDConfig(max_length=300).prompt_budget == 172
    assert GOLDConfig(max_length=300, max_prompt_length=100).prompt_budget == 100
    assert SFTConfig(max_length=None).max_length is None


def test_intervals_below_one_are_shares_of_the_run():
    settings = SFTConfig(logging_steps=0.1, save_steps=7)
    assert settings.interval("logging_steps", 95) == 10
    assert settings.interval("save_steps", 95) == 7
    assert settings.eval_steps == 0.1
    assert (SFTConfig(warmup_ratio=0.07).warmup(100), SFTConfig(warmup_ratio=0.5, warmup_steps=3).warmup(100)) == (8, 3)
    assert SFTConfig(warmup_steps=0.25).warmup(10) == 3


def test_the_hub_token_is_neither_shown_nor_recorded():
    settings = SFTConfig(hub_token="hf_secret")
    assert "hf_secret" not in repr(settings)
    assert "hf_secret" not in json.dumps(settings.to_dict())


@pytest.mark.parametrize(
    "given, same_tokenizer, point",
    [
        (dict(), False, ("gold", "chain", "all", "hybrid")),
        (dict(), True, ("gkd", "chain", "all", "shared")),
        (dict(use_uld_loss=True), False, ("uld_extended", "chain", "all", "sorted")),
        (dict(use_uld_loss=True, use_extended_uld=False), False, ("uld", "chain", "positional", "sorted")),
        (dict(use_uld_loss=True, uld_use_hybrid_loss=True), True, ("gold", "chain", "all", "hybrid")),
        (
            dict(use_uld_loss=True, uld_use_hybrid_loss=True, use_extended_uld=False),
            False,
            ("gold", "chain", "positional", "hybrid"),
        ),
        (dict(loss="events"), True, ("events", "boundary", "all", "events")),
        (dict(loss="projected", groups="one_to_one"), False, ("projected", "boundary", "one_to_one", "projected")),
        (dict(loss="alm"), False, ("alm", "boundary", "all", "alm")),
        (dict(loss="reverse_kl", lmbda=1), False, ("reverse_kl", "boundary", "all", "reverse_kl")),
        (dict(loss="strict", compare="shared_rest"), False, ("strict", "boundary", "one_to_one", "shared_rest")),
        (
            dict(use_uld_loss=True, uld_token_merge_strategy="bayesian"),
            False,
            ("uld_extended", "chain", "all", "sorted"),
        ),
        (
            dict(use_uld_loss=True, uld_token_merge_strategy="observed"),
            False,
            ("uld_extended", "observed", "all", "sorted"),
        ),
        (dict(loss="gold"), True, ("gold", "chain", "all", "hybrid")),
        (dict(loss="gold", use_uld_loss=True, use_extended_uld=False), False, ("gold", "chain", "all", "hybrid")),
        (dict(loss="uld_extended"), False, ("uld_extended", "chain", "all", "sorted")),
        (dict(loss="uld"), False, ("uld", "chain", "positional", "sorted")),
        (dict(loss="gkd"), True, ("gkd", "chain", "all", "shared")),
        (dict(loss="strict"), False, ("strict", "boundary", "one_to_one", "shared")),
        (
            dict(loss="strict", uld_token_merge_strategy="observed"),
            False,
            ("strict", "boundary", "one_to_one", "shared"),
        ),
        (
            dict(loss="gold", merge="boundary", groups="one_to_one", compare="shared"),
            False,
            ("gold", "boundary", "one_to_one", "shared"),
        ),
    ],
)
def test_presets_and_trl_s_flags_choose_their_point_of_the_grid(given, same_tokenizer, point):
    spec = GOLDConfig(**given).loss_spec(same_tokenizer)
    assert (spec.name, spec.merge, spec.groups, spec.compare) == point


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(loss="events", merge="observed"), "--merge is 'observed'.*boundary or chain"),
        (dict(loss="uld", compare="alm"), "--groups is 'positional'.*all or one_to_one"),
        (dict(loss="gold", projection_mask=["numerals"]), "--projection_mask is numerals.*projected or events"),
        (dict(loss="reverse_kl", lmbda=0.5), "--lmbda is 0.5.*use --lmbda 1"),
    ],
)
def test_points_of_the_grid_that_mean_nothing_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        GOLDConfig(**given).loss_spec(same_tokenizer=False)


def test_a_loss_says_what_it_is():
    spec = GOLDConfig(loss="events", projection_mask="whitespace,numerals", beta=0.25).loss_spec(False)
    assert spec.mask == ("whitespace", "numerals") and spec.of_text
    assert spec.describe() == "events: boundary/all/events, beta 0.25, whitespace and numerals masked"
    assert "to the power 1/20" in GOLDConfig(loss="alm", alm_temperature=20).loss_spec(False).describe()


def test_gkd_with_two_tokenizers_is_an_error():
    with pytest.raises(ValueError, match="different tokenizers; use another --loss"):
        GOLDConfig(loss="gkd").loss_spec(same_tokenizer=False)


def test_the_loss_takes_its_numbers_from_the_flags():
    settings = GOLDConfig(
        **dict(beta=0.3, uld_hybrid_matched_weight=0.7, uld_hybrid_unmatched_weight=0.2, uld_crossentropy_weight=0.1),
        **dict(uld_distillation_weight=0.9, uld_student_temperature=2, uld_teacher_temperature=3, temperature=0.6),
        **dict(uld_skip_student_eos=True, uld_skip_teacher_eos=True, uld_top_k=50, normalization="row_mean"),
        uld_sort="xla",
    )
    expected = LossSpec(
        options=dict(beta=0.3, matched_weight=0.7, unmatched_weight=0.2, top_k=50, sort="xla"),
        **dict(crossentropy_weight=0.1, distillation_weight=0.9),
        **dict(student_temperature=2.0, teacher_temperature=3.0, skip_student_stop=True, skip_teacher_stop=True),
        normalization="row_mean",
    )
    assert settings.loss_spec(same_tokenizer=False) == expected
    gkd = settings.loss_spec(same_tokenizer=True)
    assert (gkd.student_temperature, gkd.teacher_temperature) == (0.6, 0.6)


def test_a_loss_is_told_in_one_line():
    assert LossSpec().describe() == "gold: chain/all/hybrid, beta 0.5, weights by overlap"
    spec = LossSpec(
        compare="sorted", name="uld_extended", options={"top_k": 9}, crossentropy_weight=0.5, student_temperature=2.0
    )
    assert spec.describe() == (
        "uld_extended: chain/all/sorted, sorted top 9, temperatures 2 student, 1 teacher, cross-entropy x 0.5"
    )


def unanswered(flags):
    known = {name for cls in (ModelArguments, DataArguments, GOLDConfig) for name in field_names(cls)} | set(ANSWERS)
    return sorted({name for names in flags.values() for name in names} - known)


def test_every_flag_of_trl_is_implemented_or_answered():
    assert unanswered(json.loads((GOLDEN / "trl_flags.json").read_text())) == []


def test_no_answer_is_given_for_a_flag_that_is_implemented():
    assert not {name for cls in (ModelArguments, DataArguments, GOLDConfig) for name in field_names(cls)} & set(ANSWERS)


def test_no_default_of_trl_is_refused():
    for flags in json.loads((GOLDEN / "trl_flags.json").read_text()).values():
        for name, default in flags.items():
            if name in ANSWERS:
                answer(name, default)


@pytest.mark.live
def test_every_flag_of_the_installed_trl_is_implemented_or_answered():
    python = os.environ.get("GOLD_JAX_TRL_PYTHON", sys.executable if importlib.util.find_spec("trl") else None)
    if not python:
        pytest.skip("TRL is not installed and GOLD_JAX_TRL_PYTHON does not name a Python that has it")
    command = [python, str(GOLDEN / "make_trl_flags.py"), "--print"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert unanswered(json.loads(output.strip().splitlines()[-1])) == []


# Settings after they were made


@pytest.mark.parametrize("cls", [GOLDConfig, SFTConfig, ModelArguments, DataArguments])
def test_an_attribute_that_is_no_setting_is_refused_and_the_nearest_named(cls):
    name = {GOLDConfig: "lmbda", SFTConfig: "seed"}.get(cls, dataclasses.fields(cls)[0].name)
    wrong = name[:-2] + name[-1]
    with pytest.raises(AttributeError, match=f"{cls.__name__} has no field '{wrong}'; the nearest is {name}"):
        setattr(cls(), wrong, 1)


def test_a_setting_that_is_set_later_is_read_and_held_to_its_range():
    settings = GOLDConfig()
    settings.lmbda, settings.max_new_tokens, settings.report_to = "0.25", 64, "wandb"
    assert (settings.lmbda, settings.max_completion_length, settings.report_to) == (0.25, 64, ["wandb"])
    with pytest.raises(ValueError, match="--lmbda is 2.0; it must be between 0 and 1"):
        settings.lmbda = 2
    with pytest.raises(ValueError, match="--compare is 'all'; it must be one of sorted"):
        settings.compare = "all"
    assert settings.lmbda == 0.25
    with pytest.raises(ValueError, match="use --bf16"):
        settings.fp16 = True  # TRL's, refused as it is in the constructor
    settings.dataloader_num_workers = 4
    assert any("worker processes" in notice for notice in settings.notices)


def test_a_changed_copy_leaves_the_settings_and_is_checked_as_a_whole():
    settings = GOLDConfig(max_length=200, template_kwargs={"a": [1]}, dataloader_num_workers=4)
    other = settings.replace(max_new_tokens=64, seed=3)
    assert (other.max_completion_length, other.seed, settings.max_completion_length, settings.seed) == (64, 3, 128, 42)
    assert other.notices == settings.notices and other.notices is not settings.notices
    other.template_kwargs["a"].append(2)
    assert settings.template_kwargs == {"a": [1]}
    with pytest.raises(ValueError, match="--max_completion_length is 300"):
        settings.replace(max_completion_length=300)
    with pytest.raises(TypeError, match="no field 'sede'; the nearest is seed"):
        settings.replace(sede=1)


def test_a_frozen_copy_takes_no_change_and_says_what_to_do():
    settings = GOLDConfig(lmbda=0.25)
    frozen = settings.frozen_copy()
    assert frozen == settings
    with pytest.raises(AttributeError, match=r"args.replace\(lmbda=...\), and make another trainer"):
        frozen.lmbda = 1
    settings.lmbda = 1
    assert frozen.lmbda == 0.25 and frozen.replace(lmbda=0.5).lmbda == 0.5


def test_what_was_set_after_the_constructor_is_checked_with_the_rest_when_a_copy_is_taken():
    settings = GOLDConfig(max_length=100, max_completion_length=50)
    settings.max_completion_length = 100
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        settings.frozen_copy()


def test_settings_know_which_of_them_were_named():
    assert GOLDConfig(lmbda=0.5, max_new_tokens=128).given == {"lmbda", "max_completion_length"}
    assert dataclasses.replace(GOLDConfig(seed=3)).given == {"seed"}  # though it names every field
    assert config("--lmbda", "0.5", "--no_bf16").given == {"lmbda", "bf16"}
    settings = GOLDConfig()
    settings.beta = 0.5
    assert settings.given == {"beta"}


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (dict(shuffle_dataset=True), "--shuffle_dataset: rows always come in a new random order"),
        (
            dict(pad_to_multiple_of=8),
            "--pad_to_multiple_of: lengths are padded to buckets; --length_buckets says how many",
        ),
        (dict(vllm_mode="colocate"), "--vllm_mode: no effect without --use_vllm"),
        (dict(vllm_mode="server"), "--vllm_mode: no effect without --use_vllm"),
        (dict(completion_only_loss=True), "--completion_only_loss: no effect in distillation"),
        (dict(top_p=0.9, top_k=3, lmbda=0), "--top_p, --top_k: no effect with --lmbda 0 and without --seq_kd"),
        (dict(temperature=0.9, lmbda=0), "--temperature: no effect with --lmbda 0"),
        (dict(lmbda=1, seq_kd=True), "--seq_kd: no effect with --lmbda 1"),
        (dict(lmbda=0, seq_kd=True, rollout_quantization="int8"), "--rollout_quantization: no effect where"),
        (dict(uld_use_hybrid_loss=True), "--uld_use_hybrid_loss: no effect without --use_uld_loss"),
        (dict(loss="uld", beta=0.5), "--beta: no effect with loss uld (chain/positional/sorted)"),
        (
            dict(loss="events", uld_top_k=5),
            "--uld_top_k: no effect with loss events (boundary/all/events)",
        ),
        (dict(loss="gold", alm_temperature=7.0), "--alm_temperature: no effect with loss gold (chain/all/hybrid)"),
        (
            dict(loss="strict", uld_token_merge_strategy="observed"),
            "--uld_token_merge_strategy: no effect with loss strict",
        ),
        (dict(eval_steps=3), "--eval_steps: no effect without --eval_strategy steps"),
        (dict(save_strategy="epoch", save_steps=3), "--save_steps: no effect without --save_strategy steps"),
        (dict(max_steps=3, num_train_epochs=1), "--num_train_epochs: no effect with --max_steps"),
        (dict(vllm_server_port=9), "--vllm_server_port: no effect without --use_vllm --vllm_mode server"),
        (
            dict(uld_distillation_weight=0, beta=0.1, loss="gold"),
            "--loss, --beta: no effect with --uld_distillation_weight 0",
        ),
        (dict(predict_with_generate=True), "--predict_with_generate: no effect without rows to evaluate on"),
        (
            dict(lr_scheduler_type="constant", warmup_steps=3),
            "--warmup_steps: no effect with --lr_scheduler_type constant",
        ),
        (dict(log_completions_steps=5), "--log_completions_steps: no effect without --log_completions"),
    ],
)
def test_a_named_setting_that_changes_nothing_is_told(named, says):
    settings = GOLDConfig(**named)
    (line,) = unused(settings)
    assert line.startswith(says)


def test_settings_that_nobody_named_are_not_told():
    for settings in (GOLDConfig(), GOLDConfig(loss="events", lmbda=0), dataclasses.replace(GOLDConfig(lmbda=0))):
        told = unused(settings)
        assert told == []
    assert unused(SFTConfig(), evaluates=True) == []
    off = GOLDConfig(run_name=None, assistant_only_loss=False, uld_top_k=0, loss="events", seq_kd=False, lmbda=1)
    assert unused(off, evaluates=True) == []
    quick = config("--config", "embedded:quickstart")
    assert unused(quick, evaluates=True) == []


def test_one_setting_under_two_names_is_an_error_on_the_command_line_and_in_a_file(tmp_path):
    with pytest.raises(FlagError, match="--max_completion_length and --max_new_tokens are one setting"):
        gold("--max_new_tokens", "5", "--max_completion_length", "7")
    assert config("--max_new_tokens", "5", "--max_new_tokens", "7").max_completion_length == 7
    for argv in (
        ["--no_seq_kd", "--seq_kd"],
        ["--seq_kd", "--no_seq_kd"],
        ["--activation_checkpointing", "--no_gradient_checkpointing"],
    ):
        with pytest.raises(FlagError, match="are one setting; give it once"):
            gold(*argv)
    file = tmp_path / "both.yaml"
    file.write_text("max_new_tokens: 5\nmax_completion_length: 7\n")
    with pytest.raises(FlagError, match="'max_completion_length' sets max_completion_length, which is there already"):
        gold("--config", str(file))
    file.write_text("beta: 0.5\nseed: 1\nbeta: 0.0\n")
    with pytest.raises(FlagError, match="is not YAML: the key 'beta' is there twice"):
        gold("--config", str(file))


def test_what_follows_from_a_changed_setting_is_what_a_new_one_has():
    settings = GOLDConfig(logging_steps=5, eval_strategy="steps")
    assert settings.replace(logging_steps=50).eval_steps == 50
    settings.logging_steps, settings.max_completion_length = 2, 800
    made = GOLDConfig(logging_steps=2, eval_strategy="steps", max_completion_length=800)
    assert settings.frozen_copy() == settings.replace() == made
    assert GOLDConfig().replace(max_completion_length=2000).max_length == 2512


def test_a_copy_of_a_subclass_is_of_the_subclass():
    class Own(GOLDConfig):
        """Settings of somebody's own."""

    assert type(Own(seed=1).replace(seed=2)) is type(Own().frozen_copy()) is Own


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_settings_are_copied_and_pickled_with_what_was_named(twin):
    settings = GOLDConfig(lmbda=0.25, hub_token="secret").frozen_copy()
    other = twin(settings)
    assert other == settings and other.given == {"lmbda", "hub_token"} and "secret" not in repr(other)
    with pytest.raises(AttributeError, match="make another trainer"):
        other.lmbda = 1


@pytest.mark.parametrize("wrong", [{"output_dir": ""}, {"checkpoint_dir": " "}, {"resume_from_checkpoint": ""}])
def test_an_empty_text_names_no_folder(wrong):
    with pytest.raises(ValueError, match="it must name a folder"):
        GOLDConfig(**wrong)


def test_a_seed_fits_into_64_bits():
    with pytest.raises(ValueError, match="--seed is .* smaller than 2"):
        GOLDConfig(seed=2**63)


@pytest.mark.parametrize("name", ["seed", "max_steps", "per_device_train_batch_size", "max_length", "save_total_limit"])
@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 2**63, "1" + "0" * 5000, "1e30", "nan", "inf", 1e300, "1.5", [1]]
)
def test_what_is_no_whole_number_of_64_bits_is_one_short_sentence(name, value):
    with pytest.raises(ValueError, match=f"--{name} is .*; it must be") as error:
        GOLDConfig(**{name: value})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("value", [10**400, "1e400", "nan", "-inf", float("inf"), "x", [1]])
def test_what_is_no_finite_number_is_one_short_sentence(value):
    with pytest.raises(ValueError, match="--learning_rate is .*; it must be") as error:
        GOLDConfig(learning_rate=value)
    assert len(str(error.value)) < 400


def test_whole_numbers_are_read_to_the_last_digit():
    assert GOLDConfig(seed="9007199254740993").seed == 9007199254740993
    assert GOLDConfig(seed=str(2**63 - 1)).seed == 2**63 - 1
    assert GOLDConfig(seed="1e3").seed == 1000 and GOLDConfig(seed=7.0).seed == 7


def test_options_nested_without_end_are_refused():
    with pytest.raises(ValueError, match="--loss_kwargs is .*; it must be a JSON object"):
        GOLDConfig(loss_kwargs='{"a": ' * 100_000)


# Messages


def refusal(*argv, settings=GOLDConfig):
    with pytest.raises(FlagError) as error:
        parse_args(list(argv), settings)
    return str(error.value)


@pytest.mark.parametrize(
    "argv",
    ["--push_to_hub_token SECRET", "--hub_token SECRET SECRET2", "--hub_token SECRET --hub_token=SECRET SECRET2"],
)
def test_secrets_are_never_printed(argv):
    assert "SECRET" not in refusal(*argv.split())


def test_messages_quote_little_of_what_is_given(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for k in range(1, 7):
        bomb += f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n"
    for name, text in (
        ("bomb", "max_steps: *a6\n"),
        ("deep", f"max_steps: {'[' * 3000}{']' * 3000}\n"),
        ("long", f"max_steps: {'x' * 10**6}\n"),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text((bomb if name == "bomb" else "") + text)
        assert len(refusal("--config", str(path))) < 700, name
    assert len(refusal("--max_steps", "x" * 10**6)) < 400
    assert len(refusal("--" + "x" * 10**5, "1")) < 700


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        (
            "x" * 10**5,
            "report_to profile_steps mesh attn_implementation lr_scheduler_kwargs seed bf16 loss packing_strategy",
        ),
        ('{"' + "x" * 10**5 + '": 1}', "lr_scheduler_kwargs loss_kwargs model_init_kwargs"),
        ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", "lr_scheduler_kwargs template_kwargs loss_kwargs"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "template_kwargs loss_kwargs model_init_kwargs"),
        ("9" * 5000, "seed profile_steps mesh"),
        ("1-999999999999", "profile_steps"),
    ],
)
def test_errors_of_flags_quote_little(value, flags):
    for name in flags.split():
        assert len(refusal("--" + name, value)) < 700, name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [{f'*a{k - 1}, ' * 10}]}}\n" for k in range(1, 8)),
            "20 aliases",
        ),
        ("report_to: &a [*a]\n", "contains itself"),
        ("template_kwargs: &a {b: {c: *a}}\n", "contains itself"),
        ("seed: 1" + "0" * 400, "--seed is 1000"),
        ("seed: " + "9" * 5000, "limit .4300 digits"),
        ("seed: 2020-13-45", "month must be in"),
        ("report_to: [" + "x" * 10**5 + "]", "--report_to is"),
        ("report_to: " + "{a: " * 200 + "}" * 200, "--report_to is"),
        ("x" * 10**5 + ":\n- 1", "is not YAML"),
    ],
)
def test_errors_of_files_quote_little(tmp_path, text, says):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    said = refusal("--config", str(path))
    assert len(said) < 700 and re.search(says, said), said


def test_aliases_of_a_file_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: &n 3\nmax_steps: *n\n")
    *_, settings, _ = gold("--config", str(path))
    assert settings.seed == settings.max_steps == 3
