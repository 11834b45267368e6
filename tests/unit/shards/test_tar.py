"""The bytes are those of `tarfile`, whatever the members; a corpus that was written before has the same hash."""

from __future__ import annotations

import io
import tarfile

import pytest

from shards.files.tar import end_of_archive, member_header, padding


@pytest.mark.parametrize("sizes", [[], [0], [1, 511, 512, 513], [10240 - 1024], [7] * 40, [100_000]])
def test_an_archive_is_tarfiles(sizes: list[int]) -> None:
    ours, theirs = bytearray(), io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            name, payload = f"{number:09d}.{'x' * (90 if number % 2 else 3)}", bytes([65 + number % 26]) * size
            header = tarfile.TarInfo(name)
            header.size, header.mode = size, 0o644
            tar.addfile(header, io.BytesIO(payload))
            ours += member_header(name.encode(), size) + payload + padding(size)
    assert bytes(ours) + end_of_archive(len(ours)) == theirs.getvalue()


def test_a_header_holds_every_size_that_it_can_say() -> None:
    for size in (8**11 - 1, 8**10, 2**31):
        found = tarfile.TarInfo.frombuf(member_header(b"0123456789012.json", size), "utf-8", "strict")
        assert (found.name, found.size, found.mode) == ("0123456789012.json", size, 0o644)
    for name, size in ((b"x", 8**11), (b"x" * 101, 1)):
        with pytest.raises(ValueError, match="at most 100 bytes of name and 8 GiB"):
            member_header(name, size)
