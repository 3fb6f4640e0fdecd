"""The hub: the repository that a run is pushed to, and the push."""

import os
import pathlib
import shlex


class HubError(RuntimeError):
    """The hub refused or could not be reached; the text names the folder that holds the model."""


class HubSilent(HubError):
    """The hub does not answer now; it may later."""


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
        HubError: with what went wrong, the folder that holds the model, and the command that uploads it by hand.
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
