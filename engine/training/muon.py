"""DeepSpeed's optimizer Muon, which no recipe uses, imported without torch's compiler.

DeepSpeed imports it with the first engine, to know its class, and its functions are compiled as they are defined. That
brings hundreds of modules of the compiler into every rank, which take as long to import as torch itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from deepspeed.runtime import compiler  # type: ignore[import-untyped]


def import_muon() -> None:
    """Import Muon with its functions as they are written; harmless where it has been imported."""
    compiled = compiler.compile
    compiler.compile = _as_written
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled


def _as_written() -> Callable[[Any], Any]:
    """Stand for a decorator that compiles."""
    return lambda function: function
