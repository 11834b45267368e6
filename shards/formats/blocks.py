"""Where the blocks of a corpus file begin, so that each of many ranks reads its own lines and no others.

To skip a document of a stream takes nearly as long as to read it: its line is parsed before anybody knows whose it is.
To count lines goes at the speed of the disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

_BYTES_AT_A_TIME = 4 << 20


def find_blocks(path: Path, size: int, num_documents: int) -> list[int] | None:
    """Find where each block of a file of lines begins.

    Args:
        path: A plain file.
        size: Lines of a block, at least 1.
        num_documents: Documents that the file is known to hold.

    Returns:
        The offset in bytes of the first line of each block, in order; None where lines and documents differ in number,
        so that some line holds no document and the file must be read from its beginning.
    """
    starts, num_lines, offset, ends_in_line = [0], 0, 0, False
    with open(path, "rb") as file:
        while block := file.read(_BYTES_AT_A_TIME):
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            first = (size - 1 - num_lines) % size  # of these line ends, the first that ends a block
            starts += (offset + 1 + ends[first::size]).tolist()
            num_lines, offset = num_lines + len(ends), offset + len(block)
            ends_in_line = not block.endswith(b"\n")
    if num_lines + ends_in_line != num_documents:
        return None
    return starts[: -(-num_documents // size)]
