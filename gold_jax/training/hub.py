"""What is published of a run: the model card, the repository on the hub, and the push to it."""

import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gold_jax.models.staged_save import TOKENIZER
from gold_jax.wording import without_passwords

_MARK = "<!-- written by gold_jax -->"
# The files of a model. Nothing else in the folder is published: a run's logs and checkpoints, or what somebody keeps there.
_PUBLISHED = (
    "README.md", "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", *sorted(TOKENIZER), "additional_chat_templates/*", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class HubError(RuntimeError):
    """The hub refused or could not be reached; the text names the folder that holds the model."""


class HubSilent(HubError):
    """The hub does not answer now; it may later."""


def create_hub_repository(repo_id: str | None, folder: Any, private: bool | None, token: str | None) -> str:
    """Make the repository that a run will be pushed to, so that a bad token shows before training; its full name.

    `repo_id` is `user/name`, or None for the name of `folder` under the token's account; `private` None the account's
    default; `token` None the one that is stored on this machine.
    HubSilent: it does not answer. HubError: with what the hub said.
    """
    from huggingface_hub import HfApi

    repo_id = repo_id or pathlib.Path(folder).resolve().name
    try:
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:
        if _no_answer(error):
            silent = f"--push_to_hub: the hub does not answer ({_reason(error)})"
            raise HubSilent(f"{silent}; training goes on, and the push is tried when it is done.") from error
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
    """Upload the model that a folder holds, with its tokenizer and card, and nothing else; the commit's address.

    HubError: with what went wrong, the folder that holds the model, and the command that uploads it by hand.
    """
    from huggingface_hub import HfApi

    folder = pathlib.Path(folder)
    name, allowed = repo_id or folder.resolve().name, list(_PUBLISHED)
    try:
        api = HfApi(token=token)
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        upload = dict(folder_path=str(folder), repo_id=name, commit_message=commit_message, allow_patterns=allowed)
        return str(api.upload_folder(**upload))
    except Exception as error:
        failed = f"The push to the hub failed ({_reason(error)}), but nothing is lost: the model lies in {folder}"
        by_hand = f"hf upload {shlex.quote(name)} {shlex.quote(str(folder))} . --include {shlex.join(allowed)}"
        raise HubError(f"{failed}. Upload it with: {by_hand}") from error


def _no_answer(error: BaseException) -> bool:
    """Whether an error means that the hub could not be reached or was down, and not that it refused."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False  # the user said so
    down = getattr(getattr(error, "response", None), "status_code", 0) >= 500
    # By name: whose error it is, httpx's or httpx2's, depends on the version of huggingface_hub.
    transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return down or transport or isinstance(error, ConnectionError | TimeoutError)


def _reason(error: Exception) -> str:
    line = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return f"{type(error).__name__}: {line}"


def shown_command(argv: Sequence[str]) -> str:
    """A command line as text, with the hub token hidden."""
    shown, hide = [], False
    for part in argv:
        name, equals, _ = part.partition("=")
        secret = name.replace("-", "_") == "__hub_token"
        shown.append("HIDDEN" if hide else f"{name}=HIDDEN" if secret and equals else part)
        hide = secret and not equals
    # Of an argument that is no UTF-8 Python makes surrogates, which no file takes.
    return without_passwords(shlex.join(shown)).encode("utf-8", "backslashreplace").decode()


def write_model_card(
    folder: str | os.PathLike,
    *,
    method: str,
    base_model: str | None,
    teacher: str | None = None,
    loss: str | None = None,
    dataset: str | None = None,
    command: Sequence[str] | None = None,
    results: Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
    tags: Sequence[str] | str | None = None,
) -> pathlib.Path:
    """Write `README.md`, what a model was trained from, on and with, into its folder; returns its path.

    One that someone else wrote is kept. Of the command line the hub token is left out; `results` has a column of
    metrics for each time or model that was measured; empty columns are left out. `title` is the folder's name by default,
    `tags` are further ones.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = pathlib.Path(folder) / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    on_hub = {x for x in (base_model, dataset) if x and _HUB_ID.fullmatch(x) and not os.path.exists(x)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gold_jax", "distillation" if teacher else "sft", *([tags] if isinstance(tags, str) else tags or ())],
        # The hub refuses cards whose metadata name a folder; the text below names it all the same.
        base_model=base_model if base_model in on_hub else None,
        datasets=[dataset] if dataset in on_hub else None,
    )
    lines = ["---", data.to_yaml(), "---", _MARK, "", f"# {title or path.parent.resolve().name}", ""]
    lines += [f"Trained with gold_jax by {method}. The weights open in transformers and vLLM.", ""]
    facts = {"Base model": base_model, "Teacher": teacher, "Data set": dataset, "Loss": loss}
    lines += [f"- {label}: `{value}`" for label, value in facts.items() if value]
    columns = {head: column for head, column in (results or {}).items() if column}
    if columns:
        lines += ["", "Measured on the run's own evaluation data:", "", f"| metric | {' | '.join(columns)} |"]
        lines += ["| --- |" + " --- |" * len(columns)]
        for name in dict.fromkeys(name for column in columns.values() for name in column):
            cells = (f"{column[name]:.4f}" if name in column else "" for column in columns.values())
            lines += [f"| {name} | {' | '.join(cells)} |"]
    if command:
        lines += ["", "```", shown_command(command), "```"]
    ModelCard("\n".join(lines) + "\n").save(path)
    return path
