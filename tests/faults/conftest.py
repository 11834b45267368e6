"""What the tests of faults share."""

from __future__ import annotations

from tests.e2e.conftest import alone, zygote

__all__ = ["alone", "zygote"]
