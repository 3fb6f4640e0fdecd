"""`python -m gold_jax.train`: a student learns from a teacher, whatever tokenizers the two use."""

from collections.abc import Sequence

from gold_jax import cli
from gold_jax.config import GOLDConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, builds a `GOLDTrainer`, trains."""
    given = cli.training_inputs(argv, GOLDConfig, prog="gold_jax.train", doc=__doc__)
    from gold_jax.training.trainer import GOLDTrainer

    teacher = given.args.teacher_model_name_or_path
    GOLDTrainer(given.model, teacher, given.args, given.train, given.evaluation, **given.options).train()


if __name__ == "__main__":
    cli.run("gold_jax.train", main)
