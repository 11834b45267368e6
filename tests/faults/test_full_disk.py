"""A run on a disk that fills up, wherever that is: it stops with the place, and ends the same once there is space.

The preflight refuses such a disk; without it the run shows what happens where others fill it. The disk is really too
small (a tmpfs); the run is a whole recipe on one rank, its starts copies of a process that has imported everything.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import Finished
from tests.e2e.made import measured, summary_of, weights_of
from tests.small_disk import run_on_small_disk

STARTS = """
import json, os, shutil

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
from tests.e2e.zygote import become, prepare

prepare()

def start(number, words):
    out, err = (f"{sys.argv[3]}-{number}.{name}" for name in ("out", "err"))
    files = {"stdin": os.devnull, "stdout": out, "stderr": err}
    pid = os.fork()
    if pid == 0:
        become({"argv": words, "module": "", "env": {}, "only": False, "unread": False, **files})
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, Path(err).read_text()

words = json.loads(sys.argv[2])
ends = []
starts = [("900k", "true")] + [(size, "false") for size in ("900k", "2500k", "4500k", "6500k", "64m")]
for number, (size, preflight) in enumerate(starts):
    enlarge(size)
    code, text = start(number, ["launcher/run.py", *words, f"run.path={disk / 'run'}", f"run.preflight={preflight}"])
    told = [line for line in text.splitlines() if "disk is full" in line]
    ends.append([code, told[:1], text[-2000:]])
    if code == 0:
        break
shutil.copytree(disk / "run", sys.argv[3])
print(json.dumps(ends))
"""


def test_a_run_goes_on_each_time_there_is_more_space(alone: Finished, tmp_path: Path) -> None:
    words = ["--config", "configs/tiny.yaml", "run.device=cpu", "run.checkpoint_every_steps=2"]
    kept = tmp_path / "kept"
    script = f"sys.argv += {[json.dumps(words), str(kept)]!r}\n" + STARTS
    ends = json.loads(run_on_small_disk(tmp_path / "disk", "900k", script))
    assert [end[0] for end in ends[:-1]] == [2] * (len(ends) - 1), ends
    assert ends[-1][0] == 0, ends
    refused, *full = ends[:-1]
    assert "nothing was computed" in refused[2]
    assert "space: 896 KiB are free" in refused[2], refused
    assert len(full) >= 2, "the disk was full at several places"
    for _, told, text in full:
        assert told, text
        assert "/disk/run" in told[0] or "bytes" in told[0], told
        assert "start the same command again" in told[0]
    assert weights_of(kept) == weights_of(alone.folder)
    assert summary_of(kept) == summary_of(alone.folder)
    assert measured(kept) == measured(alone.folder)
