"""A process that has imported everything, and forks a copy of itself for each command it is given.

Importing torch, DeepSpeed and transformers takes longer than a whole tiny run. What is forked here still is the real
thing from its first own line on: the script or module runs as `__main__` with its own arguments, environment, process
group and output files. It is told by lines of JSON on stdin, and answers each with the children's process ids, and a
line for each child that has ended. Its one argument is the folder of those files, which goes when it ends.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import selectors
import shutil
import sys
import traceback
from typing import Any

from launcher.world.imports import begin_imports, end_imports

PRELOADED = (
    "launcher.recipe",
    "engine.ar2",
    "engine.pretrain.edmlm",
    "engine.pretrain.ict",
    "engine.pretrain.cocondenser",
    "launcher.commands.search",
    "launcher.commands.evaluate",
    "launcher.commands.export",
    "torch.utils.tensorboard",
    "sentence_transformers",
)


def become(order: dict[str, Any]) -> None:
    """Turn this forked process into the one that was ordered; never returns."""
    code = 1
    try:
        os.setsid()
        for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(order[name], flags, 0o644), descriptor)
        if order["only"]:
            os.environ.clear()
        os.environ.update(order["env"])
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        if order["unread"]:  # outputs whose reader has gone
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
        sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115 - lives as long as the process
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        sys.argv = list(order["argv"])
        try:
            if order["module"]:
                runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as Python ends where it cannot write what is left
    os._exit(code)


def prepare() -> None:
    """Import everything; the search for cycles in a child would write to, and so copy, every page that it shares."""
    begin_imports()
    for name in PRELOADED:
        importlib.import_module(name)
    end_imports()


def serve() -> None:
    """Take orders until stdin closes."""
    prepare()
    answer({"ready": os.getpid()})
    children: dict[int, int] = {}
    orders = selectors.DefaultSelector()
    orders.register(0, selectors.EVENT_READ)
    while True:
        if orders.select(timeout=0.02):
            line = sys.stdin.buffer.raw.readline()  # type: ignore[attr-defined]
            if not line:
                return
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                become(order)
            children[pid] = order["number"]
            answer({"started": pid, "number": order["number"]})
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            answer({"ended": os.waitstatus_to_exitcode(status), "number": children.pop(pid)})


def answer(record: dict[str, Any]) -> None:
    """Write one line to whoever gives the orders."""
    os.write(1, json.dumps(record).encode() + b"\n")


if __name__ == "__main__":
    serve()
    shutil.rmtree(sys.argv[1], ignore_errors=True)
