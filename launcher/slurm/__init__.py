"""Runs as SLURM jobs: submitted, started again until they are finished, looked at and cancelled."""
