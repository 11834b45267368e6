"""Processes and machines: what `deepspeed` starts, and the commands that use what a run made."""
