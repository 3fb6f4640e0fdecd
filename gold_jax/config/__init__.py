"""Settings: what the flags are (`arguments`), how they are read (`fields`, `parsing`), and TRL's that are not here (`trl_compat`)."""

from gold_jax.loss_spec import LossSpec

from .arguments import TRACKERS, DataArguments, GOLDConfig, ModelArguments, RunFacts, SFTConfig
from .fields import fields_with, named_without_effect, read_value, without_effect

__all__ = [
    "TRACKERS",
    "DataArguments",
    "GOLDConfig",
    "LossSpec",
    "ModelArguments",
    "RunFacts",
    "SFTConfig",
    "fields_with",
    "named_without_effect",
    "read_value",
    "without_effect",
]
