"""What is written from the code says what the code says."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools/generate_docs.py")
generate_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate_docs)


@pytest.mark.parametrize("name", generate_docs.PAGES)
def test_a_generated_page_is_as_the_code_has_it(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == generate_docs.PAGES[name](), (
        "python tools/generate_docs.py writes it anew"
    )
