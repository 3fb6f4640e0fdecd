"""The built-in engine: the host's schedule of which rows are prefilled, decoded and compacted when.

What happens to the rows on the device is in `rollout.decode_state`.
"""

import collections

import jax
import numpy as np

from gold_jax import progress
from gold_jax.bucketing import bucket, fine_bucket, power_of_two
from gold_jax.models.config import DecoderConfig
from gold_jax.models.functional import commit, count, merge, split
from gold_jax.models.quantization import KV_CACHE, vector_bytes
from gold_jax.rollout import decode_state as device
from gold_jax.rollout.decode_state import SamplingOptions
from gold_jax.rollout.engine import EMPTY, NonFiniteLogits, Sampled
from gold_jax.sharding.placement import Placement
from gold_jax.values import QUANTIZATIONS

STOP_SLOTS = 8  # stop ids are padded to a multiple of this, so that their number is no new shape

_DEFAULT_ROWS, _MOST_ROWS = 32, 128  # of a shard; beyond the latter weights are no longer most of what is read
_MIN_LENGTH = 32  # least prompt width, number of slots, and free slots after a resize
_MIN_ROWS = 8  # no program for fewer rows: decoding is bound by reading the weights, for one row as for eight
_REFILL_FRACTION = 4  # refill when a fourth of the rows is free: each prefill interrupts decoding
SMALL_MODEL = 10**7  # parameters below which fewer programs save more time than the rows that they decode in vain take
_SMALL_CACHE = 4  # a cache of at most a fourth of the weights' bytes gets all its slots at once: growing saves little


class SamplingEngine:
    """Writes completions with the model itself; an `rollout.engine.Engine`.

    At most `rows` rows are written at once; on a mesh, the next multiple of its shards. The device decodes by itself
    until the host must act: when a fourth of the rows is free and prompts wait, they are prefilled, the longest first;
    when none waits and half the rows are done, the others are compacted to half as many; when a row's slots are full,
    all rows get twice as many.

    What a row draws depends on the key, its index and its own prompt alone, whatever `rows` is and the other rows do
    (as far as rounding goes: a product of other shapes may round otherwise).

    Programs are compiled for pairs of a number of rows, one of `rows` and its halves, and a number of slots, a power of
    two (of a cache that is small beside the weights, one); to read prompts, also for their width (32, 48, 64, 96, …). In
    one call the rows only shrink. A small model keeps all its rows, and prefills every refill at its full number of rows.

    Prompts that are the same, and join together, are read once. With `quantization` "int8" completions are drawn from
    matrices rounded to 8 bits, which are read in half the time (prompts are read with the model's own), with
    "int8_kv_cache" also with keys and values of 8 bits, half of bfloat16's bytes; their log-probabilities are those of what
    they were drawn from. With `sampling_logprobs` those at the sampling temperature are returned too.
    """

    def __init__(self, rows: int = 32, quantization: str = "none", sampling_logprobs: bool = False):
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}.")
        if quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
        self.rows, self.quantization, self.sampling_logprobs = rows, quantization, sampling_logprobs

    def generate(self, model, prompts, *, max_new_tokens, key, temperature=1.0, top_k=0, top_p=1.0, stop_ids=()):
        """See `Engine.generate`.

        `max_new_tokens` is a static size: each new value compiles once. So does turning temperature, top-k or top-p on or
        off; their values compile nothing.

        Raises:
            ValueError: a setting out of its range, or a token that the model does not have.
            NonFiniteLogits: the model's logits for a completion are not finite.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}.")
        if top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {top_k}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], 1 being off, got {top_p}.")
        stops = np.full(-(-max(len(stop_ids), 1) // STOP_SLOTS) * STOP_SLOTS, -1, np.int32)
        stops[: len(stop_ids)] = stop_ids
        filters = device.sampling_filters(temperature, top_k, top_p)
        settings = SamplingOptions(*filters, stops, np.int32(max_new_tokens))
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        run = _GenerationRun(split(model), prompts, settings, key, self.rows)
        return run.finish(self.quantization, self.sampling_logprobs)


class _GenerationRun:
    """One call of an engine: which prompt each row of the device holds, and what comes next."""

    def __init__(self, model: tuple, prompts: list[np.ndarray], settings: SamplingOptions, key, rows: int):
        graph, params = model[0], commit(model[1])
        decoder = merge(graph, params)
        vocab_size = decoder.config.vocab_size
        for number, prompt in enumerate(prompts):
            if len(wrong := prompt[(prompt < 0) | (prompt >= vocab_size)]):
                raise ValueError(
                    f"prompt {number} holds token {wrong[0]}, but the model has tokens 0 to {vocab_size - 1}."
                )
        longest = max(map(len, prompts), default=0) - 1 + int(settings.limit)
        decoder.config.check_decode_length(longest, "the longest prompt and max_new_tokens")
        self.model, self.config, self.dtype, self.placement = (
            (graph, params),
            decoder.config,
            decoder.dtype,
            decoder.placement,
        )
        if self.placement is None:  # else the mesh's programs put the key where they want it
            key = jax.device_put(key, getattr(jax.tree.leaves(params)[0], "sharding", None))
        self.prompts, self.settings, self.key, self.new = prompts, settings, key, int(settings.limit)
        known: dict[bytes, int] = {}
        self.first_identical = [known.setdefault(prompt.tobytes(), i) for i, prompt in enumerate(prompts)]
        longest_first = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), self.first_identical[i]))
        self.queue = collections.deque(i for i in longest_first if len(prompts[i]))
        self.shards = 1 if self.placement is None else self.placement.row_shards
        halves = [-(-rows // self.shards)]  # of the rows of a shard, down to 1
        while halves[-1] > 1:
            halves.append(-(-halves[-1] // 2))
        self.sizes = [self.shards * size for size in halves]
        size = min(size for size in self.sizes if size >= min(self.sizes[0], len(self.queue)))
        self.is_small_model = count(params) < SMALL_MODEL
        if self.is_small_model:
            self.sizes = [size]
        self.rows_per_prompt = rows_per_prefill(len(prompts), len(known), size // self.shards, count(params))
        # For each row: its prompt's index (-1: nothing to offload), tokens in its cache, whether it is unfinished.
        self.prompt_of_row, self.length, self.active = np.full(size, -1), np.zeros(size, int), np.zeros(size, bool)
        self.offloaded: list[tuple] = []

    def finish(self, quantization: str, sampling_logprobs: bool = False) -> list[Sampled]:
        """Run until every prompt has its completion."""
        found = [EMPTY] * len(self.prompts)
        if not self.queue:
            return found
        self.weights = merge(*self.model).decoding_weights(quantization)
        self.slots = self._fitting_slots(len(self.prompts[self.queue[0]]) - 1)
        of_model = {"config": self.config, "dtype": self.dtype, "placement": self.placement}
        sizes = {"rows": len(self.active), "slots": self.slots, "new": self.new}
        options = of_model | sizes | {"sampling_logprobs": sampling_logprobs, "int8_cache": quantization == KV_CACHE}
        self.state = device.empty_slots(self._key_of(0), **options)  # the cache and the decode state
        with progress.task("sampling", len(self.prompts)) as bar:
            while True:
                while self.queue and (~self.active).sum() >= self._rows_needed_free():
                    self._prefill()
                if not self.active.any():
                    break
                self._resize()
                self._decode()
                bar.reach(len(self.prompts) - len(self.queue) - int(self.active.sum()))
            self._offload_finished()
        # One device-to-host transfer for the whole call.
        for (tokens, logprobs, lengths, at_temperature), prompt_of_row in jax.device_get(self.offloaded):
            for row in np.flatnonzero(prompt_of_row >= 0):
                end = lengths[row]
                sampling = None if at_temperature is None else at_temperature[row, :end]
                drawn = Sampled(tokens[row, :end], logprobs[row, :end], sampling)
                if not np.isfinite(drawn.logprobs).all():  # a drawn token's always is where the logits are
                    raise NonFiniteLogits(
                        f"the model's logits for completion {prompt_of_row[row]} are not finite, so that nothing can be drawn "
                        "from them: its weights are not finite, or it overflows on this prompt."
                    )
                found[prompt_of_row[row]] = drawn
        return found

    def _refill_size(self) -> int:
        """Prompts of one refill while other rows are decoding: the same number for each shard."""
        return self.shards * max(1, len(self.active) // self.shards // _REFILL_FRACTION)

    def _rows_needed_free(self) -> int:
        """Free rows at which a refill is worth its interruption."""
        return min(len(self.queue), self._refill_size() if self.active.any() else len(self.active))

    def _prefill(self) -> None:
        """Prefill the next prompts into free rows."""
        self._offload_finished()
        size = len(self.active)
        space = size if self.is_small_model or self._rows_needed_free() > self._refill_size() else self._refill_size()
        each, own = space // self.shards, size // self.shards
        free = [shard * own + np.flatnonzero(~alive)[:each] for shard, alive in enumerate(self.active.reshape(-1, own))]
        joining = self._distribute([len(rows) for rows in free])
        distinct, height = self._prompts_to_read(joining, each)
        shared = height < each
        lengths = np.zeros((self.shards, height), np.int32)
        row_index = np.full((self.shards, each), size, np.int32)
        next_token, index, source = np.zeros((3, self.shards, each), np.int32)
        for shard, (indices, prompts, rows) in enumerate(zip(joining, distinct, free)):
            rows, slot_of_prompt = rows[: len(indices)], {i: shard * height + at for at, i in enumerate(prompts)}
            lengths[shard, : len(prompts)] = [len(self.prompts[i]) - 1 for i in prompts]
            row_index[shard, : len(indices)] = rows
            next_token[shard, : len(indices)] = [self.prompts[i][-1] for i in indices]
            index[shard, : len(indices)] = indices
            source[shard, : len(indices)] = [slot_of_prompt[self.first_identical[i] if shared else i] for i in indices]
            self.prompt_of_row[rows], self.active[rows] = indices, True
            self.length[rows] = [len(self.prompts[i]) - 1 for i in indices]
        tokens = np.zeros((*lengths.shape, prompt_width(int(lengths.max()), self.slots)), np.int32)
        for shard, at in zip(*np.nonzero(lengths)):
            tokens[shard, at, : lengths[shard, at]] = self.prompts[distinct[shard][at]][:-1]
        arrays = tokens, lengths, next_token, index, row_index, source
        *arrays, source = (x.reshape(-1, *x.shape[2:]) for x in arrays)
        source, key = source if shared else None, self._key_of(arrays[3])
        self.state = device.prefill_into_slots(*self.model, *self.state, *arrays, source, key)

    def _key_of(self, index):
        """The key of all prompts, or of those at an index."""
        return self.key[index] if self.key.ndim else self.key

    def _prompts_to_read(self, joining: list[list[int]], each: int) -> tuple[list[list[int]], int]:
        """Of each shard the prompts that it reads for the rows that join it, and for how many its program has room.

        Room for `each`, the most rows, means that every row has its own; less, that identical prompts are read once.
        """
        distinct = [list(dict.fromkeys(self.first_identical[i] for i in indices)) for indices in joining]
        rows_per_prompt, most = self.rows_per_prompt, max(map(len, distinct))
        while rows_per_prompt > 1 and most > each // rows_per_prompt:
            rows_per_prompt //= 2
        return (joining if rows_per_prompt == 1 else distinct), each // rows_per_prompt

    def _distribute(self, free: list[int]) -> list[list[int]]:
        """The next indices of the queue for each shard, which has so many free rows: equally many, and copies together."""
        joining: list[list[int]] = [[] for _ in free]
        while self.queue and (open_ := [shard for shard, most in enumerate(free) if len(joining[shard]) < most]):
            shard = min(open_, key=lambda shard: len(joining[shard]))
            first = self.first_identical[self.queue[0]]
            for _ in range(self.rows_per_prompt):
                if self.queue and self.first_identical[self.queue[0]] == first and len(joining[shard]) < free[shard]:
                    joining[shard].append(self.queue.popleft())
        return joining

    def _resize(self) -> None:
        """Drop finished rows once the queue is empty, and have enough slots for the next tokens."""
        size, alive = len(self.active), self.active.reshape(self.shards, -1)
        if not self.queue:
            needed = max(alive.sum(axis=1).max(), min(_MIN_ROWS, alive.shape[1]))
            size = min(s for s in self.sizes if s >= self.shards * needed)
        longest = self.length[self.active].max()
        slots = self._fitting_slots(longest)
        if self._steps_before_resize(longest) > 0 and self.slots < 4 * slots:
            slots = self.slots
        if (size, slots) == (len(self.active), self.slots):
            return
        self._offload_finished()
        kept = np.argsort(~alive, axis=1, kind="stable")[:, : size // self.shards]
        rows = (kept + alive.shape[1] * np.arange(self.shards)[:, None]).reshape(-1).astype(np.int32)
        self.state = device.resize_slots(*self.state, rows, placement=self.placement, slots=slots)
        self.prompt_of_row, self.length, self.active = (x[rows] for x in (self.prompt_of_row, self.length, self.active))
        self.slots = slots

    def _needed_slots(self) -> int:
        """Slots for all that the rows, or the first that will be there, may draw."""
        indices = self.prompt_of_row[self.active] if self.active.any() else [self.queue[0]]
        return max(len(self.prompts[i]) for i in indices) - 1 + self.new

    def _fitting_slots(self, longest: int) -> int:
        """Slots for rows of which the longest holds so many tokens: all they may need where that is cheap, or the next."""
        most, small = most_slots(
            self.config, count(self.model[1]), len(self.active) // self.shards, self._needed_slots()
        )
        return most if small else min(most, _slots(longest + _MIN_LENGTH))

    def _steps_before_resize(self, longest: int) -> int:
        """How many tokens may be decoded before there must be more slots: whole checks, or all that there will be."""
        if self._needed_slots() <= self.slots:
            return self.new + device.TOKENS_PER_CHECK
        return (self.slots - longest) // device.TOKENS_PER_CHECK * device.TOKENS_PER_CHECK

    def _decode(self) -> None:
        """Decode on the device until the next refill, shrink or resize."""
        size, min_active, min_active_per_shard = len(self.active), 0, 0
        if self.queue:
            min_active = size - self._rows_needed_free()
        else:
            smaller = [s // self.shards for s in self.sizes if s < size]
            min_active_per_shard = max((s for s in smaller if s >= _MIN_ROWS), default=0)
        max_steps = self._steps_before_resize(self.length[self.active].max())
        limits = map(np.int32, (max_steps, min_active, min_active_per_shard))
        *state, steps = device.decode_until(*self.model, self.weights, *self.state, self.settings, *limits)
        self.state = state
        done, steps = jax.device_get((state[1].done, steps))
        self.length += steps * self.active
        self.active = ~done

    def _offload_finished(self) -> None:
        """Copy the samples of finished rows to the host, asynchronously, before their slots are reused."""
        prompt_of_row = np.where(self.active, -1, self.prompt_of_row)
        if (prompt_of_row >= 0).any():
            _, state = self.state
            samples = state.tokens, state.logprobs, state.count, state.sampling_logprobs
            for array in jax.tree.leaves(samples):
                array.copy_to_host_async()
            self.offloaded.append((samples, prompt_of_row))
            self.prompt_of_row = np.where(self.active, self.prompt_of_row, -1)


def rows_per_prefill(rows: int, distinct_prompts: int, rows_per_shard: int, parameters: int) -> int:
    """How many rows share one prefilled prompt, on average, rounded down to a power of two; 1 for a small model."""
    average = min(rows // max(1, distinct_prompts), rows_per_shard)
    return 1 if parameters < SMALL_MODEL or average < 2 else 1 << average.bit_length() - 1


def default_rows(shards: int, free: int | None, each: int) -> int:
    """How many completions to sample at once by default, on all `shards` of the rows together.

    32 a shard, doubled to at most 128 while half of the `free` bytes of a device (None: not known) hold so many rows of
    `each` bytes (`bytes_per_row`).
    """
    rows = _DEFAULT_ROWS
    while free is not None and rows < _MOST_ROWS and 2 * (2 * rows * each) <= free:
        rows *= 2
    return shards * rows


def bytes_per_row(
    config: DecoderConfig,
    itemsize: int,
    placement: Placement | None,
    prompt_length: int,
    new: int,
    quantization: str = "none",
) -> int:
    """About how many bytes of a device sampling takes for a row of the longest prompt and `new` tokens.

    They are the cache, with the smaller one that it grows from, the logits, and prefill's activations.
    """
    repeats = 1 if placement is None else placement.kv_repeats(config.heads, config.kv_heads)
    split = 1 if placement is None or placement.head_axis(config.heads) is None else placement.tensor_size
    vectors = 2 * config.layers * config.kv_heads * repeats // split  # of a token
    cached = vectors * vector_bytes(config.head_dim, itemsize, quantization)
    reading = itemsize * (vectors * config.head_dim + 2 * config.mlp_width // split + 3 * config.width)
    slots, width = fine_bucket(prompt_length + new, smallest=_MIN_LENGTH), bucket(prompt_length, smallest=_MIN_LENGTH)
    return 3 * slots * cached // 2 + 8 * config.vocab_size + width * reading


def prompt_width(length: int, slots: int) -> int:
    """How wide prompts of `length` tokens are padded, in few sizes, to be read into a cache of `slots`, which hold them."""
    return min(bucket(length, smallest=_MIN_LENGTH), slots)


def most_slots(config: DecoderConfig, weights: int, rows: int, length: int) -> tuple[int, bool]:
    """How many slots a cache has at most that is to hold `length` tokens in so many rows, and whether it is cheap.

    A cache that is cheap, because it is small beside the model's `weights` (their number), has all its slots at once and
    in few sizes; of another no more than a fourth stays empty.
    """
    slots, most = _slots(length), config.max_decode_length
    small = _SMALL_CACHE * rows * slots * 2 * config.layers * config.kv_heads * config.head_dim <= weights
    slots = slots if small else fine_bucket(int(length), smallest=_MIN_LENGTH)
    return slots if most is None else min(slots, max(most, int(length))), small


def _slots(length: int) -> int:
    """How many slots hold `length` tokens: 32, 64, 128, …"""
    return power_of_two(int(length), smallest=_MIN_LENGTH)
