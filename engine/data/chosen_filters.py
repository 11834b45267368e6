"""From the filters that a configuration lists to those that judge candidates: files read, scores and others at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache

from engine.config.negatives import (
    AdditionsFilterConfig,
    AnswersFilterConfig,
    ConstrainedFilterConfig,
    FilterConfig,
    MarginFilterConfig,
    NegativesConfig,
    RankerThresholdsFilterConfig,
    RelabelsFilterConfig,
)
from engine.data.answers import AnswerMatcher
from engine.data.candidates import Candidates
from engine.data.corpus import Data
from engine.data.filters import (
    Answers,
    Constrained,
    Filter,
    KnownDocuments,
    Listed,
    RankerThresholds,
    Redistributed,
    RetrieverMargin,
    Teacher,
    TeacherMargin,
)
from engine.data.label_files import read_additions, read_relabels
from engine.errors import ConfigError

Predicate = Callable[[str, int], bool]
"""From a query's id and a document."""


def filters_of(
    settings: NegativesConfig,
    data: Data,
    contains_answer: Predicate,
    teacher: Teacher | None,
    within: Mapping[str, Candidates],
) -> list[tuple[str, Filter]]:
    """Return the filters of a configuration in their order, each with the name by which it is counted.

    Args:
        settings: Of the configuration.
        data: For the ids in files.
        contains_answer: Of a query's id and a document.
        teacher: A ranker's scores; None where there are none.
        within: Candidates that a filter may keep to, by name.

    Returns:
        What the data know first; a filter that stands there twice has its number behind its name.

    Raises:
        ConfigError: A filter needs what is not there.
        DataError: A file of labels does not fit the data.
    """
    filters: list[tuple[str, Filter]] = [(KnownDocuments.name, KnownDocuments())]
    names = Counter(one.name for one in settings.filters)
    seen: Counter[str] = Counter()
    for one in settings.filters:
        seen[one.name] += 1
        name = one.name if names[one.name] == 1 else f"{one.name}_{seen[one.name]}"
        filters.append((name, _filter_of(one, data, contains_answer, teacher, within)))
    return filters


def _filter_of(
    one: FilterConfig,
    data: Data,
    contains_answer: Predicate,
    teacher: Teacher | None,
    within: Mapping[str, Candidates],
) -> Filter:
    index_of = data.shards.docids.index_of
    if isinstance(one, AnswersFilterConfig):
        return Answers(contains_answer)
    if isinstance(one, AdditionsFilterConfig):
        return Listed(one.name, read_additions(one.file, data.dataset, index_of).out)
    if isinstance(one, RelabelsFilterConfig):
        labels = read_relabels(one.file, data.dataset, index_of)
        qids = labels.positive.keys() | labels.out.keys()
        return Listed(one.name, {qid: labels.positive.get(qid, []) + labels.out.get(qid, []) for qid in qids})
    if isinstance(one, ConstrainedFilterConfig):
        if one.within not in within:
            raise ConfigError(
                f"negatives are to be within what {one.within!r} finds, which has no candidates here",
                expected=f"one of {', '.join(within) or 'none, since this recipe mines nothing to keep to'}",
                remedy="name one of them, or take the filter out",
            )
        return Constrained(within[one.within], one.top_k)
    if isinstance(one, MarginFilterConfig) and one.scores == "retriever":
        return RetrieverMargin(one.share, one.difference)
    if teacher is None:
        raise ConfigError(
            f"the filter {one.name!r} needs a teacher's scores, and there are none here",
            expected="the scores of a ranker for all candidates of this pool",
            remedy="take the filter out, or let it go by the retriever's scores",
        )
    if isinstance(one, MarginFilterConfig):
        return TeacherMargin(teacher, one.share, one.difference)
    if isinstance(one, RankerThresholdsFilterConfig):
        return RankerThresholds(teacher, one.reject_above, one.keep_below)
    return Redistributed(teacher, one.top_k)


def answers_of(data: Data) -> Predicate:
    """Return a function (query id, document) -> whether the document contains an answer of that query."""
    answers = {query.id: query.answers for query in data.train.queries if query.answers}

    @lru_cache(maxsize=16)
    def matcher(qid: str) -> AnswerMatcher:
        return AnswerMatcher(answers[qid])

    return lambda qid, document: qid in answers and matcher(qid).has(data.haystack_of(document))
