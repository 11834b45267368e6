"""Where scripts find `load_config`, whatever lies below `engine/config/`."""

from engine.config.file import load_config

__all__ = ["load_config"]
