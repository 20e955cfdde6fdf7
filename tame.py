"""The command line: thin, and imports the rest only when it is needed."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.command_line import parser_of
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
    asked |= {"group_size": options.group_size, "scale": options.scale}
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
            from tasks.calibrate.prepare import calibrate

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

    if options.check and options.rederive is not None:
        return _rederive(options)
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
    return parser_of((run, plan, quantize, evaluate, publish, up, worker, provision, cache, report, track))


def _rederive(options: argparse.Namespace) -> int:
    """Some tensors of a release, computed again from its source."""
    from tasks.publish.rederive import rederive

    found = rederive(options.check, options.rederive, options.source)
    print("\n".join(found.lines(options.check)))
    return 1 if found.problems else 0


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
