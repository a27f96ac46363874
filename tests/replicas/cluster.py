"""Ray Serve on this machine, with the application of this repository's deployment file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.server.running import KEY, free_port

ROOT = Path(__file__).parents[2]
RAY = Path(os.environ.get("RAY_BIN", ROOT / ".venv-replicas/bin"))
REPLICA = "x-posterior-replica"
CUT = 6000  # characters of a log that a failed test shows


@dataclass
class Cluster:
    """Ray below `folder`. `mark`: a word of the command lines of its servers, beside the folder's name."""

    folder: Path
    mark: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def file(self) -> Path:
        return self.folder / "serve.yaml"

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "POSTERIOR_API_KEY": KEY,
            "POSTERIOR_OUTCOMES": f"sqlite:///{self.folder}/outcomes.db",
            "POSTERIOR_CACHE": f"{self.folder}/cache",
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),
            "PATH": f"{RAY}:{os.environ['PATH']}",
        }
        return {**os.environ, **own}

    def write(self, args: dict[str, Any], **replica: Any) -> None:
        """The deployment file with this port, these `args`, and these fields of the deployment Replica."""
        config = yaml.safe_load((ROOT / "clients/ray/serve.yaml").read_text())
        config["http_options"]["port"] = self.port
        [application] = config["applications"]
        application["args"] = args
        application["deployments"][0] |= replica
        self.file.write_text(yaml.safe_dump(config))

    def start(self, args: dict[str, Any], **replica: Any) -> None:
        """What `make replicas` runs."""
        self.write(args, **replica)
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [RAY / "serve", "run", self.file], env=self.environment, stdout=log, stderr=log, cwd=ROOT
            )

    def deploy(self, args: dict[str, Any], **replica: Any) -> None:
        """Another file for the application that runs."""
        self.write(args, **replica)
        subprocess.run([RAY / "serve", "deploy", self.file], env=self.environment, check=True, cwd=ROOT)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def servers(self) -> list[psutil.Process]:
        """The processes that the replicas run."""
        lines = {each: " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])}
        words = (self.mark, " serve ", str(self.folder))
        return [each for each, line in lines.items() if all(word in line for word in words)]

    def stop(self) -> None:
        """Ctrl-C."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
        print((self.folder / "log").read_text()[-CUT:])


@contextlib.contextmanager
def clustered(mark: str) -> Iterator[Cluster]:
    """A cluster that is not started, up to the end of the block, which no server outlives."""
    folder = Path(tempfile.mkdtemp(prefix="ps", dir="/tmp"))  # short: Ray's sockets lie below it
    cluster = Cluster(folder, mark)
    try:
        yield cluster
    finally:
        cluster.stop()
        left = cluster.servers()
        for process in left:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        assert left == [], "no server outlives Ray"


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Returns when the condition holds. While nobody answers it does not."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
