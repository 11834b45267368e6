"""Every cause of a failed load is told as itself, with what helps in that case."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, T5Config, ViTConfig

from engine.errors import ModelError
from engine.models.loading import load_backbone, load_tokenizer


@pytest.fixture
def copied(random_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_model, tmp_path / "copied"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_bin(folder: Path, content: bytes | None = None) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    if content is not None:
        (folder / "pytorch_model.bin").write_bytes(content)


def without_a_part(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, key in enumerate(sorted(weights))}
    for file in set(names.values()):
        part = {key: weights[key] for key in weights if names[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model-00002-of-00002.safetensors").unlink()


def without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: truncate(folder / "model.safetensors"), r"model\.safetensors of .* is damaged"),
        (lambda folder: as_bin(folder, b"abc" * 10), r"pytorch_model\.bin of .* is damaged"),
        (lambda folder: truncate(folder / "config.json"), r"config\.json of .* is damaged"),
        (
            lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            r"pointer of Git LFS.*git lfs pull",
        ),
        (without_a_part, r"1 of the 2 files .* are not in .*: model-00002-of-00002\.safetensors"),
        (with_config(model_type=None), "names no model_type"),
        (with_config(model_type="of_tomorrow"), "has no architecture of_tomorrow"),
        (with_config(vocab_size=7), r"other sizes than its config\.json says: .*word_embeddings"),
    ],
)
def test_a_folder_says_what_is_wrong_with_it(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    """One remedy stood for all: to check the name."""
    damage(copied)
    with pytest.raises(ModelError, match=message) as refusal:
        load_backbone(AutoModel, str(copied), section="student")
    assert "student.name" in refusal.value.remedy or "cannot be loaded" not in refusal.value.fact


def test_weights_in_a_torch_file_are_loaded(copied: Path) -> None:
    as_bin(copied)
    assert load_backbone(AutoModel, str(copied)).config.hidden_size == 32


def test_a_folder_without_a_tokenizer_is_refused(copied: Path) -> None:
    """transformers makes a tokenizer of five special tokens: every text became the same five ids."""
    without_a_tokenizer(copied)
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(str(copied))
    (copied / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ModelError, match="special tokens all of them"):
        load_tokenizer(str(copied))


def test_a_damaged_tokenizer_is_named(copied: Path) -> None:
    truncate(copied / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json of .* is damaged"):
        load_tokenizer(str(copied))


def test_a_known_architecture_is_loaded_without_the_code_beside_it(copied: Path) -> None:
    with_config(auto_map={"AutoModel": "modeling.Model"})(copied)
    (copied / "modeling.py").write_text(f"open({str(copied / 'ran')!r}, 'w')")
    assert type(load_backbone(AutoModel, str(copied))).__name__ == "BertModel"
    assert not (copied / "ran").exists()


@pytest.mark.parametrize(
    ("config", "auto_class", "message"),
    [
        (T5Config(num_layers=1, d_model=8, d_ff=8, d_kv=4, num_heads=2, vocab_size=9), AutoModel, "encoder-decoder"),
        (T5Config(num_layers=1, vocab_size=9, is_encoder_decoder=False), AutoModel, "encoder-decoder"),
        (ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), AutoModel, "reads pixel_values"),
        (ViTConfig(), AutoModelForSequenceClassification, "no sequence classifier"),
    ],
)
def test_what_is_no_text_encoder_is_refused_by_name(copied: Path, config: Any, auto_class: Any, message: str) -> None:
    """T5 failed at its first publication, for weights that it has under two names."""
    config.save_pretrained(copied)
    with pytest.raises(ModelError, match=message):
        load_backbone(auto_class, str(copied))


@pytest.mark.parametrize(("attention", "remedy"), [("sdpa", "eager"), ("flash_attention_2", "eager")])
def test_an_attention_that_a_class_lacks_is_said_with_one_it_has(copied: Path, attention: Any, remedy: str) -> None:
    """The message told to ask a project for support of the architecture."""
    with_config(model_type="mpnet")(copied)
    with pytest.raises(ModelError, match=f"has no {attention} attention.*set judge.attention={remedy}"):
        load_backbone(AutoModel, str(copied), attention=attention, section="judge")


def test_flash_attention_that_is_not_installed(copied: Path) -> None:
    with pytest.raises(ModelError, match=r"not available here.*set judge\.attention=sdpa"):
        load_backbone(AutoModel, str(copied), attention="flash_attention_2", section="judge")


# --- the hub ---------------------------------------------------------------------------------------------------------

ANSWERS = {
    "gone": (404, {"X-Error-Code": "RepoNotFound"}),
    "private": (401, {"X-Error-Message": "Invalid username or password."}),
    "gated": (401, {"X-Error-Code": "GatedRepo"}),
    "empty": (404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}),
    "refused": (403, {"X-Error-Message": "Forbidden"}),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Serve a hub on this machine: the name of a model says what it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/").lstrip("/").split("/")[1]
            status, headers = ANSWERS.get(name, (404, {}))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    use_hub(monkeypatch, address, tmp_path / "cache")
    yield address
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models/gone", "the hub has no model models/gone.*correct judge.name"),
        ("models/private", "answers 401.*correct judge.name.*hf auth login"),
        ("models/gated", "only to those whom its owner has let in.*ask for access at .*/models/gated"),
        ("models/empty", "lacks a file that a model has: config.json"),
        ("models/refused", "answers 403.*HF_TOKEN"),
    ],
)
def test_the_hub_s_answer_is_told(hub: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_backbone(AutoModel, name, section="judge")


def test_a_name_that_no_hub_takes() -> None:
    with pytest.raises(ModelError, match="neither a folder nor the id of a model"):
        load_backbone(AutoModel, "what is this?", section="judge")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*hf download models/any") as refusal:
        load_backbone(AutoModel, "models/any", section="judge")
    assert "judge.name" in refusal.value.remedy
