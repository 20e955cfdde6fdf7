"""Many short releases, queued at once, on a few workers: is one lost, is one run twice, does the server keep answering?

    python benchmarks/operate.py [--runs 500] [--workers 2] [--fresh 0] [--postgres] [--folder DIR]

Each run is a release of a tiny model by `release/any` under a name of its own. Its artifacts are there already, but for
those of the first `--fresh` runs, which have an evaluation window of their own and so are measured anew. What is left is
what Prefect, MLflow and a process a run cost. Every tenth run is asked for twice, by the same key. Ctrl-C ends it early, and
tells what was seen until then. `--postgres` puts Prefect and MLflow on a PostgreSQL cluster of its own (needs root), else on
SQLite.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PORT = 14300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"runs": 500, "workers": 2, "fresh": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="tame-operate-"))
    folder.mkdir(parents=True, exist_ok=True)
    api = f"http://127.0.0.1:{PORT}/api"
    os.environ |= {
        "TAME_HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "OMP_NUM_THREADS": "1", "PREFECT_LOGGING_LEVEL": "WARNING",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{PORT + 2}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    postgres, database = None, f"sqlite:///{folder}/mlflow.db"
    if args.postgres:
        from tests.e2e.machines import Postgres

        postgres = Postgres(PORT + 1)
        postgres.start()
        postgres.create("prefect")
        postgres.create("mlflow")
        at = f"postgres@127.0.0.1:{postgres.port}"
        os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"postgresql+asyncpg://{at}/prefect"
        database = f"postgresql+psycopg2://{at}/mlflow"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(start(folder, "server", "prefect", "server", "start", "--port", str(PORT), "--no-ui"))
        store = [
            "--backend-store-uri",
            database,
            "--no-serve-artifacts",
            "--default-artifact-root",
            str(folder / "files"),
        ]
        processes.append(start(folder, "mlflow", "mlflow", "server", "--port", str(PORT + 2), "--workers", "1", *store))
        measure(args, folder, processes)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()
        if postgres:
            postgres.stop()
            shutil.rmtree(postgres.folder)


def start(folder: Path, name: str, *command: str) -> "subprocess.Popen[bytes]":
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=log, stderr=log)


def recipe(folder: Path, number: int, fresh: int) -> dict[str, Any]:
    return {
        "name": f"r{number:05}",
        "source": {"model": str(folder / "model")},
        "variants": [{"method": "nf4"}],
        "evaluate": {
            "text": {"builtin": "python-docs"}, "window": 64 + number if number <= fresh else 64, "max_tokens": 512,
            "samples": None, "speed": None,
        },
        "publish": {"to": "nowhere"},
        "track": {"experiment": "operate"},
    }  # fmt: skip


def measure(args: argparse.Namespace, folder: Path, processes: list["subprocess.Popen[bytes]"]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import FlowRun

    from infra.provision import provision
    from tests.e2e.machines import ok
    from tests.models import tiny

    tiny(folder / "model")
    provision()
    while not ok(f"{os.environ['MLFLOW_TRACKING_URI']}/health"):
        time.sleep(0.5)
    first = folder / "first.json"
    first.write_text(json.dumps(recipe(folder, 0, 0)))
    for _ in range(2):  # the first makes the artifacts, the second shows what a run without Prefect's worker takes
        started, used = time.monotonic(), children()
        command = [sys.executable, "-m", "tame", "run", str(first), "--out", str(folder / "out")]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        alone = f"{time.monotonic() - started:.1f} s, {children() - used:.1f} s of CPU"
    print(f"tame run, everything there: {alone}")
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("release/any")

        def ask(number: int) -> FlowRun:
            wanted = {"recipe": recipe(folder, number, args.fresh)}
            return client.create_flow_run_from_deployment(
                deployment.id, parameters=wanted, idempotency_key=f"operate-{number}"
            )

        started = time.monotonic()
        asked = {ask(number).id for number in range(1, args.runs + 1)}
        print(f"queued: {args.runs} in {time.monotonic() - started:.1f} s")
        assert asked >= {ask(number).id for number in range(1, args.runs + 1, 10)}
        before = bytes_of(folder)
        began = time.monotonic()
        server = sum(family(process.pid) for process in processes[:2])
        workers = [start(folder, f"worker{number}", "tame", "worker") for number in range(args.workers)]
        processes += workers
        sampler = Sampler()
        sampler.start()
        try:
            while (left := waiting(client)) > 0:
                print(f"{time.monotonic() - began:7.0f} s  {args.runs - left} ended", file=sys.stderr, flush=True)
                time.sleep(10)
                assert all(worker.poll() is None for worker in workers), "a worker ended"
        except KeyboardInterrupt:
            pass
        finally:
            sampler.stop.set()
        seconds = time.monotonic() - began
        left = waiting(client)
        ended = args.runs - left
        work = sum(cpu(worker.pid, children=True) for worker in workers)
        own = sum(cpu(worker.pid) for worker in workers)
        served = sum(family(process.pid) for process in processes[:2]) - server
        print(
            f"ended: {ended} of {args.runs} in {seconds:.0f} s with {args.workers} workers: {ended / seconds * 60:.1f} a minute"
        )
        used = f"{work / ended:.2f} s in its process, {own / ended:.2f} s in the worker, {served / ended:.2f} s in the servers"
        print(f"CPU a run: {used}")
        if not args.postgres:
            print(f"Prefect's and MLflow's databases: {(bytes_of(folder) - before) / ended / 1e3:.0f} kB a run")
        sampler.tell()
        check(client, args.runs, asked)


def waiting(client: Any) -> int:
    """Releases that have not ended; counted by the server."""
    from prefect.client.schemas.filters import FlowRunFilter

    alive = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}
    return int(client.count_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"state": alive})))


def check(client: Any, runs: int, asked: set[Any]) -> None:
    """Every run once: by Prefect's states, and by what each left in MLflow."""
    from mlflow import MlflowClient

    states: Counter[str] = Counter()
    begun: Counter[int] = Counter()
    found = []
    while page := client.read_flow_runs(limit=200, offset=len(found)):
        found += page
    for run in found:
        if run.id in asked:
            states[run.state_name] += 1
            begun[run.run_count] += 1
    print(f"states: {dict(states)}; times a run was begun: {dict(begun)}; lost: {runs - sum(states.values())}")
    store = MlflowClient()
    logged: Counter[str] = Counter()
    token = None
    while True:
        experiment = store.get_experiment_by_name("operate").experiment_id
        page = store.search_runs([experiment], "tags.kind = 'release'", max_results=1000, page_token=token)
        logged.update(run.data.tags["prefect_run"] for run in page)
        token = page.token
        if not token:
            break
    mine = {run: count for run, count in logged.items() if run in {str(one) for one in asked}}
    print(f"in MLflow: {len(mine)} releases, at most {max(mine.values(), default=0)} of a run")


def children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def cpu(pid: int, children: bool = False) -> float:
    """CPU seconds of a process, or of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = fields[13:15] if children else fields[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> float:
    """CPU seconds of a process, and of its children that are alive."""
    import psutil

    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.db*"))


class Sampler(threading.Thread):
    """Asks the server every five seconds how it is, and for the page of runs that a sweep or a person would ask for."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.took: dict[str, list[float]] = {"health": [], "100 runs, filtered": [], "count": []}
        self.failed = 0

    def run(self) -> None:
        """Until `stop`."""
        import httpx

        running = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "RUNNING"]}}}}
        with httpx.Client(base_url=os.environ["PREFECT_API_URL"], timeout=60) as http:
            while not self.stop.wait(5):
                for name, method, path, body in (
                    ("health", "GET", "/health", None),
                    ("100 runs, filtered", "POST", "/flow_runs/filter", {**running, "limit": 100}),
                    ("count", "POST", "/flow_runs/count", running),
                ):
                    started = time.monotonic()
                    try:
                        http.request(method, path, json=body).raise_for_status()
                        self.took[name].append(time.monotonic() - started)
                    except httpx.HTTPError:
                        self.failed += 1

    def tell(self) -> None:
        """Print how long the server took."""
        for name, took in self.took.items():
            ordered = sorted(took)
            middle, p99 = statistics.median(took), ordered[int(0.99 * (len(ordered) - 1))]
            took_ms = f"median {1e3 * middle:.0f} ms, p99 {1e3 * p99:.0f} ms, worst {1e3 * ordered[-1]:.0f} ms"
            print(f"server, {name}: {took_ms} ({len(took)} times)")
        print(f"server: {self.failed} requests failed")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
