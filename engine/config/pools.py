"""What pools are made of: the minings that words for retrievers stand for, deep enough for all who read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from urllib.parse import quote

from engine.config.negatives import ConstrainedFilterConfig, Joint, NegativesConfig
from engine.config.timetable import Mining

BM25, RUN_FILE, GIVEN = "bm25", "run_file", "given"
"""Kinds of retriever: words alone, a ranking in a file, and the negatives that the data give."""
START = "zero_shot"
"""A recipe's word for what its retriever finds before any training."""


def mining_of(word: str, top_k: int, section: str, number: int = 0) -> Mining:
    """Return the mining that a word of a recipe stands for, where it names no model.

    Args:
        word: `bm25`; `given`, the data's own negatives; `given@NAME`, those of them that NAME proposed; or the path of
            a TREC run file.
        top_k: Candidates of a query.
        section: Key of that number in the configuration.
        number: Of the run file among those of the recipe.
    """
    if word == BM25:
        return Mining(BM25, BM25, None, top_k, section)
    kind, _, proposed_by = word.partition("@")
    if kind == GIVEN:
        name = f"{GIVEN}-{quote(proposed_by, safe='')}" if proposed_by else GIVEN
        return Mining(name, GIVEN, None, top_k, section, proposed_by=proposed_by)
    return Mining(f"{RUN_FILE.replace('_', '-')}-{number}", RUN_FILE, None, top_k, section, word)


def first_from_bm25(option: str, candidates: str, *, also: Sequence[str] = (), otherwise: str = "") -> dict[str, str]:
    """Return whether the first phase cannot do without BM25's index, and what to do where there is none.

    Args:
        option: That names its candidates.
        candidates: Its value.
        also: What it can be set to besides what all recipes know.
        otherwise: What can be done besides.
    """
    if candidates != BM25:
        return {}
    words = ["the path of a TREC run file that ranks the training queries", *also, "given (the data's own)"]
    remedy = f"set it to {', '.join(words[:-1])} or to {words[-1]}"
    return {f"{option}=bm25": f"{remedy}, {otherwise}" if otherwise else remedy}


def drawn_from_bm25(section: str, words: Sequence[str], negatives: NegativesConfig) -> dict[str, str]:
    """Return what of a pool cannot do without BM25's index, and what to do where there is none.

    Args:
        section: Key of a list of retrievers in the configuration.
        words: Those retrievers.
        negatives: Filters of what they find.
    """
    found = {}
    if BM25 in words:
        found[f"{section}=[{','.join(words)}]"] = "take bm25 out, or put the path of a TREC run file in its place"
    if any(isinstance(one, ConstrainedFilterConfig) and one.within == BM25 for one in negatives.filters):
        key = f"{section.partition('.')[0]}.negatives.filters"
        found[f"the filter constrained in {key}"] = "set its `within` to the path of a TREC run file, or take it out"
    return found


class Pools:
    """Gathers what is mined and what is drawn from together, for a timetable.

    Args:
        minings: What phases draw from alone, by name.
        section: Key in the configuration of the number of candidates in pools, for messages.
        meant: From a recipe's word for a retriever to the name of a mining, or to the same word.
        mined_by: Makes the mining of a word that stands for none yet, as `mining_of`.
    """

    def __init__(
        self,
        minings: Mapping[str, Mining],
        section: str,
        *,
        meant: Callable[[str], str] = lambda word: word,
        mined_by: Callable[[str, int, str, int], Mining] = mining_of,
    ) -> None:
        self.minings = dict(minings)
        self._alone, self._section, self._meant, self._mined_by = dict(minings), section, meant, mined_by
        self._joint: dict[str, Joint] = {}

    def mined(self, retriever: str, top_k: int) -> str:
        """Return the name of a retriever's candidates, which are mined to a depth at least.

        Args:
            retriever: A word for a mining: one of a model's, or as of `mining_of`.
            top_k: The depth.
        """
        files = {one.path: name for name, one in self.minings.items() if one.path}
        name = files.get(retriever) or self._meant(retriever)
        if name not in self.minings:
            mining = self._mined_by(retriever, top_k, self._section, len(files))
            name = mining.name
            self.minings.setdefault(name, mining)
        mining = self.minings[name]
        self.minings[name] = replace(mining, top_k=max(mining.top_k, top_k))
        return name

    def add(self, name: str, retrievers: tuple[str, ...], top_k: int, negatives: NegativesConfig) -> None:
        """Add a pool; where it is one mining drawn from as it is, nothing is added.

        Args:
            name: Of the pool.
            retrievers: As for `mined`.
            top_k: Candidates of each.
            negatives: Filters and sampler.
        """
        members = tuple(self.mined(retriever, top_k) for retriever in retrievers)
        filters = tuple(
            one.model_copy(update={"within": self.mined(one.within, one.top_k)})
            if isinstance(one, ConstrainedFilterConfig)
            else one
            for one in negatives.filters
        )
        if members != (name,) or not negatives.is_plain:
            self._joint[name] = Joint(members, top_k, negatives.model_copy(update={"filters": filters}))

    @property
    def joint(self) -> dict[str, Joint]:
        """All pools; with the beginning of each list that phases draw from alone, where it is mined deeper."""
        cut = {
            name: Joint((name,), mining.top_k)
            for name, mining in self._alone.items()
            if name not in self._joint and self.minings[name].top_k > mining.top_k
        }
        return cut | self._joint
