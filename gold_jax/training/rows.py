"""The rows that a run learns from: checked before it, as they are read, or beside it; and the order of them."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import jax
from rich.console import Console

from gold_jax.compilation_cache import user_caches
from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.text import check_cache
from gold_jax.text.background_check import BackgroundCheck
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import CheckedRows, RowChecker, check_examples
from gold_jax.text.data import Example
from gold_jax.text.stream import RowStream, ShuffledRows, StreamOrder
from gold_jax.text.surface import backend_of
from gold_jax.training.batches import RowOrder
from gold_jax.training.resume import describe_tokenizer
from gold_jax.wording import plural

_CACHED_FROM = 10_000  # rows: results of checking fewer are not cached
_BACKGROUND_FROM = 200_000  # rows: with `check_rows="auto"`, fewer are checked before training


class TrainingRows(NamedTuple):
    """The rows that can be learned from."""

    examples: Sequence[Example] | RowStream | ShuffledRows
    order: RowOrder | StreamOrder
    digest: str
    notices: list[str]  # those of rows that are checked during training come when they are read
    count: int | None = None  # None: they are checked during training
    background: BackgroundCheck | None = None  # the check of all rows during training

    @property
    def checked(self) -> str:
        """When rows are checked, as checkpoints record it: "beside" training, or "before" it (those of streams, too)."""
        return "beside" if isinstance(self.examples, ShuffledRows) else "before"


def check_training_rows(
    args: SFTConfig,
    examples: Sequence[Example] | RowStream,
    learned: Any,
    chat_tokenizer: ChatTokenizer,
    shards: int,
    console: Console,
    **options: Any,
) -> TrainingRows:
    """Checks the rows of a run over so many shards, or prepares that they are checked during training.

    `options` are those of `check_examples`; `learned` is everything that `count_targets` depends on besides the
    tokenizers. ValueError: a row is bad, or `check_rows` is "beside" and other settings need all rows.
    """
    per_step, background = args.rows_per_update * shards, None
    options["source"] = getattr(examples, "source", "the data set")
    if not isinstance(examples, RowStream):
        if not _checks_in_background(args, len(examples)):
            checked, cached = _check_all(examples, learned, chat_tokenizer, options)
            if cached:
                console.print(f"The {len(examples):,} rows were checked in an earlier run, with the same settings.")
            notices = [*examples.notices, *checked.notices]
            if cut := len(getattr(examples, "shortened", ())):
                notices.append(f"--truncation_mode keep_end: the beginning of {plural(cut, 'prompt')} was cut off")
            order = RowOrder(checked.kept, per_step, args.seed)
            return TrainingRows(examples, order, checked.digest, notices, len(checked.kept))
        if jax.process_count() == 1:
            # With tokenizers of its own: setting truncation and padding is not thread-safe.
            own = examples, learned, *copy.deepcopy((chat_tokenizer, options))
            background = BackgroundCheck(lambda after_block: _check_all(*own, after_block)[0], len(examples))
        else:
            console.print("With several processes there is no background check: rows are checked as they are used.")
        examples = ShuffledRows.of(examples)
    say, checker = functools.partial(console.print, markup=False, soft_wrap=True), RowChecker(chat_tokenizer, **options)
    order = StreamOrder(examples, checker, per_step, args.seed, args.max_steps, say)
    return TrainingRows(examples, order, examples.digest, list(examples.notices), None, background)


def needs_all_rows(args: SFTConfig) -> str | None:
    """Which setting needs all rows to be known before training, and what to set instead; None: none does."""
    if args.max_steps < 0:
        return "say with --max_steps how many updates to make"
    if "epoch" in (args.eval_strategy, args.save_strategy):
        return "no epoch ends at an update: use steps"
    if args.truncation_mode == "keep_end":
        return "prompts are not shortened: use --truncation_mode keep_start"
    if isinstance(args, GOLDConfig) and args.rollout_batches > 1:
        return "completions are drawn for one update: use --rollout_batches 1"
    return None


def _checks_in_background(args: SFTConfig, count: int) -> bool:
    """Whether rows are checked during training; ValueError if that is requested and not possible."""
    when, why = args.check_rows, needs_all_rows(args)
    if when == "beside" and why:
        raise ValueError(f"--check_rows beside does not know all rows when training begins: {why}")
    return when == "beside" or (when == "auto" and not why and count >= _BACKGROUND_FROM)


def _check_all(
    examples: Any,
    learned: Any,
    chat_tokenizer: ChatTokenizer,
    options: dict[str, Any],
    after_block: Callable[[RowChecker], Any] | None = None,
) -> tuple[CheckedRows, bool]:
    """The result of `check_examples` for all rows, and whether it comes from the cache of an earlier run."""
    check = functools.partial(check_examples, examples, chat_tokenizer, after_block, **options)
    sides = [chat_tokenizer, *filter(None, [options.get("teacher")])]
    known = all(backend_of(side.tokenizer) is not None for side in sides)  # digests of others are incomplete
    large = len(examples) >= _CACHED_FROM and datasets.is_caching_enabled()
    if not (known and large and (data := check_cache.data_key(examples))):
        return check(), False
    key = {name: value for name, value in options.items() if name not in ("teacher", "count_targets")}
    key |= {"data": data, "code": check_cache.code_key(), "learned": repr(learned)}
    key["sides"] = [check_cache.tokenizer_key(side, describe_tokenizer(side)) for side in sides]
    return check_cache.remembered(user_caches() / "checked", key, check)
