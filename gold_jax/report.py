"""`python -m gold_jax.report`: an HTML report of a run, or of two runs compared.

`python -m gold_jax.report RUN [RUN2] [--output FILE]`; RUN is the --output_dir of a run, finished or still running.
"""

import html
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence

from gold_jax.cli import run, show
from gold_jax.config.fields import Settings, flag
from gold_jax.config.parsing import parse_args
from gold_jax.reporting.run import read_run


# fmt: off
class ReportArguments(Settings):
    """The runs, and where the report is written."""

    run: list[str] | None = flag(None, "The --output_dir of one or two runs, finished or still running; they can also be "
        "given before all flags.", verbatim=True)
    output: str | None = flag(None, "The file to write; none: report.html in the run's folder, for two runs "
        "comparison.html in the first one's.", folder=True)


# fmt: on
class Report:
    """The report of a run, or of two compared, which notebooks display.

    Args:
        run: the folder of a run (its `output_dir`), finished or not.
        beside: the folder of a run to compare with.

    `runs` has their data. FileNotFoundError: a folder is not a run's.
    """

    def __init__(self, run: str | os.PathLike, beside: str | os.PathLike | None = None):
        self.runs = tuple(read_run(folder) for folder in (run, beside) if folder is not None)

    def to_html(self) -> str:
        """The page. ImportError: Bokeh is not installed."""
        from gold_jax.reporting.page import page

        return page(self.runs)

    def _repr_html_(self) -> str:
        """The page in an iframe, which isolates it from the notebook; without Bokeh the line that says so."""
        try:
            shown = self.to_html()
        except ImportError as error:
            return f"<pre>{html.escape(str(error))}</pre>"
        frame = 'style="width: 100%; height: 50rem; border: 0" sandbox="allow-scripts"'
        return f'<iframe title="report" {frame} srcdoc="{html.escape(shown)}"></iframe>'


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, reads the runs, writes the page."""
    argv = sys.argv[1:] if argv is None else argv
    leading = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    argv = [*(["--run", *leading] if leading else []), *argv[len(leading) :]]
    args, notices = parse_args(argv, ReportArguments, prog="gold_jax.report", doc=__doc__)
    show(notices)
    if len(args.run) not in (1, 2):
        raise ValueError(
            f"{len(args.run) or 'no'} runs are named; name one or two, as in gold_jax.report runs/a runs/b"
        )
    report = Report(*args.run)
    from gold_jax.reporting.page import page_path, write_page

    path = pathlib.Path(args.output or page_path(report.runs))
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output is {path}; it must be a file in a folder that is there, such as report.html")
    for found in report.runs:
        for note in found.notes:
            print(f"note: {found.folder}: {note}", file=sys.stderr)
    write_page(report.runs, path)
    print(f"The page is in {path}")


if __name__ == "__main__":
    run("gold_jax.report", main)
