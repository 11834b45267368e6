"""The recipes and DeepSpeed files that come along: `configs/` of the repository, also where a wheel was installed."""

from __future__ import annotations

from pathlib import Path

from engine.config.text import absolute_path

SHIPPED = (Path(__file__).parent / "files").resolve()
"""The folder; in the repository a symbolic link to `configs/`, of which a wheel holds the contents."""


def found_recipe(text: str) -> Path:
    """Return the file that a word names: its own path, or where there is no such file a recipe that comes along.

    Args:
        text: A path, from the working directory, or a name as of `shipped_recipe`.

    Returns:
        An absolute path; of a word that names neither, its own.

    Raises:
        ValueError: It is empty, or no program here could use the name.
    """
    path = absolute_path(text)
    return path if path.is_file() else shipped_recipe(text) or path


def shipped_recipe(name: str) -> Path | None:
    """Return the recipe that comes along under a name; None where there is none.

    Args:
        name: Such as `quickstart`, `tiny.yaml` or `configs/tiny.yaml`.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return None
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for found in (SHIPPED / inside, SHIPPED / f"{inside}.yaml"):
        if found.suffix == ".yaml" and found.is_file():
            return found
    return None


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come along."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
