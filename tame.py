"""The command line: thin, and imports the rest only when it is needed."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError, line, named_line
from configs.method_names import METHODS

log = logging.getLogger("tame")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 all well, 1 something failed, 2 wrong recipe or arguments, 3 the gate rejected."""
    options = _parser().parse_args(arguments)
    _set_up(options.debug, "INFO" if options.command in (up, worker) else "CRITICAL")
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        code = command(options)
    except TameError as error:
        code = _say(error, options.debug, error.exit_code)
    except KeyboardInterrupt:
        code = _say("stopped; the next run goes on from what is finished", False, 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = _say(f"{named_line(error, limit=None)} (--debug shows where)", options.debug, 1)
    sys.stdout.flush()
    sys.exit(code)


def run(options: argparse.Namespace) -> int:
    """The whole flow."""
    from configs.load import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    from tasks.plan import preflight
    from tasks.result import folder_of

    out = folder_of(recipe, options.out)
    for warning in preflight(recipe, out).warnings:
        log.warning("%s", warning)
    from flows.local import release_here

    result = release_here(recipe, out)
    from shutil import get_terminal_size

    from tasks.report.terminal import closing

    print(closing(result, out, get_terminal_size((110, 24)).columns, sys.stdout.isatty()))
    return result.exit_code


def plan(options: argparse.Namespace) -> int:
    """Nothing but looks."""
    from configs.load import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    from tasks.plan import describe
    from tasks.result import folder_of

    lines = describe(recipe, folder_of(recipe, options.out))
    width = max(len(what) for what, _ in lines)
    print("\n".join(f"{what:<{width}}  {how}" for what, how in lines))
    return 0


def quantize(options: argparse.Namespace) -> int:
    """A folder in, a folder out."""
    from configs.load import explain
    from configs.schema import Source, Variant

    compute = options.compute_dtype if "compute_dtype" in METHODS[options.method] else None
    asked = {"method": options.method, "double_quant": options.double_quant, "compute_dtype": compute}
    asked["group_size"] = options.group_size
    variant = _checked(Variant, explain, **asked)
    from tasks.download.look import look
    from tasks.quantize.command import parse_size, quantize_folder
    from tasks.quantize.protocols import Request

    limit = None if options.max_shard_size is None else parse_size(options.max_shard_size)
    trust = options.trust_remote_code
    source = _checked(Source, explain, model=options.source, revision=options.revision, trust_remote_code=trust)
    found = look(source)
    folder = found.path
    if found.kind != "folder":  # a folder need not be hashed, nor Prefect imported for it
        from tasks.download.task import download

        folder = download(source, found).path
    request = Request(
        source=Path(str(folder)),
        out=Path(options.out),
        variant=variant,
        device=options.device,
        workers=options.workers,
        max_shard_size=limit,
        trust_remote_code=trust,
    )
    made = quantize_folder(request, check=options.check)
    print(f"{options.out}  {made.bytes / 1e6:,.1f} MB, {made.bits_per_weight:.2f} bits a weight, sha256 {made.digest}")
    for note in made.notes:
        print(f"note: {note}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """One model, against a baseline or alone."""
    from configs.load import explain
    from configs.schema import Evaluate, Source

    given = {
        "window": options.window,
        "max_tokens": options.max_tokens,
        "tasks": options.tasks,
        "task_path": options.task_path,
        "task_limit": options.task_limit,
        "batch_size": options.batch_size,
    }
    asked = {key: value for key, value in given.items() if value is not None}
    for part in ("speed", "samples"):  # seconds to minutes of work that a recipe asks for, and here a flag
        asked |= {} if getattr(options, part) else {part: None}
    spec = _checked(Evaluate, explain, text={"files": options.text}, **asked)
    trust = options.trust_remote_code
    model = _checked(Source, explain, model=options.model, trust_remote_code=trust)
    base = _checked(Source, explain, model=options.baseline, trust_remote_code=trust) if options.baseline else None
    from tasks.evaluate.command import evaluate_alone
    from tasks.report.terminal import numbers
    from tasks.result import write_file

    measured = evaluate_alone(model, base, spec, options.device)
    print(numbers(measured))
    if options.json:
        write_file(Path(options.json), measured.model_dump_json(indent=1) + "\n")
    return 0


def publish(options: argparse.Namespace) -> int:
    """A folder to the Hub, verified; or a check of what is there."""
    from tasks.publish import task as stage
    from tasks.runtime.progress import show

    if options.check:
        wrong = stage.check(options.check, options.source)
        print("\n".join(wrong) or f"{options.check}: every file is what tame.json says")
        return 1 if wrong else 0
    if not options.folder or not options.repo:
        raise BadInputError("publish: expected FOLDER REPO, or --check REPO")
    published = stage.publish_folder(Path(options.folder), options.repo, private=options.private, progress=show)
    print(f"{published.url}  {'already there' if published.already else f'{len(published.uploaded)} files'}, verified")
    return 0


def up(options: argparse.Namespace) -> int:
    """Everything on this machine."""
    from infra.up import up as start

    return start(host=options.host)


def worker(options: argparse.Namespace) -> int:
    """Runs for one device of this machine, or flows that only wait."""
    from infra.worker import become_worker

    become_worker(options.gpu, options.control, options.pool, options.once)


def provision(options: argparse.Namespace) -> int:
    """What a Prefect server needs to release models."""
    from infra.provision import provision as make

    print("\n".join(make()) or "everything is there")
    return 0


def cache(options: argparse.Namespace) -> int:
    """The artifact store."""
    from tasks.store import artifacts as store

    if options.remote:
        return _cache_remote(options)
    if options.action == "prune":
        removed, kept = store.prune(options.older_than)
        print(f"removed {len(removed)} artifacts, {sum(a.bytes for a in removed) / 1e6:,.1f} MB; kept {len(kept)}")
        return 0
    wrong = 0
    for artifact in store.artifacts():
        state = ""
        if options.action == "verify":
            problems = store.verify(artifact)
            wrong += len(problems)
            state = "  ok" if not problems else "".join(f"\n  {problem}" for problem in problems)
        print(f"{artifact.kind:<12} {artifact.key[:12]}  {artifact.bytes / 1e6:>10,.1f} MB  {artifact.path}{state}")
    return 1 if wrong else 0


def _cache_remote(options: argparse.Namespace) -> int:
    from tasks.store import admin

    remote = admin.remote_store()
    if options.action == "prune":
        removed, kept = admin.prune(remote, options.older_than)
        print(
            "\n".join(f"removed {remote.url}/{name}" for name in removed) or "nothing to remove",
            f"kept {len(kept)}",
            sep="\n",
        )
        return 0
    wrong = 0
    for name, shared, problems in admin.artifacts(remote):
        if shared and options.action == "verify":
            problems = admin.verify(remote, shared)
        wrong += len(problems)
        told = "".join(f"\n  {problem}" for problem in problems) or ("  ok" if options.action == "verify" else "")
        kind, _, key = name.rpartition("-")
        print(f"{kind:<12} {key[:12]}  {shared.bytes / 1e6 if shared else 0:>10,.1f} MB  {remote.url}/{name}{told}")
    return 1 if wrong and options.action == "verify" else 0


def report(options: argparse.Namespace) -> int:
    """All releases over time."""
    from tasks.report.html import history

    html = history(options.model)
    Path(options.out).write_text(html, encoding="utf-8")
    print(options.out)
    return 0


def track(options: argparse.Namespace) -> int:
    """Log what could not be logged when it happened."""
    from tasks.track.task import replay

    print(f"{replay()} spooled logs caught up")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tame",
        description="Download a language model, quantize it, measure honestly what that cost, and publish it.",
        epilog="exit codes: 0 passed and published, 1 something failed, 2 wrong recipe or arguments, 3 the gate rejected",
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="more is logged, and errors come with a traceback")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            function.__name__, help=text, description=text, parents=[common], allow_abbrev=False
        )
        command.set_defaults(command=function)
        return command

    for function, text in ((run, "release a model: the whole flow"), (plan, "say what a run would do, and do nothing")):
        command = add(function, text)
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file, as in configs/")
        command.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe"
        )
        command.add_argument("--out", metavar="DIR", help="where result.json and report.html go")

    command = add(quantize, "quantize a model, and nothing else")
    command.add_argument("source", metavar="SOURCE", help="a folder, a .gguf or a Hub repo")
    command.add_argument("out", metavar="OUT", help="a folder that is absent or empty")
    command.add_argument("--method", required=True, choices=tuple(METHODS))
    command.add_argument("--double-quant", action="store_true", help="quantize the 4-bit scales too")
    dtypes = ("float32", "bfloat16", "float16")
    command.add_argument(
        "--compute-dtype",
        default="float32",
        choices=dtypes,
        help="of 4-bit layers; float32 is what transformers writes",
    )
    command.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        help="integers of w4a16 and w8a16 that share a scale: 128, 64, 32, or -1 for a whole row",
    )
    command.add_argument("--revision", default="main", help="branch, tag or commit of a Hub repo")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--workers", type=_positive, help="tensors in flight; by default what the machine is good for")
    command.add_argument("--max-shard-size", metavar="SIZE", help="largest output file, such as 5GB; by default 256MB")
    command.add_argument(
        "--check", action="store_true", help="run the result once; takes the memory of the whole model"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code of the model; read it first"
    )

    command = add(evaluate, "measure a model, and nothing else")
    command.add_argument("model", metavar="MODEL", help="a folder, a .gguf or a Hub repo")
    command.add_argument("--baseline", metavar="BASE", help="what to compare it with")
    command.add_argument("--text", metavar="FILE", nargs="+", action="extend", required=True, help="UTF-8 text")
    command.add_argument("--window", metavar="N", type=_positive, help="tokens in a window")
    command.add_argument("--max-tokens", metavar="N", type=_positive, help="stop after so many tokens")
    command.add_argument("--tasks", metavar="T", nargs="+", action="extend", help="lm-evaluation-harness tasks")
    command.add_argument("--task-path", metavar="DIR", help="a folder of your own task files")
    command.add_argument("--task-limit", metavar="N", type=_positive, help="only the first N items of each task")
    command.add_argument("--batch-size", metavar="N", type=_positive, help="windows in a batch")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that MODEL and BASE bring with them"
    )
    command.add_argument("--speed", action="store_true", help="time a prompt and the tokens after it, and take memory")
    command.add_argument("--samples", action="store_true", help="show what it answers to a few prompts")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--json", metavar="OUT", help="write the numbers to a file")

    command = add(publish, "publish a folder to the Hub, verified")
    command.add_argument("folder", metavar="FOLDER", nargs="?")
    command.add_argument("repo", metavar="REPO", nargs="?", help="owner/name")
    command.add_argument("--private", action="store_true", help="visible to you alone")
    command.add_argument("--check", metavar="REPO", help="compare a published repo with its own tame.json")
    command.add_argument("--source", metavar="SOURCE", help="with --check: the model it says it was made from")

    command = add(up, "Prefect, MLflow, the deployments and a worker on this machine")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")

    command = add(worker, "work for the Prefect server of PREFECT_API_URL, on the CPU unless a GPU is named")
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--gpu", metavar="N", type=_index, help="on this GPU, as nvidia-smi counts them")
    kind.add_argument("--control", action="store_true", help="only flows that wait for others: watch, sweep")
    command.add_argument("--pool", default="tame", help="the work pool to take runs from")
    command.add_argument("--once", action="store_true", help="end after one run, or at once if none waits")

    add(provision, "make the work pool, queues, automations and deployments on the server of PREFECT_API_URL")

    command = add(cache, "the artifact store")
    command.add_argument("action", choices=("list", "verify", "prune"))
    command.add_argument("--remote", action="store_true", help="the shared one, at TAME_STORE")
    command.add_argument(
        "--older-than", metavar="DAYS", type=float, help="prune: also what was not used for so long (0: all)"
    )

    command = add(report, "all releases over time, from MLflow")
    command.add_argument("--model", help="of one model only")
    command.add_argument("--out", metavar="FILE", default="history.html")

    command = add(track, "catch up with MLflow")
    command.add_argument(
        "--replay", action="store_true", required=True, help="log what was spooled while MLflow was away"
    )
    return parser


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 is the first")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _checked(model: Any, explain: Callable[..., str], /, **values: Any) -> Any:
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInputError(explain(error, model)) from None


def _set_up(debug: bool, prefect: str) -> None:
    """Quiet libraries and tame's own log on stderr; set before any of them is imported, and never against the user's own."""
    for name, value in {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tame",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "DEBUG" if debug else prefect,
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "false",  # datasets would ask s3.amazonaws.com whenever it opens a local file
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",  # tame has its own bars
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s" if debug else "%(message)s")
    )
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False
    if not debug:
        import warnings

        warnings.simplefilter("ignore")


def _say(error: BaseException | str, debug: bool, code: int) -> int:
    if debug and isinstance(error, BaseException):
        import traceback

        traceback.print_exception(error)
    print(f"tame: {line(error, limit=None)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
