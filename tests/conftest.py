"""Which files of tests are begun first where several processes take them (`-n 2 --dist loadfile`).

A process takes whole files, since the tests of a file share what takes long. So that none is left with a long file
while the others have nothing to do, the files that take long come first, the longest first of all; all others keep
their order. xdist would sort the files by the number of their tests: `--no-loadscope-reorder` keeps it from that.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from launcher.world.imports import begin_imports, end_imports

TESTS = Path(__file__).parent
LONGEST_FIRST = (
    "e2e/test_variants.py",
    "e2e/test_r2anker.py",
    "e2e/test_tiny.py",
    "distributed/test_passes.py",
    "faults/test_recipe.py",
    "e2e/test_resume.py",
    "faults/test_processes.py",
    "e2e/test_bad_input.py",
    "distributed/test_backend.py",
    "e2e/test_presets.py",
    "e2e/test_damage.py",
    "e2e/test_terminal.py",
    "distributed/test_world.py",
    "e2e/test_overlap.py",
    "distributed/test_coordinator.py",
    "distributed/test_preflight.py",
    "e2e/test_commands.py",
    "e2e/test_python.py",
    "unit/engine/models/test_export_usage.py",
    "distributed/test_architectures.py",
    "e2e/test_sweep.py",
    "faults/test_full_disk.py",
    "distributed/test_local_embeddings.py",
    "distributed/test_packed.py",
    "distributed/test_pretrain.py",
    "faults/test_restarts.py",
    "unit/engine/models/test_compiled.py",
    "distributed/test_elastic.py",
    "distributed/test_listening.py",
    "distributed/test_lexical.py",
    "distributed/test_models.py",
    "e2e/test_comparisons.py",
    "e2e/test_branch.py",
    "e2e/test_pretrain.py",
    "site/test_site.py",
    "e2e/test_ict.py",
    "e2e/test_documented.py",
    "distributed/test_heads.py",
    "distributed/test_lexical_search.py",
    "distributed/test_adapters.py",
    "e2e/test_texts.py",
    "distributed/test_scoring.py",
    "unit/launcher/terminal/test_streams.py",
    "cluster/test_slurm.py",
    "cluster/test_faults.py",
    "cluster/test_hostfile.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests, and all that they import, as the programs do."""
    begin_imports()
    try:
        return (yield)
    finally:
        end_imports()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    place = {TESTS / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
