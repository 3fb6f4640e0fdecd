import contextlib
import socket

import numpy as np
import pytest

from gold_jax.distributed import consensus
from gold_jax.distributed.consensus import describe_difference
from gold_jax.distributed.initialize import initialize, is_main_process, process_names

from .run_several import begin, finish, free_address, told


def test_a_single_process_exchanges_with_itself(monkeypatch):
    monkeypatch.setattr(consensus, "_gather_words", None)
    initialize()
    values = np.array([[1, 2**60]])
    assert is_main_process()
    assert process_names() == (f"{socket.gethostname()} (process 0)",)
    assert consensus.all_gather(values).tolist() == [[[1, 2**60]]]
    assert consensus.all_reduce_sum(values).tolist() == consensus.all_reduce_max(values).tolist() == [[1, 2**60]]
    assert [x.tolist() for x in consensus.all_gather_ragged([np.arange(2, dtype=np.int32)])[0]] == [[0, 1]]
    consensus.assert_same_across_processes("--seed", 3)


def test_rows_that_are_not_int32_are_refused():
    with pytest.raises(ValueError, match=r"row 1 is int64\[2\]"):
        consensus.all_gather_ragged([np.zeros(1, np.int32), np.zeros(2, np.int64)])
    with pytest.raises(ValueError, match="object"):
        consensus.all_gather(np.array([None]))


def test_differences_say_which_processes_have_what():
    names = [f"h{i} (process {i})" for i in range(8)]
    assert describe_difference("--seed", [1] * 8, names) is None
    assert describe_difference("--seed", [1] * 3 + [2] + [1] * 4, names) == (
        "The processes differ in --seed: h0 (process 0) and 6 others have 1; h3 (process 3) has 2."
    )
    many = describe_difference("--seed", list(range(8)), names)
    assert "h3 (process 3) has 3; …" in many and "h4" not in many
    settings = [{"lr": 0.1, "batch": 4}, {"lr": 0.1, "batch": 8, "new": None}, {"lr": 0.2, "batch": 8}]
    assert describe_difference("the settings", settings, names) == (
        "The processes differ in the settings. lr: h0 (process 0) and 1 other have 0.1; h2 (process 2) has 0.2; "
        "batch: h1 (process 1) and 1 other have 8; h0 (process 0) has 4."
    )
    assert len(describe_difference("the text", ["x" * 999, "y"], names)) < 300


@pytest.fixture(scope="module")
def exchanged():
    """What two processes said of what they told each other."""
    address = free_address()
    started = [begin("exchange", address, 2, i) for i in range(2)]
    found = []
    for process in started:
        code, out, err = finish(process)
        assert code == 0, err[-3000:]
        found.append(told(out))
    return found


def of(one, name):
    return [value for key, value in one if key == name]


def test_processes_know_each_other_by_name(exchanged):
    host = socket.gethostname()
    for i, one in enumerate(exchanged):
        assert of(one, "names") == [[f"{host} (process 0)", f"{host} (process 1)"]]
        assert of(one, "first") == [i == 0]


def test_arrays_are_gathered_bit_for_bit(exchanged):
    for one in exchanged:
        assert of(one, "gather") == [[[2**40, -(2**62), 0], [2**40 + 1, -(2**62) - 1, 1]]]
        assert of(one, "total") == [[2**41 + 1, 1]] and of(one, "largest") == [[0, 2**53 + 1]]
        assert of(one, "float64") == [[of(other, "own")[0] for other in exchanged]]
        assert of(one, "scalar") == [2.0] and of(one, "many") == [5000]


def test_rows_of_any_length_reach_all_processes(exchanged):
    top = 2**31 - 2
    for one in exchanged:
        assert of(one, "ragged") == [[[], [[0], [top, top, top]]]] and of(one, "long") == [[1, 3001]]


def test_what_the_processes_disagree_on_is_said_in_all_of_them(exchanged):
    for one in exchanged:
        seed, settings = of(one, "differ")
        assert "differ in --seed: " in seed and "(process 1) has 1." in seed
        assert (
            "differ in the settings. batch: " in settings and "(process 0) has 4" in settings and "lr" not in settings
        )
        assert "float64[3]" in of(one, "shapes")[0]


@pytest.mark.parametrize("several", [False, True])
def test_an_error_of_one_process_is_raised_in_all(several, monkeypatch):
    def compare(what, value):
        if several:
            raise ValueError(
                f"The processes differ in {what}: host0 (process 0) has 'full'; host1 (process 1) has null."
            )

    monkeypatch.setattr(consensus, "assert_same_across_processes", compare)
    with pytest.raises(OSError, match="^full$"), consensus.raised_in_all_processes("the folder", OSError):
        raise OSError("full")
    error = pytest.raises(ValueError, match="differ in the folder: host0") if several else contextlib.nullcontext()
    with error, consensus.raised_in_all_processes("the folder"):
        pass
