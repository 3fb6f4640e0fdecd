"""`python -m gold_jax.train`: a student learns from a teacher, whatever tokenizers the two use."""

from collections.abc import Sequence

from gold_jax.command import load_split, run, unread
from gold_jax.config import DataArguments, GOLDConfig, ModelArguments
from gold_jax.flags import parse_args


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, builds a `GOLDTrainer`, trains."""
    model, data, training, notices = parse_args(
        argv, ModelArguments, DataArguments, GOLDConfig, prog="gold_jax.train", doc=__doc__
    )
    from gold_jax.distributed.initialize import initialize
    from gold_jax.training.trainer import GOLDTrainer

    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the student, a folder or a hub id")
    if training.teacher_model_name_or_path is None:
        raise ValueError("--teacher_model_name_or_path is missing: the teacher, a folder or a hub id")
    initialize(
        training.coordinator_address,
        training.num_processes,
        training.process_id,
        heartbeat_timeout=training.process_timeout,
    )
    train, evaluation = load_split(data, training)
    named = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
    same = {"attn_implementation": model.attn_implementation}
    training = training.replace(
        model_init_kwargs=named | training.model_init_kwargs,
        teacher_model_init_kwargs=same | training.teacher_model_init_kwargs,
        notices=[*notices, *unread(data, training)],
    )
    GOLDTrainer(
        model.model_name_or_path,
        training.teacher_model_name_or_path,
        training,
        train,
        evaluation,
        dataset_name=data.dataset_name,
        command=["python", "-m", "gold_jax.train", *(argv or ())],
    ).train()


if __name__ == "__main__":
    run("gold_jax.train", main)
