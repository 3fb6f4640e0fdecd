"""Whole runs of the four commands and the two trainers on tiny models: what goes in, what comes out."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import types

import datasets
import jax
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from run_files import completions, metrics

from gold_jax import GOLDConfig, GOLDTrainer, SFTConfig, SFTTrainer, cli, evaluate, generate, load_model, sft, train
from gold_jax.loading import load_model_and_tokenizer
from gold_jax.models.hf_checkpoint import save_model
from gold_jax.training import checkpointing
from gold_jax.training.loop import Loop
from gold_jax.training.step import Step

MAINS = {"train": train.main, "sft": sft.main, "evaluate": evaluate.main, "generate": generate.main}
SMALL = {"max_steps": 1, "max_completion_length": 8, "per_device_train_batch_size": 2, "save_strategy": "no"}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes everything and remembers it."""
    said = []

    class HfApi:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            said.append(("create", repo_id))
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path, repo_id, **options):
            said.append(("upload", repo_id, sorted(os.listdir(folder_path))))
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    return said


@pytest.fixture
def trackio(monkeypatch):
    """A Trackio that remembers what it is told."""
    said = types.SimpleNamespace(options=None, lines=[], finished=0)

    def init(**options):
        said.options = options
        log = lambda values, step: said.lines.append((step, values))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: setattr(said, "finished", said.finished + 1))

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    return said


def call(name: str, line: str, **flags):
    """Runs a command as the shell would; flags with a value of True stand alone."""
    argv = shlex.split(line)
    for flag, value in flags.items():
        argv += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    cli.run(f"gold_jax.{name}", MAINS[name], argv)


def distil(world, output, line: str = "", **flags):
    """One small distillation from the teacher."""
    paths = {
        "model_name_or_path": world / "student",
        "teacher_model_name_or_path": world / "teacher",
        "dataset_name": world / "data",
        "output_dir": output,
    }
    call("train", line, **(paths | SMALL | flags))


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.slow
def test_the_long_train_command(world, tmp_path, hub, trackio, capsys):
    out = tmp_path / "out"
    call(
        "train",
        f"--model_name_or_path {world}/student --teacher_model_name_or_path {world}/teacher --dataset_name {world}/data "
        "--dataset_train_split train --dtype auto --attn_implementation kernels-community/flash-attn --bf16 "
        "--learning_rate 1e-7 --gradient_checkpointing --per_device_train_batch_size 1 --gradient_accumulation_steps 64 "
        "--num_train_epochs 1 --eval_strategy steps --eval_steps 100 --temperature 1.0 --top_p 0.95 --top_k 0 "
        "--max_new_tokens 8 --max_prompt_length 48 --lmbda 0.25 --beta 0.0 --use_uld_loss --use_extended_uld "
        "--uld_use_hybrid_loss --uld_crossentropy_weight 0.0 --uld_distillation_weight 1.0 --uld_student_temperature 1.0 "
        "--uld_teacher_temperature 1.0 --uld_hybrid_unmatched_weight 1.0 --uld_hybrid_matched_weight 1.0 "
        f"--logging_steps 1 --push_to_hub --hub_model_id U/M --report_to trackio --trackio_project P --seed 42 "
        f"--warmup_ratio 0.05 --lr_scheduler_type cosine_with_min_lr --max_steps 2 --output_dir {out}",
    )
    found = metrics(out)
    assert [row["step"] for row in found] == [1, 2, 2]
    assert all(np.isfinite(row["loss"]) for row in found[:2]) and np.isfinite(found[2]["eval_bits_per_byte"])
    assert load_model_and_tokenizer(out, dtype="float32").model.config.layers == 2
    card = (out / "README.md").read_text()
    assert "on-policy distillation" in card and "--uld_use_hybrid_loss" in card and "eval_loss" in card
    assert hub[0] == ("create", "U/M") and hub[-1][:2] == ("upload", "U/M")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub[-1][2])
    assert trackio.options["project"] == "P" and trackio.finished == 1 and len(trackio.lines) == 3
    wanted = {
        "bf16": True, "learning_rate": 1e-7, "gradient_checkpointing": True, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 64, "num_train_epochs": 1.0, "eval_strategy": "steps", "eval_steps": 100,
        "temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_completion_length": 8, "max_prompt_length": 48,
        "lmbda": 0.25, "beta": 0.0, "use_uld_loss": True, "use_extended_uld": True, "uld_use_hybrid_loss": True,
        "uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0, "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0, "uld_hybrid_unmatched_weight": 1.0, "uld_hybrid_matched_weight": 1.0,
        "logging_steps": 1, "push_to_hub": True, "hub_model_id": "U/M", "report_to": ["trackio"], "project": "P",
        "seed": 42, "warmup_ratio": 0.05, "lr_scheduler_type": "cosine_with_min_lr", "max_steps": 2,
    }  # fmt: skip
    assert {name: trackio.options["config"][name] for name in wanted} == wanted
    shown = capsys.readouterr().out
    assert "note: --attn_implementation" in shown and "bfloat16 compute" in shown and "https://hub/U/M" in shown
    assert "gold: chain/all/hybrid, beta 0, weights 1 matched, 1 unmatched" in shown


@pytest.mark.slow
def test_the_long_sft_command(world, tmp_path, hub, trackio, capsys):
    out = tmp_path / "out"
    call(
        "sft",
        f"--model_name_or_path {world}/student --dtype auto --attn_implementation kernels-community/flash-attn "
        f"--dataset_name {world}/data --dataset_config C --bf16 --gradient_checkpointing --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 32 --learning_rate 1e-5 --num_train_epochs 1 --max_length 16384 --logging_steps 1 "
        f"--report_to trackio --trackio_project P --output_dir {out} --push_to_hub --hub_model_id U/M --seed 42 "
        "--warmup_ratio 0.05 --lr_scheduler_type cosine_with_min_lr --use_liger_kernel --max_steps 2",
    )
    assert [row["step"] for row in metrics(out)] == [1, 2]
    assert load_model_and_tokenizer(out, dtype="float32").model.config.layers == 2
    assert "supervised fine-tuning" in (out / "README.md").read_text()
    assert [entry[:2] for entry in hub] == [("create", "U/M"), ("create", "U/M"), ("upload", "U/M")]
    assert trackio.options["config"]["max_length"] == 16384 and trackio.options["config"]["warmup_ratio"] == 0.05
    assert "note: --use_liger_kernel" in capsys.readouterr().out


def test_the_snippet_with_a_dataset_and_with_a_list(world, tmp_path):
    rows = [tiny.conversation(*row) for row in tiny.ROWS[:4]]
    logs = []
    for name, data in {"dataset": datasets.Dataset.from_list(rows), "list": rows}.items():
        trainer = GOLDTrainer(
            model=str(world / "student"),
            teacher_model=str(world / "teacher"),
            args=GOLDConfig(
                output_dir=str(tmp_path / name),
                use_uld_loss=True,
                teacher_tokenizer_name_or_path=str(world / "teacher"),
                **SMALL,
            ),
            train_dataset=data,
        )
        assert not [name for name in trainer.train().metrics if name.startswith("eval_")]
        logs.append([{k: v for k, v in row.items() if k not in tiny.TIMED} for row in trainer.log_history])
    assert logs[0] == logs[1]


def test_models_in_memory_stay_whole(world, tmp_path):
    student, teacher = load_model(world / "student"), load_model(world / "teacher")
    before = jax.tree.map(np.asarray, (nnx.state(student), nnx.state(teacher)))
    results = []
    for number, (one, other) in enumerate([(student, teacher), (nnx.split(student), nnx.split(teacher))]):
        trainer = GOLDTrainer(
            one,
            other,
            GOLDConfig(output_dir=str(tmp_path / str(number)), learning_rate=1e-2, lmbda=0, **SMALL),
            str(world / "data"),
            processing_class=tiny.student_tokenizer(),
            teacher_processing_class=tiny.teacher_tokenizer(),
        )
        trainer.train()
        results.append(jax.tree.map(np.asarray, nnx.state(trainer.model)))
        # The parameters that were given are neither changed nor consumed.
        assert same((nnx.state(student), nnx.state(teacher)), before)
    assert same(*results) and not same(results[0], before[0])
    save_model(student, tmp_path / "again")
    assert student(np.ones((1, 4), np.int32), np.ones((1, 4), bool)).shape == (1, 4, 32)


def direct_bits_per_byte(folder: pathlib.Path, rows) -> float:
    """The definition, row by row and token by token."""
    model, tokenizer = load_model(folder), tiny.student_tokenizer()
    bits = 0.0
    for question, answer in rows:
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt, said = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
        ids = np.array([prompt + said])
        logits = np.asarray(model.logits(model(ids, np.ones(ids.shape, bool))), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        bits -= sum(logp[at - 1, ids[0, at]] for at in range(len(prompt), len(ids[0]))) / np.log(2)
    return bits / sum(len(answer.encode()) for _, answer in rows)


def test_evaluate_prints_bits_per_byte_as_text_and_as_json(world, capsys):
    line = f"--model_name_or_path {world}/student --dataset_name {world}/data"
    call("evaluate", line, json=True, batch_size=3, teacher_context="unread")
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4 and found["rows_cut"] == 0
    assert found["bytes"] == sum(len(answer.encode()) for _, answer in tiny.ROWS[:4])
    assert found["bits_per_byte"] == pytest.approx(direct_bits_per_byte(world / "student", tiny.ROWS[:4]), rel=1e-5)
    line = f"--model_name_or_path {world}/student --dataset_name {world}/data --dataset_split test --max_samples 1"
    call("evaluate", line, predict_with_generate=True, max_new_tokens=8)
    shown = capsys.readouterr().out
    assert "on 1 row of" in shown and "bits per byte" in shown and "exact match     0.0%" in shown


def test_generate_prints_completions_as_text_and_as_json(world, capsys):
    model = f"--model_name_or_path {world}/student --max_new_tokens 8"
    call("generate", f"{model} --prompt 'Hello, world' 'Go on' --json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Prompts keep their blanks and commas.
    assert [row["prompt"][0]["content"] for row in found] == ["Hello, world", "Go on"]
    assert all(0 < row["tokens"] <= 8 for row in found)
    call("generate", f"{model} --prompt 'Hello, world' --prompt='Go on'")
    shown = capsys.readouterr().out
    assert "── Hello, world" in shown and "── Go on" in shown and found[0]["completion"] in shown
    call("generate", f"{model} --raw --prompt 'def there' --dataset_name {world}/data --max_samples 1 --json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0]["prompt"] == "def there" and found[1]["prompt"][0]["content"] == tiny.ROWS[0][0]


FORMS = {
    "messages": [tiny.conversation(*row) for row in tiny.ROWS[:2]],
    "text": [{"text": answer} for _, answer in tiny.ROWS[:2]],
    "prompt and completion": [{"prompt": question, "completion": answer} for question, answer in tiny.ROWS[:2]],
    "prompt and completion of messages": [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
        for row in (tiny.conversation(*pair) for pair in tiny.ROWS[:2])
    ],
    "prompt": [{"prompt": [{"role": "user", "content": question}]} for question, _ in tiny.ROWS[:2]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_trains(form, world, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", FORMS[form])
    alone = form == "prompt"
    distil(world, tmp_path / "out", dataset_name=data, lmbda=int(alone))
    assert metrics(tmp_path / "out")[0]["loss"] > 0
    if not alone:
        call(
            "sft",
            f"--model_name_or_path {world}/student --dataset_name {data} --output_dir {tmp_path}/sft",
            max_steps=1,
        )
        assert metrics(tmp_path / "sft")[0]["loss"] > 0


def test_the_seed_decides_every_batch(world, tmp_path):
    def batches(seed):
        trainer = GOLDTrainer(
            str(world / "student"),
            str(world / "teacher"),
            GOLDConfig(
                output_dir=str(tmp_path / "out"),
                seed=seed,
                lmbda=0.5,
                gradient_accumulation_steps=4,
                per_device_train_batch_size=1,
                max_completion_length=8,
            ),
            str(world / "data"),
        )
        return [trainer.loop._build_batch(step) for step in range(3)]

    first, again, other = batches(1), batches(1), batches(2)
    on_policy = [batch.stats["on_policy"] for batch in first]
    assert any(0 < share < 1 for share in on_policy) and all(len(batch.batches) == 4 for batch in first)
    assert same([w.batches for w in first], [w.batches for w in again])
    assert [w.samples for w in first] == [w.samples for w in again]
    assert [w.samples for w in first] != [w.samples for w in other]


@pytest.mark.slow
def test_completions_evaluations_and_saves_on_the_way(world, tmp_path, capsys):
    out = tmp_path / "out"
    flags = {
        "max_steps": 4, "lmbda": 1, "gradient_accumulation_steps": 2, "num_generations": 2, "logging_steps": 1,
        "log_completions": True, "log_completions_steps": 2, "num_completions_to_print": 1,
        "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "predict_with_generate": True,
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    distil(world, out, **flags)
    found = metrics(out)
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4]
    measured = [row for row in found if "eval_bits_per_byte" in row]
    assert [row["step"] for row in measured] == [0, 2, 4]
    assert measured[0]["eval_bits_per_byte"] != measured[2]["eval_bits_per_byte"]
    written = completions(out)
    drawn, kept = ([row for row in written if ("eval_set" in row) == evaluated] for evaluated in (False, True))
    assert [row["step"] for row in drawn] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert [row["step"] for row in drawn if "groups" in row] == [1] * 4 + [3] * 4  # those that are shown
    assert len({row["prompt"] for row in kept}) * 3 == len(kept) and {row["step"] for row in kept} == {0, 2, 4}
    assert all("".join(text for text, *_ in row["groups"]) == row["completion"] for row in kept)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert load_model_and_tokenizer(out / "checkpoint-3", dtype="float32").model.config.layers == 2
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown and "exact match" in shown and "teacher" in shown
    assert "Completions at step 1" in shown and "Completions at step 3" in shown
    # A second run in the same folder begins its logs anew.
    distil(world, out, **(flags | {"max_steps": 1, "eval_strategy": "no", "eval_on_start": "false"}))
    assert [row["step"] for row in metrics(out)] == [1]
    assert {row["step"] for row in completions(out)} == {1}


def test_sft_counts_what_it_is_told_to(world, tmp_path):
    chat = tiny.conversation(*tiny.ROWS[0])["messages"] + tiny.conversation(*tiny.ROWS[1])["messages"]
    data = tiny.write_rows(tmp_path / "chat.jsonl", [{"messages": chat}] * 2)
    targets = {}
    for name, flags in {
        "completion": {},
        "assistant": {"assistant_only_loss": True},
        "all": {"completion_only_loss": "false"},
        "cut": {"assistant_only_loss": True, "max_length": 28},
    }.items():
        line = f"--model_name_or_path {world}/student --dataset_name {data} --output_dir {tmp_path / name}"
        call("sft", line, **({"max_steps": 1, "per_device_train_batch_size": 2} | flags))
        targets[name] = metrics(tmp_path / name)[0]["targets"] / 2
    size = [len(tiny.student_tokenizer().encode(answer, add_special_tokens=False)) + 1 for _, answer in tiny.ROWS[:2]]
    whole = len(tiny.student_tokenizer().apply_chat_template(chat)["input_ids"])
    assert targets == {"completion": size[1], "assistant": sum(size), "all": whole - 1, "cut": targets["cut"]}
    # A conversation whose last turn begins beyond the limit still teaches its first.
    assert 0 < targets["cut"] < sum(size)


@pytest.mark.parametrize(
    "line, says",
    [
        ("--loss gold", "gold: chain/all/hybrid"),
        ("--loss uld", "uld: chain/positional/sorted"),
        ("--loss uld_extended", "uld_extended: chain/all/sorted"),
        ("--loss strict --compare shared_rest", "strict: boundary/one_to_one/shared_rest"),
        ("--loss projected --projection_mask whitespace,numerals", "whitespace and numerals masked"),
        ("--loss events", "events: boundary/all/events"),
        ("--loss alm --beta 0", "alm: boundary/all/alm"),
        ("--use_uld_loss --uld_token_merge_strategy observed", "observed/all/sorted"),
        ("--loss gold --uld_crossentropy_weight 0.5 --uld_top_k 16 --normalization row_mean", "gold"),
    ],
)
def test_every_loss_trains(line, says, world, tmp_path, capsys):
    distil(world, tmp_path / "out", line, lmbda=0)
    assert says in capsys.readouterr().out
    row = metrics(tmp_path / "out")[0]
    assert row["loss"] > 0 and row["grad_norm"] > 0
    assert "by off-policy distillation" in (tmp_path / "out/README.md").read_text()


def test_reverse_kl_learns_from_what_the_student_draws(world, tmp_path, capsys):
    distil(world, tmp_path / "out", "--loss reverse_kl --temperature 1 --top_p 1", lmbda=1)
    assert "reverse_kl: boundary/all/reverse_kl" in capsys.readouterr().out
    assert metrics(tmp_path / "out")[0]["grad_norm"] > 0


def test_the_teacher_writes_the_completions_under_seq_kd(world, tmp_path, capsys):
    """From prompts alone, and the same text on both sides."""
    rows = [{"prompt": [{"role": "user", "content": question}]} for question, _ in tiny.ROWS[:2]]
    path = tiny.write_rows(tmp_path / "prompts.jsonl", rows)
    flags = dict(lmbda=0, seq_kd=True, dataset_name=path, uld_crossentropy_weight=1, uld_distillation_weight=0)
    distil(world, tmp_path / "out", **flags)
    shown = capsys.readouterr().out
    assert "0% by the student, 100% by the teacher" in shown
    assert metrics(tmp_path / "out")[0]["loss"] > 0


def test_the_teacher_alone_reads_its_context(world, tmp_path):
    rows = [tiny.conversation(*tiny.ROWS[0]) | {"teacher_context": "Think of dogs."}, tiny.conversation(*tiny.ROWS[1])]
    trainer = GOLDTrainer(
        str(world / "student"),
        str(world / "teacher"),
        GOLDConfig(
            output_dir=str(tmp_path / "out"), lmbda=0, per_device_train_batch_size=2, teacher_context="Be brief."
        ),
        rows,
    )
    builder = trainer.loop.run.batches
    examples = [trainer.train_examples[i] for i in range(2)]
    prompts = [builder.teacher.render(prompt) for prompt in builder._teacher_prompts(examples)]
    assert "Be brief.\n\nThink of dogs.\n\n" + tiny.ROWS[0][0] in prompts[0]
    assert "Be brief.\n\n" + tiny.ROWS[1][0] in prompts[1]
    (batch,) = builder.build(0, examples, trainer.loop.state.params).batches
    texts = [
        chat_tokenizer.tokenizer.decode(side.packed.tokens[0, side.packed.gather_index[0, 0][side.packed.mask[0, 0]]])
        for chat_tokenizer, side in ((builder.student, batch.student), (builder.teacher, batch.teacher))
    ]
    assert "brief" not in texts[0] and "brief" in texts[1]


def test_evaluate_measures_the_gaps_to_a_teacher(world, capsys):
    line = f"--model_name_or_path {world}/student --dataset_name {world}/data --max_new_tokens 24"
    call("evaluate", line, teacher_model_name_or_path=world / "teacher", json=True)
    shown = capsys.readouterr()
    assert "model: chat template of " in shown.err and "teacher: chat template of " in shown.err
    found = json.loads(shown.out)
    assert found["forward_gap"] == pytest.approx(found["student_on_teacher"] - found["teacher_on_teacher"])
    assert found["reverse_gap"] == pytest.approx(found["teacher_on_student"] - found["student_on_student"])
    assert 0 <= found["ended"] <= 1
    call("evaluate", line, teacher_model_name_or_path=world / "student")
    shown = capsys.readouterr().out
    assert "forward gap" in shown and "reverse gap" in shown


def test_one_tokenizer_for_both_is_gkd(world, tmp_path, capsys):
    distil(world, tmp_path / "out", teacher_model_name_or_path=world / "sibling", lmbda=0.5)
    shown = capsys.readouterr().out
    assert "one and the same" in shown and "gkd: chain/all/shared" in shown
    for who, folder in (("student", "student"), ("teacher", "sibling")):
        assert f"{who} reads: chat template of the tokenizer '{world / folder}', stops at " in shown
    assert re.search(r"updates: \d+ of \d+ rows each, learning rate \S+ \(\w+, \d+ warmup steps\)", shown)
    assert metrics(tmp_path / "out")[0]["loss"] > 0


def test_an_interrupted_run_saves_what_it_has_learned(world, tmp_path, monkeypatch, capsys):
    train_step, calls = Step.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_step(self, *arguments)

    monkeypatch.setattr(Step, "__call__", interrupted)
    with pytest.raises(SystemExit) as end:
        distil(world, tmp_path / "out", lmbda=0, max_steps=3, logging_steps=1)
    assert end.value.code == 130
    out, err = capsys.readouterr()
    assert "Interrupted after 1 update;" in out and "gold_jax.train: interrupted" not in err
    saved = load_model(tmp_path / "out" / "checkpoint-1")
    assert not same(nnx.state(saved), nnx.state(load_model(world / "student")))
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1]


def test_a_trained_student_is_saved_before_the_closing_evaluation_can_fail(world, tmp_path, monkeypatch):
    def failing(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "evaluate", failing)
    with pytest.raises(SystemExit):
        distil(world, tmp_path / "out", lmbda=0, eval_strategy="epoch")
    assert not same(nnx.state(load_model(tmp_path / "out")), nnx.state(load_model(world / "student")))


def test_ctrl_c_in_the_midst_of_an_update_waits_for_its_end(world, tmp_path, monkeypatch, capsys):
    train_step = Step.__call__

    def interrupted(self, *arguments):
        new = train_step(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)  # the old parameters are donated, the new ones not assigned yet
        return new

    monkeypatch.setattr(Step, "__call__", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            distil(world, tmp_path / "out", lmbda=0, max_steps=3)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == 130 and "Interrupted after 1 update;" in capsys.readouterr().out
    assert load_model(tmp_path / "out" / "checkpoint-1").config.layers == 2


def test_a_push_that_fails_is_told_with_another_exit_code(world, tmp_path, monkeypatch, capsys):
    class HfApi:
        def __init__(self, token=None):
            pass

        def create_repo(self, *_, **__):
            raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    with pytest.raises(SystemExit) as end:
        distil(world, tmp_path / "out", push_to_hub=True, hub_model_id="U/M")
    assert end.value.code == 1
    assert "U/M" in capsys.readouterr().err


def test_trainers_measure_and_save_when_asked(world, tmp_path):
    rows = [tiny.conversation(*row) for row in tiny.ROWS[:2]]
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, eos_token="<|endoftext|>")
    tokenizer = tiny.student_tokenizer()
    trainer = SFTTrainer(str(world / "student"), args, rows, rows, processing_class=tokenizer)
    before = trainer.evaluate()
    assert trainer.train().metrics.keys() >= before.keys() >= {"eval_loss", "eval_bits_per_byte"}
    assert tokenizer.eos_token == "<|im_end|>"  # the caller's tokenizer stays as it was
    assert (trainer.save_model(tmp_path / "elsewhere") / "model.safetensors").is_file()


def shell(*argv) -> subprocess.Popen:
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        return subprocess.Popen(
            [sys.executable, *([] if str(argv[0]).endswith(".py") else ["-m"]), *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_second_ctrl_c_while_the_run_is_saved_ends_it_at_once_and_the_checkpoint_before_stays(world, tmp_path):
    code = (
        "import sys, time\nfrom gold_jax import cli, sft\nfrom gold_jax.training import loop\nsave = loop.save_final_model\n"
        "def slow(model, tokenizer, folder, **options):\n"
        "    if 'checkpoint-2' not in str(folder):\n        print('saving', flush=True)\n        time.sleep(100)\n"
        "    return save(model, tokenizer, folder, **options)\n"
        "loop.save_final_model = slow\ncli.run('gold_jax.sft', sft.main, sys.argv[1:])"
    )
    (tmp_path / "slow.py").write_text(code)
    process = shell(
        tmp_path / "slow.py", "--model_name_or_path", world / "student", "--dataset_name", world / "data", "--output_dir",
        tmp_path / "out", "--max_steps", "100000", "--logging_steps", "1", "--save_steps", "2", "--learning_rate", "1e-3",
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith(("step 3/", "saving")):
                process.send_signal(signal.SIGINT)
            if line.startswith("saving"):
                break
        out, err = process.communicate(timeout=50)
    finally:
        process.kill()
    assert process.returncode == 130 and err.count("Traceback") == 0, err
    assert re.search(
        rf"Interrupted again after \d+ updates, .* the last checkpoint is {tmp_path}/out/checkpoint-2", out
    )
    assert [path.name for path in checkpointing.checkpoints_in(tmp_path / "out")] == ["checkpoint-2"]
    assert load_model(tmp_path / "out" / "checkpoint-2").config.layers == 2


def test_ctrl_c_before_a_run_begins_says_so(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run("gold_jax.train", main, [])
    assert end.value.code == 130 and capsys.readouterr().err == "gold_jax.train: interrupted\n"


def test_ctrl_c_ends_a_process_with_130_and_a_checkpoint(world, tmp_path):
    process = shell(
        "gold_jax.sft", "--model_name_or_path", world / "student", "--dataset_name", world / "data", "--output_dir",
        tmp_path / "out", "--max_steps", "100000", "--logging_steps", "1", "--learning_rate", "1e-3",
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Interrupted after" in out and "Traceback" not in err
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert load_model(saved).config.layers == 2


def test_sigterm_ends_a_process_with_75_and_the_same_command_goes_on(world, tmp_path):
    out = tmp_path / "out"
    line = (
        "gold_jax.sft", "--model_name_or_path", world / "student", "--dataset_name", world / "data", "--output_dir", out,
        "--logging_steps", "1", "--resume_from_checkpoint", "latest", "--lr_scheduler_type", "constant", "--max_steps",
    )  # fmt: skip
    process = shell(*line, "100000")
    try:
        for said in process.stdout:
            if said.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        said, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert said.count("Preempted after") == 1 and "Traceback" not in err
    (saved,) = out.glob("checkpoint-*")
    done = int(saved.name.removeprefix("checkpoint-"))
    process = shell(*line, str(done + 2))
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"Resumed from {saved}: {done} of {done + 2} updates are done." in said and "--max_steps is now " in said
    assert [row["step"] for row in metrics(out)] == list(range(1, done + 3))
