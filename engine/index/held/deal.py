"""Deals the parts of an index to hosts: who encodes, and so has, which embeddings.

All shards of an index part (`engine.index.plan.cut_parts`) belong to one host, so that a part is filled and searched
where its embeddings are. Who has which is decided before each encoding, from what is whole on the hosts that are there:
a part stays where most of it is, the others go to the host with the least to do for its ranks. So a resumed run, on
whichever hosts, encodes what it has lost and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.index.plan import cut_parts
from shards.manifest import CorpusManifest


@dataclass(frozen=True, slots=True)
class Deal:
    """Which shards are to be encoded, and where.

    Attributes:
        missing: Their numbers, the longest first.
        homes: The host of each of them.
    """

    missing: list[int]
    homes: list[str]

    def documents_of(self, host: str, manifest: CorpusManifest) -> int:
        """Return how many documents a host is to encode."""
        mine = (number for number, home in zip(self.missing, self.homes, strict=True) if home == host)
        return sum(manifest.shards[number].num_documents for number in mine)


def deal_parts(manifest: CorpusManifest, stream: str, whole: Sequence[str], ranks_of_host: Mapping[str, int]) -> Deal:
    """Decide which host has which index part, and so what is to be encoded where.

    Args:
        manifest: The corpus.
        stream: The encoder's token stream, by which shards are long or short.
        whole: Of each shard, the host on which its part is whole; empty where there is none.
        ranks_of_host: The hosts, in order, with their ranks.
    """
    entries = manifest.shards
    tokens = [entry.num_tokens[stream] for entry in entries]
    places = {host: place for place, host in enumerate(ranks_of_host)}
    load = dict.fromkeys(ranks_of_host, 0)
    parts = cut_parts([entry.num_documents for entry in entries])
    there = [Counter[str]() for _ in parts]
    for shards, count in zip(parts, there, strict=True):
        for number in shards:
            if whole[number]:
                count[whole[number]] += tokens[number] + 1
    # What somebody has already comes first, then the largest.
    order = sorted(range(len(parts)), key=lambda part: (not there[part], -sum(tokens[n] for n in parts[part]), part))
    homes = [""] * len(entries)
    for part in order:
        size = sum(tokens[number] for number in parts[part])
        if there[part]:
            home = min(there[part], key=lambda host: (-there[part][host], places[host]))
        else:
            home = min(load, key=lambda host: ((load[host] + size) / ranks_of_host[host], places[host]))
        for number in parts[part]:
            homes[number] = home
            load[home] += tokens[number] if whole[number] != home else 0
    missing = [entry.number for entry in entries if whole[entry.number] != homes[entry.number]]
    missing.sort(key=lambda number: (-tokens[number], number))
    return Deal(missing, [homes[number] for number in missing])
