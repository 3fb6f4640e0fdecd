"""What TRL's scripts import: `from gold_jax.trl import …` stands in the place of `from trl import …`."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, TrainerCallback

from gold_jax.config import DataArguments as ScriptArguments
from gold_jax.config import GOLDConfig, ModelArguments, SFTConfig
from gold_jax.config.fields import Settings, field_names, like
from gold_jax.config.parsing import FlagError, HelpRequested, parse_args
from gold_jax.scoring import sample_completions
from gold_jax.training.logging import completions_table
from gold_jax.training.trainer import GOLDTrainer, SFTTrainer

__all__ = [
    "GOLDConfig", "GOLDTrainer", "LogCompletionsCallback", "ModelConfig", "SFTConfig", "SFTTrainer", "ScriptArguments",
    "TrlParser", "get_kbit_device_map", "get_peft_config", "get_quantization_config",
]  # fmt: skip


class ModelConfig(ModelArguments):
    """Which model, and how it is read. LoRA and quantization, which TRL's class has too, are refused by name."""

    trust_remote_code: bool = like(SFTConfig, "trust_remote_code")


class TrlParser:
    """Reads a command line and its `--config` file into settings.

    What is wrong with the command line ends the program with one paragraph and exit code 2.

    Args:
        dataclass_types: of `ScriptArguments`, `ModelConfig`, `GOLDConfig`, `SFTConfig` and subclasses of them; a TypeError
            for any other class.
    """

    def __init__(self, dataclass_types: Sequence[type] | type, **_: Any):
        self._classes = (dataclass_types,) if isinstance(dataclass_types, type) else tuple(dataclass_types)
        for cls in self._classes:
            if not issubclass(cls, Settings):
                takes = "ScriptArguments, ModelConfig, GOLDConfig and SFTConfig of gold_jax.trl"
                raise TypeError(f"TrlParser reads {takes}, not {cls.__module__}.{cls.__name__}; parse it by itself")

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The settings, in the order of the classes; the trainer prints the notices about flags (`notices` of each)."""
        try:
            *found, notices = parse_args(args, *self._classes, prog=sys.argv[0])
        except HelpRequested as wanted:
            print(wanted, end="")
            raise SystemExit(0) from None
        except FlagError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        # A flag that several classes have sets the field of each.
        given = {name: getattr(one, name) for one in found for name in one.given}
        own = [{name: given[name] for name in given if name in field_names(type(one))} for one in found]
        return tuple(one.replace(**values, notices=notices) for one, values in zip(found, own))

    parse_args_into_dataclasses = parse_args_and_config


def get_peft_config(model_args: Any) -> None:
    """None: all parameters are trained; `--use_peft` is an error of the parser."""


def get_quantization_config(model_args: Any) -> None:
    """None: `--load_in_4bit` and `--load_in_8bit` are errors of the parser."""


def get_kbit_device_map() -> None:
    """None: JAX places the model."""


class LogCompletionsCallback(TrainerCallback):
    """Shows what the student writes for prompts of the trainer's `eval_dataset`.

    Args:
        trainer: the trainer whose student writes; a ValueError where it has no `eval_dataset`.
        generation_config: `max_new_tokens`, `do_sample`, `temperature`, `top_k` and `top_p` are read; None: 128 tokens,
            greedily.
        num_prompts: only the first so many prompts; None: all.
        freq: updates between two tables; None: the trainer's `eval_steps`.
    """

    def __init__(
        self,
        trainer: Any,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
    ):
        if trainer.eval_examples is None:
            raise ValueError("LogCompletionsCallback shows prompts of eval_dataset: pass one to the trainer")
        found = trainer.eval_examples
        if isinstance(found, Mapping):  # several sets, one after another
            found = itertools.chain(*found.values())
        self._prompts = [row.prompt for row in itertools.islice(found, num_prompts)]
        config, self._trainer, self._freq = generation_config or GenerationConfig(), trainer, freq
        self._options = dict(max_new_tokens=config.max_new_tokens or 128)
        self._options |= dict(temperature=(config.temperature or 1.0) if config.do_sample else 0.0)
        self._options |= dict(top_k=config.top_k or 0, top_p=config.top_p or 1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Writes and shows the completions, where they are due."""
        if state.global_step % (self._freq or state.eval_steps):
            return
        tokenizer, chat = kwargs["processing_class"], self._trainer.student.chat_tokenizer
        options = dict(self._options, key=state.global_step, batch_size=args.per_device_eval_batch_size)
        drawn = sample_completions(model, tokenizer, self._prompts, **options)
        rows = [(chat.render(prompt), completion.text) for prompt, completion in zip(self._prompts, drawn)]
        completions_table(self._trainer.console, rows, step=state.global_step)
