import pathlib

import pytest
import yaml

from gold_jax.config import DataArguments, GOLDConfig, ModelArguments, SFTConfig
from gold_jax.config.parsing import parse_args

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses_and_each_of_its_fields_lands(path):
    training = GOLDConfig if "teacher_model_name_or_path" in path.read_text() else SFTConfig
    model, data, settings, _ = parse_args(["--config", str(path)], ModelArguments, DataArguments, training)
    values = {**vars(model), **vars(data), **vars(settings)}
    aliases = {"max_new_tokens": "max_completion_length"}
    for name, value in yaml.safe_load(path.read_text()).items():
        assert values[aliases.get(name, name)] == value


def test_there_are_recipes():
    assert len(RECIPES) >= 2
