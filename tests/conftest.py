import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """The folder of real tokenizers and models; the test is skipped where there is none."""
    folder = os.environ.get("GOLD_JAX_ASSETS")
    if not folder:
        pytest.skip(
            "GOLD_JAX_ASSETS does not name a folder of real models and tokenizers (tests/fetch_assets.py makes one)"
        )
    path = pathlib.Path(folder)
    if not path.is_dir():
        pytest.skip(f"GOLD_JAX_ASSETS names {path.name}, which is not a folder")
    return path
