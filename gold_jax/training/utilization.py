"""A run's speed and memory, and its model FLOPs utilization (MFU; Chowdhery et al., "PaLM", 2022, appendix B)."""

import time

import jax

from gold_jax import progress
from gold_jax.accelerators import DEVICE_KINDS
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import count, split


class Throughput:
    """Tokens per second since `restart`, compilation excluded, and how many programs compiled in how many seconds."""

    def __init__(self):
        self._reported = progress.compiled()

    def restart(self) -> None:
        """Starts to count time and tokens anew."""
        self._since, self._tokens, self._compiled_before = time.perf_counter(), 0, progress.compiled()[1]

    def add(self, tokens: int) -> None:
        """Counts the tokens of an update."""
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        """The rate since `restart`."""
        compiling = progress.compiled()[1] - self._compiled_before
        return self._tokens / max(time.perf_counter() - self._since - compiling, 1e-9)

    def compilations(self) -> dict[str, float]:
        """`programs_compiled` and `compiling_seconds` since the last call."""
        before, self._reported = self._reported, progress.compiled()
        programs, seconds = (new - old for new, old in zip(self._reported, before))
        return {"programs_compiled": programs, "compiling_seconds": round(seconds, 3)}


def peak_flops() -> float | None:
    """Peak dense bfloat16 FLOP/s of all devices of the run together; None if their kind is not known."""
    found = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    return None if found is None else found.flops * jax.device_count()


def peak_memory() -> int | None:
    """Peak bytes in use on the first device of this process; None if the backend does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def device_metrics(flops_per_second: float) -> dict[str, float]:
    """`mfu` of a run whose models need so many FLOP/s, and `memory_gib`; what is unknown is left out."""
    peak, held = peak_flops(), peak_memory()
    found = {} if peak is None else {"mfu": flops_per_second / peak}
    return found if held is None else found | {"memory_gib": held / 2**30}


def training_flops(student: Decoder, teacher: Decoder | None) -> float:
    """FLOPs of the models per token of an update: 6 for each parameter of the student, 2 for each of the teacher.

    Embeddings that are only looked up, attention, recomputation and sampling do not count. The teacher is assumed to
    have as many tokens as the student.
    """
    return 6.0 * _parameters(student) + (0.0 if teacher is None else 2.0 * _parameters(teacher))


def _parameters(model: Decoder) -> int:
    """How many parameters a model has, without an embedding that is only looked up."""
    config = model.config
    return count(split(model)[1]) - (0 if config.tied else config.vocab_size * config.width)
