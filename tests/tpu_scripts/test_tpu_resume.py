"""resume.sh against a gcloud that plays back what a TPU goes through."""

import shlex

import pytest
from fake_gcloud import WHERE

FLAGS = (*WHERE, "--accelerator=v6e-16", "--spot", "--poll=0")
COMMAND = ("--", "python", "-m", "gold_jax.train", "--output_dir", "gs://b/out dir")
START = shlex.join([*COMMAND[1:], "--resume_from_checkpoint", "latest"])


def said(*states, run="gold"):
    """What two and more workers answer, beside what else comes over ssh."""
    return "; ".join(["Welcome!", *(f"gold_jax w-{i} {run} {state}" for i, state in enumerate(states))])


def deeds(scripts):
    """The calls that change something, in order."""
    names = {"create": "create", "delete": "delete", "scp": "copy"}
    done = []
    for call in scripts.calls():
        done += [name for verb, name in names.items() if verb in call]
        done += [word for word in ("install", "start") if any(f"on_worker.sh {word}" in arg for arg in call)]
    return done


def starts(scripts):
    commands = [arg for call in scripts.calls() for arg in call if "on_worker.sh start" in arg]
    return [command.split("on_worker.sh start gold ")[1] for command in commands]


def test_a_run_that_has_ended_well_is_left_alone(scripts):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said(0, 0)])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == []


def test_a_run_that_never_ran_is_installed_and_started(scripts):
    scripts.answers(
        queued=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
        vm=["CREATING", "READY"],
        status=[said("none", "none"), said("running", "running"), said(0, 0)],
    )
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["copy", "install", "start"] and starts(scripts) == [START]


def test_a_preempted_run_goes_on_on_the_same_vm_when_that_stays(scripts):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said(75, 1), said(75, 1), said("running", 75), said(0, 0)])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["start"] and starts(scripts) == [START]


def test_a_queued_resource_that_was_taken_away_is_made_anew(scripts):
    scripts.answers(
        queued=["ACTIVE", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"],
        vm=["READY"],
        status=[said(75, 75), said("none", "none"), said("running", "running"), said(0, 0)],
    )
    done = scripts.run("resume", *FLAGS, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert deeds(scripts) == ["delete", "create", "copy", "install", "start"] and starts(scripts) == [START]
    (delete,) = (call for call in scripts.calls() if "delete" in call)
    assert "--force" in delete and "--quiet" in delete
    (create,) = (call for call in scripts.calls() if "create" in call)
    assert "--spot" in create and "--accelerator-type=v6e-16" in create


@pytest.mark.parametrize("vm", ["PREEMPTED", "TERMINATED", "!NOT_FOUND: Resource was not found"])
def test_an_active_queued_resource_whose_vm_is_gone_is_made_anew(scripts, vm):
    scripts.answers(queued=["ACTIVE"], vm=[vm, "READY"], status=[said(0, 0)])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["delete", "create"]


def test_a_tpu_vm_that_is_not_there_is_created_without_deleting(scripts):
    scripts.answers(vm=["!NOT_FOUND: Resource was not found", "READY"], status=[said(0)])
    assert scripts.run("resume", *FLAGS, "--kind=vm", *COMMAND).returncode == 0
    assert deeds(scripts) == ["create"]


def test_many_preemptions_one_after_the_other(scripts):
    once = [said(75, 75), said("none", "none"), said("running", "running")]
    scripts.answers(
        queued=[*["ACTIVE", "SUSPENDED", "ACTIVE", "ACTIVE"] * 3, "ACTIVE"],
        vm=["READY"],
        status=[*once * 3, said(0, 0)],
    )
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["delete", "create", "copy", "install", "start"] * 3


def test_a_run_that_is_gone_without_an_exit_code_is_continued_when_all_have_ended(scripts):
    scripts.answers(
        queued=["ACTIVE"], vm=["READY"], status=[said("lost", "running"), said("lost", 1), said("lost", 1), said(0, 0)]
    )
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["start"]


@pytest.mark.parametrize("states", [(134, 134), (137, 134, 134), (134, 137), (0, 134), (134, 139)])
def test_workers_that_jax_aborted_because_one_was_lost_are_continued(scripts, states):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said(*states), said(*states), said(0, 0)])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["start"]


@pytest.mark.parametrize("states, code", [((134, 2), 2), ((2, 134, 1), 2), ((134,), 134), ((0, 137), 137)])
def test_an_error_that_aborted_the_others_and_a_crash_of_one_worker_are_not_repeated(scripts, states, code):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said(*states)])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == code
    assert deeds(scripts) == []


def test_a_run_that_failed_ends_with_its_code_and_is_not_repeated(scripts):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said("running", "running"), said(0, 3)])
    done = scripts.run("resume", *FLAGS, *COMMAND)
    assert done.returncode == 3 and "exit code 3" in done.stderr
    assert deeds(scripts) == []
    assert any("tail -n 30" in arg for arg in scripts.calls()[-1])


def test_a_failure_of_workers_that_are_being_taken_away_is_a_preemption(scripts):
    scripts.answers(
        queued=["ACTIVE", "SUSPENDED", "ACTIVE"], vm=["READY"], status=[said(1, 137), said("none", "none"), said(0, 0)]
    )
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["delete", "create", "copy", "install", "start"]


def test_workers_and_a_service_that_do_not_answer_are_asked_again(scripts):
    scripts.answers(queued=["!503", "ACTIVE"], vm=["!503", "READY"], status=["!ssh: timed out", "", said(0, 0)])
    done = scripts.run("resume", *FLAGS, *COMMAND)
    assert done.returncode == 0 and "ssh: timed out" in done.stderr
    assert deeds(scripts) == []


def test_workers_that_never_answer_are_given_up(scripts):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=["!ssh: timed out"])
    done = scripts.run("resume", *FLAGS, *COMMAND)
    assert done.returncode == 2 and "ten times running" in done.stderr


def test_an_installation_that_fails_is_tried_again_and_then_given_up(scripts):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said("none")], install=["!no route", "!no route", "done"])
    scripts.answers(status=[*[said("none")] * 3, said(0)])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0
    assert deeds(scripts) == ["copy", "install"] * 3 + ["start"]
    scripts.answers(status=[said("none")], install=["!no route"])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 2


def test_a_queued_resource_that_fails_again_is_no_preemption(scripts):
    scripts.answers(queued=["FAILED"])
    done = scripts.run("resume", *FLAGS, *COMMAND)
    assert done.returncode == 2 and "describe gold" in done.stderr
    assert deeds(scripts) == ["delete", "create"]


def test_restarts_have_a_limit(scripts):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said(75)])
    done = scripts.run("resume", *FLAGS, "--max-restarts=2", *COMMAND)
    assert done.returncode == 2 and "restarted 2 times" in done.stderr
    assert deeds(scripts) == ["start", "start"]


def test_a_run_of_another_name_is_not_looked_at(scripts):
    scripts.answers(queued=["ACTIVE"], vm=["READY"], status=[said("running", run="other"), said(0)])
    assert scripts.run("resume", *FLAGS, *COMMAND).returncode == 0


def test_create_waits_until_the_tpu_is_ready_and_says_when_it_cannot_be(scripts):
    flags = (*WHERE, "--accelerator=v6e-8", "--wait", "--poll=0")
    scripts.answers(queued=["ACCEPTED", "ACTIVE"], vm=["CREATING", "READY"])
    assert scripts.run("create", *flags).returncode == 0
    scripts.answers(queued=["FAILED"])
    done = scripts.run("create", *flags)
    assert done.returncode == 2 and "gold is FAILED" in done.stderr
    assert deeds(scripts) == ["create", "create"]


def test_status_asks_the_workers_only_where_the_tpu_is_ready(scripts):
    scripts.answers(queued=["SUSPENDED", "ACTIVE"], vm=["READY"], status=[said(0, 75)])
    assert scripts.run("status", *WHERE).stdout == "gold is SUSPENDED\n"
    assert scripts.run("status", *WHERE).stdout.splitlines()[2:] == ["gold_jax w-0 gold 0", "gold_jax w-1 gold 75"]
