"""No test can touch the user's state: every folder and address that a library would use is a temporary one.

Set before anything is imported, because Prefect and the Hub client read their settings at import.
"""

import os
import tempfile
from pathlib import Path

_ROOT = Path(tempfile.mkdtemp(prefix="tame-tests-"))
# The one part of this machine that a test may use: it takes 3 GB.
VLLM = os.environ.get("TAME_VLLM") or str(Path("~/.cache/tame/runtimes/vllm/bin/python").expanduser())
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "HF_", "MLFLOW_", "TAME_", "HUGGING"))]:
    del os.environ[_name]
os.environ.pop("PYTHONSAFEPATH", None)  # the tests' own child processes import from this folder
os.environ |= {
    "HOME": str(_ROOT / "home"),
    "TAME_HOME": str(_ROOT / "tame"),
    "HF_HOME": str(_ROOT / "hf"),
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens: a test that needs a Hub starts its own
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PREFECT_HOME": str(_ROOT / "prefect"),
    "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(_ROOT / "prefect" / "results"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the tests run two at a time
    # What tame.main and quantizing set as well: see `same_environment`.
    "DO_NOT_TRACK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUTF8": "1",
    "COMPRESSED_TENSORS_LOG_DISABLED": "true",
    "TORCHINDUCTOR_CACHE_DIR": str(_ROOT / "inductor"),  # torch sets it where it is not set
}
(_ROOT / "home").mkdir()

import shutil  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from multiprocessing import forkserver  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

from tasks.runtime import child_process  # noqa: E402

# Each test's Hub has an address of its own, which tame reads when it asks, and none of what is done in a process of its own
# asks by itself: no reason to import torch again, for 8 s. For the same reason the one process of `tame quantize`, which would
# import it anyway, is forked here; test_quantize_edges runs the command as it is.
child_process.OURS += ("HF_ENDPOINT", "HF_TOKEN")
child_process.spawned = child_process.isolated

TOGETHER = {
    "lm_eval": {"evaluate_tasks", "evaluate_chat"},
    "runs": {"first_minute", "flow", "second_method", "sweep"},
    "deployments": {"approval", "automations", "infra", "publish_task", "watch"},
}
"""Files, by their names without test_ and .py, whose tests share what costs seconds to make: a Prefect server, or imports."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a file to one process, and those on the server too.

    Imports, models of a module, and the server, which cost more than most tests, are then made in one process and not in each.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::", 1)[0])

    config.option.loadscopereorder = False
    return ByFile(config, log)


def group_of(file: str) -> str:
    name = Path(file).stem.removeprefix("test_")
    return next((server for server, files in TOGETHER.items() if name in files), file)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # the largest first, so that both processes end at about the same time
        sizes = {path: path.stat().st_size for path in {item.path for item in items}}
        items.sort(key=lambda item: (group_of(item.path.name) not in TOGETHER, -sizes[item.path]))
    if not any("cuda" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_unconfigure() -> None:
    shutil.rmtree(_ROOT, ignore_errors=True)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment before the first test. No test may have a parameter of this name, which `same_environment` would take."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(autouse=True)
def same_environment(environment: dict[str, str]) -> Iterator[None]:
    """Begin every test in the environment of the first: libraries and `tame.main` set variables, and leave them set.

    A stage's process is forked from one that has imported torch only while the environment is what it was when that one began;
    else it imports torch again, for 8 s. One that began under a single test's environment is ended with that test.
    """
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    yield
    began_under = child_process._preloaded_under
    if began_under and any(environment.get(name) != value for name, value in began_under.items()):
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        began_under.clear()


@pytest.fixture
def tame_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TAME_HOME for this test alone."""
    monkeypatch.setenv("TAME_HOME", str(tmp_path / "tame-home"))
    return tmp_path / "tame-home"


@pytest.fixture(scope="session")
def prefect_url() -> Iterator[str]:
    """The API of a real Prefect server, one for the session."""
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    server.start(timeout=120)
    yield server.api_url
    server.stop()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama in bf16 with its tokenizer; do not write into it."""
    from tests.models import tiny

    return tiny(tmp_path_factory.mktemp("models") / "tiny-llama")
