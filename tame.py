"""The command line: thin, and imports the rest only when it is needed."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.argument_types import days, index, positive
from configs.errors import BadInputError, TameError, line, named_line
from configs.method_names import METHODS
from configs.settings import unknown
from tasks.runtime.environment import check_addresses, set_up, stop_at_second_interrupt

if TYPE_CHECKING:
    from configs.schema import Calibrate

log = logging.getLogger("tame")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 all well, 1 something failed, 2 wrong recipe or arguments, 3 the gate rejected."""
    options = _parser().parse_args(arguments)
    set_up(options.debug, "INFO" if options.command in (up, worker) else "CRITICAL")
    stop_at_second_interrupt()
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        for warning in unknown(os.environ):
            log.warning("%s", warning)
        check_addresses(os.environ)
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
    if options.calibrate is not None:
        asked["calibrate"] = {"true": True}.get(options.calibrate_level, options.calibrate_level)
    variant = _checked(Variant, explain, **asked)
    spec = _calibration(options, explain)
    from tasks.download.look import look
    from tasks.quantize.command import parse_size, quantize_folder
    from tasks.quantize.protocols import Request

    limit = None if options.max_shard_size is None else parse_size(options.max_shard_size)
    trust = options.trust_remote_code
    source = _checked(Source, explain, model=options.source, revision=options.revision, trust_remote_code=trust)
    found = look(source)
    folder, calibration = found.path, None
    if found.kind != "folder" or variant.calibrate:  # else nothing need be hashed, nor Prefect imported for it
        from tasks.download.task import download

        snapshot = download(source, found)
        folder = snapshot.path
        if variant.calibrate:
            from tasks.calibrate.task import calibrate

            calibration = calibrate(snapshot, spec)
    request = Request(
        source=Path(str(folder)),
        out=Path(options.out),
        variant=variant,
        device=options.device,
        workers=options.workers,
        max_shard_size=limit,
        trust_remote_code=trust,
        calibration=calibration,
    )
    made = quantize_folder(request, check=options.check)
    print(f"{options.out}  {made.bytes / 1e6:,.1f} MB, {made.bits_per_weight:.2f} bits a weight, sha256 {made.digest}")
    for note in made.notes:
        print(f"note: {note}")
    return 0


def _calibration(options: argparse.Namespace, explain: Callable[..., Any]) -> "Calibrate":
    """What `--calibrate` and the options that belong to it ask for."""
    from configs.schema import Calibrate

    given = {"sequences": options.calibrate_sequences, "length": options.calibrate_length}
    asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if options.calibrate is None and (asked or options.calibrate_level != "true"):
        raise BadInputError("--calibrate-sequences, --calibrate-length and --calibrate-level need --calibrate FILE")
    if options.calibrate:
        asked["text"] = {"files": options.calibrate}
    spec: Calibrate = _checked(Calibrate, explain, **asked)
    return spec


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
    from tasks.store.command import look_after

    lines, code = look_after(options.action, options.remote, options.older_than)
    sys.stdout.writelines(f"{text}\n" for text in lines)
    return code


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

    _takes_a_recipe(add(run, "release a model: the whole flow"))
    _takes_a_recipe(add(plan, "say what a run would do, and do nothing"))
    _of_quantize(add(quantize, "quantize a model, and nothing else"))
    _of_evaluate(add(evaluate, "measure a model, and nothing else"))
    _of_publish(add(publish, "publish a folder to the Hub, verified"))
    command = add(up, "Prefect, MLflow, the deployments and a worker on this machine")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")
    _of_worker(add(worker, "work for the Prefect server of PREFECT_API_URL, on the CPU unless a GPU is named"))
    add(provision, "make the work pool, queues, automations and deployments on the server of PREFECT_API_URL")
    _of_cache(add(cache, "the artifact store"))
    command = add(report, "all releases over time, from MLflow")
    command.add_argument("--model", help="of one model only")
    command.add_argument("--out", metavar="FILE", default="history.html")
    command = add(track, "catch up with MLflow")
    command.add_argument(
        "--replay", action="store_true", required=True, help="log what was spooled while MLflow was away"
    )
    return parser


def _takes_a_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, as in configs/")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe")
    command.add_argument("--out", metavar="DIR", help="where result.json and report.html go")


def _of_quantize(command: argparse.ArgumentParser) -> None:
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
        "--calibrate",
        metavar="FILE",
        nargs="*",
        action="extend",
        help="choose 4-bit codes on these UTF-8 texts, mixed evenly; without a FILE, on Python's own library",
    )
    command.add_argument(
        "--calibrate-sequences", metavar="N", type=positive, help="sequences taken from each text; by default 128"
    )
    command.add_argument("--calibrate-length", metavar="N", type=positive, help="tokens in each; by default 2048")
    command.add_argument(
        "--calibrate-level", default="true", choices=("fast", "true", "best"), help="fast: the scales alone"
    )
    command.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        help="integers of w4a16 and w8a16 that share a scale: 128, 64, 32, or -1 for a whole row",
    )
    command.add_argument("--revision", default="main", help="branch, tag or commit of a Hub repo")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--workers", type=positive, help="tensors in flight; by default what the machine is good for")
    command.add_argument("--max-shard-size", metavar="SIZE", help="largest output file, such as 5GB; by default 256MB")
    command.add_argument(
        "--check", action="store_true", help="run the result once; takes the memory of the whole model"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code of the model; read it first"
    )


def _of_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder, a .gguf or a Hub repo")
    command.add_argument("--baseline", metavar="BASE", help="what to compare it with")
    command.add_argument("--text", metavar="FILE", nargs="+", action="extend", required=True, help="UTF-8 text")
    command.add_argument("--window", metavar="N", type=positive, help="tokens in a window")
    command.add_argument("--max-tokens", metavar="N", type=positive, help="stop after so many tokens")
    command.add_argument("--tasks", metavar="T", nargs="+", action="extend", help="lm-evaluation-harness tasks")
    command.add_argument("--task-path", metavar="DIR", help="a folder of your own task files")
    command.add_argument("--task-limit", metavar="N", type=positive, help="only the first N items of each task")
    command.add_argument("--batch-size", metavar="N", type=positive, help="windows in a batch")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that MODEL and BASE bring with them"
    )
    command.add_argument("--speed", action="store_true", help="time a prompt and the tokens after it, and take memory")
    command.add_argument("--samples", action="store_true", help="show what it answers to a few prompts")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--json", metavar="OUT", help="write the numbers to a file")


def _of_publish(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", nargs="?")
    command.add_argument("repo", metavar="REPO", nargs="?", help="owner/name")
    command.add_argument("--private", action="store_true", help="visible to you alone")
    command.add_argument("--check", metavar="REPO", help="compare a published repo with its own tame.json")
    command.add_argument("--source", metavar="SOURCE", help="with --check: the model it says it was made from")


def _of_worker(command: argparse.ArgumentParser) -> None:
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--gpu", metavar="N", type=index, help="on this GPU, as nvidia-smi counts them")
    kind.add_argument("--control", action="store_true", help="only flows that wait for others: watch, sweep")
    command.add_argument("--pool", default="tame", help="the work pool to take runs from")
    command.add_argument("--once", action="store_true", help="end after one run, or at once if none waits")


def _of_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument("action", choices=("list", "verify", "prune"))
    command.add_argument("--remote", action="store_true", help="the shared one, at TAME_STORE")
    command.add_argument(
        "--older-than", metavar="DAYS", type=days, help="prune: also what was not used for so long (0: all)"
    )


def _checked(model: Any, explain: Callable[..., str], /, **values: Any) -> Any:
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInputError(explain(error, model)) from None


def _say(error: BaseException | str, debug: bool, code: int) -> int:
    if debug and isinstance(error, BaseException):
        import traceback

        traceback.print_exception(error)
    print(f"tame: {line(error, limit=None)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
