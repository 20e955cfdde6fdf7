"""infra/compose.yaml without Docker: its commands, environments, health checks and order, run as they are in a network namespace
where the services' names are this machine. PostgreSQL is the real one; moto stands in for SeaweedFS, which is not packaged."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
POSTGRES = Path("/usr/lib/postgresql/15/bin")
SPACE = "tame-compose"
SECRETS = {"TAME_DATABASE_PASSWORD": "p:1@x/y", "TAME_S3_SECRET": "s3-secret", "TAME_PREFECT_AUTH": "ann:secret"}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip, for a network namespace"
    ),
    pytest.mark.skipif(not (POSTGRES / "initdb").exists(), reason=f"needs PostgreSQL's programs in {POSTGRES}"),
]


class Compose:
    """As much of Docker Compose as the file asks for: a process a service, started when what it depends on is well."""

    def __init__(self, folder: Path) -> None:
        text = (ROOT / "infra/compose.yaml").read_text()
        filled = re.sub(r"\$\{(\w+)(?::?[-?]([^}]*))?\}", lambda found: SECRETS.get(found[1], found[2] or ""), text)
        self.file: dict[str, Any] = yaml.safe_load(filled)
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self, service: str) -> dict[str, str]:
        home = self.folder / service
        home.mkdir(exist_ok=True)
        env = re.search(r"^ENV (HOME=.*?[^\\])$", (ROOT / "infra/Dockerfile").read_text(), re.M | re.S)
        assert env
        image = dict(word.split("=", 1) for word in env[1].replace("/var/lib/tame", str(home)).split() if word != "\\")
        given = {name: str(value) for name, value in self.file["services"][service].get("environment", {}).items()}
        path = f"{Path(sys.executable).parent}:{POSTGRES}:{os.environ['PATH']}"
        return {"PATH": path, "OMP_NUM_THREADS": "1", **image, **given}

    def run(self, service: str, command: list[str], to: str | None = None) -> subprocess.Popen[bytes]:
        with (self.folder / f"{to or service}.log").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", SPACE, *command],
                env=self.environment(service),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def up(self, service: str) -> None:
        """Start a service after all it depends on, and wait until that is as well as the file wants it."""
        described = self.file["services"][service]
        if service in self.running:
            return
        for other, wanted in described.get("depends_on", {}).items():
            self.up(other)
            if wanted["condition"] == "service_healthy":
                self.wait_healthy(other)
            else:
                assert self.running[other].wait(timeout=600) == 0, self.log(other)
        self.running[service] = getattr(self, f"_{service}", lambda: self.run(service, described["command"]))()

    def wait_healthy(self, service: str) -> None:
        check = self.file["services"][service]["healthcheck"]["test"]
        assert check[0] == "CMD"
        end = time.monotonic() + 600
        while self.run(service, check[1:], to="checks").wait(timeout=300) != 0:
            assert time.monotonic() < end, self.log(service)
            assert self.running[service].poll() is None, self.log(service)
            time.sleep(1)

    def log(self, service: str) -> str:
        return (self.folder / f"{service}.log").read_text()[-3000:]

    def down(self) -> None:
        for process in reversed(self.running.values()):
            process.terminate()
        for process in reversed(self.running.values()):
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    def _postgres(self) -> subprocess.Popen[bytes]:
        data, user = self.folder / "data", self.file["services"]["postgres"]["environment"]["POSTGRES_USER"]
        secret = self.folder / "password"
        secret.write_text(SECRETS[self.file["secrets"]["database"]["environment"]])
        data.mkdir()
        for path in (data, secret):
            shutil.chown(path, "postgres")
        become = ["runuser", "-u", "postgres", "--"]
        init = [
            *become,
            str(POSTGRES / "initdb"),
            "-D",
            str(data),
            "-U",
            user,
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
        ]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL, cwd="/")
        databases = self.file["configs"]["databases"]["content"]
        single = [*become, str(POSTGRES / "postgres"), "--single", "-D", str(data), "postgres"]
        subprocess.run(single, input=databases.encode(), check=True, stdout=subprocess.DEVNULL, cwd="/")
        return self.run("postgres", [*become, str(POSTGRES / "postgres"), "-D", str(data), "-k", ""])

    def _s3(self) -> subprocess.Popen[bytes]:
        described = self.file["services"]["s3"]
        described["healthcheck"]["test"] = [
            "CMD",
            "python",
            "-c",
            "import socket; socket.create_connection(('s3', 8333))",
        ]
        json.loads(self.file["configs"]["s3"]["content"])
        return self.run("s3", ["moto_server", "--host", "0.0.0.0", "--port", "8333"])


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    folder = tmp_path_factory.mktemp("compose")
    for parent in (folder, *folder.parents):  # PostgreSQL's user has to reach it
        if parent != Path("/") and parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    made = Compose(folder)
    hosts = Path(f"/etc/netns/{SPACE}/hosts")
    hosts.parent.mkdir(parents=True, exist_ok=True)
    hosts.write_text("127.0.0.1 localhost " + " ".join(made.file["services"]))
    subprocess.run(["ip", "netns", "add", SPACE], check=True)
    try:
        subprocess.run(["ip", "-n", SPACE, "link", "set", "lo", "up"], check=True)
        yield made
    finally:
        made.down()
        subprocess.run(["ip", "netns", "del", SPACE], check=True)
        shutil.rmtree(hosts.parent)


def test_a_release_from_provision_to_published_numbers(compose: Compose, tiny_llama: Path) -> None:
    compose.up("worker")
    compose.up("control")
    recipe = {
        "name": "tiny",
        "source": {"model": str(tiny_llama)},
        "variants": [{"method": "nf4"}],
        "evaluate": {
            "text": {"builtin": "python-docs"},
            "window": 64,
            "max_tokens": 256,
            "speed": None,
            "samples": None,
        },
    }
    ask = ["prefect", "deployment", "run", "release/any", "--params", json.dumps({"recipe": recipe})]
    asked = compose.run("provision", [*ask, "--watch", "--watch-timeout", "600"], to="asked")
    assert asked.wait(timeout=700) == 0, compose.log("asked") + compose.log("worker")
    look = "import s3fs; fs = s3fs.S3FileSystem(); print(*fs.find('tame'), *fs.find('mlflow'), sep='\\n')"
    assert compose.run("buckets", ["python", "-c", look], to="listing").wait(timeout=300) == 0
    listing = compose.log("listing")
    assert re.search(r"^tame/artifacts/.*quantized", listing, re.M), listing
    assert re.search(r"^mlflow/.*/report.html$", listing, re.M), listing
    for service in ("prefect", "mlflow"):
        assert "Temporary failure in name resolution" not in compose.log(service)  # it asks nobody outside
