"""Any language model teaches any other, whatever tokenizers they use: General On-policy Logit Distillation in JAX.

Names are imported when they are first used, so that a command's `--help` does not wait for JAX.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "GOLDConfig": "gold_jax.config",
    "SFTConfig": "gold_jax.config",
    "GOLDTrainer": "gold_jax.training.trainer",
    "SFTTrainer": "gold_jax.training.trainer",
    "load_model": "gold_jax.models.hf_checkpoint",
    "save_model": "gold_jax.models.hf_checkpoint",
    "load_model_and_tokenizer": "gold_jax.loading",
    "LoadedModel": "gold_jax.loading",
    "Decoder": "gold_jax.models.decoder",
    "ChatTokenizer": "gold_jax.text.chat",
    "align": "gold_jax.api",
    "Alignment": "gold_jax.text.align",
    "match_vocabularies": "gold_jax.api",
    "VocabularyMap": "gold_jax.text.vocabulary",
    "inspect_pair": "gold_jax.inspection.pair",
    "sample_completions": "gold_jax.scoring",
    "score_completions": "gold_jax.scoring",
    "exact_match": "gold_jax.scoring",
    "measure_gaps": "gold_jax.scoring",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gold_jax' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
