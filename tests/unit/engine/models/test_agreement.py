"""What a start says against what a recipe says: nothing is changed without a word, and each remedy helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.config.file import parse_config
from engine.config.models import RankerConfig, RetrieverConfig
from engine.errors import ModelError
from engine.models.agreement import Note, require_agreement, require_trained_teachers
from engine.models.export import export_ranker, export_retriever
from engine.models.kinds import load_untrained
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate

TANH = "torch.nn.modules.activation.Tanh"
LENGTHS = {"max_length": 24, "query_max_length": 12}
PAIRS = [("what is a container?", "Lists, tuples and dictionaries are containers."), ("negatives", "x " * 50)]
POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
TRANSFORMER, SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"


def compare(folder: Path, **settings: Any) -> list[Note]:
    section = RetrieverConfig(name=str(folder), **{"pooling": "mean", **LENGTHS, **settings})
    return require_agreement(section, str(folder), "retriever")


def compare_ranker(folder: Path, **settings: Any) -> list[Note]:
    section = RankerConfig(name=str(folder), **{"max_length": 24, **settings})
    return require_agreement(section, str(folder), "ranker")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_module(folder: Path, kind: str, path: str, *, place: int | None = None) -> None:
    listing = json.loads((folder / "modules.json").read_text())
    module = {"idx": 9, "name": "9", "path": path, "type": kind}
    listing.insert(len(listing) if place is None else place, module)
    (folder / "modules.json").write_text(json.dumps(listing))


def tall(folder: Path) -> None:
    """Leave the bias out of a layer's weights."""
    save_file({"linear.weight": torch.zeros(16, 32)}, folder / "2_Dense" / "model.safetensors")


# --- what a retriever does not keep ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "weightedmean", "mean_sqrt_len_tokens", ["cls", "mean"]])
def test_a_pooling_that_is_not_computed_here_is_refused_by_name(
    tmp_path: Path, made_folder: Callable[..., Path], mode: Any
) -> None:
    folder = made_folder(tmp_path / "start")
    edit(folder / POOLING, pooling_mode=mode)
    named = mode if isinstance(mode, str) else r"cls \+ mean"
    with pytest.raises(ModelError, match=f"pools by {named}, which no retriever here does"):
        compare(folder)
    # The remedy: its transformer alone.
    files = shutil.ignore_patterns("1_Pooling", "modules.json", "config_sentence_transformers.json")
    alone = Path(shutil.copytree(folder, tmp_path / "alone", ignore=files))
    assert not compare(alone)
    assert Retriever.load(str(alone), pooling="mean", similarity="dot", tied=True).dimension == 32


@pytest.mark.parametrize("version", [2, 6])
@pytest.mark.parametrize(("stated", "asked"), [("mean", "cls"), ("cls", "mean")])
def test_another_pooling_than_the_folders_is_refused_and_the_remedy_helps(
    tmp_path: Path, made_folder: Callable[..., Path], version: int, stated: str, asked: str
) -> None:
    """A recipe without a pooling took cls from a folder that says mean, and all embeddings were others."""
    folder = made_folder(tmp_path / "start", pooling=stated, version=version)
    with pytest.raises(ModelError, match=f"pools by {stated}, retriever.pooling is {asked}.*pooling={stated};"):
        compare(folder, pooling=asked)
    assert not compare(folder, pooling=stated, query_max_length=24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: edit(f / POOLING, include_prompt=False), "leaves out the query's prompt"),
        (lambda f: edit(f / SETTINGS, truncate_dim=8), r"first 8 numbers.*\(truncate_dim\)"),
        (lambda f: edit(f / SETTINGS, similarity_fn_name="euclidean"), "by euclidean .similarity_fn_name"),
        (lambda f: edit(f / SETTINGS, model_type="SparseEncoder"), "is a sparse encoder"),
        (lambda f: edit(f / SETTINGS, model_type="MultiVectorEncoder"), "is a MultiVectorEncoder"),
        (lambda f: edit(f / SETTINGS, default_prompt_name="web", prompts={"web": "w: "}), "default_prompt_name"),
        (lambda f: edit(f / TRANSFORMER, tokenizer_args={"truncation_side": "left"}), "truncation_side=left"),
        (lambda f: edit(f / TRANSFORMER, config_kwargs={"is_decoder": True}), "config_kwargs.is_decoder=True"),
        (lambda f: edit(f / TRANSFORMER, query_length=32), "sets query_length=32"),
        (lambda f: edit(f / TRANSFORMER, transformer_task="fill-mask"), "is one for fill-mask"),
        (lambda f: edit(f / DENSE, activation_function="torch.nn.modules.activation.Softmax"), "activation.Softmax"),
        (lambda f: edit(f / DENSE, activation_function="my.code.Act"), "activation_function my.code.Act"),
        (lambda f: edit(f / DENSE, use_residual=True), "a residual"),
        (lambda f: edit(f / DENSE, module_input_name="token_embeddings"), "module_input_name token_embeddings"),
        (lambda f: with_module(f, "sentence_transformers.models.LSTM", "3_LSTM"), r"the module LSTM \(3_LSTM\)"),
        (lambda f: with_module(f, "their_code.Block", "3_Block"), "their_code.Block, whose code"),
        (lambda f: with_module(f, "sentence_transformers.models.SpladePooling", "3_S"), "encoder .SpladePooling"),
        (lambda f: with_module(f, "sentence_transformers.models.Normalize", "", place=2), "in this order"),
        (lambda f: with_module(f, "sentence_transformers.models.Dense", "../x"), "in '../x'"),
        (lambda f: (f / DENSE).unlink(), "settings of a Dense layer is missing"),
        (lambda f: (f / "modules.json").write_text("[1]"), "another form than sentence-transformers"),
        (lambda f: (f / POOLING).write_text("{"), "is damaged"),
    ],
)
def test_what_is_not_kept_is_refused_by_name(
    tmp_path: Path, made_folder: Callable[..., Path], change: Callable[[Path], Any], message: str
) -> None:
    folder = made_folder(tmp_path / "start", dense=((16, TANH),), prompts={"query": "q: "})
    compare(folder)
    change(folder)
    with pytest.raises(ModelError, match=message):
        compare(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "2_Dense" / "model.safetensors").unlink(), "2_Dense of .* has no weights"),
        (lambda f: (f / "2_Dense" / "model.safetensors").write_bytes(b"abc"), "cannot be read"),
        (lambda f: edit(f / DENSE, in_features=31), "takes 31 numbers"),
        (lambda f: edit(f / DENSE, out_features=15), r"'linear.weight': \[16, 32\]"),
        (tall, r"are {'linear.weight': \[16, 32\]}"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_at_load(
    tmp_path: Path, made_folder: Callable[..., Path], change: Callable[[Path], Any], message: str
) -> None:
    folder = made_folder(tmp_path / "start", dense=((16, TANH),))
    change(folder)
    with pytest.raises(ModelError, match=message):
        Retriever.load(str(folder), pooling="mean", similarity="dot", tied=True)


@pytest.mark.parametrize("old", [False, True])
def test_a_router_with_other_routes_is_refused(tmp_path: Path, made_folder: Callable[..., Path], old: bool) -> None:
    folder = made_folder(tmp_path / "start")
    (folder / "r").mkdir()
    structure = {"query": [], "image": []}
    router = {"types": {}, "structure": structure, "parameters": {}}
    (folder / "r" / ("config.json" if old else "router_config.json")).write_text(json.dumps(router))
    kind = "sentence_transformers.models." + ("Asym" if old else "Router")
    with_module(folder, kind, "r")
    with pytest.raises(ModelError, match=r"the routes image, query.*one named document"):
        compare(folder)


# --- similarity and lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalize", "stated", "asked", "outcome"),
    [
        (True, "cosine", "cosine", ""),
        (True, None, "cosine", ""),
        (True, "dot", "cosine", ""),
        (True, "cosine", "dot", "refused"),
        (False, "cosine", "cosine", ""),
        (False, "dot", "dot", ""),
        (False, None, "dot", ""),
        (False, None, "cosine", ""),
        (False, "dot", "cosine", "refused"),
        (False, "cosine", "dot", "told"),
    ],
)
def test_similarities_that_change_an_embedding_are_refused_and_others_told(
    tmp_path: Path,
    made_folder: Callable[..., Path],
    normalize: bool,
    stated: str | None,
    asked: str,
    outcome: str,
) -> None:
    folder = made_folder(tmp_path / "start", normalize=normalize, similarity_fn_name=stated)
    if outcome == "refused":
        other = {"cosine": "dot", "dot": "cosine"}[asked]
        with pytest.raises(ModelError, match=f"set retriever.similarity={other}"):
            compare(folder, similarity=asked)
        compare(folder, similarity=other)
        return
    warnings = [note.text for note in compare(folder, similarity=asked) if note.warns]
    assert bool(warnings) == (outcome == "told")
    assert all("compares embeddings by cosine, retriever.similarity is dot" in text for text in warnings)


def test_texts_that_are_read_further_than_before_are_warned_of(
    tmp_path: Path, made_folder: Callable[..., Path]
) -> None:
    folder = made_folder(tmp_path / "start")
    (longer,) = compare(folder, max_length=32, query_max_length=24)
    assert longer.warns
    assert "takes 24 tokens, retriever.max_length is 32" in longer.text
    (shorter,) = compare(folder, query_max_length=12)
    assert not shorter.warns
    assert "retriever.query_max_length is 12: long texts are cut" in shorter.text
    edit(folder / TRANSFORMER, max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=20)  # where the newest versions write it
    assert any("takes 20 tokens" in note.text for note in compare(folder))


# --- our own folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_of_ours_is_a_start_that_is_compared_like_others(
    tmp_path: Path, random_model: Path, tied: bool
) -> None:
    retriever = Retriever.load(str(random_model), pooling="cls", similarity="cosine", tied=tied)
    retriever.save(tmp_path / "saved", load_tokenizer(str(random_model)), metadata=LENGTHS)
    export_retriever(tmp_path / "saved", tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        assert not compare(folder, pooling="cls", similarity="cosine", tied=tied)
        with pytest.raises(ModelError, match=r"pools by cls, retriever.pooling is mean"):
            compare(folder, similarity="cosine", tied=tied)
        with pytest.raises(ModelError, match="normalises its embeddings"):
            compare(folder, pooling="cls", tied=tied)
        if not tied:
            with pytest.raises(ModelError, match=r"set retriever.tied=false"):
                compare(folder, pooling="cls", similarity="cosine", tied=True)
            with pytest.raises(ModelError, match=f"two transformers.*{folder}/document"):
                compare_ranker(folder)
            compare_ranker(folder / "document")
            Ranker.load(str(folder / "document"))


def test_an_exported_ranker_goes_on_with_its_scores(tmp_path: Path, random_model: Path) -> None:
    ranker = Ranker.load(str(random_model), seed=3)
    ranker.save(tmp_path / "saved", load_tokenizer(str(random_model)), metadata={"max_length": 24})
    export_ranker(tmp_path / "saved", tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        assert not compare_ranker(folder)
        torch.testing.assert_close(scores(folder), scores_of(ranker, random_model))
        (head,) = compare(folder)
        assert head.warns
        assert "without its head" in head.text


# --- rankers ---------------------------------------------------------------------------------------------------------


def scores_of(ranker: Any, folder: Path) -> torch.Tensor:
    tokenizer = load_tokenizer(str(folder))
    template = InputTemplate.from_tokenizer(tokenizer)
    ids = [tokenizer(list(pair), add_special_tokens=False)["input_ids"] for pair in PAIRS]
    with torch.inference_mode():
        found: torch.Tensor = ranker(template.pad([template.pair(*pair, 24) for pair in ids]))
    return found


def scores(folder: Path, **settings: Any) -> torch.Tensor:
    section = RankerConfig(name=str(folder), max_length=24, **settings)
    require_agreement(section, str(folder), "ranker")
    return scores_of(load_untrained(section, str(folder), seed=0), folder)


@pytest.fixture(scope="module")
def cross_encoder(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the installed version writes."""
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("cross") / "encoder"
    library.CrossEncoder(str(random_model), device="cpu", num_labels=1, max_length=24).save_pretrained(str(folder))
    return folder


def older(folder: Path, copied: Path, **settings: Any) -> Path:
    """Make of a CrossEncoder's folder one that versions up to 5 wrote: config.json says all."""
    ignored = shutil.ignore_patterns("modules.json", "sentence_bert_config.json", SETTINGS)
    shutil.copytree(folder, copied, ignore=ignored)
    edit(copied / "config.json", **settings)
    return copied


def test_a_cross_encoder_starts_with_its_logits(tmp_path: Path, cross_encoder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    logit = "torch.nn.modules.linear.Identity"
    layouts = [
        cross_encoder,
        older(cross_encoder, tmp_path / "five", sentence_transformers={"version": "5.0.0", "activation_fn": logit}),
        older(cross_encoder, tmp_path / "three", sbert_ce_default_activation_function=logit),
    ]
    model = library.CrossEncoder(str(cross_encoder), device="cpu")
    expected = model.predict(PAIRS, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    for folder in layouts:
        torch.testing.assert_close(scores(folder), expected.clone(), atol=1e-5, rtol=1e-5)
    (sigmoid,) = compare_ranker(cross_encoder)
    assert "applies Sigmoid: the order is the same" in sigmoid.text
    assert not compare_ranker(layouts[1])
    (longer,) = (note for note in compare_ranker(cross_encoder, max_length=48) if note.warns)
    assert "takes 24 tokens, ranker.max_length is 48" in longer.text


def test_an_activation_that_changes_the_order_is_refused(tmp_path: Path, cross_encoder: Path) -> None:
    kind = "torch.nn.modules.activation.ReLU"
    layouts = [
        Path(shutil.copytree(cross_encoder, tmp_path / "six")),
        older(cross_encoder, tmp_path / "five", sentence_transformers={"version": "5.0.0", "activation_fn": kind}),
        older(cross_encoder, tmp_path / "three", sbert_ce_default_activation_function=kind),
    ]
    edit(layouts[0] / SETTINGS, activation_fn=kind)
    for folder in layouts:
        with pytest.raises(ModelError, match=r"scores by torch.nn.modules.activation.ReLU of its logit"):
            compare_ranker(folder)


def test_a_cross_encoder_of_other_modules_is_refused(tmp_path: Path, cross_encoder: Path) -> None:
    folder = Path(shutil.copytree(cross_encoder, tmp_path / "six"))
    with_module(folder, "sentence_transformers.cross_encoder.modules.logit_score.LogitScore", "1_LogitScore")
    with pytest.raises(ModelError, match="scores by LogitScore"):
        compare_ranker(folder)
    folder = Path(shutil.copytree(cross_encoder, tmp_path / "causal"))
    edit(folder / TRANSFORMER, transformer_task="text-generation")
    with pytest.raises(ModelError, match=r"scores by Transformer \(text-generation\)"):
        compare_ranker(folder)


def test_a_prompt_of_a_cross_encoder_is_refused(tmp_path: Path, cross_encoder: Path) -> None:
    folder = Path(shutil.copytree(cross_encoder, tmp_path / "six"))
    edit(folder / SETTINGS, prompts={"web": "w: "}, default_prompt_name="web")
    with pytest.raises(ModelError, match=r"puts 'w: ' before its texts \(default_prompt_name\)"):
        compare_ranker(folder)


def test_a_cross_encoder_as_a_retriever_is_told_to_lose_its_head(cross_encoder: Path) -> None:
    (head,) = compare(cross_encoder)
    assert head.warns
    assert "without its head" in head.text


def test_a_ranker_starts_from_the_transformer_of_a_sentence_transformer(
    tmp_path: Path, made_folder: Callable[..., Path]
) -> None:
    folder = made_folder(tmp_path / "start", transformer="0_Transformer", dense=((16, TANH),))
    (note,) = compare_ranker(folder)
    assert not note.warns
    assert "starts from the transformer" in note.text
    own = made_folder(tmp_path / "own")
    torch.testing.assert_close(scores(folder), scores(own))


def test_modules_without_their_list_are_told_of(tmp_path: Path, made_folder: Callable[..., Path]) -> None:
    folder = made_folder(tmp_path / "start", dense=((16, TANH),))
    (folder / "modules.json").unlink()
    (note,) = compare(folder)
    assert note.warns
    assert "has 1_Pooling, 2_Dense, but no modules.json" in note.text


def test_a_plain_checkpoint_is_left_to_the_recipe(random_model: Path) -> None:
    assert not compare(random_model, pooling="cls")
    assert not compare(random_model, similarity="cosine", max_length=48)
    assert not compare_ranker(random_model)


def told_of_teacher(source: str, own: dict[str, Any], **game: Any) -> list[Note]:
    """Return what is told of a game with a ranker of a start, whose D0 is taken as it is."""
    config = parse_config(
        {
            "run": {"path": "r"},
            "retriever": {"name": "g"},
            "ranker": {"name": source, **own},
            "warmup_ranker": {"steps": 0},
            "ar2": game,
        },
        "c",
    )
    module = load_untrained(config.models["ranker"], source, seed=1, name="ranker")
    return require_trained_teachers(config, {"ranker": module})


@pytest.mark.parametrize("head", ["pooler", "cls"])
def test_a_new_head_that_no_step_trains_may_not_teach(head: str, random_model: Path) -> None:
    """Symptom: a plain encoder as D, with both numbers of steps 0, taught by random numbers for a whole run."""
    plain, own, idle = str(random_model), {"head": head}, {"ranker": {"steps": 0}}
    with pytest.raises(
        ModelError, match=r"warmup_ranker\.steps=0 and ar2\.ranker\.steps=0 no step trains it"
    ) as caught:
        told_of_teacher(plain, own, **idle)
    assert "raise warmup_ranker.steps or ar2.ranker.steps" in str(caught.value)
    for told, own_prior, game in (
        ("in the first iteration as it is", {}, {}),
        ("in every iteration as it is, beside its prior", {"prior": 1.0}, idle),
    ):
        (note,) = told_of_teacher(plain, own | own_prior, **game)
        assert told in note.text
        assert note.warns
    for game in ({"order": "released"}, {"retriever": {"steps": 0}}, {"iterations": 0}):
        assert told_of_teacher(plain, own, **game) == []


def test_a_trained_head_may_teach_as_it_is(tmp_path: Path, cross_encoder: Path, random_model: Path) -> None:
    assert told_of_teacher(str(cross_encoder), {}, ranker={"steps": 0}) == []
    pooled = Ranker.load(str(random_model), head="cls")
    pooled.save(tmp_path / "saved", load_tokenizer(str(random_model)))
    assert told_of_teacher(str(tmp_path / "saved"), {"head": "cls"}, ranker={"steps": 0}) == []
