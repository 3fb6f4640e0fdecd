"""A run's speed and memory, and its model FLOPs utilization (MFU; Chowdhery et al., "PaLM", 2022, appendix B)."""

import time

import jax

from gold_jax import progress
from gold_jax.accelerators import DEVICE_KINDS
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import count, split


class Throughput:
    """Tokens per second since `restart`, the seconds left out in which programs were compiled, which it counts, too."""

    def __init__(self):
        self._told = progress.compiled()

    def restart(self) -> None:
        """Counts time and tokens from here on."""
        self._since, self._tokens, self._compiled_before = time.perf_counter(), 0, progress.compiled()[1]

    def add(self, tokens: int) -> None:
        """Counts the tokens of an update."""
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        """Until now."""
        compiling = progress.compiled()[1] - self._compiled_before
        return self._tokens / max(time.perf_counter() - self._since - compiling, 1e-9)

    def compilations(self) -> dict[str, float]:
        """`programs_compiled` and `compiling_seconds` since the last call."""
        before, self._told = self._told, progress.compiled()
        programs, seconds = (new - old for new, old in zip(self._told, before))
        return {"programs_compiled": programs, "compiling_seconds": round(seconds, 3)}


def peak_flops() -> float | None:
    """Peak dense bfloat16 FLOP/s of all devices of the run together; None where their kind is not known."""
    found = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    return None if found is None else found.flops * jax.device_count()


def peak_memory() -> int | None:
    """The most bytes that the first device of this process held so far; None where the backend does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def device_metrics(flops_per_second: float) -> dict[str, float]:
    """`mfu` of a run whose models need so many FLOP/s, and `memory_gib` (`peak_memory`); without what is not known."""
    peak, held = peak_flops(), peak_memory()
    found = {} if peak is None else {"mfu": flops_per_second / peak}
    return found if held is None else found | {"memory_gib": held / 2**30}


def training_flops(student: Decoder, teacher: Decoder | None) -> float:
    """FLOPs that the models need for a token of an update: 6 for each of the student's parameters, 2 of the teacher's.

    An embedding that is not the head too has no products and does not count; nor do attention, recomputation and
    sampling. The teacher is taken to have as many tokens as the student.
    """
    return 6.0 * _parameters(student) + (0.0 if teacher is None else 2.0 * _parameters(teacher))


def _parameters(model: Decoder) -> int:
    """How many parameters a model has, without an embedding that is only looked up."""
    config = model.config
    return count(split(model)[1]) - (0 if config.tied else config.vocab_size * config.width)
