"""Run Python on a disk that is really too small: a tmpfs of its own, seen by one process only, that can be made larger.

Needs the right to mount; where it is missing, tests skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PREFACE = """
import subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])

def enlarge(size):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
"""


def run_on_small_disk(folder: Path, size: str, script: str) -> str:
    """Run a script with `disk`, a folder on a tmpfs of `size`, and `enlarge(size)`; return what it printed.

    Skips the test where mounting is not allowed; fails it where the script does.
    """
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small disk needs root and unshare")
    folder.mkdir(parents=True, exist_ok=True)
    mount = 'mount -t tmpfs -o "size=$1" tmpfs "$2" || exit 77; folder=$2; shift 2; exec "$@" "$folder"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", size, str(folder), sys.executable, "-c"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, _PREFACE + script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode == 77 or "unshare failed" in ended.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
