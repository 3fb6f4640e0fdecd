"""The repository of a run on the hub, and the push to it."""

import os
import pathlib
import shlex
from typing import Any

from gold_jax import progress
from gold_jax.models.staged_save import TOKENIZER

# The files of a model. Nothing else in the folder is published, such as logs and checkpoints.
_PUBLISHED = (
    "README.md", "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", *sorted(TOKENIZER), "additional_chat_templates/*", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


class HubError(RuntimeError):
    """The hub refused or could not be reached; the text names the folder that holds the model."""


class HubSilent(HubError):
    """The hub does not answer now; it may later."""


def create_hub_repository(repo_id: str | None, folder: Any, private: bool | None, token: str | None) -> str:
    """Creates the repository that a run will be pushed to, so that a bad token is found before training.

    Args:
        repo_id: `user/name`; None: the name of `folder` under the token's account.
        folder: the model's.
        private: None: the account's default.
        token: None: the one stored on this machine.

    Returns:
        The full name of the repository.

    Raises:
        HubSilent: the hub does not answer.
        HubError: the hub refuses.
    """
    from huggingface_hub import HfApi

    repo_id = repo_id or pathlib.Path(folder).resolve().name
    try:
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:
        if _no_answer(error):
            silent = f"--push_to_hub: the hub does not answer ({_reason(error)})"
            raise HubSilent(f"{silent}; training continues, and the push is tried again at the end.") from error
        refused = f"--push_to_hub cannot use the repository {repo_id!r}: {_reason(error)}"
        instead = "Log in with `hf auth login` or give --hub_token, and check --hub_model_id."
        raise HubError(f"{refused}. {instead}") from error


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str | None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Trained with gold_jax",
) -> str:
    """Uploads the model in a folder with its tokenizer and card, and nothing else; returns the commit's URL.

    HubError: names the cause, the folder, and the command that uploads it by hand.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    folder = pathlib.Path(folder)
    name, allowed = repo_id or folder.resolve().name, list(_PUBLISHED)
    shows_bars = not are_progress_bars_disabled()
    if shows_bars:
        disable_progress_bars()  # one that fails is drawn again at exit, after the error
    try:
        with progress.task("pushing to the hub"):
            api = HfApi(token=token)
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            upload = dict(folder_path=str(folder), repo_id=name, commit_message=commit_message, allow_patterns=allowed)
            return str(api.upload_folder(**upload))
    except Exception as error:
        failed = f"The push to the hub failed ({_reason(error)}), but nothing is lost: the model is in {folder}"
        again = "Push it again (with the token in HF_TOKEN)" if token else "Push it again"
        raise HubError(f"{failed}. {again}: {_by_hand(folder, name, private)}") from error
    finally:
        if shows_bars:
            enable_progress_bars()


def _by_hand(folder: pathlib.Path, repo_id: str, private: bool | None) -> str:
    """The command that uploads what `push_to_hub` would."""
    from huggingface_hub.utils import filter_repo_objects

    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    flags = ["--private"] * bool(private)
    for name in filter_repo_objects(files, allow_patterns=list(_PUBLISHED)):
        flags += ["--include", name]
    return shlex.join(["hf", "upload", repo_id, str(folder), ".", *flags])


def _no_answer(error: BaseException) -> bool:
    """Whether an error means that the hub could not be reached or was down, and not that it refused."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False  # the user said so
    down = getattr(getattr(error, "response", None), "status_code", 0) >= 500
    # By name: whose error it is, httpx's or httpx2's, depends on the version of huggingface_hub.
    transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return down or transport or isinstance(error, ConnectionError | TimeoutError)


def _reason(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    # Errors of the hub are complete; others may wrap one.
    cause = None if hasattr(error, "response") else error.__cause__
    return f"{type(error).__name__}: {line}" + (f": {_reason(cause)}" if cause else "")
