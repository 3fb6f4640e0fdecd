"""Trackers that a run's metrics go to: Trackio, Weights & Biases, TensorBoard."""

import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gold_jax.config import SFTConfig


def require_trackers(report_to: Sequence[str]) -> None:
    """ValueError: one of the named trackers is not installed. Nothing is imported or started."""
    for name in report_to:
        if name != "all" and not _is_installed(name):
            instead = f"pip install 'gold_jax[{name}]', or train with --report_to none"
            needs = f"--report_to {name} needs a package that is not installed: {instead}"
            raise ValueError(f"{needs} (metrics are written to the output folder anyway).")


def make_trackers(report_to: Sequence[str], config: SFTConfig) -> list[Any]:
    """Start the trackers that a run reports to, "all" those installed: objects with `log(values, step)` and `close()`.

    All fields of the run's settings are recorded. ValueError: a tracker is not installed, or does not start.
    """
    names = list(dict.fromkeys(report_to))
    if "all" in names:
        names = [name for name in _MODULES if name in names or _is_installed(name)]
    require_trackers(names)
    trackers = []
    for name in names:
        try:
            trackers.append(_TRACKERS[name](importlib.import_module(_MODULES[name]), config))
        except Exception as error:  # each library has its own; all mean that this run would not be tracked
            failed = f"--report_to {name} could not start: {type(error).__name__}: {error}"
            raise ValueError(f"{failed}. Put that right, or train with --report_to none.") from error
    return trackers


def _is_installed(name: str) -> bool:
    return sys.modules.get(_MODULES[name]) is not None or importlib.util.find_spec(_MODULES[name]) is not None


def grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metric names as transformers gives them to trackers: `eval_loss` is `eval/loss`, all others `train/...`."""
    named = {name: value for name, value in values.items() if value is not None}
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": value for k, value in named.items()}


class Trackio:
    """Reports to Trackio, on this machine or in a Space."""

    def __init__(self, module: Any, config: SFTConfig):
        named = dict(project=config.project, name=config.run_name, config=config.to_dict(), resume="allow")
        options = {"space_id": config.trackio_space_id, "private": config.hub_private_repo}
        given = {name: value for name, value in options.items() if value is not None}
        self._run = module.init(**named, **given)  # `trackio.log` would not find it from the thread that logs

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record the metrics of one step."""
        self._run.log(grouped(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class WeightsAndBiases(Trackio):
    """Reports to Weights & Biases; its WANDB_* environment variables hold."""

    def __init__(self, module: Any, config: SFTConfig):
        project = os.environ.get("WANDB_PROJECT", config.project)
        self._run = module.init(project=project, name=config.run_name, config=config.to_dict())


class TensorBoard:
    """Writes event files for TensorBoard below `output_dir/runs`."""

    def __init__(self, module: Any, config: SFTConfig):
        folder = pathlib.Path(config.output_dir) / "runs" / (config.run_name or "run")
        self._writer = module.SummaryWriter(logdir=str(folder))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record the metrics of one step; text is left out."""
        for name, value in grouped(values).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Send what is left."""
        self._writer.close()


_MODULES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboardX"}
_TRACKERS = {"trackio": Trackio, "wandb": WeightsAndBiases, "tensorboard": TensorBoard}
