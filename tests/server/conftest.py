"""The user's own labels are neither read nor written by the server's tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuron_explainer.analysis.workspace import DATA_VARIABLE
from tests.server.stores import make_stores


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where labels of the package's own stores go."""
    before = os.environ.get(DATA_VARIABLE)
    folder = tmp_path_factory.mktemp("data")
    os.environ[DATA_VARIABLE] = str(folder)
    yield folder
    if before is None:
        del os.environ[DATA_VARIABLE]
    else:
        os.environ[DATA_VARIABLE] = before


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """A folder of three small stores."""
    return make_stores(tmp_path / "stores")
