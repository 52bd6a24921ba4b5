"""The two contexts that these tests share."""

import pytest

from neuron_explainer.models.model_context import ModelContext
from tests.activations.helpers import save_context


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    """Two layers, width 16, 29 tokens, context of 12. Not to be changed."""
    return save_context(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tales() -> ModelContext:
    """The embedded model. Not to be changed."""
    return ModelContext.from_model_type("tiny-tales", device="cpu")
