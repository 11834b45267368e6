"""The bytes of a tar whose members have a name and a payload and nothing else, at the speed of joining them.

`tarfile` builds every header from its twelve fields, which for members of a few hundred bytes takes longer than all
else. Here only what differs is put into a header that `tarfile` made once: name, size, checksum. The archive has the
bytes of `tarfile`'s (POSIX ustar; time, owner and group are 0 and empty).
"""

from __future__ import annotations

import tarfile

_MODE = 0o644
_NAME, _SIZE, _CHECKSUM = 100, slice(124, 136), slice(148, 156)


def _empty_header() -> bytes:
    member = tarfile.TarInfo("")
    member.mode = _MODE
    return member.tobuf(tarfile.USTAR_FORMAT)


_HEADER = _empty_header()
_BEFORE_SIZE, _TO_CHECKSUM, _REST = _HEADER[_NAME:124], _HEADER[136:148], _HEADER[156:]
# A checksum is the sum of a header's bytes, its own eight counted as spaces.
_SUM = sum(_BEFORE_SIZE) + sum(_TO_CHECKSUM) + sum(_REST) + 8 * ord(" ")


def member_header(name: bytes, num_bytes: int) -> bytes:
    """Return the header of a member, 512 bytes.

    Args:
        name: The member's name, 100 bytes at most.
        num_bytes: Of its payload, below 8 GiB.

    Raises:
        ValueError: The name or the payload is longer.
    """
    size = b"%011o\0" % num_bytes
    if len(name) > _NAME or len(size) > 12:
        raise ValueError(f"a tar member {name!r} of {num_bytes} bytes: at most {_NAME} bytes of name and 8 GiB")
    checksum = b"%06o\0 " % (_SUM + sum(name) + sum(size))
    return b"".join((name.ljust(_NAME, b"\0"), _BEFORE_SIZE, size, _TO_CHECKSUM, checksum, _REST))


def padding(num_bytes: int, unit: int = tarfile.BLOCKSIZE) -> bytes:
    """Return the zeros that fill up a payload to whole units."""
    return b"\0" * (-num_bytes % unit)


def end_of_archive(num_bytes: int) -> bytes:
    """Return what follows the last member: two empty blocks, and zeros up to a whole record of 10240 bytes.

    Args:
        num_bytes: Of all members.
    """
    two_blocks = 2 * tarfile.BLOCKSIZE
    return b"\0" * two_blocks + padding(num_bytes + two_blocks, tarfile.RECORDSIZE)
