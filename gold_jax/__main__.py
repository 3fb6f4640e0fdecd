"""`python -m gold_jax`, or `gold-jax`: what there is, and each command by its name, as in `gold-jax train --config FILE`."""

import importlib
import re
import sys
from collections.abc import Sequence

from gold_jax import __version__

# The commands, and which of them SIGTERM ends so that they are started again.
COMMANDS = ("train", "sft", "evaluate", "generate", "serve", "inspect", "plan", "report")
RESUMABLE = ("train", "sft")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that is named first; without one, or with `--help` or `--version`, says what there is."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in COMMANDS:
        from gold_jax.cli import run

        command = importlib.import_module(f"gold_jax.{name}")
        if argv is None:
            sys.argv[1:2] = []  # what the command itself reads
        run(f"gold_jax.{name}", command.main, argv and rest[:-1], resumable=name in RESUMABLE)
    elif name in ("--version", "-V"):
        print(f"gold_jax {__version__}")
    elif name == "completion" and rest[0] in ("bash", "zsh"):
        print(_completion(rest[0]), end="")
    elif name in ("", "--help", "-h", "help"):
        print(_overview(), end="")
    else:
        from gold_jax.config.trl_compat import nearest

        near = nearest(name, COMMANDS)
        print(f"gold_jax: there is no command {name!r}{near}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)


def _overview() -> str:
    lines = [f"gold_jax {__version__}: any language model teaches any other, whatever tokenizers they use.", ""]
    for name in COMMANDS:
        doc = importlib.import_module(f"gold_jax.{name}").__doc__ or ""
        lines.append(f"  {name:10}{doc.partition(': ')[2].partition(chr(10))[0].rstrip('.')}")
    lines += ["", "gold-jax COMMAND --help shows a command's flags; python -m gold_jax.COMMAND is the same command."]
    lines += ["Completion of commands and flags: source <(gold-jax completion bash), or zsh.", ""]
    return "\n".join(lines)


def _completion(shell: str) -> str:
    """A script for the shell that completes commands and their flags, and else the names of files."""
    from gold_jax.config.parsing import HelpRequested

    cases = []
    for name in COMMANDS:
        try:
            importlib.import_module(f"gold_jax.{name}").main(["--help", "all"])
        except HelpRequested as wanted:
            lines = [line for line in str(wanted).splitlines() if line.startswith("  --")]
            flags = " ".join(dict.fromkeys(flag for line in lines for flag in re.findall(r"--\w+", line)))
            cases.append(f'    {name}) words="{flags}" ;;')
    script = f"""_gold_jax() {{
  local words="{" ".join(COMMANDS)} completion --help --version"
  [ "$COMP_CWORD" -gt 1 ] && case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _gold_jax gold-jax
"""
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script


if __name__ == "__main__":
    main()
