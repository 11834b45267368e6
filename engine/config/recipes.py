"""All recipes by name: which class of configuration a file is, by its key `recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.ar2 import Ar2Recipe
from engine.config.pretrain import CoCondenserRecipe, EdMlmRecipe, IctRecipe
from engine.config.r2anker import R2ankerRecipe
from engine.config.recipe import Config
from engine.errors import ConfigError

RECIPES: Mapping[str, type[Config]] = {
    "ar2": Ar2Recipe,
    "r2anker": R2ankerRecipe,
    "edmlm": EdMlmRecipe,
    "ict": IctRecipe,
    "cocondenser": CoCondenserRecipe,
}
DEFAULT = "ar2"
"""What a file without the key is."""


def recipe_class(tree: Mapping[str, Any], origin: str) -> type[Config]:
    """Return the class of a recipe.

    Args:
        tree: The mapping of sections as it was read.
        origin: Names it in the error.

    Raises:
        ConfigError: There is no such recipe.
    """
    name = str(tree.get("recipe", DEFAULT))
    if name not in RECIPES:
        raise ConfigError(
            f"{origin} names the recipe {name!r}",
            expected=f"one of {', '.join(RECIPES)}",
            remedy=f"name one of them by the key recipe, or leave it out for {DEFAULT}",
        )
    return RECIPES[name]
