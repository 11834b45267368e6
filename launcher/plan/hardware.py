"""GPUs by name: memory and peak rates as their makers state them, without sparsity."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from engine.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device that a rank computes on."""

    name: str
    memory_bytes: int
    """What programs can have of it, the card's name taken as GiB less what the driver keeps."""
    bf16_flops: float
    """Dense products a second in bf16 or fp16, accumulated in float32."""
    fp32_flops: float
    """The same in float32; TF32 is not used, torch's default."""
    link_bytes: float
    """That a rank sends a second to others of its host, over NVLink or PCIe (assumed: what NCCL commonly reaches)."""

    @property
    def is_cpu(self) -> bool:
        """Whether this is no GPU but a share of the host."""
        return self.name == "cpu"

    def peak_flops(self, precision: str) -> float:
        """Return the peak rate of a numeric type, in operations a second."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


def _gpu(name: str, memory_gib: float, bf16_tflops: float, fp32_tflops: float, link_gbytes: float) -> Gpu:
    return Gpu(name, int(memory_gib * GIB), bf16_tflops * 1e12, fp32_tflops * 1e12, link_gbytes * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("v100-16gb", 15.7, 125, 15.7, 130),
        _gpu("v100-32gb", 31.7, 125, 15.7, 130),
        _gpu("t4", 14.7, 65, 8.1, 8),
        _gpu("a10", 22.0, 125, 31.2, 10),
        _gpu("l4", 22.0, 121, 30.3, 10),
        _gpu("l40s", 44.4, 362, 91.6, 20),
        _gpu("rtx-3090", 23.6, 71, 35.6, 10),
        _gpu("rtx-4090", 23.6, 165, 82.6, 10),
        _gpu("a100-40gb", 39.4, 312, 19.5, 230),
        _gpu("a100-80gb", 79.2, 312, 19.5, 230),
        _gpu("h100-80gb", 79.2, 989, 67.0, 400),
        _gpu("h200", 140.0, 989, 67.0, 400),
        _gpu("b200", 178.0, 2250, 80.0, 700),
        # One core with AVX-512, as measured by engine.index.estimate on two machines: 0.09 to 0.19 TFLOP/s.
        _gpu("cpu", 8.0, 0.1, 0.1, 2),
    )
}
"""By name. Makers' data sheets; consumer cards at the rate with float32 accumulation."""


def find_gpu(name: str) -> Gpu:
    """Look a GPU up.

    Raises:
        ConfigError: It is not in the table; the message names the nearest.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    begun = [known for known in GPUS if known.startswith(name.lower())]
    near = begun[-1:] or difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"unknown GPU {name!r}{hint}",
        expected=f"one of {', '.join(GPUS)}",
        remedy="name the one that is most alike, and its memory by --gpu-memory",
    )
