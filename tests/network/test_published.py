"""Whatever has a name can still be had: every published file that the registry knows is there.

    pytest -m network

Nothing is downloaded: each file is asked for with a HEAD request. That the list is whole is tested
everywhere.
"""

import pytest

from neuron_explainer import files
from neuron_explainer.models import model_registry


def autoencoder_files() -> list[str]:
    """The file, or the folder's config, of every layer of every named autoencoder."""
    sources = [
        str(path)
        for model in model_registry.list_model_names()
        for name in model_registry.list_autoencoder_names(model)
        for path in model_registry.get_autoencoder_spec(
            model, name
        ).autoencoder_path_by_layer_index.values()
    ]
    remote = [source for source in sources if files.is_remote(source)]
    return [path if path.endswith(".pt") else f"{path}/cfg.json" for path in remote]


def model_files() -> list[str]:
    """The config and one tensor of every named model."""
    specs = map(model_registry.get_standard_model_spec, model_registry.list_model_names())
    folders = [spec.model_path for spec in specs if files.is_remote(spec.model_path)]
    return [
        f"{folder}/{name}"
        for folder in folders
        for name in ("config.json", "model_pieces/final_ln.bias.pt")
    ]


@pytest.mark.network
@pytest.mark.parametrize("url", [*model_files(), *autoencoder_files()])
def test_it_is_still_there(url: str) -> None:
    assert files.exists(url)


def test_the_list_is_whole() -> None:
    found = autoencoder_files()
    openai = [url for url in found if "openaipublic" in url]
    assert len(openai) == 24 + 36 + 96
    assert len(found) > len(openai) + 12 + 1
    assert len(set(found)) == len(found)
    assert len(model_files()) == 2 * 4
