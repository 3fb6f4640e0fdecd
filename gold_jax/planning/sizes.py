"""How much there is of everything in a run, by its settings and its models' configs."""

import math
from typing import NamedTuple

from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.models.config import DecoderConfig
from gold_jax.models.parameters import parameters
from gold_jax.rollout.sampler import most_slots
from gold_jax.training.batches import sampling_rows

CHUNK = 256  # what `losses.fused_head.chunk_size` takes on accelerators


class Pair(NamedTuple):
    """The models of a run.

    Attributes:
        student, teacher: their configs; no teacher is fine-tuning.
        matched: entries that the two vocabularies share; None: they are one and the same.
    """

    student: DecoderConfig
    teacher: DecoderConfig | None = None
    matched: int | None = None


class Sizes:
    """How much there is of everything in a run, by its settings and its models' shapes.

    Args:
        args: the settings.
        pair: the models.
        shards: parts that the rows of a batch are shared out to.
    """

    def __init__(self, args: SFTConfig, pair: Pair, shards: int):
        self.args, self.pair, self.shards = args, pair, shards

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.pair.teacher is not None

    @property
    def dtype(self) -> str:
        """What is computed in: on accelerators bfloat16, unless the settings say otherwise."""
        return "float32" if self.args.bf16 is False else "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one number of that dtype."""
        return 4 if self.dtype == "float32" else 2

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, on all devices."""
        return self.args.per_device_train_batch_size * self.shards

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.args.max_length or 1024

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.args.prompt_budget if isinstance(self.args, GOLDConfig) else self.length // 2

    @property
    def samples(self) -> bool:
        """Whether the student writes completions on these devices."""
        args = self.args
        return isinstance(args, GOLDConfig) and self.taught and args.lmbda > 0 and args.server_url is None

    @property
    def sampled_rows(self) -> int:
        """Rows that are written at once, on all devices."""
        args, shards = self.args, self.shards
        prompts = self.rows * args.gradient_accumulation_steps
        requested = sampling_rows(prompts, self.rows, args.generation_batch_size or 32 * shards)
        return -(-min(requested, prompts) // shards) * shards

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the student writes, but for the last, which it does not read."""
        return self.prompt_length - 1 + self.args.max_completion_length

    @property
    def slots(self) -> int:
        """Slots of the cache at its largest, as the sampler has them."""
        return self._most_slots[0]

    @property
    def cheap(self) -> bool:
        """Whether the cache is small beside the weights."""
        return self._most_slots[1]

    @property
    def _most_slots(self) -> tuple[int, bool]:
        student = self.pair.student
        weights = sum(math.prod(info.shape) for info in parameters(student).values())
        return most_slots(student, weights, self.sampled_rows // self.shards, self.longest)
