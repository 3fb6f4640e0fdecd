"""What each script would call, and what it says of bad input."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from fake_gcloud import SCRIPTS, WHERE

CHECKOUT = str(SCRIPTS.parent)
ALL = sorted(SCRIPTS.glob("*.sh"))
COMMANDS = [path.stem for path in ALL if path.stem not in ("common", "tpu", "on_worker")]
TPU = ["gcloud", "compute", "tpus"]
ZONE = "--zone=us-east5-b"
QUEUED_STATE = [*TPU, "queued-resources", "describe", "gold", ZONE, "--format=value(state.state)"]
VM_STATE = [*TPU, "tpu-vm", "describe", "gold", ZONE, "--format=value(state)"]


def remote_command(call):
    """The command that an ssh call runs on the workers, split as their shell splits it."""
    (command,) = (arg.removeprefix("--command=") for arg in call if arg.startswith("--command="))
    return shlex.split(command)


@pytest.mark.parametrize(
    "accelerator, known, version",
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-256", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-384", "v5p-384", "v2-alpha-tpuv5"),
        ("v6e-1", "v6e-1", "v2-alpha-tpuv6e"),
    ],
)
def test_a_queued_resource_has_the_runtime_of_its_accelerator(scripts, accelerator, known, version):
    (call,) = scripts.dry("create", *WHERE, "--accelerator", accelerator)
    assert call == [
        *TPU, "queued-resources", "create", "gold", "--node-id=gold", ZONE,
        f"--accelerator-type={known}", f"--runtime-version={version}",
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [("--spot",), ("--capacity=spot",), ("--capacity", "spot")])
def test_a_tpu_vm_on_spot(scripts, flags):
    (call,) = scripts.dry("create", *WHERE, "--kind=vm", "--accelerator=v6e-8", "--project=p", *flags)
    assert call == [
        *TPU, "tpu-vm", "create", "gold", ZONE, "--project=p",
        "--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "--spot",
    ]  # fmt: skip


def test_a_reservation_another_runtime_more_arguments_and_waiting(scripts):
    flags = ("--accelerator=v4-32", "--reserved", "--runtime=other", "--wait", "--create-arg", "--labels=a=b c")
    create, queued, vm = scripts.dry("create", *WHERE, *flags, "--create-arg=--network=net")
    assert create[-4:] == ["--runtime-version=other", "--reserved", "--labels=a=b c", "--network=net"]
    assert (queued, vm) == (QUEUED_STATE, VM_STATE)


def test_settings_come_from_the_environment_and_flags_win(scripts):
    env = {"NAME": "mine", "ZONE": "z", "PROJECT": "p", "ACCELERATOR": "v6e-8", "CAPACITY": "spot", "KIND": "vm"}
    (call,) = scripts.dry("create", "--zone=other", **{f"GOLD_TPU_{name}": value for name, value in env.items()})
    assert call[4:8] == ["create", "mine", "--zone=other", "--project=p"] and call[-1] == "--spot"


def test_the_checkout_is_copied_and_installed_on_all_workers(scripts):
    make, pack, copy, install = scripts.dry("install", *WHERE)
    archive = f"{CHECKOUT}/build/gold_jax.tgz"
    assert make == ["mkdir", "-p", f"{CHECKOUT}/build"]
    assert pack[:3] == ["tar", "-czf", archive] and {"gold_jax", "configs", "tpu_scripts", "pyproject.toml"} < set(pack)
    assert copy == [*TPU, "tpu-vm", "scp", archive, "gold:gold_jax.tgz", "--worker=all", ZONE]
    assert install[:6] == [*TPU, "tpu-vm", "ssh", "gold"] and "--worker=all" in install
    assert remote_command(install)[-3:] == ["bash", "gold_jax/tpu_scripts/on_worker.sh", "install"]


def test_what_is_packed_is_there_and_enough_to_install():
    packed = ["gold_jax", "configs", "tpu_scripts", "pyproject.toml", "README.md", "LICENSE"]
    assert all((SCRIPTS.parent / name).exists() for name in packed)


def test_a_repository_is_cloned_or_brought_up_to_date(scripts):
    (call,) = scripts.dry("install", *WHERE, "--repo", "https://host/o'hara.git", "--ref=v 1")
    words = remote_command(call)
    for command in (
        ["fetch", "--depth", "1", "https://host/o'hara.git", "v 1"],
        ["clone", "--depth", "1", "--branch", "v 1"],
    ):
        assert any(words[i : i + len(command)] == command for i in range(len(words)))
    assert words[-3:] == ["bash", "gold_jax/tpu_scripts/on_worker.sh", "install"]


def test_a_command_reaches_the_workers_as_it_was_typed(scripts):
    command = ["python", "-m", "gold_jax.train", "--x", "two words", "it's", '"$HOME"', "$(date)", "", "a\nb", "*", "ü"]
    done = scripts.run("launch", *WHERE, "--run=r1", "--dry-run", "--", *command)
    call = shlex.split(done.stdout)
    assert call[:6] == [*TPU, "tpu-vm", "ssh", "gold"] and "--worker=all" in call
    assert remote_command(call) == ["bash", "gold_jax/tpu_scripts/on_worker.sh", "start", "r1", *command]


def test_what_a_dry_run_prints_can_be_pasted(scripts):
    printed = scripts.run("launch", *WHERE, "--dry-run", "--", "echo", "it's $HOME").stdout
    subprocess.run(["bash", "-c", printed], env=scripts.env, check=True)
    (call,) = scripts.calls()
    assert remote_command(call)[-2:] == ["echo", "it's $HOME"]


def test_many_workers_in_batches_and_tunnels_take_the_alpha_commands(scripts):
    batched = scripts.dry("launch", *WHERE, "--batch-size=16", "--", "true")[0]
    assert batched[:4] == ["gcloud", "alpha", "compute", "tpus"] and batched[-1] == "--batch-size=16"
    tunnel = scripts.dry("launch", *WHERE, "--ssh-arg=--tunnel-through-iap", "--", "true")[0]
    assert tunnel[1] == "alpha" and tunnel[-1] == "--tunnel-through-iap"
    inside = scripts.dry("launch", *WHERE, "--ssh-arg", "--internal-ip", "--", "true")[0]
    assert inside[1] == "compute" and inside[-1] == "--internal-ip"


def test_logs(scripts):
    (call,) = scripts.dry("logs", *WHERE, "--run=r1", "--worker=3")
    assert "--worker=3" in call and remote_command(call) == ["tail", "-n", "100", "-F", "gold_jax_runs/r1/log"]
    (call,) = scripts.dry("logs", *WHERE, "--no-follow", "--lines=5", "--worker=all")
    assert "--worker=all" in call and remote_command(call) == ["tail", "-n", "5", "gold_jax_runs/gold/log"]


def test_status(scripts):
    queued, vm, run = scripts.dry("status", *WHERE)
    assert (queued, vm) == (QUEUED_STATE, VM_STATE)
    assert "bash gold_jax/tpu_scripts/on_worker.sh status gold" in " ".join(remote_command(run))
    vm, run = scripts.dry("status", *WHERE, "--kind=vm")
    assert vm == VM_STATE


def test_stop(scripts):
    (call,) = scripts.dry("stop", *WHERE)
    assert remote_command(call) == ["bash", "gold_jax/tpu_scripts/on_worker.sh", "stop", "gold"]


@pytest.mark.parametrize(
    "path, at", [("gold-model", "gold_jax/gold-model"), ("~/gold_jax_runs/gold/log", "gold_jax_runs/gold/log"), ("/a b", "/a b")]
)  # fmt: skip
def test_results_of_a_worker(scripts, path, at):
    make, copy = scripts.dry("fetch", path, "to here", *WHERE)
    assert make == ["mkdir", "-p", "to here"]
    assert copy == [*TPU, "tpu-vm", "scp", f"gold:{at}", "to here", "--recurse", "--worker=0", ZONE]


def test_results_in_a_bucket_need_no_tpu(scripts):
    make, copy = scripts.dry("fetch", "gs://bucket/out", "--project=p")
    assert make == ["mkdir", "-p", "."]
    assert copy == ["gcloud", "storage", "cp", "--recursive", "gs://bucket/out", ".", "--project=p"]


def test_delete(scripts):
    assert scripts.dry("delete", *WHERE) == [[*TPU, "queued-resources", "delete", "gold", ZONE, "--force"]]
    assert scripts.dry("delete", *WHERE, "--yes", "--kind=vm") == [[*TPU, "tpu-vm", "delete", "gold", ZONE, "--quiet"]]


def test_resume_shows_every_command_that_can_come(scripts):
    flags = (*WHERE, "--accelerator=v6e-8", "--spot")
    calls = scripts.dry("resume", *flags, "--", "python", "-m", "gold_jax.train")
    assert calls[:2] == [QUEUED_STATE, VM_STATE]
    assert calls[2] == [*scripts.dry("delete", *WHERE)[0], "--quiet"]
    assert calls[3:4] == scripts.dry("create", *flags)
    assert calls[4] == scripts.dry("status", *WHERE)[-1]
    assert calls[5:-1] == scripts.dry("install", *WHERE)
    command = ["python", "-m", "gold_jax.train", "--resume_from_checkpoint", "latest"]
    assert calls[-1:] == scripts.dry("launch", *WHERE, "--", *command)


@pytest.mark.parametrize("given", [["--resume_from_checkpoint", "gs://b/7"], ["--resume_from_checkpoint=gs://b/7"]])
def test_resume_leaves_a_checkpoint_that_was_named(scripts, given):
    calls = scripts.dry("resume", *WHERE, "--accelerator=v6e-8", "--", "python", *given)
    assert remote_command(calls[-1])[-len(given) - 1 :] == ["python", *given]


@pytest.mark.parametrize(
    "script, args, said",
    [
        ("create", ["--zone=z", "--accelerator=v6e-8"], "no name: give --name"),
        ("create", ["--name=Gold_1", "--zone=z", "--accelerator=v6e-8"], "--name is Gold_1"),
        ("create", ["--name=gold", "--accelerator=v6e-8"], "no zone: give --zone"),
        ("create", [*WHERE], "no accelerator: give --accelerator"),
        ("create", [*WHERE, "--accelerator=v6e-12"], "unknown accelerator type v6e-12; the nearest is v6e-8 "),
        ("create", [*WHERE, "--accelerator=v5lite-16"], "the nearest is v5litepod-16 "),
        ("create", [*WHERE, "--accelerator=v5-4096"], "the nearest is v4-4096 "),
        ("create", [*WHERE, "--accelerator=v5p-1000"], "the nearest is v5p-1024 "),
        ("create", [*WHERE, "--accelerator=v6e"], "the nearest is v6e-8 "),
        ("create", [*WHERE, "--accelerator=v6e-8", "--acelerator=x"], "unknown flag --acelerator; the nearest is --accelerator"),
        ("create", [*WHERE, "--accelerator=v6e-8", "--capacity=spott"], "the nearest is spot"),
        ("create", [*WHERE, "--accelerator=v6e-8", "--kind=queue"], "not one of: queued vm; the nearest is queued"),
        ("create", [*WHERE, "--accelerator=v6e-8", "--spot=yes"], "--spot takes no value, got yes"),
        ("create", [*WHERE, "--accelerator"], "--accelerator needs a value: --accelerator TYPE"),
        ("create", [*WHERE, "--accelerator=v6e-8", "more"], "what is more?"),
        ("install", [*WHERE, "--ref=main"], "--ref needs --repo"),
        ("install", [*WHERE, "--spot"], "unknown flag --spot"),
        ("launch", [*WHERE], "no command: launch.sh … -- python"),
        ("launch", [*WHERE, "python", "-m", "gold_jax.train"], "the command goes behind --: launch.sh … -- python"),
        ("launch", [*WHERE, "--run=../x", "--", "true"], "--run is ../x"),
        ("logs", [*WHERE, "--worker=first"], "--worker is first, not a whole number"),
        ("resume", [*WHERE, "--accelerator=v6e-8"], "no command: resume.sh"),
        ("resume", [*WHERE, "--accelerator=v6e-8", "--poll=1m", "--", "true"], "--poll is 1m, not a whole number"),
        ("fetch", [*WHERE], "one or two paths are needed"),
        ("fetch", ["out"], "no name: give --name"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_called(scripts, script, args, said):
    assert said in scripts.error(script, *args)


def test_a_missing_gcloud_is_named(scripts, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "grep", "tr"):
        (tools / tool).symlink_to(shutil.which(tool))
    assert "gcloud is not on PATH" in scripts.error("delete", *WHERE, PATH=str(tools))


@pytest.mark.parametrize("script", COMMANDS)
def test_help_lists_the_flags_that_the_script_takes(scripts, script):
    done = scripts.run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"{script}.sh ") and not scripts.calls()
    assert all(f"  {flag} " in done.stdout for flag in ("--name", "--dry-run", "--help"))
    assert ("  --accelerator " in done.stdout) == (script in ("create", "resume"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_bash_reads_the_script(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert (path.stat().st_mode & 0o111 != 0) == (path.stem not in ("common", "tpu"))


def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, *map(str, ALL)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
