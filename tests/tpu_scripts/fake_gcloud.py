import json
import os
import pathlib
import shlex
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).parents[2] / "tpu_scripts"
WHERE = ("--name=gold", "--zone=us-east5-b")

# Records its calls. A describe, and the question how the run is, are answered from a file, one line for each call, the
# last line for good; "!" before a line makes it an error. Any other ssh does nothing, or runs here where there is a home.
FAKE_GCLOUD = """#!{python} -IS
import json, os, sys

folder, args = {folder!r}, sys.argv[1:]
with open(folder + "/calls", "a") as calls:
    calls.write(json.dumps(args) + "\\n")
command = "".join(arg.removeprefix("--command=") for arg in args if arg.startswith("--command="))
if "describe" in args:
    question = "queued" if "queued-resources" in args else "vm"
else:
    question = next((word for word in ("status", "install", "start") if "on_worker.sh " + word in command), "other")
answers, home = folder + "/" + question, folder + "/home"
if os.path.exists(answers):
    with open(answers) as file:
        first, *rest = file.read().split("\\n")
    if rest:
        with open(answers, "w") as file:
            file.write("\\n".join(rest))
    if first.startswith("!"):
        sys.exit(first[1:])
    print(first.replace("; ", "\\n"))
elif command and os.path.exists(home):
    os.chdir(home)
    os.execvpe("bash", ["bash", "-c", command], dict(os.environ, HOME=home))
"""


class Scripts:
    """The scripts beside a gcloud that is none."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        fake = folder / "bin" / "gcloud"
        fake.parent.mkdir()
        fake.write_text(FAKE_GCLOUD.format(python=sys.executable, folder=str(folder)))
        fake.chmod(0o755)
        tar = folder / "bin" / "tar"  # packing the checkout takes a while, and every test would do it in the same place
        tar.write_text("#!/bin/sh\n")
        tar.chmod(0o755)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("GOLD_TPU_")}
        self.env["PATH"] = f"{fake.parent}{os.pathsep}{self.env['PATH']}"

    def run(self, script, *args, **env):
        return subprocess.run(
            [str(SCRIPTS / f"{script}.sh"), *args], env=self.env | env, capture_output=True, text=True, timeout=60
        )

    def dry(self, script, *args, **env):
        """The commands that a dry run prints, each as a list of arguments."""
        done = self.run(script, "--dry-run", *args, **env)
        assert done.returncode == 0, done.stderr
        assert not self.calls()
        return [line for line in (shlex.split(line, comments=True) for line in done.stdout.splitlines()) if line]

    def error(self, script, *args, **env):
        """What a script says of bad input; it must call nothing."""
        done = self.run(script, *args, **env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert not self.calls() and not done.stdout
        return done.stderr

    def answers(self, **lines):
        """What is played back from now on: queued=[…], vm=[…], status=[…], install=[…], start=[…]."""
        for question, answers in lines.items():
            (self.folder / question).write_text("\n".join(answers))

    def calls(self):
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
