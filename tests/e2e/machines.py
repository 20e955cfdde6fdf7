"""A site for tests: PostgreSQL, Prefect, MLflow, S3 and a Hub, and machines that share nothing else. Needs root.

A machine is a network namespace with a host name, a TAME_HOME and a worker of its own, on a bridge where the servers are.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from infra.up import LEASES
from tests.hub import Hub
from tests.test_flow import ROOT

BRIDGE, NETWORK = "tame-test", "10.213.77"
ADDRESS, CDN = f"{NETWORK}.1", f"{NETWORK}.250"
PREFECT, MLFLOW, S3, DATABASE = 14200, 15000, 15001, 15432


def missing() -> str:
    """Why there can be no site here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not all(shutil.which(tool) for tool in ("ip", "unshare", "runuser")):
        return "needs ip, unshare and runuser"
    return "" if _postgres_binaries() else "needs PostgreSQL's server"


def _postgres_binaries() -> Path | None:
    found = shutil.which("initdb") or next(
        map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))[-1:]), None
    )
    return Path(found).resolve().parent if found else None


class Server:
    """A process that can be stopped and started again; `start` returns when it answers."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, answers: Callable[[], bool]) -> None:
        self.command, self.environment, self.log, self.answers = command, environment, log, answers
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 300
        while wait and not self.answers():
            assert self.process.poll() is None, f"{self.command[:4]} ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"{self.command[:4]} does not answer:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.3)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            self.process.wait(60)
            self.process = None


def ok(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


class Postgres:
    """A cluster of its own, run by the user `postgres`, on 127.0.0.1."""

    def __init__(self, port: int = DATABASE) -> None:
        binaries = _postgres_binaries()
        assert binaries is not None
        self.binaries, self.port = binaries, port
        self.folder = Path(tempfile.mkdtemp(prefix="tame-postgres-"))
        shutil.chown(self.folder, "postgres")
        self._as_postgres("initdb", "-D", self.folder / "data", "-A", "trust", "--no-sync", "-E", "UTF8")

    def _as_postgres(self, tool: str, *arguments: str | Path) -> None:
        command = ["runuser", "-u", "postgres", "--", str(self.binaries / tool), *map(str, arguments)]
        subprocess.run(command, cwd="/", check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        log = self.folder / "log"
        self._as_postgres("pg_ctl", "-D", self.folder / "data", "-l", log, "-o", options, "-w", "start")

    def stop(self, how: str = "immediate") -> None:
        self._as_postgres("pg_ctl", "-D", self.folder / "data", "-m", how, "-w", "stop")

    def create(self, name: str) -> None:
        self._as_postgres("createdb", "-h", "127.0.0.1", "-p", str(self.port), name)


class Machine:
    """A host with a worker, on the site's network."""

    def __init__(self, name: str, number: int, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.number, self.folder = name, number, folder
        self.worker: subprocess.Popen[bytes] | None = None
        self.space, self.link = f"tame-test-{name}", f"tame-{name}"
        folder.mkdir()
        self.environment = {
            **environment, "TAME_HOME": str(folder / "home"), "HOME": str(folder), "HF_HOME": str(folder / "hf"),
            "PREFECT_HOME": str(folder / "prefect"),
        }  # fmt: skip

    def connect(self) -> None:
        """Put it on the site's network."""
        ip("netns", "add", self.space)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("link", "set", self.link, "master", BRIDGE, "up")
        ip("-n", self.space, "addr", "add", f"{NETWORK}.{self.number}/24", "dev", "eth0")
        ip("-n", self.space, "link", "set", "eth0", "up")
        ip("-n", self.space, "link", "set", "lo", "up")

    @property
    def log(self) -> Path:
        return self.folder / "worker.log"

    def start(self, *options: str) -> None:
        """Start its worker."""
        inside = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
        command = [*inside, self.name, sys.executable, "-m", "tame", "worker", *options]
        with self.log.open("ab") as log:
            self.worker = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def processes(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self) -> None:
        """Take its power: every process of it is gone at once."""
        while found := self.processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.worker:
            self.worker.wait()

    def cut(self) -> None:
        """Pull its network cable out."""
        ip("link", "set", self.link, "down")

    def join(self) -> None:
        """Put the cable back."""
        ip("link", "set", self.link, "up")

    def end(self) -> None:
        self.kill()
        for left in (
            ["link", "del", self.link],
            ["netns", "del", self.space],
        ):  # the link, which would go some time later
            subprocess.run(["ip", *left], check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Site:
    """The servers, and what a machine's environment has to be."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub, self.api = folder, hub, f"http://{ADDRESS}:{PREFECT}/api"
        keys = {"AWS_ACCESS_KEY_ID": "tame", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        self.environment = {
            **os.environ, **keys, "PREFECT_API_URL": self.api, "MLFLOW_TRACKING_URI": f"http://{ADDRESS}:{MLFLOW}",
            "TAME_STORE": "s3://tame/artifacts", "AWS_ENDPOINT_URL": f"http://{ADDRESS}:{S3}", "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token(), "OMP_NUM_THREADS": "1", "PREFECT_LOGGING_LEVEL": "INFO",
        }  # fmt: skip
        python = [sys.executable, "-m"]
        self.postgres = Postgres()
        self.s3 = Server(
            [*python, "moto.server", "-H", ADDRESS, "-p", str(S3)],
            self.environment,
            folder / "s3.log",
            lambda: ok(f"http://{ADDRESS}:{S3}/moto-api/"),
        )
        database = f"postgres@127.0.0.1:{DATABASE}"
        self.prefect = Server(
            [*python, "prefect", "server", "start", "--host", ADDRESS, "--port", str(PREFECT), "--no-ui"],
            {
                **self.environment,
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{database}/prefect",
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
                "PREFECT_HOME": str(folder / "prefect"),
            },
            folder / "prefect.log",
            lambda: ok(f"{self.api}/health"),
        )
        mlflow = [*python, "mlflow", "server", "--host", ADDRESS, "--port", str(MLFLOW), "--workers", "1"]
        mlflow += ["--backend-store-uri", f"postgresql+psycopg2://{database}/mlflow", "--allowed-hosts", "*"]
        self.mlflow = Server(
            [*mlflow, "--artifacts-destination", str(folder / "mlartifacts")],
            self.environment,
            folder / "mlflow.log",
            lambda: ok(f"http://{ADDRESS}:{MLFLOW}/health"),
        )

    def s3_client(self) -> Any:
        """boto's."""
        import boto3

        options = {"aws_access_key_id": "tame", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://{ADDRESS}:{S3}", **options)


@contextmanager
def site(folder: Path, machines: list[str]) -> Iterator[tuple[Site, list[Machine]]]:
    """The servers, answering and provisioned, and machines on their network, whose workers are not started yet."""
    with ExitStack() as stack:
        ip("link", "add", BRIDGE, "type", "bridge")
        stack.callback(ip, "link", "del", BRIDGE)
        for address in (ADDRESS, CDN):
            ip("addr", "add", f"{address}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        hub = stack.enter_context(Hub(folder / "hub", host=ADDRESS, cdn=CDN))
        it = Site(folder, hub)
        stack.callback(shutil.rmtree, it.postgres.folder, ignore_errors=True)
        it.postgres.start()
        stack.callback(it.postgres.stop)
        it.postgres.create("prefect")
        it.postgres.create("mlflow")
        for server in (it.s3, it.prefect, it.mlflow):
            stack.callback(server.stop, signal.SIGKILL)
            server.start(wait=False)
        for server in (it.s3, it.prefect, it.mlflow):
            while not server.answers():
                assert server.process is not None
                assert server.process.poll() is None, server.log.read_text()[-3000:]
                time.sleep(0.5)
        subprocess.run([sys.executable, "-m", "tame", "provision"], cwd=ROOT, env=it.environment, check=True)
        made = []
        for number, name in enumerate(machines, 2):
            made.append(Machine(name, number, folder / name, it.environment))
            stack.callback(made[-1].end)
            made[-1].connect()
        yield it, made
