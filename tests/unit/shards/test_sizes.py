"""Sizes as a person reads them."""

from __future__ import annotations

import pytest

from shards.files.sizes import size


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [
        *((0, "0"), (0.4, "0"), (7, "7 bytes"), (1023, "1023 bytes"), (2048, "2 KiB"), (99.9 * 2**10, "99.9 KiB")),
        *((1023 * 2**20, "1,023 MiB"), (3.5 * 2**30, "3.5 GiB"), (2**41, "2 TiB"), (-(2**30), "-1 GiB")),
    ],
)
def test_a_size_is_told_in_the_largest_unit_of_which_there_is_one(num_bytes: float, told: str) -> None:
    assert size(num_bytes) == told
