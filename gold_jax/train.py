"""`python -m gold_jax.train`: a student learns from a teacher, whatever tokenizers the two use."""

from collections.abc import Sequence

from gold_jax import cli
from gold_jax.config import GOLDConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, builds a `GOLDTrainer`, trains."""
    model, args, train, evaluation, options = cli.training_inputs(argv, GOLDConfig, prog="gold_jax.train", doc=__doc__)
    from gold_jax.training.trainer import GOLDTrainer

    GOLDTrainer(model, args.teacher_model_name_or_path, args, train, evaluation, **options).train()


if __name__ == "__main__":
    cli.run("gold_jax.train", main, resumable=True)
