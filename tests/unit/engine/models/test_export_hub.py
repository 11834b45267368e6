"""Publishing on a hub: what arrives there, what is refused before anything is sent, and what a second try sends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import _http

from engine.errors import ConfigError, ModelError
from engine.models.export_hub import push, repositories, require_hub
from tests.stand_in_hub import TOKEN, Repository, StandIn, stand_in_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    with stand_in_hub() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
            monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "none"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield state


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "retriever"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_export_arrives_whole_and_as_private_as_was_said(
    hub: StandIn, export: Path, private: bool, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By large file storage with one commit, and by the client's stream of commits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not streamed)
    hub.large = () if streamed else (".safetensors",)
    require_hub(["acme/mine"], private=private)
    assert not [call for call in hub.asked if not call.startswith("GET")], "nothing is made by asking"
    assert push(export, "acme/mine", private=private) == f"{hub.address}/acme/mine"
    (repository,) = hub.repositories.values()
    assert repository.private is private
    assert repository.files == files_of(export)
    assert len(hub.stored) == (not streamed)


def test_the_same_again_changes_nothing_and_other_weights_leave_none_of_the_old(hub: StandIn, export: Path) -> None:
    hub.large = (".safetensors",)
    push(export, "me/mine", private=True)
    repository = hub.repositories["me/mine"]
    repository.files["notes.txt"] = b"written on the hub"
    before = dict(repository.files)
    push(export, "me/mine", private=True)
    assert (repository.files, len(repository.commits)) == (before, 1)
    (export / "model.safetensors").rename(export / "model-00001-of-00001.safetensors")
    push(export, "me/mine", private=True)
    assert repository.files == {**files_of(export), "notes.txt": b"written on the hub"}


def test_an_upload_that_broke_off_goes_on(hub: StandIn, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that had arrived were sent again."""
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between the client's own tries
    hub.large, hub.fails_after = (".safetensors",), 1
    (export / "second.safetensors").write_bytes(b"more" * 1000)
    with pytest.raises(ModelError, match=r"no answer when the hub was to upload .*start the same command again"):
        push(export, "me/mine", private=True)
    assert not hub.repositories["me/mine"].files, "half a model is no commit"
    hub.fails_after = None
    sent = sum(call.startswith("PUT") for call in hub.asked)
    push(export, "me/mine", private=True)
    assert hub.repositories["me/mine"].files == files_of(export)
    assert sum(call.startswith("PUT") for call in hub.asked) == sent + 1


def test_what_cannot_be_published_is_refused_before_anything_is_made(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"me, who is logged in, belongs to no organization other.*me, acme.*me/mine"):
        require_hub(["other/mine"], private=True)
    hub.repositories["me/seen"] = Repository(private=False)
    with pytest.raises(ConfigError, match=r"me/seen is there, and is public.*say --public"):
        require_hub(["me/new", "me/seen"], private=True)
    hub.repositories["me/own"] = Repository(private=True)
    with pytest.raises(ConfigError, match=r"me/own is there, and is private.*leave --public out"):
        require_hub(["me/own"], private=False)
    hub.role = "read"
    with pytest.raises(ConfigError, match="the token of me may only read"):
        require_hub(["me/mine"], private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(ConfigError, match=r"does not accept the token.*unset HF_TOKEN"):
        require_hub(["me/mine"], private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"nobody is logged in to the hub.*hf auth login"):
        require_hub(["me/mine"], private=True)
    assert {call.partition(" ")[0] for call in hub.asked} == {"GET"}


def test_a_hub_that_refuses_or_does_not_answer_is_told(
    hub: StandIn, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refusals["/api/repos/create"] = (403, "You don't have the rights to create a model under acme")
    with pytest.raises(ConfigError, match=r"refused to make the repository acme/mine: You don't have the rights.*ask"):
        push(export, "acme/mine", private=True)
    hub.refusals = {"/preupload/": (400, "too large")}
    with pytest.raises(ModelError, match=r"failed to upload .*too large"):
        push(export, "me/mine", private=True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"no answer when the hub was to ask who is logged in.*127\.0\.0\.1:9"):
        require_hub(["me/mine"], private=True)
    assert time.monotonic() - began < 60


def test_each_model_has_a_repository_of_its_own() -> None:
    assert repositories("me/mine", ["retriever"]) == {"retriever": "me/mine"}
    assert repositories("me/mine", ["retriever", "ranker"]) == {
        "retriever": "me/mine-retriever",
        "ranker": "me/mine-ranker",
    }
    for name in ("mine", "a/b/c", "me/mi ne", "me/mine--x", "me/.."):
        with pytest.raises(ConfigError, match="is no name of a repository"):
            repositories(name, ["retriever"])
