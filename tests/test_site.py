"""The documentation builds as a site: every link leads somewhere, and nothing is fetched."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Sphinx without a network: a connection is an error.
OFFLINE = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    raise OSError("building the site opened a connection")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = ["sphinx", *sys.argv[1:]]
runpy.run_module("sphinx", run_name="__main__")
"""


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_without_a_network(tmp_path):
    for package in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e '.[docs]')")
    line = [sys.executable, "-c", OFFLINE, "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*line, ROOT / "docs", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages.keys()
    assert 'href="contributing.html#what-the-tests-compare-with"' in pages["index"]  # README.md, its links mended
    fetched = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="(https?:[^"]*)', "".join(pages.values()))
    assert not fetched
