"""A sweep of four variants one after the other, and over all GPUs of this machine: `tame up`, its workers, its queues.

    python benchmarks/gpus.py --model 1.7b

Prints both times, and what was seen on each GPU meanwhile, asked of the driver twice a second: which processes worked
there. Two at a time on one GPU would be a stage that was not alone. On a machine without GPUs it is a rehearsal.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.quantize import MODELS, make_model  # noqa: E402

VARIANTS = [{"method": "nf4"}, {"method": "fp4"}, {"method": "nf4", "double_quant": True}, {"method": "int8"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.7b", choices=MODELS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tame-benchmark"))
    parser.add_argument("--tokens", type=int, default=65_536)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    models = [model(options, number) for number in (1, 2)]
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "TAME_HOME": home, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        started = time.perf_counter()
        up = subprocess.Popen([sys.executable, "-m", "tame", "up"], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert up.stdout
            pages = [up.stdout.readline() for _ in range(2)]
            print(f"tame up: {time.perf_counter() - started:.0f} s", flush=True)
            os.environ["PREFECT_API_URL"] = pages[0].split()[1].replace("/deployments", "/api")
            one, _ = sweep("one at a time", models[0], 1, options)
            all_, stages = sweep("all GPUs", models[1], None, options)
            print(f"all GPUs took {all_ / one:.2f} of the time of one at a time; at most {stages} processes on one GPU")
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(60)
            if os.environ.get("OUT"):
                shutil.copytree(Path(home) / "logs", Path(os.environ["OUT"]) / "logs")


def sweep(what: str, folder: Path, limit: int | None, options: argparse.Namespace) -> tuple[float, int]:
    """Seconds that a sweep took, from its submission, and the most processes seen on one GPU at a time."""
    from prefect.client.orchestration import get_client

    window = 2048 if options.model != "tiny" else 128
    tokens = min(options.tokens, options.tokens if options.model != "tiny" else 512)
    evaluate = {
        "text": {"builtin": "python-docs"},
        "window": window,
        "max_tokens": tokens,
        "speed": None,
        "samples": None,
    }
    recipe = {"variants": VARIANTS, "evaluate": evaluate}
    spec: dict[str, Any] = {"name": folder.name, "models": [str(folder)], "recipe": recipe, "limit": limit}
    seen: list[Counter[str]] = []
    stop = threading.Event()
    watching = threading.Thread(target=watch, args=(seen, stop))
    watching.start()
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("sweep/sweep")
        started = time.perf_counter()
        run = client.create_flow_run_from_deployment(deployment.id, parameters={"spec": spec})
        while not (state := client.read_flow_run(run.id).state) or not state.is_final():
            time.sleep(0.5)
        took = time.perf_counter() - started
        print(f"\n{what}: {took:.0f} s, {state.name}: {state.message}", flush=True)
        stop.set()
        watching.join()
        stages(client, run.id)
    most = max((max(there.values(), default=0) for there in seen), default=0)
    together = sum(len(there) > 1 for there in seen)
    print(f"{len(seen)} looks at the GPUs: at most {most} processes on one; {together} looks saw several GPUs at work")
    return took, most


def stages(client: Any, parent: Any) -> None:
    """Print when each heavy stage ran, and on which worker."""
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter

    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [parent]}})
    )
    found = []
    for run in runs:
        criteria = TaskRunFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        for task in client.read_task_runs(task_run_filter=criteria):
            if task.start_time and task.name.startswith(("quantize", "evaluate", "baseline")):
                found.append(
                    (task.start_time, task.end_time, task.name, task.state_name, run.name, run.infrastructure_pid)
                )
    first = min((start for start, *_ in found), default=None)
    for start, end, name, state, run, pid in sorted(found):
        print(
            f"  {(start - first).total_seconds():6.1f} to {(end - first).total_seconds():6.1f} s  {name:20} {state:10} {run}  {pid}"
        )


def watch(seen: list[Counter[str]], stop: threading.Event) -> None:
    """Note which processes work on each GPU, twice a second."""
    if not shutil.which("nvidia-smi"):
        return
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"]
    while not stop.wait(0.5):
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        seen.append(Counter(line.split(",")[0] for line in lines))


def model(options: argparse.Namespace, number: int) -> Path:
    """A model of random weights with a tokenizer: the same for every number, but for one byte."""
    from tests.models import tokenizer

    source, folder = make_model(options.work, options.model), options.work / f"{options.model}-{number}"
    if not (folder / "tokenizer.json").exists():
        shutil.copytree(source, folder, dirs_exist_ok=True)
        with next(folder.glob("*.safetensors")).open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(number.to_bytes(2, "little"))
        tokenizer().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 0}))
    return folder


if __name__ == "__main__":
    main()
