"""Settings: what the flags are (`arguments`), how they are read (`fields`, `parsing`), and TRL's that are not here (`trl_compat`)."""

from gold_jax.config.arguments import TRACKERS, DataArguments, GOLDConfig, ModelArguments, RunFacts, SFTConfig
from gold_jax.config.fields import fields_with, named_without_effect, read_value, without_effect

__all__ = ["TRACKERS", "DataArguments", "GOLDConfig", "ModelArguments", "RunFacts", "SFTConfig"]
__all__ += ["fields_with", "named_without_effect", "read_value", "without_effect"]
