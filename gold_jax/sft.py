"""`python -m gold_jax.sft`: supervised fine-tuning on completions, through the same loop and the same fused head."""

from collections.abc import Sequence

from gold_jax import cli
from gold_jax.config import SFTConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, builds an `SFTTrainer`, trains."""
    model, args, train, evaluation, options = cli.training_inputs(argv, SFTConfig, prog="gold_jax.sft", doc=__doc__)
    from gold_jax.training.trainer import SFTTrainer

    SFTTrainer(model, args, train, evaluation, **options).train()


if __name__ == "__main__":
    cli.run("gold_jax.sft", main, resumable=True)
