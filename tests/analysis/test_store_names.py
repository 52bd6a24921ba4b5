"""What a store is called."""

from pathlib import Path

import pytest

from neuron_explainer.analysis import ExampleStore, open_stores
from neuron_explainer.analysis.store_names import ASSETS, built_in_models, find_stores
from neuron_explainer.analysis.workspace import DATA_VARIABLE
from neuron_explainer.errors import SourceError

FOLDER = ASSETS / "tiny-tales" / "stores"


def test_names_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert built_in_models() == ["tiny-tales"]
    assert find_stores("tiny-tales") == FOLDER
    assert find_stores("tiny-tales/ae-mlp-post-act/0") == FOLDER / "ae-mlp-post-act.0.store"
    name = "2/mlp.post_act.neurons"
    assert ExampleStore.open(f"tiny-tales/{name}").name == name
    Path("tiny-tales").mkdir()  # a path comes first
    assert find_stores("tiny-tales") == Path("tiny-tales")


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "a.b.store").touch()
    assert find_stores(tmp_path) == tmp_path
    assert find_stores(tmp_path / "a.b") == find_stores(tmp_path / "a.b.store")
    for name, said in (
        ("tiny-tales/ae-mlp-post-act/7", "Did you mean 'tiny-tales/ae-mlp-post-act/"),
        ("tiny-tales/..", "has no store"),
        ("../tiny-tales", "no store of examples"),
        (tmp_path / "a.c.store", "Did you mean"),
    ):
        with pytest.raises(SourceError, match=said):
            find_stores(name)


def test_what_users_say_is_not_kept_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    store = open_stores("tiny-tales")["ae-resid-delta-mlp.2"]
    store.workspace.set_label(5, "royal titles")
    assert [found.unit for found in store.search("royal")] == [5]
    store.close()
    assert (tmp_path / "workspace.sqlite").exists()
    assert not (FOLDER / "workspace.sqlite").exists()
