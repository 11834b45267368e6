"""What an installation holds beside the code, and that it is found without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel, made by setuptools as pip makes them."""
    folder = tmp_path_factory.mktemp("site")
    words = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder)]
    script = "import setuptools; setuptools.setup()"
    subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, check=True, capture_output=True)
    return folder


def test_recipes_and_deepspeed_files_come_along(installed: Path) -> None:
    """Without `configs/` beside the code no model could be trained: its ZeRO file was looked for there."""
    shipped = installed / "engine" / "config" / "files"
    ours = ROOT / "configs"
    names = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    assert names == {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()}
    assert all((shipped / name).read_bytes() == (ours / name).read_bytes() for name in names)
    assert Path("deepspeed/zero3.json") in names


def test_all_code_comes_along(installed: Path) -> None:
    for package in ("engine", "launcher", "shards", "sparring"):
        names = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        assert names == {path.relative_to(installed) for path in (installed / package).rglob("*.py")}


def test_a_recipe_is_found_by_its_name_elsewhere(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "train", "--config", "quickstart", "--ranks", "2", "--print", "data.path=d"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f" {installed}/launcher/run.py --config {installed}/engine/config/files/quickstart.yaml" in done.stdout
