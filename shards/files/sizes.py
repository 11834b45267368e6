"""Sizes as a person reads them."""

from __future__ import annotations

_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size(num_bytes: float) -> str:
    """Write a number of bytes in the largest binary unit of which there is one, such as `3.52 GiB`."""
    for unit, one in _UNITS:
        if abs(num_bytes) >= one:
            number = num_bytes / one
            return f"{number:,.0f} {unit}" if abs(number) >= 100 else f"{number:.3g} {unit}"
    return f"{num_bytes:.0f} bytes" if abs(num_bytes) >= 1 else "0"
