import pytest
from fake_gcloud import Scripts


@pytest.fixture
def scripts(tmp_path):
    return Scripts(tmp_path)
