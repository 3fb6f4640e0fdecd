"""Writes trl_flags.json: every flag of TRL's GOLD and SFT commands with its default (needs trl)."""

import dataclasses
import json
import pathlib
import sys


def flags() -> dict[str, dict[str, str]]:
    """For each of TRL's dataclasses, its fields with the default as text."""
    from trl import ModelConfig, ScriptArguments, SFTConfig
    from trl.experimental.gold import GOLDConfig

    found = {}
    for cls in (GOLDConfig, SFTConfig, ModelConfig, ScriptArguments):
        found[cls.__name__] = {}
        for f in dataclasses.fields(cls):
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            found[cls.__name__][f.name] = str(getattr(default, "value", default))
    return found


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(json.dumps(flags()))
    else:
        path = pathlib.Path(__file__).with_name("trl_flags.json")
        path.write_text(json.dumps(flags(), indent=0, sort_keys=True) + "\n")
