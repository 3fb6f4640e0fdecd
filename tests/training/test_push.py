"""Trained models are pushed to a server that speaks as the hub does: what arrives, and what is said where it fails."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
import types

import huggingface_hub.constants
import pytest
import yaml
from training.hub_server import TOKEN, serving

from gold_jax import cli, sft

MODEL = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
}  # fmt: skip


@pytest.fixture
def hub():
    with serving() as server:
        yield server


def environment(hub, **more):
    """Of a process that takes the server for the hub, with LFS and not with the protocol of `hf_xet`."""
    return os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"} | more


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in MODEL}


def test_what_a_run_pushes_arrives_byte_for_byte_with_a_card_that_tells_of_it(hub, world, tmp_path):
    out = tmp_path / "out"
    flags = {
        "model_name_or_path": world / "student", "teacher_model_name_or_path": world / "teacher", "dataset_name": world / "data",
        "output_dir": out, "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 8, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2, "hub_model_id": "me/pushed", "hub_token": TOKEN,
    }  # fmt: skip
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "gold_jax.train",
        *given,
        "--eval_on_start",
        "--push_to_hub",
        "--hub_private_repo",
        "true",
    ]
    done = subprocess.run(command, env=environment(hub), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"Pushed to {hub.url}/me/pushed/commit/1" in done.stdout
    assert hub.repositories == {"me/pushed": files_of(out)} and hub.private == {"me/pushed": "private"}
    card, summary = hub.repositories["me/pushed"]["README.md"].decode(), json.loads((out / "summary.json").read_text())
    assert TOKEN not in card and TOKEN not in (out / "summary.json").read_text()
    before, after, teacher = summary["results"].values()
    bits = "eval_bits_per_byte"
    assert f"| {bits} | {before[bits]:.4f} | {after[bits]:.4f} | {teacher[bits]:.4f} |" in card
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        assert "loss" not in row or f"| {row['step']} | {row['loss']:.4f} |" in card
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    wanted = ("teacher_model_name_or_path", "max_steps", "per_device_train_batch_size", "max_completion_length")
    chosen = {name: summary["settings"][name] for name in wanted}
    assert settings == chosen | {"model_init_kwargs": {"dtype": "float32"}}
    assert "- Updates: `2 of 2 rows each, learning rate" in card
    assert f"- Versions: `python {sys.version.split()[0]}, gold_jax" in card
    assert 'pipeline("text-generation", model="me/pushed")([{"role"' in card
    assert 'LLM("me/pushed").chat([{"role"' in card and 'sample_completions("me/pushed", prompts=[[{"role"' in card
    assert "@misc{patino2025unlocking," in card and "@software{gold_jax," in card


@pytest.mark.parametrize(
    "fault, why",
    [
        (("commit", 500), "500 Internal Server Error"),
        (("commit", "cut"), "RemoteProtocolError"),
        (("lfs", 401), "401 Unauthorized"),
        (("upload", 500), "Error while uploading 'model.safetensors' to the Hub: HfHubHTTPError: Server error '500"),
    ],
)
def test_a_push_that_breaks_off_loses_nothing_and_says_last_how_to_push_again(
    fault, why, hub, world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hasty = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)  # between one try and the next
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty, raising=False)
    out, hub.fault = tmp_path / "a folder", fault
    given = ["--model_name_or_path", world / "student", "--dataset_name", world / "data", "--output_dir", out]
    given += [
        "--max_steps",
        1,
        "--save_strategy",
        "no",
        "--push_to_hub",
        "--hub_model_id",
        "me/m",
        "--hub_token",
        TOKEN,
    ]
    with pytest.raises(SystemExit) as ended:
        cli.run("gold_jax.sft", sft.main, [str(part) for part in given])
    assert ended.value.code == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("gold_jax.sft: The push to the hub failed (") and why in last and TOKEN not in last
    assert hub.repositories == {"me/m": {}} and set(files_of(out)) == MODEL
    hub.fault = None
    said, _, again = last.partition("Push it again (with the token in HF_TOKEN): ")
    assert said.endswith(f"the model is in {out}. ")
    program, *rest = shlex.split(again)
    command = [pathlib.Path(sys.executable).with_name(program), *rest]
    subprocess.run(command, env=environment(hub, HF_TOKEN=TOKEN), capture_output=True, check=True, timeout=120)
    assert hub.repositories == {"me/m": files_of(out)}
