"""Tells longer stories by hand: python tests/stateful/run_long.py --stories 50 --steps 20 --seed 1 [--pair embedded] [--all]."""

import argparse
import pathlib
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path += [str(HERE.parent), str(HERE), str(HERE / "text")]

import jax  # noqa: E402
from hypothesis import HealthCheck, Phase, Verbosity, settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402
from stateful.story import CHECKS, MORE, PAIRS, SETTINGS, Story, World  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="calls in a story")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--all", action="store_true", help="with the settings that the tests leave out")
    parser.add_argument("--only", nargs="*", help="these settings alone")
    parser.add_argument("--without", nargs="*", default=[], choices=CHECKS, help="checks to leave out")
    parser.add_argument("--shrink", action="store_true", help="look for the shortest story that fails")
    parser.add_argument("--cache", help="folder for compiled programs")
    parser.add_argument("--verbose", action="store_true")
    a = parser.parse_args()
    chosen = SETTINGS | (MORE if a.all or a.only else {})
    chosen = {name: chosen[name] for name in a.only or chosen}
    phases = [Phase.generate, *([Phase.shrink] if a.shrink else [])]
    how = settings(
        max_examples=a.stories,
        stateful_step_count=a.steps,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.verbose if a.verbose else Verbosity.normal,
        report_multiple_bugs=False,
    )
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(a.cache or folder) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        world = World(pathlib.Path(folder), a.pair, chosen, [c for c in CHECKS if c not in a.without])
        Machine = type("Story", (Story,), {"world": world})
        Machine._hypothesis_internal_use_seed = a.seed
        try:
            run_state_machine_as_test(Machine, settings=how)
        finally:
            print(f"{world.made} trainers, {world.compared} comparisons, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
