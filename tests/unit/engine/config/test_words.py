"""What a word means: the field decides, on the command line and in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from engine.config.ar2 import Ar2Recipe
from engine.config.file import dump_config, load_config
from engine.config.models import RankerConfig
from engine.config.text import absolute_path, as_recorded, as_typed, number_of
from engine.config.tree import read_tree
from engine.config.values import kind_at, takes_structure, value_of
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
TINY = ROOT / "configs" / "tiny.yaml"

HOSTILE = (
    "set #2", "2024-01-01", "2024-01-01 12:00:00", "20240101", "on", "No", "true", "1e-6", "1_000", "010", "0x10", ".5",
    ".inf", "1:30", "{title} [SEP] {text}", "{text}", "[a, b", "a: b", "- a", "a=b=c", "=", "*star", "&anchor", "!tag",
    "!!int 7", "%TAG", "@at", "`tick`", "|", ">", "? key", "'quoted'", '"quoted"', "it's", ' blanks ', "\ttab",
    "back\\slash", "new\nline", "$HOME `x` $(y)", "ü 中文 🙂", "None", "Null", "a,b", "<<", "---", "#",
)  # fmt: skip
"""Words that YAML takes for something else than the text that they are, or does not take at all."""


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in section.model_fields.items():
        inner = [kind for kind in members(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(inner) == 1:  # a section, which may be one that can be left out
            yield from fields(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name, info.annotation


def members(kind: Any) -> set[Any]:
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    inner = get_args(kind) if get_origin(kind) is not Literal else ()
    return set().union(*map(members, inner)) if inner else {kind}


MEASURED = {"run.keep_best", "evaluation.metrics", "evaluation.fusion_metric"}
NAMES = {"bm25.language", "bm25.stemmer", "bm25.stopwords"}
"""Texts of which only some are known; a word is still what it says, so that a message can name it."""
LISTS = {"ar2.further_retrievers", "retriever.lora.target_modules", "ranker.lora.target_modules"}
"""Lists of texts, which a word writes as YAML does."""
WORDED = {"ranker.instruction", "ranker.yes_word", "ranker.no_word"}
"""Texts that go with a head which puts pairs into words; those of a pair have places that no word has."""
ON_HOSTS = {"index.local_folder"}
"""An absolute folder as each host has it, which goes with another key."""
OTHERS = MEASURED | NAMES | LISTS | ON_HOSTS | {"ranker.pair_template"}
TEXTS = [key for key, kind in fields(Ar2Recipe) if str in members(kind) and key not in OTHERS]
PATHS = [key for key, kind in fields(Ar2Recipe) if Path in members(kind)]
OPTIONAL = [key for key, kind in fields(Ar2Recipe) if NoneType in members(kind)]


def at(config: Ar2Recipe, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_there_are_such_fields() -> None:
    assert {"retriever.name", "data.template", "index.factory", "run.network"} <= set(TEXTS)
    assert {"run.path", "data.path", "shards.cache", "ranker.deepspeed"} <= set(PATHS)
    assert {"data.path", "run.network", "run.keep_best", "retriever.num_layers"} <= set(OPTIONAL)


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_field_takes_any_word_unchanged(key: str) -> None:
    """`data.template={title} [SEP] {text}`, which the documentation gives, was refused as bad YAML."""
    more = ["ranker.head=yes_no"] if key in WORDED else []
    for word in HOSTILE:
        assert at(load_config(TINY, [f"{key}={word}", *more]), key) == word


@pytest.mark.parametrize("key", sorted(NAMES))
def test_a_name_is_read_as_it_is_typed(key: str) -> None:
    """`bm25.language=no`, Norwegian's code, was false."""
    assert load_config(TINY, ["bm25.language=no"]).bm25.language == "norwegian"
    for word in ("2024-01-01", "on", "1e3"):
        with pytest.raises(ConfigError, match=rf"{key}: .*got '{word}'"):
            load_config(TINY, [f"{key}={word}"])


@pytest.mark.parametrize("key", PATHS)
def test_a_path_field_takes_any_word_unchanged(key: str) -> None:
    """`data.path="DIR/set #2"` used `DIR/set` without a word; `run.path=2024-01-01` and `on` were refused."""
    for word in HOSTILE:
        assert at(load_config(TINY, [f"{key}={word}"]), key) == Path.cwd() / word
        assert at(load_config(TINY, [f"{key}=/x/{word}/y"]), key) == Path(f"/x/{word}/y")


def test_what_was_taken_is_written_and_read_back_unchanged(tmp_path: Path) -> None:
    """The recipe of a submitted run, and the one that a run records, are read back by another process."""
    for word in HOSTILE:
        config = load_config(TINY, [f"run.path={word}", f"data.path=/d/{word}", f"data.template={word}"])
        (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("written", ["2024-01-01", "20240101", "on", "1e3", "010", "12:30:45", "0x1f", "1_000", "no"])
def test_a_file_is_read_as_it_is_written(tmp_path: Path, written: str) -> None:
    """`path: 2024-01-01` in a file was a date, `name: on` the truth value True."""
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run: {{path: {written}}}\nretriever: {{name: {written}}}\nranker: {{name: '{written}'}}\n"
        f"data:\n  path: {written}\n  template: {written}   # a comment\n"
    )
    config = load_config(path)
    assert (config.run.path, config.data.path) == (Path.cwd() / written, Path.cwd() / written)
    assert (config.retriever.name, config.ranker.name, config.data.template) == (written, written, written)


@pytest.mark.parametrize("key", OPTIONAL)
@pytest.mark.parametrize("nothing", ["", "null"])
def test_what_can_be_left_out_is_left_out_by_null_or_by_nothing(key: str, nothing: str) -> None:
    assert (
        at(load_config(TINY, [f"{key}=1", f"{key}={nothing}"] if key != "run.keep_best" else [f"{key}={nothing}"]), key)
        is None
    )


def test_null_is_a_text_where_a_text_is_needed(tmp_path: Path) -> None:
    """`run.path=null` was refused; a folder of the name of nothing is `./null` where the path may be left out."""
    config = load_config(TINY, ["run.path=null", "data.template=null", "retriever.name=", "data.path=./null"])
    assert (config.run.path.name, config.data.template, config.retriever.name) == ("null", "null", "")
    assert config.data.path == Path.cwd() / "null"
    path = tmp_path / "c.yaml"
    path.write_text(
        "run: {path: r, network: ~, keep_best: null}\nretriever: {name: null}\nranker: {name: 'null'}\ndata: {path: }"
    )
    config = load_config(path)
    assert (config.run.network, config.run.keep_best, config.data.path) == (None, None, None)
    assert (config.retriever.name, config.ranker.name) == ("null", "null")
    path.write_text("run: {path: r, network: 'null'}\nretriever: {name: }\nranker: {name: g}")
    with pytest.raises(ConfigError, match=r"retriever.name: expected a text, got null"):
        load_config(path)


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("warmup_ranker.optim.lr", "1e-6", 1e-6),
        ("warmup_ranker.optim.lr", ".5", 0.5),
        ("warmup_ranker.optim.lr", "5.", 5.0),
        ("warmup_ranker.optim.betas", "[.8, 95e-2]", (0.8, 0.95)),
        ("run.seed", "1_000", 1000),
        ("run.seed", "010", 10),  # YAML says eight
        ("run.seed", "08", 8),
        ("run.seed", "0x1F", 31),
        ("run.seed", "1e3", 1000),
        ("run.seed", " 7 ", 7),
        ("run.seed", str(2**63 - 1), 2**63 - 1),
        ("retriever.num_layers", "2", 2),
        ("retriever.zero_stage", "3", 3),
        ("retriever.gradient_checkpointing", "auto", "auto"),
        ("retriever.gradient_checkpointing", "True", True),
        ("retriever.gradient_checkpointing", "off", False),
        ("retriever.tied", "no", False),
        ("run.keep_best", "R@1", "R@1"),
        ("index", "OPQ64,IVF16384,PQ64", None),
        ("index", "{factory: Flat, memory_gib: 4}", None),
    ],
)
def test_other_fields_read_a_word_by_their_type(tmp_path: Path, key: str, word: str, value: object) -> None:
    config = load_config(TINY, [f"{key}={word}"])
    if key == "index":
        assert config.index.factory == ("Flat" if "{" in word else word)
        return
    assert at(config, key) == value
    assert type(at(config, key)) is type(value)
    *sections, leaf = key.split(".")
    tree = yaml.safe_load(TINY.read_text())
    node = tree
    for section in sections:
        node = node[section]
    node[leaf] = "PLACE"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree).replace("PLACE", word))
    assert at(load_config(tmp_path / "c.yaml"), key) == value, "a file says the same"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("warmup_ranker.optim.lr=nan", "lr: expected a finite number, got nan"),
        ("warmup_ranker.optim.lr=.inf", "finite number"),
        ("warmup_ranker.optim.lr=1e400", "finite number"),
        ("warmup_ranker.optim.lr=-1", "greater than 0"),
        ("warmup_ranker.optim.betas=[nan, 0.9]", "betas.0: expected a finite number"),
        ("warmup_ranker.optim.betas=[0.9, 2]", "betas.1: expected a number less than 1"),
        ("warmup_ranker.optim.betas=0.9", "betas: expected a list, written as [a, b], got '0.9'"),
        ("run.timeout_seconds=inf", "finite number"),
        ("run.timeout_seconds=1e300", "less than or equal to 100000000"),
        ("index.memory_gib=1e308", "is beyond 1e+15"),
        ("random_model.hidden_size=1e9", "less than or equal to 65536"),
        ("ar2.iterations=1e9", "less than or equal to 10000"),
        ("run.seed=1.5", "expected a whole number"),
        ("run.seed=1:30", "expected a whole number"),  # YAML says ninety
        ("run.seed=99999999999999999999", "is beyond 9.22337e+18"),
        ("run.seed=" + "9" * 5000, "run.seed"),
        ("run.seed=", "expected a whole number"),
        ("run.path=", "is empty"),
        ("run.path=~nobody-of-this-name/x", "there is no user 'nobody-of-this-name'"),
        ("data.path=/a/\udcff", "is no UTF-8"),
        ("data.template=\udcff{text}", "is no UTF-8"),
        ("warmup_ranker.optim={lr: 1e-4, lr: 2}", "the key 'lr' stands there again"),
        ("warmup_ranker.optim={lr: 1e-4", "is not valid YAML"),
        ("retriever.gradient_checkpointing=maybe", "got 'maybe'"),
        ("run.seed.x=3", "goes below 'run.seed', which is a value"),
    ],
)
def test_a_word_that_its_field_cannot_take_is_refused(word: str, message: str) -> None:
    """A learning rate that is not a number trained until the first loss; infinite times ended in a traceback."""
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [word])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("evaluation.metrics=R@5,MRR@10", "expected a list, written as [R@5,MRR@10], got 'R@5,MRR@10'"),
        ("run.trackers=wandb", "expected a list, written as [wandb], got 'wandb'"),
        ("retriever.layers=0, 1", "expected a list, written as [0,1], got '0, 1'"),
        ("evaluation.metrics={a: 1}", "expected a list, written as [a, b], got {a: 1}"),
        ("evaluation.metrics=[]", "expected a list of at least 1, written as [a, b], got []"),
        ("warmup_ranker.optim.betas=[0.9]", "betas: expected a list of 2, written as [a, b], got [0.9]"),
        ("warmup_ranker.optim.betas=[0.9, 0.9, 0.9]", "betas: expected a list of at most 2, written as [a, b]"),
        ("retriever.lora.target_modules=q", "expected a list, written as [q], or 'all-linear', got 'q'"),
        ("ar2.negatives.filters=answers", "filters: expected a list, written as [{name: ...}]"),
        ("ar2.negatives.filters=[answers]", "filters.0: expected a section, written as {name: ...}, got 'answers'"),
        ("ar2.negatives.filters=[{name: x}]", "filters.0: expected one of the names 'answers', 'additions'"),
        ("ar2.negatives.filters=[{share: 1}]", "filters.0: expected a key 'name', got {share: 1}"),
        ("ar2.negatives.filters=[{name: margin, share: x}]", "filters.0.share: expected a number, got 'x'"),
        ("retriever=random", "retriever: expected a section with keys of its own, written as retriever.name=..., got"),
        ("ar2=null", "ar2: expected a section with keys of its own, written as ar2.objective=..., got null"),
        ("run=5", "run: expected a section with keys of its own, written as run.path=..., got '5'"),
        ("ar2.negatives.sampler=x", "keys of its own, written as ar2.negatives.sampler.name=..., got 'x'"),
        ("retriever.tied=maybe", "retriever.tied: expected true or false, got 'maybe'"),
        (
            "retriever.gradient_checkpointing=x",
            "1 problem: retriever.gradient_checkpointing: expected true or false or",
        ),
        (
            "index.tokens_per_batch=5",
            "1 problem: index.tokens_per_batch: expected a number greater than or equal to 128",
        ),
        ("bm25.k1=x", "bm25.k1: expected a number, got 'x'"),
    ],
)
def test_a_wrong_value_is_told_in_the_words_of_the_file(word: str, message: str) -> None:
    """Symptom: "Input should be a valid tuple", and "instance of RetrieverConfig" of a section that was given a value.

    Of a field with several kinds of value there was a problem for each, under names such as `literal['auto']`.
    """
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [word])
    assert message in str(caught.value)
    for foreign in ("tuple", "dict", "instance", "Config", "Input", "valid ", "string", "boolean", "None", "literal["):
        assert foreign not in str(caught.value).replace(word, "")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["run.seed.x=4"], "Expected: nothing between run.seed and =. Remedy: write run.seed=..."),
        (["retriever=g", "retriever.name=h"], "a section with keys of its own, written as retriever.KEY=VALUE"),
        (["ar2.negatives.filters=[a]", "ar2.negatives.filters.0=b"], "Expected: a list as a whole, written as [a, b]"),
        (["run.seed"], "Remedy: put the value behind the key"),
        (["recipe=foo"], "Remedy: name one of them"),
    ],
)
def test_a_word_that_cannot_be_put_anywhere_is_told_a_way_out(words: list[str], remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, words)
    assert remedy in str(caught.value)
    assert caught.value.remedy


def test_of_two_words_for_one_key_the_last_holds() -> None:
    config = load_config(TINY, ["run.seed=1", "data={path: a, template: b}", "run.seed=2", "data.path=c"])
    assert (config.run.seed, config.data.path, config.data.template) == (2, Path.cwd() / "c", "b")


def test_a_word_goes_below_a_section_that_the_file_leaves_out(tmp_path: Path) -> None:
    """A run's config.yaml names what is left out: `student: null` must not stand against `student.name=...`."""
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {path: r}\ndata: {path: d}\nretriever: {name: random}\nranker: null\n")
    assert (
        load_config(path, ["ranker.name=random", "ranker.max_length=50"]).model("ranker", RankerConfig).max_length == 50
    )


def test_a_key_that_stands_twice_in_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    """Of two `seed:` in a file the first was dropped without a word, which a merged or copied recipe easily has."""
    path = tmp_path / "c.yaml"
    path.write_text("run:\n  path: r\n  seed: 1\nretriever: {name: g}\nranker: {name: d}\nrun: {path: x}\n")
    with pytest.raises(ConfigError, match=r"c.yaml, line 6: the key 'run' stands there again, first in line 1"):
        load_config(path)
    path.write_text("run:\n  path: r\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"line 4: the key 'seed' stands there again, first in line 3"):
        load_config(path)
    path.write_text("a: &o {lr: 1}\nb: {<<: *o, lr: 2}\nc: {<<: *o}\n")
    assert read_tree(path.read_text(), "x") == {"a": {"lr": "1"}, "b": {"lr": "2"}, "c": {"lr": "1"}}, "a merge is none"


@pytest.mark.parametrize("written", [b"run: {path: \xff}", b"run: {path: a\0b}", b"[" * 2000, b"\xff\xfe", b"a: *b"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, written: bytes) -> None:
    """A recipe saved in Latin-1 ended in a traceback."""
    (tmp_path / "c.yaml").write_bytes(written)
    with pytest.raises(ConfigError, match=r"is no UTF-8: line 1|is not valid YAML"):
        load_config(tmp_path / "c.yaml")


def test_paths_are_made_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was started as `data.path=../data` looked for its data beside whoever opened it later."""
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    config = load_config(TINY, ["data.path=../data", "shards.cache=~/cache", "ranker.deepspeed=./~x"])
    assert config.run.path == tmp_path / "runs" / "tiny", "those of a file begin in the working directory, too"
    assert config.data.path == tmp_path / ".." / "data"
    assert (config.shards.cache, config.ranker.deepspeed) == (Path("/home/somebody/cache"), tmp_path / "~x")
    assert absolute_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "c.yaml").write_text(dump_config(config))
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "c.yaml") == config


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert load_config(TINY, ["run.path=/r"]).run.path == Path("/r")
    with pytest.raises(ConfigError, match="the working directory does not exist any more"):
        load_config(TINY, ["run.path=r"])


def test_a_name_of_a_file_in_a_locale_of_ascii() -> None:
    """`LC_ALL=C PYTHONUTF8=0` made an error of YAML of a path with an umlaut; a text is read as it was typed."""
    script = """
import sys
from pathlib import Path
from engine.config.file import load_config
from engine.errors import ConfigError
config = load_config(Path(sys.argv[1]), ["data.template=" + sys.argv[2]])
assert config.data.template == "\\u00fc {text}", ascii(config.data.template)
try:
    load_config(Path(sys.argv[1]), ["run.path=/tmp/" + sys.argv[2]])
except ConfigError as error:
    print(ascii(str(error)))
"""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(TINY), "ü {text}"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "run.path: has more than ASCII (/tmp/\\xfc {text}), and Python takes names of files as ascii" in done.stdout
    assert "PYTHONUTF8=1" in done.stdout


def test_bytes_of_utf8_that_the_locale_did_not_read() -> None:
    assert as_typed("/\udcc3\udcbc") == "/ü"
    assert as_typed("\udcff") == "\udcff"
    assert as_recorded("\udcc3\udcbc") == "ü"
    assert as_recorded("\udcff") == "\\udcff", "which every file can hold"
    assert as_typed("ü") == "ü"


@pytest.mark.parametrize(
    ("kind", "tree", "value"),
    [
        (list[str], ["on", "1e3"], ["on", "1e3"]),
        (list[int] | None, ["1_0", "2"], [10, 2]),
        (tuple[str, ...], ["a", "1"], ["a", "1"]),
        (dict[str, str], {"on": "2024-01-01"}, {"on": "2024-01-01"}),
        (dict[str, float], {"a": "1e-6"}, {"a": 1e-6}),
        (list[str | None], ["x", read_tree("null", "t"), read_tree("'null'", "t")], ["x", None, "null"]),
        (bool | Literal["auto"], "auto", "auto"),
        (Literal[0, 1, "all"], "1", 1),
        (Literal["1", "all"], "1", "1"),
        (int | float, "2", 2),
        (int | None, "", ""),
        (None, {"a": ["b"]}, {"a": ["b"]}),
    ],
)
def test_lists_mappings_and_unions(kind: Any, tree: Any, value: Any) -> None:
    """No field is a list of texts yet; the next one is read like the others."""
    assert value_of(tree, kind) == value


def test_what_a_key_holds() -> None:
    assert kind_at(Ar2Recipe, ["run", "seed"]) is int
    assert kind_at(Ar2Recipe, ["run", "sede"]) is None
    assert takes_structure(kind_at(Ar2Recipe, ["warmup_ranker", "optim"]))
    assert takes_structure(kind_at(Ar2Recipe, ["warmup_ranker", "optim", "betas"]))
    assert not takes_structure(kind_at(Ar2Recipe, ["data", "template"]))


@pytest.mark.parametrize("text", ["", ".", "_1", "1e", "1.2.3", "0x", "٣", "1 2", "e5", "--1", "infinity"])
def test_what_is_no_number(text: str) -> None:
    assert number_of(text) is None
