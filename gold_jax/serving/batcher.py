"""Continuous batching: a thread that decodes all running sequences, in a fixed number of slots on the device.

A sequence that is submitted waits in a bounded queue for a free slot and joins the others between two rounds of a few
tokens; so do prompts whose log-probabilities are asked for. Programs are compiled for few sizes: slots of the cache and
widths of prompts in powers of two, one number of rows, three numbers of prompts.
"""

import collections
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gold_jax.bucketing import power_of_two
from gold_jax.models.functional import commit, count, merge, split
from gold_jax.rollout import decode_state as device
from gold_jax.rollout.sampler import SMALL_MODEL, STOP_SLOTS
from gold_jax.serving import programs

ROUND = 16  # most tokens of a sequence per round; the queue is polled between rounds
_ROUND_SECONDS = 0.1  # about how long a round may take
STOPPING = "the server is stopping"
_LAST_SECONDS = 30  # that `close` waits for the last round, which may compile
_LONGEST = 4096
_SCORED = 4  # prompts that are scored in one program at most: decoding waits for it
_TOPS = (0, 1, 5, 20)  # numbers of likeliest tokens that programs are compiled for
MOST_TOP = _TOPS[-1]


class QueueFull(Exception):
    """The queue has no room for the submitted sequences."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """New tokens of a sequence, or the tokens of its prompt except the first."""

    ids: np.ndarray  # int32 [N]
    logprobs: np.ndarray  # float32 [N], at temperature 1 and unfiltered
    top_ids: np.ndarray  # int32 [N, K]; K is at least what was asked for
    top_logprobs: np.ndarray  # float32 [N, K], descending


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence to generate, and the callback that receives its tokens.

    `receive(kind, value)` is called in the batcher's thread and must not block. Kinds and values: "prompt", `Tokens` of
    the prompt (with `score_prompt`); "tokens", new `Tokens`; "end", "stop" or "length"; "error", a message.
    """

    prompt: np.ndarray  # int32 [P], at least one token
    receive: Callable[[str, Any], None]
    max_tokens: int  # 0: the prompt is only scored
    seed: int = 0  # of sampling, with `index`, the number of the completion among those of the prompt
    index: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    top: int = 0  # how many of the most likely tokens are returned
    score_prompt: bool = False
    cancelled: bool = False
    written: int = 0


class Batcher:
    """Generates sequences with one model on one device; `submit` is thread-safe.

    Args:
        model: a `Decoder`.
        stop_ids: tokens that end a sequence.
        rows: how many sequences are decoded at once.
        queue_size: how many may wait.
        max_length: most tokens of a sequence, its prompt included; the caller enforces it.
        quantization: "int8" decodes with quantized weights, as `rollout.sampler.SamplingEngine`.
        least: least prompt width and cache length; a higher one compiles fewer programs and pads more.
    """

    def __init__(
        self,
        model,
        stop_ids: Sequence[int],
        *,
        rows: int,
        queue_size: int,
        max_length: int,
        quantization: str = "none",
        least: int | None = None,
    ):
        graph, params = split(model)
        self._model, self._config, self._dtype = (graph, commit(params)), model.config, model.dtype
        self._weights = merge(*self._model).decoding_weights(quantization)
        stops = [*stop_ids] + [-1] * (-len(stop_ids) % STOP_SLOTS)
        self._stops = np.array(stops, np.int32)
        self.rows, self.queue_size, self.max_length = rows, queue_size, max_length
        small = count(params) < SMALL_MODEL
        self._prompts_at_once = [rows] if small else sorted({1, min(4, rows), rows})
        self._least = power_of_two(min(least or (128 if small else 32), max_length))
        self._device = next(iter(jax.tree.leaves(self._model[1])[0].devices()))
        self._no_key = jax.random.key(0)
        self._lock = threading.Condition()
        self._waiting: collections.deque[Request] = collections.deque()
        self._scoring: collections.deque[Request] = collections.deque()
        self._closed = False
        self._reset()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, sequences: Sequence[Request]) -> None:
        """Queues sequences, all or none of them; `QueueFull` if there is no room for all."""
        with self._lock:
            if self._closed:
                raise QueueFull
            if self.waiting + len(sequences) > self.queue_size + self.rows - self.running:
                raise QueueFull
            for sequence in sequences:
                (self._scoring if sequence.score_prompt else self._waiting).append(sequence)
            self._lock.notify()

    def cancel(self, sequence: Request) -> None:
        """Cancels a waiting or running sequence; it receives nothing more."""
        with self._lock:
            sequence.cancelled = True
            for queue in (self._waiting, self._scoring):
                if sequence in queue:
                    queue.remove(sequence)
            self._lock.notify()

    @property
    def waiting(self) -> int:
        """How many sequences wait for a slot."""
        return len(self._waiting) + len(self._scoring)

    @property
    def running(self) -> int:
        """How many sequences are in slots."""
        return sum(slot is not None for slot in self._slots)

    def close(self) -> None:
        """Ends the thread after its current round; unfinished sequences receive an error."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join(_LAST_SECONDS)

    def _reset(self) -> None:
        self._slots: list[Request | None] = [None] * self.rows
        self._length = np.zeros(self.rows, int)  # tokens in the cache of each slot
        self._state: tuple | None = None
        self._size, self._seconds_per_step = 0, 0.0

    def _run(self) -> None:
        with jax.default_device(self._device):
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._closed or self.waiting or self.running)
                    if self._closed:
                        return self._fail(STOPPING)
                try:
                    self._turn()
                except Exception as error:  # the thread must live: whoever waits is told
                    self._fail(f"{type(error).__name__}: {error}")
                    self._reset()

    def _fail(self, why: str) -> None:
        with self._lock:
            lost = [*self._waiting, *self._scoring, *(slot for slot in self._slots if slot is not None)]
            self._waiting.clear()
            self._scoring.clear()
        for sequence in lost:
            self._tell(sequence, "error", why)

    def _tell(self, sequence: Request, kind: str, value: Any) -> None:
        if not sequence.cancelled:
            sequence.receive(kind, value)

    def _turn(self) -> None:
        """Scores and admits waiting sequences, then decodes a round."""
        self._score()
        for row, sequence in enumerate(self._slots):
            if sequence is not None and sequence.cancelled:
                self._slots[row] = None
        self._join()
        if self.running:
            self._decode()

    def _score(self) -> None:
        """Scores the next prompts; sequences that are to be continued then wait for a slot."""
        with self._lock:
            some = [self._scoring.popleft() for _ in range(min(_SCORED, len(self._scoring)))]
        if not some:
            return
        try:
            height = 1 if len(some) == 1 else _SCORED
            width = self._width(max(len(sequence.prompt) for sequence in some))
            tokens, lengths = np.zeros((height, width), np.int32), np.zeros(height, np.int32)
            for at, sequence in enumerate(some):
                tokens[at, : len(sequence.prompt)], lengths[at] = sequence.prompt, len(sequence.prompt)
            top = _top_of(some)
            found = jax.device_get(programs.score_tokens(*self._model, tokens, lengths, top=top))
        except Exception:
            with self._lock:  # so that they receive the error
                self._scoring.extendleft(some[::-1])
            raise
        for at, sequence in enumerate(some):
            self._give(sequence, "prompt", [x[at, : len(sequence.prompt) - 1] for x in found])
            if not sequence.max_tokens:
                self._tell(sequence, "end", "length")
        with self._lock:
            self._waiting.extendleft([s for s in some if s.max_tokens and not s.cancelled][::-1])

    def _width(self, length: int) -> int:
        return power_of_two(length, smallest=self._least)

    def _join(self) -> None:
        """The next sequences that wait are read into free slots."""
        free = [row for row, slot in enumerate(self._slots) if slot is None]
        with self._lock:
            joining = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
            for row, sequence in zip(free, joining):
                self._slots[row] = sequence
        self._length[free] = 0
        self._length[free[: len(joining)]] = [len(sequence.prompt) - 1 for sequence in joining]
        if not self.running:
            return
        self._resize()
        if not joining:
            return
        prompts: dict[bytes, int] = {}
        source = [prompts.setdefault(sequence.prompt.tobytes(), len(prompts)) for sequence in joining]
        height = min(size for size in self._prompts_at_once if size >= len(prompts))
        lengths = np.zeros(height, np.int32)
        tokens = np.zeros((height, self._width(max(len(s.prompt) - 1 for s in joining))), np.int32)
        next_token, index, source_of_row, seed = np.zeros((4, self.rows), np.int32)
        row_index = np.full(self.rows, self.rows, np.int32)
        for at, (row, sequence) in enumerate(zip(free, joining)):
            ids = sequence.prompt
            tokens[source[at], : len(ids) - 1], lengths[source[at]] = ids[:-1], len(ids) - 1
            next_token[at], row_index[at], source_of_row[at] = ids[-1], row, source[at]
            seed[at], index[at] = np.int64(sequence.seed).astype(np.int32), sequence.index
        keys = programs.row_keys(seed, index)
        arrays = tokens, lengths, next_token, index, row_index, source_of_row, keys
        self._state = device.prefill_into_slots(*self._model, *self._state, *arrays)

    def _resize(self) -> None:
        """Resizes the cache to what the longest sequence needs for the next round, in powers of two."""
        active = [row for row, slot in enumerate(self._slots) if slot is not None]
        needed = self._width(int(self._length[active].max()) + ROUND)
        if self._state is None:
            options = {"config": self._config, "dtype": self._dtype, "rows": self.rows, "new": ROUND}
            self._state = device.empty_slots(self._no_key, slots=needed, **options)
        elif needed > self._size or self._size >= 4 * needed:
            self._state = device.resize_slots(*self._state, np.arange(self.rows, dtype=np.int32), slots=needed)
        else:
            return
        self._size = needed

    def _decode(self) -> None:
        """One round: a few tokens of every sequence."""
        now = self._slots
        column = lambda name, off: np.array([off if s is None else getattr(s, name) for s in now])  # noqa: E731
        settings = [column("temperature", 0.0), column("top_k", 0), column("top_p", 1.0)]
        options = programs.row_options(*settings, self._stops, column("max_tokens", 1))
        done = np.array([slot is None for slot in now])
        steps = (
            ROUND if not self._seconds_per_step else min(ROUND, max(1, int(_ROUND_SECONDS / self._seconds_per_step)))
        )
        with self._lock:
            min_active = self.running - 1 if self.waiting else 0
        began = time.perf_counter()
        limits = np.int32(steps), np.int32(min_active)
        top = _top_of([slot for slot in now if slot is not None])
        cache, state, *found = programs.decode_round(
            *self._model, self._weights, *self._state, options, done, *limits, top=top
        )
        self._state = cache, state
        drawn, counts, ended = jax.device_get((*found, state.done))
        if taken := int(counts.max()):
            self._seconds_per_step = (time.perf_counter() - began) / taken
        self._length += counts
        for row, sequence in enumerate(now):
            if sequence is None:
                continue
            sequence.written += int(counts[row])
            if not self._give(sequence, "tokens", [x[row, : counts[row]] for x in drawn]):
                self._slots[row] = None
            elif ended[row]:
                stopped = drawn.tokens[row, counts[row] - 1] in self._stops
                self._slots[row] = None
                self._tell(sequence, "end", "stop" if stopped else "length")

    def _give(self, sequence: Request, kind: str, arrays: list[np.ndarray]) -> bool:
        """Sends tokens to a sequence, or an error if they are not finite; returns whether it continues."""
        tokens = Tokens(*arrays)
        if np.isfinite(tokens.logprobs).all():
            self._tell(sequence, kind, tokens)
            return True
        self._tell(
            sequence, "error", "the model's logits are not finite: its weights are not, or it overflows on this prompt"
        )
        sequence.cancelled = True
        return False


def longest_sequence(decoder) -> int:
    """The default `max_length`: the model's `max_position_embeddings`, at most 4096 so that caches fit."""
    config = json.loads(decoder.config.source).get("config") or {}
    return min(_LONGEST, (config.get("text_config") or config).get("max_position_embeddings") or _LONGEST)


def _top_of(sequences: Sequence[Request]) -> int:
    """For how many of the likeliest tokens the program is that all of them use."""
    most = max(sequence.top for sequence in sequences)
    return next(size for size in _TOPS if size >= most)
