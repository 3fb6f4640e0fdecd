"""What makes CPUs faster: off in the library, on in the commands."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gold_jax import cli, cpu
from gold_jax.losses.divergence import sorted_l1

SCRIPT = """
import os, sys
from gold_jax.cpu import restart_with_huge_pages
restart_with_huge_pages()
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


def calls_back(sort, entries=cpu.FEWEST_SORTED_ON_HOST):
    values = jnp.full((3, entries), 0.25)
    return "pure_callback" in str(jax.make_jaxpr(lambda p, q: sorted_l1(p, q, sort))(values, values))


def test_a_command_has_the_host_sort_and_the_library_does_not(monkeypatch):
    monkeypatch.setattr(cpu, "can_call_host", lambda: True)
    found = []
    assert not calls_back("auto")
    cli.run("test", lambda argv: found.append((argv, calls_back("auto"), calls_back("xla"))), ["--flag"])
    assert found == [(["--flag"], True, False)]
    assert not calls_back("auto") and calls_back("host")
    with cpu.enabled():  # XLA sorts small vocabularies, in programs that are kept
        assert not calls_back("auto", cpu.FEWEST_SORTED_ON_HOST - 1)


def test_a_command_that_fails_leaves_the_library_as_it_was():
    def fails(argv):
        assert cpu.sorts_on_host() == cpu.can_call_host()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run("test", fails, [])
    assert not cpu.sorts_on_host()


def test_whole_chunks_are_sorted_in_one_call(monkeypatch):
    if not cpu.can_call_host():
        pytest.skip("one core alone, or several devices")
    shapes = []
    sort = cpu.sorted_l1_and_signs
    monkeypatch.setattr(cpu, "sorted_l1_and_signs", lambda p, q: shapes.append((p.shape, q.shape)) or sort(p, q))
    one = lambda p, q: sorted_l1(p, q, "host")  # noqa: E731
    jax.block_until_ready(jax.jit(jax.vmap(one))(jnp.full((6, 4), 0.25), jnp.full((6, 9), 0.1)))
    assert shapes == [((6, 4), (6, 9))]
