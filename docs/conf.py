"""The documentation as a site: `python -m sphinx -W -b html docs OUT`, without a network.

Links to other projects are plain links: intersphinx would fetch their inventories at every build, and with none committed
a build without a network would warn.
"""

import os
import pathlib
import re

import gold_jax

DOCS = pathlib.Path(__file__).parent
# Files beside this folder that are pages of the site, by the page whose {include} has them.
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
exclude_patterns = ["notebooks/*.md"]  # a notebook's pair
myst_heading_anchors = 6
highlight_language = "none"  # of a block that names none
nb_execution_mode = "off"  # the outputs that are stored
nb_ipywidgets_js = {}  # else every page loads scripts from elsewhere


NOTEBOOKS = "\n```{toctree}\n:hidden:\n:caption: Notebooks\n:glob:\n\nnotebooks/*\n```\n"


def with_links(text: str, folder: pathlib.Path) -> str:
    """Markdown of a file in `folder` as it stands in this one: links lead to the site's pages."""

    def moved(match: re.Match) -> str:
        path = (folder / match[1]).resolve()
        return f"]({f'{PAGES[path]}.md' if path in PAGES else os.path.relpath(path, DOCS)}{match[2] or ''})"

    return re.sub(r"\]\(([\w./-]+)(#[\w-]+)?\)", moved, text)


def take_in(app, docname: str, source: list[str]) -> None:
    """Puts in the files that a page includes."""
    if app.env.doc2path(docname).suffix != ".md":
        return

    def included(match: re.Match) -> str:
        path = (DOCS / match[1]).resolve()
        app.env.note_dependency(path)
        return with_links(path.read_text(encoding="utf-8"), path.parent)

    source[0] = re.sub(r"^```\{include\} (\S+)\n```$", included, with_links(source[0], DOCS), flags=re.M)
    if docname == "index" and any(DOCS.glob("notebooks/*.ipynb")):
        source[0] += NOTEBOOKS


def follow(app, env, docnames: list[str]) -> None:
    """Has links to notebooks lead to their pages: Sphinx reads through the symbolic link, and looks links up behind it."""
    env.project._path_to_docname.update({env.doc2path(name).resolve(): name for name in env.found_docs})


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("env-before-read-docs", follow)
    app.connect("source-read", take_in)
