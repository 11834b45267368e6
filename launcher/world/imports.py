"""Imports without Python's search for cycles, which finds nothing in modules and takes a fifth of their time.

torch, transformers and DeepSpeed make half a million objects that live as long as the process. A thousand searches go
through them while they come; later every full one would, and DeepSpeed asks for one whenever it makes an engine.
"""

from __future__ import annotations

import gc


def begin_imports() -> None:
    """Stop the searches; by a program, before it imports anything large."""
    gc.disable()


def end_imports() -> None:
    """Let searches begin again, which leave out for good what there is by now; harmless where none were stopped."""
    gc.freeze()
    gc.enable()
