"""The words of commands that load models, apart from what they do, so that help and completion load none of it."""
