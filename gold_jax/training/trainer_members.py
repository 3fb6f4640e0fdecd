"""Members of transformers' `Trainer` other than `train`, `evaluate` and `predict`, under the same names."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import optax
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from gold_jax.config.trl_compat import MEMBERS, nearest
from gold_jax.distributed.initialize import is_main_process
from gold_jax.json_files import read_json_object
from gold_jax.models.functional import count

# Attributes of TRL's trainer whose settings have other names.
_SETTINGS = {"log_completion_steps": "log_completions_steps"}


class TrainerMembers:
    """Mixin of a trainer with callbacks, logs, settings and parts of the run."""

    args: Any
    loop: Any
    student: Any
    state: TrainerState

    def add_callback(self, callback: Any) -> None:
        """Adds a `TrainerCallback`, or an instance of such a class; with several processes call it in all of them."""
        self.loop.callbacks.add_callback(callback)

    def pop_callback(self, callback: Any) -> TrainerCallback | None:
        """Removes a callback, or the first of a class, and returns it."""
        return self.loop.callbacks.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Removes a callback, or the first of a class."""
        self.loop.callbacks.remove_callback(callback)

    def log(self, logs: Mapping[str, Any], start_time: float | None = None) -> None:
        """Logs a line as a run does: in `metrics.jsonl` and the trackers while it trains, in `log_history` always."""
        self.loop.record(logs)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Prints metrics under a title, a line each."""
        lines = [f"***** {split} metrics *****", *(f"  {name} = {metrics[name]}" for name in sorted(metrics))]
        self.loop.say("\n".join(lines))

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Writes `{split}_results.json` into `output_dir`, and with `combined` adds to `all_results.json`."""
        if not is_main_process():
            return
        folder = pathlib.Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / f"{split}_results.json", metrics)
        if combined:
            path = folder / "all_results.json"
            _write_json(path, (read_json_object(path) if path.exists() else {}) | dict(metrics))

    def save_state(self) -> None:
        """Writes `trainer_state.json` into `output_dir`; resuming uses checkpoints instead."""
        if is_main_process():
            pathlib.Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(pathlib.Path(self.args.output_dir) / "trainer_state.json"))

    def is_world_process_zero(self) -> bool:
        """Whether this is the process that writes."""
        return is_main_process()

    is_local_process_zero = is_world_process_zero

    def get_num_trainable_parameters(self) -> int:
        """Parameters of the student: all are trained."""
        return count(self.loop.state.params)

    def get_total_train_batch_size(self, args: Any = None) -> int:
        """Completions of an update, on all devices."""
        return self.loop.data.order.per_step * self.args.completions_per_row

    def get_learning_rates(self) -> list[float]:
        """The learning rate of the next update; empty if the optimizer was passed without its schedule."""
        made = self.loop.done - self.loop.run_state.nonfinite.total
        return [] if self.lr_scheduler is None else [float(self.lr_scheduler(made))]

    @property
    def callback_handler(self):
        """transformers' `CallbackHandler`, with the callbacks of the run."""
        return self.loop.callbacks

    @property
    def control(self) -> TrainerControl:
        """The `TrainerControl` that callbacks set."""
        return self.loop.callbacks.control

    @property
    def processing_class(self):
        """The student's tokenizer, with the run's settings: a copy of what was passed."""
        return self.student.chat_tokenizer.tokenizer

    tokenizer = processing_class

    @property
    def chat_template(self) -> str:
        """The student's chat template."""
        return self.student.chat_tokenizer.template.source

    @property
    def pad_token_id(self) -> int:
        """The token that batches are padded with, which is masked."""
        return self.student.chat_tokenizer.pad_id

    @property
    def model_revision(self) -> str | None:
        """The student's revision on the hub."""
        return self.args.model_init_kwargs.get("revision")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The run's optax transformation."""
        return self.loop.run.optimizer

    @property
    def lr_scheduler(self) -> optax.Schedule | None:
        """Learning rates by the number of updates made; None if the optimizer was passed without them."""
        return self.loop.run.schedule

    def __getattr__(self, name: str) -> Any:  # for names that are no attributes
        args, kind = self.__dict__.get("args"), type(self).__name__
        if name in MEMBERS:
            raise AttributeError(f"{kind} has no {name}: {MEMBERS[name]}")
        own = _SETTINGS.get(name, name)
        if args is not None and not name.startswith("_") and hasattr(args, own):
            return getattr(args, own)
        raise AttributeError(f"{kind} has no {name}{nearest(name, dir(type(self)))}")


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")
