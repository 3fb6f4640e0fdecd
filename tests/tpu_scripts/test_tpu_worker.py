"""on_worker.sh, run here for real, over launch.sh, status.sh and stop.sh and a gcloud whose ssh is a shell."""

import os
import shutil
import signal
import time

import pytest
from fake_gcloud import SCRIPTS, WHERE

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("flock", "setsid"))),
    reason="workers are Linux machines; this one has no flock or setsid",
)


@pytest.fixture
def worker(scripts):
    """The home of a worker on which the project lies."""
    home = scripts.folder / "home"
    (home / "gold_jax" / "tpu_scripts").mkdir(parents=True)
    shutil.copy(SCRIPTS / "on_worker.sh", home / "gold_jax" / "tpu_scripts")
    scripts.answers(queued=["ACTIVE"], vm=["READY"])
    yield home
    for pid in home.glob("gold_jax_runs/*/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def state(scripts):
    done = scripts.run("status", *WHERE)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def ended(scripts):
    for _ in range(200):
        if (now := state(scripts)) != "running":
            return now
        time.sleep(0.05)
    raise AssertionError("the run does not end")


def launch(scripts, *command):
    return scripts.run("launch", *WHERE, "--", *command)


def log(home):
    return (home / "gold_jax_runs" / "gold" / "log").read_text()


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_exit_code_is_written_down(scripts, worker, code):
    assert state(scripts) == "none"
    assert launch(scripts, "bash", "-c", f"echo working in $PWD; exit {code}").returncode == 0
    assert ended(scripts) == str(code)
    assert f"working in {worker / 'gold_jax'}" in log(worker)


def test_a_command_arrives_word_for_word(scripts, worker):
    words = ["two words", "it's", '"$HOME"', "$(date)", "", "a\nb", "*", "\\n", "ü"]
    launch(scripts, "printf", "<%s>\n", *words)
    assert ended(scripts) == "0"
    assert "".join(f"<{word}>\n" for word in words) in log(worker)


def test_a_run_goes_on_when_the_connection_ends_and_is_not_started_twice(scripts, worker):
    assert launch(scripts, "sleep", "60").returncode == 0
    assert state(scripts) == "running"
    again = launch(scripts, "true")
    assert again.returncode == 1 and "run gold is still running" in again.stderr
    assert state(scripts) == "running"


def test_stop_lets_the_command_save_and_say_how_it_ended(scripts, worker):
    launch(
        scripts, "bash", "-c", "trap 'echo saving; sleep 0.2; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    )
    while "ready" not in log(worker).split("== ")[-1].split("\n", 1)[1]:
        time.sleep(0.02)
    assert scripts.run("stop", *WHERE).returncode == 0
    assert ended(scripts) == "75"
    assert "saving" in log(worker)
    assert "is not running here" in scripts.run("stop", *WHERE).stderr


def test_a_run_that_was_killed_with_all_it_started_is_lost_and_can_be_started_again(scripts, worker):
    launch(scripts, "sleep", "60")
    pid = worker / "gold_jax_runs" / "gold" / "pid"
    while not pid.exists():
        time.sleep(0.02)
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    assert ended(scripts) == "lost"
    launch(scripts, "true")
    assert ended(scripts) == "0"
    assert log(worker).count("== ") == 3, "the log of the first start is kept"


def test_a_worker_without_the_project_says_so(scripts, worker):
    shutil.rmtree(worker / "gold_jax")
    assert state(scripts) == "none"


def test_a_run_is_resumed_over_preemptions_until_it_has_ended_well(scripts, worker):
    """A command that is preempted twice, on a worker that runs it for real."""
    count = 'n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n; echo "start $n with $*"; [ $n = 2 ] || exit 75'
    launch(scripts, "bash", "-c", count, "train")
    flags = (*WHERE, "--accelerator=v6e-8", "--poll=0")
    done = scripts.run("resume", *flags, "--", "bash", "-c", count, "train")
    assert done.returncode == 0, done.stderr
    assert log(worker).count("exit code 75") == 2 and log(worker).count("exit code 0") == 1
    assert "start 2 with --resume_from_checkpoint latest" in log(worker)


def test_a_worker_whose_python_is_too_old_gets_a_newer_one_from_uv(scripts, worker):
    stub = (
        "#!/bin/sh\n"
        f'echo "$PWD: $0 $*" >>{scripts.folder}/log\n'
        'if [ "$1" = -c ]; then exit 1; fi\n'
        f'if [ "$2" = uv ]; then mkdir -p {worker}/gold_jax_venv/bin; cp "$0" {worker}/gold_jax_venv/bin/python; fi\n'
        f"if [ -d {worker}/gold_jax_venv/bin ]; then cp $0 {worker}/gold_jax_venv/bin/pip; fi\n"
    )
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (scripts.folder / "bin" / name).write_text(stub)
        (scripts.folder / "bin" / name).chmod(0o755)
    for again in (False, True):
        done = scripts.run("install", *WHERE)
        assert done.returncode == 0 and "installed" in done.stdout, done.stderr
        said = (scripts.folder / "log").read_text().replace(str(scripts.folder), "").splitlines()
        assert said[-1] == "/home/gold_jax: /home/gold_jax_venv/bin/python -m pip install --quiet .[tpu]"
        assert sum(" -m uv venv " in line and line.endswith("/gold_jax_venv") for line in said) == 1, again
