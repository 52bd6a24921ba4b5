"""What several tests of this folder use."""

import pytest

from neuron_explainer.analysis.explaining.reading import Reading, read_again
from tests.analysis.explaining.planted import Planted, make_planted


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Six latents of one token each, and six random directions. Not to be changed."""
    return make_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def planted_reading(planted: Planted) -> Reading:
    """Its text, read again."""
    units = range(len(planted.store))
    return read_again(planted.store, units, planted.context, planted.autoencoder, n_random=8)
