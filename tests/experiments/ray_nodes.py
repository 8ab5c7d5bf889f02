"""Nodes of a Ray cluster as processes of this machine, which listen on loopback only."""

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# `ray start` with one change: Ray replaces a loopback address by the machine's own where a cluster has several nodes.
START = (
    "import ray._private.services as s; s.resolve_ip_for_localhost = lambda host: host;"
    "from ray.scripts.scripts import main; main()"
)
STARTED_WITHIN = 180  # seconds; test machines are small
ADDRESS = "127.0.0.1"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # it, as /proc/net/tcp and tcp6 write it


@dataclass
class Nodes:
    """A head node and others, each with one processor.

    Attributes:
        port: of the head node.
        folder: of their logs.
        environment: of all nodes and of whoever uses them; has their token.
    """

    port: int
    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment = self.environment | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }

    @property
    def address(self) -> str:
        return f"{ADDRESS}:{self.port}"

    def start(self) -> None:
        """Start one more, the first as the head."""
        head = [f"--port={self.port}", "--head", "--include-dashboard=false"]
        words = [*([f"--address={self.address}"] if self.started else head), f"--node-ip-address={ADDRESS}"]
        words += ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
        log = self.folder / f"node{len(self.started)}.log"
        with log.open("w") as output:
            node = subprocess.Popen(
                [sys.executable, "-c", START, "start", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # so that the processes of one node, and no others, can be killed
            )
        self.started.append(node)
        deadline = time.monotonic() + STARTED_WITHIN
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def kill(self, number: int) -> None:
        """Kill a node with all its processes at once, as a machine that loses its power."""
        if self.started[number].poll() is None:
            os.killpg(self.started[number].pid, signal.SIGKILL)
            self.started[number].wait()

    def stop(self) -> None:
        """Kill all of them."""
        for number in reversed(range(len(self.started))):
            self.kill(number)

    def listening(self) -> set[str]:
        """The addresses at which processes of the nodes listen, as the kernel writes them."""
        sessions, sockets = {node.pid for node in self.started}, set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it may have ended
                if os.getsid(int(process.name)) in sessions:
                    sockets |= {os.readlink(link) for link in (process / "fd").iterdir()}
        lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
        return {words[1].split(":")[0] for words in lines if words[3] == "0A" and f"socket:[{words[9]}]" in sockets}
