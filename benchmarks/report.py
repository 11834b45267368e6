"""What every benchmark prints around its numbers: the machine, the peak memory, a table in Markdown."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

_PACKAGES = ("torch", "transformers", "faiss-cpu", "faiss-gpu", "sentence-transformers", "numpy")


def machine_line() -> str:
    """Return one line about the processor, its cores, the threads in use and the versions."""
    cores, versions = len(os.sched_getaffinity(0)), []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{_processor()}, {cores} cores, torch uses {torch.get_num_threads()} threads; {', '.join(versions)}"


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident so far, in bytes (memory-mapped pages count too)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table in Markdown; the first row's keys are its head."""
    return tabulate(list(rows), headers="keys", tablefmt="github", floatfmt=".4g")


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
