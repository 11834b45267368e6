"""Looking at a run's curves from another machine: through ssh, and in no other way."""

from __future__ import annotations

import time
from pathlib import Path

from engine.metrics import MetricsWriter
from tests.cluster.lab import BIN, Host, Lab

PORT = 6006


def ask(host: Host, url: str) -> str:
    """Return what a host gets from a URL, or an empty text where nobody answers."""
    script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"
    done = host.run([BIN / "python", "-c", script, url])
    return done.stdout if done.returncode == 0 else ""


def wait_for(host: Host, url: str) -> str:
    deadline = time.monotonic() + 60
    while not (answer := ask(host, url)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return answer


def test_tensorboard_is_seen_through_ssh_alone(lab: Lab, folder: Path) -> None:
    """Symptom: everybody on the network reads along, or the documented tunnel shows nothing."""
    writer = MetricsWriter(folder, active=True)
    writer.write("retriever/1", 1, {"retriever/loss": 0.5})
    writer.close()
    cluster, laptop = lab.nodes[0], lab.login
    server = cluster.start([BIN / "tensorboard", "--logdir", folder / "tensorboard", "--port", str(PORT)])
    tunnel = laptop.start(["ssh", "-N", "-o", "BatchMode=yes", "-L", f"{PORT}:localhost:{PORT}", cluster.name])
    try:
        answer = wait_for(laptop, f"http://localhost:{PORT}/data/plugin/scalars/tags")
        assert "retriever/loss" in answer
        assert not ask(laptop, f"http://{cluster.address}:{PORT}/data/plugin/scalars/tags")
        assert ask(cluster, f"http://localhost:{PORT}/data/environment")
    finally:
        tunnel.kill()
        cluster.kill_processes("tensorboard")
        server.wait()
