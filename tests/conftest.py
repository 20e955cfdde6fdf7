"""No test can touch the user's state: every folder and address that a library would use is a temporary one.

Set before anything is imported, because Prefect and the Hub client read their settings at import.
"""

import os
import tempfile
from pathlib import Path

_ROOT = Path(tempfile.mkdtemp(prefix="tame-tests-"))
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "HF_", "MLFLOW_", "TAME_", "HUGGING"))]:
    del os.environ[_name]
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
}
(_ROOT / "home").mkdir()

import shutil  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not any("cuda" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_unconfigure() -> None:
    shutil.rmtree(_ROOT, ignore_errors=True)


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
