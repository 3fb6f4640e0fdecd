"""The state of a run between two updates, and how checkpoints hold and restore it."""

import contextlib
import dataclasses
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from transformers.trainer_callback import TrainerState

from gold_jax.config import SFTConfig
from gold_jax.distributed.consensus import assert_same_across_processes
from gold_jax.distributed.initialize import is_main_process
from gold_jax.text.background_check import BackgroundCheck
from gold_jax.text.data import Example
from gold_jax.text.stream import RowStream, ShuffledRows, StreamOrder
from gold_jax.training import checkpointing
from gold_jax.training.batches import RowOrder, UpdateBatch
from gold_jax.training.evaluation import BestModel
from gold_jax.training.logging import RunningMean
from gold_jax.training.nonfinite import NonFiniteCounter
from gold_jax.training.resume import EVALUATED, find_and_restore
from gold_jax.training.rollout_buffer import Rollouts
from gold_jax.training.step import TrainState, state_shapes

# Of a `RunState`, stored as they are.
_PLAIN = ("run_id", "resumed", "unmeasured", "num_tokens", "completions_due", "shapes")


class Data(NamedTuple):
    """The rows that a run learns from and is measured on."""

    train: Sequence[Example] | RowStream | ShuffledRows
    eval: Sequence[Example] | Mapping[str, Sequence[Example]] | None  # several sets by their names
    order: RowOrder | StreamOrder  # in which `train` is read
    description: dict[str, Any]  # everything that the updates depend on, as JSON, for checkpoints
    background: BackgroundCheck | None = None  # the check of all rows during training

    def total_steps(self, args: SFTConfig) -> int:
        """Updates of the whole run, by `max_steps` or `num_train_epochs`. ValueError: 2**31 or more."""
        flag = "max_steps" if args.max_steps >= 0 else "num_train_epochs"
        steps = max(1, math.ceil(args.num_train_epochs * self.order.steps_per_epoch))
        steps = args.max_steps if args.max_steps >= 0 else steps
        if steps >= 2**31:
            most = "at most 2**31 - 1 can be counted"
            raise ValueError(f"--{flag} is {getattr(args, flag):g}, which is {steps:.3g} updates; {most}")
        return steps

    def poll_check(self) -> list[str]:
        """What the background check has found since the last call, as lines; raises what it raised."""
        return [] if self.background is None else self.background.poll()

    def closing_notices(self) -> list[str]:
        """Lines about rows that were checked during training. A bad row is reported, not raised: training is done."""
        try:
            lines = self.poll_check()
        except ValueError as error:
            lines = [f"The background check found a bad row, which no update has learned from: {error}"]
        except Exception as error:  # such as an OSError of the file
            lines = [f"The background check failed: {type(error).__name__}: {error}"]
        if self.background is not None:
            if not (unfinished := self.background.unfinished()):
                return lines
            lines += unfinished
        if isinstance(self.order, StreamOrder):
            lines += [f"Of the rows read so far: {line}" for line in self.order.checker.notices()]
        return lines


@dataclasses.dataclass
class RunState:
    """The state of a run other than parameters and optimizer state. Checkpoints have all of it but `losses`."""

    best: BestModel
    measured: str | None  # a digest of the rows of the evaluation before the first update
    # Distinguishes checkpoints of several runs in one folder; "" in those of early versions.
    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    # How often the run was resumed: orders checkpoints where it was resumed from an older one.
    resumed: int = 0
    done: int = 0  # updates so far
    nonfinite: NonFiniteCounter = NonFiniteCounter(0, 0)  # those of them that were skipped
    num_tokens: int = 0  # that were learned from
    means: RunningMean = dataclasses.field(default_factory=RunningMean)  # of metrics since the last line of the log
    losses: list[float] = dataclasses.field(default_factory=list)  # of the updates since the run was started or resumed
    shapes: Sequence = ()  # that batches have been padded to so far
    rollouts: Rollouts = dataclasses.field(default_factory=dict)  # drawn so far for later updates
    unmeasured: bool = False  # whether an evaluation is due after the last update
    unwritten: list[dict] = dataclasses.field(default_factory=list)  # completions that are not in their file
    completions_due: int = 0  # from which update on completions are shown again, and scored

    def advance(self, batch: UpdateBatch) -> None:
        """Counts an update of this batch."""
        self.done, self.shapes, self.rollouts = self.done + 1, batch.shapes, batch.drawn

    def count(self, nonfinite: NonFiniteCounter) -> None:
        """Copies the counter of a `TrainState`; waits for the device."""
        self.nonfinite = NonFiniteCounter(*map(int, nonfinite))

    def measure_later(self, due: bool) -> None:
        """Sets whether an evaluation is due, which checkpoints record until it is made."""
        self.unmeasured = due

    def shows_completions(self, step: int, every: int) -> bool:
        """Whether those of this update are shown: it is the first that has some in `every` updates."""
        due = step >= self.completions_due
        self.completions_due = step - step % every + every if due else self.completions_due
        return due

    @contextlib.contextmanager
    def holding(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """A context in which completions are written: if that fails, checkpoints hold them."""
        self.unwritten = rows
        yield rows
        self.unwritten = []

    def take(self, batch: UpdateBatch, metrics: dict[str, Any], nonfinite: NonFiniteCounter) -> None:
        """Adds an update's metrics and the counter of skipped updates."""
        self.count(nonfinite)
        if not metrics.pop("skipped"):
            self.losses.append(float(metrics["loss"]))
        held = {k: v for k, v in batch.stats.items() if k != "tokens"}
        self.means.add({**metrics, **held} if batch.counted else held)  # without targets there is no loss
        share = held.get("on_policy")
        if batch.counted and share in (0.0, 1.0):  # an update of both kinds has one loss for both
            self.means.add({"on_policy_loss" if share else "off_policy_loss": metrics["loss"]})
        self.num_tokens += int(batch.stats["tokens"])

    def metadata(self, data: Data) -> dict[str, Any]:
        """What a checkpoint stores of it, as JSON; waits for the device."""
        measured = {} if self.measured is None else {EVALUATED: self.measured}
        metadata = {name: getattr(self, name) for name in _PLAIN} | {"run": data.description | measured}
        metadata |= {"means": self.means.state(), "skips": self.nonfinite._asdict()}
        if isinstance(data.order, StreamOrder):
            metadata["stream"] = data.order.position(self.done)
        metadata |= {"unwritten": self.unwritten} if self.unwritten else {}
        return metadata | ({} if self.best.saved is None else {"best": self.best.state()})

    def restored(self, metadata: Mapping[str, Any], data: Data, folder: Any) -> "RunState":
        """This state of a new run as a checkpoint in `folder` left it, but for the unwritten completions."""
        if isinstance(data.order, StreamOrder):
            data.order.resume(metadata["step"], metadata["stream"])
        found = {"run_id": ""} | {name: metadata[name] for name in (*_PLAIN, "rollouts") if name in metadata}
        found |= {"done": metadata["step"], "nonfinite": NonFiniteCounter(**metadata["skips"])}
        found |= {"resumed": metadata.get("resumed", 0) + 1}
        found |= {"measured": metadata["run"].get(EVALUATED, self.measured)}
        if (best := metadata.get("best")) is not None:
            self.best.restore(best, folder)
        self.means.restore(metadata["means"])
        return dataclasses.replace(self, **found)


def trainer_state(now: RunState, args: SFTConfig, data: Data, history: list[dict[str, Any]]) -> TrainerState:
    """The state of a run as transformers has it; its `log_history` is not a copy."""
    total, per_epoch, main = data.total_steps(args), data.order.steps_per_epoch, is_main_process()
    found = {name: args.interval(name, total) for name in ("logging_steps", "eval_steps", "save_steps")}
    if (best := now.best.best) is not None:
        found |= {"best_metric": best.metric, "best_global_step": best.step}
    return TrainerState(
        epoch=now.done / per_epoch, global_step=now.done, max_steps=total, num_train_epochs=math.ceil(total / per_epoch),
        num_input_tokens_seen=now.num_tokens, train_batch_size=args.per_device_train_batch_size, log_history=history,
        best_model_checkpoint=now.best.checkpoint, is_world_process_zero=main, is_local_process_zero=main, **found,
    )  # fmt: skip


def named_for_checkpoints(optimizer: optax.GradientTransformation, state: TrainState) -> dict[str, Any]:
    """A state, or its shapes, under the names of checkpoints: parameters, and moments of them, end with `.value`."""
    kept = optax.tree.map_params(optimizer, _boxed, state.optimizer)
    return {"params": jax.tree.map(_boxed, state.params), "optimizer": kept}


def find_checkpoint(
    wanted: str, folder: Any, run: Mapping, params: Any, optimizer: Any, say: Callable[[str], Any], last: int
) -> tuple[Any, dict[str, Any], TrainState] | None:
    """The checkpoint to resume from, as `find_and_restore`: path, metadata, and state, sharded as `params`."""
    shapes = state_shapes(optimizer, _shapes(params))
    found = find_and_restore(wanted, folder, run, named_for_checkpoints(optimizer, shapes), say, last)
    assert_same_across_processes("the checkpoint to resume from", None if found is None else str(found[0]))
    if found is None:
        return None
    path, metadata, arrays = found
    boxed = jax.tree.leaves((arrays["params"], arrays["optimizer"]))
    params, kept = jax.tree.unflatten(jax.tree.structure((shapes.params, shapes.optimizer)), boxed)
    counts, shapes = (metadata["step"], NonFiniteCounter(**metadata["skips"])), (shapes.step, shapes.nonfinite)
    counts = jax.tree.map(lambda count, x: jax.device_put(np.int32(count), x.sharding), counts, shapes)
    return path, metadata, TrainState(params, kept, *counts)


def read_params(path: str, params: Any) -> Any:
    """The parameters of a checkpoint, sharded as `params`; BadCheckpoint if it is incomplete."""
    shapes = _shapes(params)
    abstract = {"params": jax.tree.map(_boxed, shapes)}
    arrays = checkpointing.restore(path, checkpointing.read_metadata(path), abstract)
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(arrays))


def _boxed(x: Any) -> dict[str, Any]:
    return {"value": x}


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
