"""The documentation as a site: `python -m sphinx -W -b html docs OUT`, without a network.

Links to other projects are plain links: intersphinx would fetch their inventories at every build, and with none committed
a build without a network would warn.
"""

import os
import pathlib
import re

import gold_jax

DOCS = pathlib.Path(__file__).parent
# Files outside this folder, with the page that includes each.
PAGES = {
    DOCS.parent / "README.md": "index",
    DOCS.parent / "CONTRIBUTING.md": "contributing",
    DOCS.parent / "CHANGELOG.md": "changelog",
    DOCS.parent / "benchmarks/README.md": "benchmarks-scripts",
}

project, author, version = "gold_jax", "the gold_jax authors", gold_jax.__version__
extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"gold_jax {version}"
myst_heading_anchors = 6
highlight_language = "none"  # of blocks without one
nb_execution_mode = "off"  # the committed outputs are shown
nb_ipywidgets_js = {}  # else every page loads scripts from other hosts

NOTEBOOKS = "\n```{toctree}\n:hidden:\n:caption: Notebooks\n:glob:\n\nnotebooks/*\n```\n"


def with_links(text: str, folder: pathlib.Path) -> str:
    """Markdown of a file in `folder` with its links relative to this folder, to pages of the site where there are any."""

    def moved(match: re.Match) -> str:
        path = (folder / match[1]).resolve()
        return f"]({f'{PAGES[path]}.md' if path in PAGES else os.path.relpath(path, DOCS)}{match[2] or ''})"

    return re.sub(r"\]\(([\w./-]+)(#[\w-]+)?\)", moved, text)


def include_files(app, docname: str, source: list[str]) -> None:
    """Replaces `{include}` blocks by the files, with their links adapted."""
    if app.env.doc2path(docname).suffix != ".md":
        return

    def included(match: re.Match) -> str:
        path = (DOCS / match[1]).resolve()
        app.env.note_dependency(path)
        return with_links(path.read_text(encoding="utf-8"), path.parent)

    source[0] = re.sub(r"^```\{include\} (\S+)\n```$", included, with_links(source[0], DOCS), flags=re.M)
    if docname == "index" and any(DOCS.glob("notebooks/*.ipynb")):
        source[0] += NOTEBOOKS


def map_links(app, env, docnames: list[str]) -> None:
    """Makes links to notebooks lead to their pages: Sphinx resolves the symbolic link to their folder."""
    env.project._path_to_docname.update({env.doc2path(name).resolve(): name for name in env.found_docs})


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("env-before-read-docs", map_links)
    app.connect("source-read", include_files)
