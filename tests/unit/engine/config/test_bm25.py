"""Names of languages, stemmers and stop words are known ones, or refused with the nearest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.file import dump_config, load_config
from engine.errors import ConfigError

TINY = Path(__file__).parents[4] / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bm25.language=germn", r"bm25.language: there is no language of this name, did you mean 'german'.*'germn'"),
        ("bm25.language=japanes", r"did you mean 'japanese'"),
        ("bm25.language=porter", r"there is no language of this name.*known are arabic, .*none"),
        ("bm25.language=swahili", r"a language that is not here, such as Swahili, is `none`"),
        ("bm25.stemmer=englsh", r"bm25.stemmer: there is no stemmer of this name, did you mean 'english'"),
        ("bm25.stemmer=japanese", r"there is no stemmer of this name"),
        ("bm25.stopwords=hindi", r"bm25.stopwords: there is no list of stop words.*or a list of words, got 'hindi'"),
        ("bm25.tokens=trigrams", r"'auto', 'words' or 'bigrams'"),
        ("bm25.k1=0", r"bm25.k1"),
        ("bm25.b=1.5", r"bm25.b"),
    ],
)
def test_what_is_not_known_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, [word])


@pytest.mark.parametrize(("given", "name"), [("German", "german"), ("de", "german"), ("zh", "chinese"), ("th", "thai")])
def test_languages_go_by_name_or_code(given: str, name: str) -> None:
    assert load_config(TINY, [f"bm25.language={given}"]).bm25.language == name


def test_a_list_of_stop_words_comes_back_from_the_recorded_configuration(tmp_path: Path) -> None:
    config = load_config(TINY, ["bm25.stopwords=[der, die]", "data.ignore_identical_ids=false"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert (config.bm25.stopwords, config.data.ignore_identical_ids) == (("der", "die"), False)


def test_the_lists_of_stop_words_come_without_what_takes_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("raise SystemExit('JAX was imported')")
    program = "from engine.config.bm25 import stop_word_lists; print(len(stop_word_lists()['english']))"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(TINY.parents[1])!r}]; {program}",
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert int(told.stdout) > 30
