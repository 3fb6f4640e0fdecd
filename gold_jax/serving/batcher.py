"""Continuous batching: a thread that decodes all running sequences, in a fixed number of slots on the device.

A sequence that is submitted waits in a bounded queue for a free slot and joins the others between two rounds of a few
tokens; prompts whose log-probabilities are requested are scored then. Programs are compiled for few sizes: slots of the cache and
widths of prompts in powers of two, one number of rows, one of prompts. `compile` compiles them before they are needed.
"""

import collections
import dataclasses
import functools
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gold_jax import progress
from gold_jax.bucketing import power_of_two
from gold_jax.models.functional import commit, count, merge, split
from gold_jax.models.quantization import KV_CACHE
from gold_jax.rollout import decode_state as device
from gold_jax.rollout.sampler import SMALL_MODEL, STOP_SLOTS
from gold_jax.serving import programs

ROUND = 16  # most tokens of a sequence per round; the queue is polled between rounds
_ROUND_SECONDS = 0.1  # about how long a round may take
STOPPING = "the server is stopping"
_LAST_SECONDS = 30  # that `close` waits for the last round, which may compile
_LONGEST = 4096
COMPILED_LENGTH = 1024  # most tokens of the sequences that a server compiles its programs for before it serves


class QueueFull(Exception):
    """The queue has no room for the submitted sequences."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """New tokens of a sequence, or the tokens of its prompt except the first."""

    ids: np.ndarray  # int32 [N]
    logprobs: np.ndarray  # float32 [N], at temperature 1 and unfiltered
    top_ids: np.ndarray  # int32 [N, K]; zeros unless requested
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
        quantization: "int8" decodes with quantized weights, "int8_kv_cache" with a quantized cache too, as
            `rollout.sampler.SamplingEngine`.
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
        self._int8_cache = quantization == KV_CACHE
        stops = [*stop_ids] + [-1] * (-len(stop_ids) % STOP_SLOTS)
        self._stops = np.array(stops, np.int32)
        self.rows, self.queue_size, self.max_length = rows, queue_size, max_length
        small = count(params) < SMALL_MODEL
        self._prompts_at_once = rows if small else 1  # decoding waits for them
        self._least = power_of_two(min(least or (128 if small else 64), max_length))
        self._sizes: set[int] = set()  # that programs have been compiled for
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

    def compile(self, length: int, *, scoring: bool = True) -> None:
        """Compiles the programs for sequences of up to `length` tokens, so that no request waits for it.

        With `scoring` also those for the log-probabilities of prompts.
        """
        largest = power_of_two(min(length, self.max_length))
        sizes = [1 << n for n in range(self._least.bit_length() - 1, largest.bit_length())]
        sizes = [size for size in sizes if size not in self._sizes]
        self._sizes.update(sizes)
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        with jax.default_device(self._device):
            for size in progress.track(sizes, "compiling for sequences of all sizes"):
                prompts = self._pad([np.zeros(size, np.int32)])
                if scoring:
                    programs.score_tokens.lower(*self._model, *prompts, np.bool_(False)).compile()
                programs.prefill.lower(*self._model, *prompts, int8_cache=self._int8_cache).compile()
                shapes = jax.eval_shape(functools.partial(self._empty_slots, size))
                state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
                programs.decode_round.lower(*self._model, self._weights, *state, *self._settings()).compile()

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
        self._slots_per_row, self._seconds_per_step = 0, 0.0

    def _run(self) -> None:
        with jax.default_device(self._device):
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._closed or self.waiting or self.running)
                    if self._closed:
                        return self._fail(STOPPING)
                try:
                    self._step()
                except Exception as error:  # the thread must live: waiting requests receive the error
                    traceback.print_exc()
                    self._fail(f"{type(error).__name__}: {error}")
                    self._reset()

    def _fail(self, why: str) -> None:
        with self._lock:
            lost = [*self._waiting, *self._scoring, *(slot for slot in self._slots if slot is not None)]
            self._waiting.clear()
            self._scoring.clear()
        for sequence in lost:
            self._send(sequence, "error", why)

    def _send(self, sequence: Request, kind: str, value: Any) -> None:
        if not sequence.cancelled:
            sequence.receive(kind, value)

    def _step(self) -> None:
        """Scores and admits waiting sequences, then decodes a round."""
        self._score()
        for row, sequence in enumerate(self._slots):
            if sequence is not None and sequence.cancelled:
                self._slots[row] = None
        self._admit()
        if self.running:
            self._decode()

    def _score(self) -> None:
        """Scores the next prompts; sequences that are to be continued then wait for a slot."""
        with self._lock:
            some = [self._scoring.popleft() for _ in range(min(self._prompts_at_once, len(self._scoring)))]
        if not some:
            return
        try:
            wants_top = np.bool_(any(sequence.top for sequence in some))
            tokens = self._pad([sequence.prompt for sequence in some])
            found = jax.device_get(programs.score_tokens(*self._model, *tokens, wants_top))
        except Exception:
            with self._lock:  # so that they receive the error
                self._scoring.extendleft(some[::-1])
            raise
        for at, sequence in enumerate(some):
            self._deliver(sequence, "prompt", [x[at, : len(sequence.prompt) - 1] for x in found])
            if not sequence.max_tokens:
                self._send(sequence, "end", "length")
        with self._lock:
            self._waiting.extendleft([s for s in some if s.max_tokens and not s.cancelled][::-1])

    def _size(self, length: int) -> int:
        """The size that programs for `length` tokens are compiled for."""
        size = power_of_two(length, smallest=self._least)
        if size not in self._sizes:
            self._sizes.add(size)
            print(f"compiling for sequences of up to {size} tokens; requests wait for it", file=sys.stderr, flush=True)
        return size

    def _pad(self, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts padded to int32 [B, T], and their lengths, int32 [B]."""
        shape = self._prompts_at_once, self._size(max(map(len, prompts)))
        tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for at, prompt in enumerate(prompts):
            tokens[at, : len(prompt)], lengths[at] = prompt, len(prompt)
        return tokens, lengths

    def _admit(self) -> None:
        """Prefills waiting sequences into free slots; the result for one does not depend on the others."""
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
        rows: dict[bytes, list[int]] = {}  # of each prompt
        for row, sequence in zip(free, joining):
            rows.setdefault(sequence.prompt[:-1].tobytes(), []).append(row)
        by_size = collections.defaultdict(list)
        for prompt in rows.values():
            by_size[self._size(int(self._length[prompt[0]]))].append(prompt)
        for prompts in by_size.values():
            for at in range(0, len(prompts), self._prompts_at_once):
                self._prefill(prompts[at : at + self._prompts_at_once])

    def _prefill(self, rows_of_prompts: Sequence[Sequence[int]]) -> None:
        """Prefills prompts, each into the rows given for it."""
        prompts = [self._slots[rows[0]].prompt[:-1] for rows in rows_of_prompts]
        prefilled = programs.prefill(*self._model, *self._pad(prompts), int8_cache=self._int8_cache)
        source, row_index, next_token, seed, index = np.zeros((5, self.rows), np.int32)
        pairs = [(at, row) for at, rows in enumerate(rows_of_prompts) for row in rows]
        for at, (prompt, row) in enumerate(pairs):
            sequence = self._slots[row]
            source[at], row_index[at], next_token[at] = prompt, row, sequence.prompt[-1]
            seed[at], index[at] = np.int64(sequence.seed).astype(np.int32), sequence.index
        arrays = source, row_index, np.int32(len(pairs)), next_token, programs.row_keys(seed, index)
        self._state = programs.insert(*self._state, prefilled, *arrays)

    def _resize(self) -> None:
        """Resizes the cache to what the longest sequence needs for the next round, in powers of two."""
        active = [row for row, slot in enumerate(self._slots) if slot is not None]
        needed = self._size(min(int(self._length[active].max()) + ROUND, self.max_length))
        if self._state is None:
            self._state = commit(self._empty_slots(needed))
        elif needed > self._slots_per_row or self._slots_per_row >= 4 * needed:
            self._state = device.resize_slots(*self._state, np.arange(self.rows, dtype=np.int32), slots=needed)
        else:
            return
        self._slots_per_row = needed

    def _empty_slots(self, size: int) -> tuple:
        options = {"config": self._config, "dtype": self._dtype, "rows": self.rows, "new": ROUND}
        return device.empty_slots(self._no_key, slots=size, int8_cache=self._int8_cache, **options)

    def _settings(self) -> tuple:
        """The last arguments of `programs.decode_round` for the current slots."""
        now = self._slots
        column = lambda name, off: np.array([off if s is None else getattr(s, name) for s in now])  # noqa: E731
        settings = [column("temperature", 0.0), column("top_k", 0), column("top_p", 1.0)]
        options = programs.row_options(*settings, self._stops, column("max_tokens", 1))
        done = np.array([slot is None for slot in now])
        steps = ROUND
        if self._seconds_per_step:
            steps = min(ROUND, max(1, int(_ROUND_SECONDS / self._seconds_per_step)))
        with self._lock:
            min_active = self.running - 1 if self.waiting else 0
        wants_top = any(slot is not None and slot.top for slot in now)
        return options, done, np.int32(steps), np.int32(min_active), np.bool_(wants_top)

    def _decode(self) -> None:
        """Decodes one round: a few tokens of every sequence."""
        settings, began = self._settings(), time.perf_counter()
        cache, state, *found = programs.decode_round(*self._model, self._weights, *self._state, *settings)
        self._state = cache, state
        drawn, counts, ended = jax.device_get((*found, state.done))
        if taken := int(counts.max()):
            self._seconds_per_step = (time.perf_counter() - began) / taken
        self._length += counts
        for row, sequence in enumerate(self._slots):
            if sequence is None:
                continue
            sequence.written += int(counts[row])
            if not self._deliver(sequence, "tokens", [x[row, : counts[row]] for x in drawn]):
                self._slots[row] = None
            elif ended[row]:
                stopped = drawn.tokens[row, counts[row] - 1] in self._stops
                self._slots[row] = None
                self._send(sequence, "end", "stop" if stopped else "length")

    def _deliver(self, sequence: Request, kind: str, arrays: list[np.ndarray]) -> bool:
        """Sends tokens to a sequence, or an error if they are not finite; returns whether it continues."""
        tokens = Tokens(*arrays)
        if np.isfinite(tokens.logprobs).all():
            self._send(sequence, kind, tokens)
            return True
        self._send(
            sequence, "error", "the model's logits are not finite: its weights are not, or it overflows on this prompt"
        )
        sequence.cancelled = True
        return False


def longest_sequence(decoder) -> int:
    """The default `max_length`: the model's `max_position_embeddings`, at most 4096 so that caches fit."""
    config, most = json.loads(decoder.config.source).get("config") or {}, decoder.config.max_decode_length or _LONGEST
    most = 1 << most.bit_length() - 1  # slots are powers of two
    return min(_LONGEST, most, (config.get("text_config") or config).get("max_position_embeddings") or _LONGEST)
