"""The typed configuration of a recipe, and how it is read from YAML and the command line."""
