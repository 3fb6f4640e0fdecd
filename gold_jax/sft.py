"""`python -m gold_jax.sft`: supervised fine-tuning on completions, through the same loop and the same chunked head."""

from collections.abc import Sequence

from gold_jax.command import load_split, run, unread
from gold_jax.config import DataArguments, ModelArguments, SFTConfig
from gold_jax.flags import parse_args


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, builds an `SFTTrainer`, trains."""
    model, data, training, notices = parse_args(
        argv, ModelArguments, DataArguments, SFTConfig, prog="gold_jax.sft", doc=__doc__
    )
    from gold_jax.distributed.initialize import initialize
    from gold_jax.training.trainer import SFTTrainer

    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the model to train, a folder or a hub id")
    initialize(
        training.coordinator_address,
        training.num_processes,
        training.process_id,
        heartbeat_timeout=training.process_timeout,
    )
    train, evaluation = load_split(data, training)
    named = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
    training = training.replace(
        model_init_kwargs=named | training.model_init_kwargs, notices=[*notices, *unread(data, training)]
    )
    SFTTrainer(
        model.model_name_or_path,
        training,
        train,
        evaluation,
        dataset_name=data.dataset_name,
        command=["python", "-m", "gold_jax.sft", *(argv or ())],
    ).train()


if __name__ == "__main__":
    run("gold_jax.sft", main)
