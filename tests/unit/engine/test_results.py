"""What finished stages returned, as a run's ledger keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ArtifactError
from engine.results import read_ledger


@pytest.mark.parametrize("text", ["{", "{}", "[1]", "null", '{"stages": []}', '{"stages": {"warmup": 1}}'])
def test_a_damaged_ledger_is_refused_and_not_to_be_deleted(tmp_path: Path, text: str) -> None:
    """Symptom: a ledger without stages ended `search` and `status` with a traceback; one cut off was to be deleted."""
    path = tmp_path / "ledger.json"
    assert read_ledger(path) == {}
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"finished stages.* is damaged.* restore .* from a copy") as caught:
        read_ledger(path)
    assert "delete" not in f"{caught.value}"
