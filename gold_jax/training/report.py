"""Where a run is reported: trackers, the model card, and the hub."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from gold_jax.config import TRACKERS, SFTConfig

_MODULES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboardX"}
_MARK = "<!-- written by gold_jax -->"
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class HubError(RuntimeError):
    """The hub refused or could not be reached; the text says where the model lies."""


class HubSilent(HubError):
    """The hub does not answer now; it may later."""


def make_trackers(report_to: Sequence[str], config: SFTConfig) -> list[Any]:
    """Start the trackers that a run reports to.

    Args:
        report_to: "trackio", "wandb", "tensorboard"; "all" stands for those that are installed.
        config: reads output_dir, project, run_name, trackio_space_id and hub_private_repo; all fields are recorded.

    Returns:
        Objects with `log(values, step)` and `close()`.

    Raises:
        ValueError: a tracker is unknown, not installed, or does not start.
    """
    names = list(report_to)
    if "all" in names:
        names = [name for name in TRACKERS if name in names or importlib.util.find_spec(_MODULES[name]) is not None]
    trackers = []
    for name in dict.fromkeys(names):
        if name not in _STARTERS:
            raise ValueError(f"--report_to names {name!r}; it must be none or some of {', '.join((*TRACKERS, 'all'))}.")
        try:
            module = importlib.import_module(_MODULES[name])
        except ImportError:
            raise ValueError(
                f'--report_to {name} needs a package that is not installed: pip install "gold_jax[{name}]", or train '
                "with --report_to none (metrics are written to the output folder anyway)."
            ) from None
        try:
            trackers.append(_STARTERS[name](module, config))
        except Exception as error:  # each library has its own; all mean that this run would not be tracked
            raise ValueError(
                f"--report_to {name} could not start: {type(error).__name__}: {error}. Put that right, or train with "
                "--report_to none."
            ) from error
    return trackers


def grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metric names as transformers gives them to trackers: `eval_loss` is `eval/loss`, all others `train/...`."""
    named = {}
    for name, value in values.items():
        if value is not None:
            named[f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"] = value
    return named


class Trackio:
    """Reports to Trackio, on this machine or in a Space."""

    def __init__(self, module: Any, config: SFTConfig):
        options = {"space_id": config.trackio_space_id, "private": config.hub_private_repo}
        given = {name: value for name, value in options.items() if value is not None}
        # Metrics are logged from another thread, where `trackio.log` would not find this run.
        self._run = module.init(
            project=config.project, name=config.run_name, config=config.to_dict(), resume="allow", **given
        )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record the metrics of one step."""
        self._run.log(grouped(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class WeightsAndBiases:
    """Reports to Weights & Biases; its WANDB_* environment variables hold."""

    def __init__(self, module: Any, config: SFTConfig):
        project = os.environ.get("WANDB_PROJECT", config.project)
        self._run = module.init(project=project, name=config.run_name, config=config.to_dict())

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record the metrics of one step."""
        self._run.log(grouped(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


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


_STARTERS = {"trackio": Trackio, "wandb": WeightsAndBiases, "tensorboard": TensorBoard}


def create_hub_repository(
    repo_id: str | None, folder: str | os.PathLike, private: bool | None, token: str | None
) -> str:
    """Make the repository that a run will be pushed to; called before training, so that a bad token shows at once.

    Args:
        repo_id: `user/name`; None: the name of `folder` under the token's account.
        folder: the run's output folder.
        private: None: the account's default.
        token: None: the one that is stored on this machine.

    Returns:
        The repository's full name.

    Raises:
        HubSilent: it does not answer.
        HubError: with what the hub said.
    """
    from huggingface_hub import HfApi

    repo_id = repo_id or pathlib.Path(folder).resolve().name
    try:
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:
        if _no_answer(error):
            raise HubSilent(
                f"--push_to_hub: the hub does not answer ({type(error).__name__}: {_first_line(error)}); training goes on, and "
                "the push is tried when it is done."
            ) from error
        raise HubError(
            f"--push_to_hub cannot use the repository {repo_id!r}: {type(error).__name__}: {_first_line(error)}. Log in with "
            "`hf auth login` or give --hub_token, and check --hub_model_id."
        ) from error


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str | None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Trained with gold_jax",
) -> str:
    """Upload a folder with a trained model; earlier saves (`checkpoint-*`) and event files stay at home.

    Args:
        folder: what to upload.
        repo_id: `user/name`; None: the name of `folder` under the token's account.
        private: whether a repository that is made now is private; None: the account's default.
        token: None: the one that is stored on this machine.
        commit_message: the commit's title.

    Returns:
        The address of the commit.

    Raises:
        HubError: with what went wrong, the folder in which the model lies, and the command that uploads it by hand.
    """
    from huggingface_hub import HfApi

    folder = pathlib.Path(folder)
    name = repo_id or folder.resolve().name
    try:
        api = HfApi(token=token)
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                folder_path=str(folder),
                repo_id=name,
                commit_message=commit_message,
                ignore_patterns=["checkpoint-*/**", "runs/**", ".*", "**/.*"],
            )
        )
    except Exception as error:
        raise HubError(
            f"The push to the hub failed ({type(error).__name__}: {_first_line(error)}), but nothing is lost: the model lies in "
            f"{folder}. Upload it with: hf upload {shlex.quote(name)} {shlex.quote(str(folder))}"
        ) from error


def _no_answer(error: BaseException) -> bool:
    """Whether an error means that the hub could not be reached or was down, and not that it refused."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False  # the user said so
    down = getattr(getattr(error, "response", None), "status_code", 0) >= 500
    # By name: whose error it is, httpx's or httpx2's, depends on the version of huggingface_hub.
    transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return down or transport or isinstance(error, ConnectionError | TimeoutError)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")


def shown_command(argv: Sequence[str]) -> str:
    """A command line as text, with the hub token hidden."""
    shown, hide = [], False
    for part in argv:
        name, equals, _ = part.partition("=")
        secret = name.replace("-", "_") == "__hub_token"
        shown.append("HIDDEN" if hide else f"{name}=HIDDEN" if secret and equals else part)
        hide = secret and not equals
    return shlex.join(shown)


def write_model_card(
    folder: str | os.PathLike,
    *,
    method: str,
    base_model: str | None,
    teacher: str | None = None,
    loss: str | None = None,
    dataset: str | None = None,
    command: Sequence[str] | None = None,
    results: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Write `README.md`: what the model was trained from, on and with. A README that someone else wrote is kept.

    Args:
        folder: the model's folder.
        method: such as "GOLD distillation" or "supervised fine-tuning".
        base_model: name of the model before training.
        teacher: name of the teacher.
        loss: the loss in one line (`LossSpec.describe()`).
        dataset: name of the data set.
        command: the command line; the hub token is left out.
        results: metric to value, as measured at the end.

    Returns:
        The path of the card.
    """
    path = pathlib.Path(folder) / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["gold_jax", "distillation"] if teacher else ["gold_jax", "sft"]
    # The hub refuses cards whose metadata name a folder; the text below names it all the same.
    if base_model and _on_hub(base_model):
        head["base_model"] = base_model
    if dataset and _on_hub(dataset):
        head["datasets"] = [dataset]
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", _MARK, ""]
    lines += [f"# {pathlib.Path(folder).resolve().name}", ""]
    lines += [f"Trained with gold_jax by {method}. The weights open in transformers and vLLM.", ""]
    facts = {"Base model": base_model, "Teacher": teacher, "Data set": dataset, "Loss": loss}
    lines += [f"- {label}: `{value}`" for label, value in facts.items() if value]
    if results:
        lines += ["", "Measured at the end of training, on the run's own evaluation data:", "", "| metric | value |"]
        lines += ["| --- | --- |"] + [f"| {name} | {value} |" for name, value in results.items()]
    if command:
        lines += ["", "```", shown_command(command), "```"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _on_hub(name: str) -> bool:
    """Whether a name is a hub id and no folder of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name)
