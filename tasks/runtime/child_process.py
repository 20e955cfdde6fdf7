"""Run a function in a process of its own, so that a crash, an out-of-memory kill or a leak costs that call alone.

On Linux these processes are forked, by Python's own fork server, from one that has imported the libraries of every stage and
computed nothing with them: no GPU is touched, and of threads there are only OpenBLAS's, which knows forks. Each stage would
else import them again, for 4 s.
"""

import gc
import logging
import logging.handlers
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any, ParamSpec, TypeVar

from configs.errors import KilledError, TameError
from tasks.runtime.progress import show

P = ParamSpec("P")
T = TypeVar("T")

# The libraries of methods are not among them: importing one may begin to use a GPU, and then forks cannot. What they import
# is, but for themselves.
PRELOADED = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.quantizers.auto",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
]
CALM = {
    "TQDM_DISABLE": "1",  # progress is shown by the parent
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU is asked without using it, so that a fork can
}
ONLY_INSTALLED = {"PYTHONSAFEPATH": "1"}  # no torch.py of the folder that tame is run in
OURS = ("TAME_", "PREFECT_", "MLFLOW_", "PYTEST_")  # variables that no preloaded library reads

log = logging.getLogger("tame.process")

_preloaded_under: dict[str, str] = {}
_said: set[str] = set()
_environment = threading.Lock()


class Pipe(logging.Handler):
    """Sends log records to the parent process."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, its message already formatted so that it pickles."""
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.connection.send(("log", record))


def isolated(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function(*args, **kwargs)` in a process of its own and return what it returns.

    Arguments, result and exceptions are pickled. A keyword argument `progress=show` works across the boundary, and so
    do log records of the `tame` loggers. The child dies with its parent, however the parent ends.

    Raises:
        TameError: the process was killed, or crashed; `what` names it. Whatever `function` raises is raised here.
    """
    return _call(_context(), what, function, args, kwargs)


def spawned(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The same for the only call of a command: its process imports what it needs itself, and that is less than all.

    Raises:
        TameError: as `isolated`.
    """
    return _call(multiprocessing.get_context("spawn"), what, function, args, kwargs)


def _call(context: Any, what: str, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    receiving, sending = context.Pipe(duplex=False)
    level = logging.getLogger("tame").getEffectiveLevel()
    call = (sending, level, dict(os.environ), function, args, kwargs)
    process = context.Process(target=_child, args=call, name=what, daemon=False)
    if context.get_start_method() == "spawn":
        with _starting():
            process.start()
    else:
        process.start()
    sending.close()
    try:
        outcome = _listen(receiving)
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        receiving.close()
    if outcome is None:
        raise KilledError(f"{what}: {_cause(process.exitcode)}")
    kind, value = outcome
    if kind == "error":
        raise value
    result: T = value
    return result


def prepare() -> None:
    """Start the fork server, which then imports its libraries while something else is waited for."""
    _context()


def _context() -> BaseContext:
    """The fork server, started now if it is not; or new processes, where libraries are to be imported under other settings."""
    always = CALM | ONLY_INSTALLED  # what the fork server has in any case
    settings = {name: value for name, value in os.environ.items() if not name.startswith(OURS) and name not in always}
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    if _preloaded_under and settings != _preloaded_under:
        _say_what_changed(settings)
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if not _preloaded_under:
        from multiprocessing.forkserver import ensure_running

        _preloaded_under.update(settings)
        context.set_forkserver_preload(PRELOADED)
        with _starting():
            ensure_running()
    return context


@contextmanager
def _starting() -> Iterator[None]:
    """The settings that a new interpreter begins with. Ctrl-C, which a terminal sends to all processes, does not reach it.

    It would say that its imports were interrupted. The tracker first: when it is started it lets signals through again.
    """
    always = CALM | ONLY_INSTALLED
    resource_tracker.ensure_running()
    with _environment:
        given = {name: os.environ.get(name) for name in always}
        os.environ.update(always)
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            for name, value in given.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _say_what_changed(settings: dict[str, str]) -> None:
    """Say once of each variable that libraries are imported again, because it is not what it was at the first stage."""
    changed = [name for name in settings.keys() | _preloaded_under if settings.get(name) != _preloaded_under.get(name)]
    if fresh := sorted(set(changed) - _said):
        _said.update(fresh)
        log.info(
            "%s changed since the first stage: libraries are imported again, which takes some seconds a stage",
            ", ".join(fresh),
        )


def _listen(receiving: Connection) -> tuple[str, Any] | None:
    while True:
        try:
            kind, value = receiving.recv()
        except (EOFError, OSError):
            return None
        if kind == "log":
            logging.getLogger(value.name).handle(value)
        elif kind == "progress":
            show(*value)
        else:
            return kind, value


def _cause(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return (
            "its process was killed (SIGKILL), most likely for want of memory; free some, or ask for less at a time "
            "(evaluate.batch_size, evaluate.window, --workers)"
        )
    if exitcode is not None and exitcode < 0:
        return f"its process crashed ({signal.Signals(-exitcode).name}); run it with --debug to see where"
    return f"its process ended with exit code {exitcode} and no result; run it with --debug to see why"


def _child(
    sending: Connection,
    level: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    gc.freeze()  # what was imported need not be searched for garbage, nor its pages copied for that
    os.environ.clear()  # a forked process has that of the fork server
    os.environ.update({**CALM, **environment})
    logger = logging.getLogger("tame")
    logger.setLevel(level)
    logger.addHandler(Pipe(sending))
    lock = threading.Lock()

    def progress(what: str, done: int, total: int) -> None:
        with lock:
            sending.send(("progress", (what, done, total)))

    if kwargs.get("progress") is show:
        kwargs["progress"] = progress
    try:
        outcome = ("result", function(*args, **kwargs))
    except BaseException as error:
        outcome = ("error", _picklable(error))
    sending.send(outcome)
    sending.close()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # gives back semaphores
    # Everything is written and sent: the interpreter's slow farewell to torch's threads and memory has nothing to add.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch parent").start()


def _picklable(error: BaseException) -> BaseException:
    if logging.getLogger("tame").isEnabledFor(logging.DEBUG):
        import traceback

        logging.getLogger("tame").debug("%s", "".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301
        return error
    except Exception:
        return TameError(f"{type(error).__name__}: {error}")
