"""What a command asks of the system's memory."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from gold_jax.host_memory import start_again_with_huge_pages
start_again_with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_command_starts_again_once_with_huge_pages_and_all_its_arguments(given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if given is not None:
        environment["GLIBC_TUNABLES"] = given
    arguments = ["--text", "two words", "", "$HOME"]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        said, _ = process.communicate()
    assert said.split(" ", 2) == [str(process.pid), expected, f"{arguments}\n"]
