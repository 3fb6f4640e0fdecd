"""Any language model teaches any other, whatever tokenizers they use: General On-policy Logit Distillation in JAX.

Names are imported when they are first used, so that a command's `--help` does not wait for JAX.
"""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, which do not run `__getattr__`
    from gold_jax.api import align as align
    from gold_jax.api import match_vocabularies as match_vocabularies
    from gold_jax.api import save_model as save_model
    from gold_jax.config import GOLDConfig as GOLDConfig
    from gold_jax.config import SFTConfig as SFTConfig
    from gold_jax.custom_comparisons import register_comparison as register_comparison
    from gold_jax.distillation import DistillationLoss as DistillationLoss
    from gold_jax.distillation import loss as loss
    from gold_jax.inspection.pair import inspect_pair as inspect_pair
    from gold_jax.loading import LoadedModel as LoadedModel
    from gold_jax.loading import load_model_and_tokenizer as load_model_and_tokenizer
    from gold_jax.loss_spec import LossSpec as LossSpec
    from gold_jax.losses.compare import GroupDistribution as GroupDistribution
    from gold_jax.losses.compare import Overlap as Overlap
    from gold_jax.models.decoder import Decoder as Decoder
    from gold_jax.models.hf_checkpoint import load_model as load_model
    from gold_jax.scoring import exact_match as exact_match
    from gold_jax.scoring import measure_gaps as measure_gaps
    from gold_jax.scoring import sample_completions as sample_completions
    from gold_jax.scoring import score_completions as score_completions
    from gold_jax.text.align import Alignment as Alignment
    from gold_jax.text.chat import ChatTokenizer as ChatTokenizer
    from gold_jax.text.data import load_examples as load_examples
    from gold_jax.text.vocabulary import VocabularyMap as VocabularyMap
    from gold_jax.training.trainer import GOLDTrainer as GOLDTrainer
    from gold_jax.training.trainer import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

# Imported without PyTorch, transformers warns that its models cannot be used. They are not used here: this one line is left
# out, and nothing else that it says.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))

_HOMES = {
    "GOLDConfig": "gold_jax.config",
    "SFTConfig": "gold_jax.config",
    "GOLDTrainer": "gold_jax.training.trainer",
    "SFTTrainer": "gold_jax.training.trainer",
    "load_model": "gold_jax.models.hf_checkpoint",
    "save_model": "gold_jax.api",
    "load_model_and_tokenizer": "gold_jax.loading",
    "LoadedModel": "gold_jax.loading",
    "Decoder": "gold_jax.models.decoder",
    "ChatTokenizer": "gold_jax.text.chat",
    "align": "gold_jax.api",
    "Alignment": "gold_jax.text.align",
    "match_vocabularies": "gold_jax.api",
    "VocabularyMap": "gold_jax.text.vocabulary",
    "inspect_pair": "gold_jax.inspection.pair",
    "load_examples": "gold_jax.text.data",
    "loss": "gold_jax.distillation",
    "DistillationLoss": "gold_jax.distillation",
    "LossSpec": "gold_jax.loss_spec",
    "register_comparison": "gold_jax.custom_comparisons",
    "GroupDistribution": "gold_jax.losses.compare",
    "Overlap": "gold_jax.losses.compare",
    "sample_completions": "gold_jax.scoring",
    "score_completions": "gold_jax.scoring",
    "exact_match": "gold_jax.scoring",
    "measure_gaps": "gold_jax.scoring",
}
__all__ = [*_HOMES, "__version__"]


if not TYPE_CHECKING:  # or every name would seem to be there

    def __getattr__(name: str):
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'gold_jax' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
