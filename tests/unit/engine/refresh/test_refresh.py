"""The refresh keeps the indexes that are still needed, and refuses an index that the corpus cannot fill."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.errors import ConfigError
from engine.index.plan import plan_index
from engine.refresh.refresh import _drop_old_indexes
from engine.run import Run

Open = Callable[..., Run]


def indexes_after(run: Run, iteration: int) -> list[str]:
    for name in ("zero-shot", *(f"{number:03d}" for number in range(iteration + 1))):
        run.folder.index(name).mkdir(parents=True, exist_ok=True)
        (run.folder.index(name) / "index.faiss").write_text("an index")
    _drop_old_indexes(run, iteration)
    return sorted(path.name for path in run.folder.index("000").parent.iterdir())


def test_old_indexes_go_but_those_of_the_last_table_stay(open_run: Open) -> None:
    assert indexes_after(open_run(), 5) == ["000", "004", "005", "zero-shot"]


def test_more_are_kept_where_asked_for(open_run: Open) -> None:
    assert indexes_after(open_run("run.keep_indexes=3"), 5) == ["000", "003", "004", "005", "zero-shot"]


def test_nothing_goes_before_there_are_too_many(open_run: Open) -> None:
    assert indexes_after(open_run(), 1) == ["000", "001", "zero-shot"]


def test_the_plan_follows_the_configuration(open_run: Open) -> None:
    plan = plan_index(open_run().config.index, num_documents=300, dimension=32)
    assert (plan.factory, plan.num_lists, plan.nprobe, plan.refine_factor) == ("IVF8,PQ8x4", 8, 8, 8)
    assert plan.num_iterations == 5


def test_a_corpus_smaller_than_the_lists_is_refused(open_run: Open) -> None:
    with pytest.raises(ConfigError, match=r"8 inverted lists, but 7 embeddings.*index\.factory=Flat"):
        plan_index(open_run().config.index, num_documents=7, dimension=32)
