"""Tests with real processes: ranks under torch's variables, under mpirun, and under the deepspeed launcher."""
