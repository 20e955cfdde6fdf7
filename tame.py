"""The command line: thin, and imports the rest only when it is needed."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import configs.quiet_interrupt  # noqa: F401  before the rest
from configs.command_line import NEXT, is_recipe, parser_of
from configs.errors import BadInputError, TameError, line, named_line
from configs.settings import unknown
from tasks.runtime.environment import check_addresses, end_interrupted, interrupted, set_up, stop_at_interrupts
from tasks.runtime.progress import begin, say, width

log = logging.getLogger("tame")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 all well, 1 something failed, 2 wrong recipe or arguments, 3 the gate rejected."""
    options = _parser().parse_args(arguments)
    if not hasattr(options, "command"):
        print(NEXT)
        sys.exit(0)
    set_up(options.debug, "INFO" if options.command in (up, worker) else "CRITICAL")
    stop_at_interrupts()
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        for warning in unknown(os.environ):
            log.warning("%s", warning)
        check_addresses(os.environ)
        code = command(options)
    except TameError as error:
        code = _say(error, options.debug, error.exit_code)
    except KeyboardInterrupt:
        code = 130  # what is to be said, the handler has said
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = _say(f"{named_line(error, limit=None)} (--debug shows where)", options.debug, 1)
    sys.stdout.flush()
    if code == 130 or interrupted.is_set():
        end_interrupted()  # libraries have nothing to say at the end
    sys.exit(code)


def run(options: argparse.Namespace) -> int:
    """The whole flow."""
    recipe = _recipe(options)
    if options.show_recipe:
        from configs.write import as_yaml

        print(as_yaml(recipe), end="")
        return 0
    from tasks.result import folder_of

    out = folder_of(recipe, options.out)
    begin("looking what is there, and what is to do")
    from flows.approve import refusal
    from flows.cached import from_cache

    result = from_cache(recipe, out)
    if result is None:
        from tasks.describe import columns, describe

        if why := refusal(recipe):
            raise BadInputError(why)
        for row in columns(describe(recipe, out), width()):
            say(row)
        begin("")
        from flows.local import release_here

        result = release_here(recipe, out)
    else:
        begin("")
    if options.json:
        print(result.model_dump_json(indent=1))
        return result.exit_code
    from tasks.report.terminal import closing

    print(closing(result, out, width(), sys.stdout.isatty()))
    return result.exit_code


def plan(options: argparse.Namespace) -> int:
    """Nothing but looks."""
    recipe = _recipe(options)
    if options.show_recipe:
        from configs.write import as_yaml

        print(as_yaml(recipe), end="")
        return 0
    begin("looking what is there, and what is to do")
    from flows.approve import refusal
    from tasks.describe import columns, describe
    from tasks.result import folder_of

    lines = describe(recipe, folder_of(recipe, options.out), options.exact)
    if why := refusal(recipe):
        lines.append(("note", why))
    begin("")
    if options.json:
        import json

        print(json.dumps([{"what": what, "how": how} for what, how in lines], indent=1))
    else:
        print("\n".join(columns(lines, width())))
    return 0


def init(options: argparse.Namespace) -> int:
    """A recipe that suits a model and this machine."""
    from tasks.suggest import commented, suggest

    text = commented(suggest(options.model))
    if options.output in (None, "-"):
        print(text, end="")
        return 0
    from tasks.result import write_file

    path = Path(options.output)
    if path.exists():
        raise BadInputError(f"{path} is there already; give another name, or remove it")
    write_file(path, text)
    say(f"{path} is written. Next: tame plan {path}, then tame run {path}")
    return 0


def completion(options: argparse.Namespace) -> int:
    """A script for a shell."""
    import shtab

    print(shtab.complete(_parser(), shell=options.shell))
    return 0


def _recipe(options: argparse.Namespace) -> Any:
    """The recipe in a file, or the one that a model and the flags ask for."""
    if sys.stderr.isatty():  # something to read at once; errors of scripts stay one line
        say(f"Looking at {options.recipe} …")
    from configs.load import load_recipe, settled

    flags = {key: getattr(options, key) for key in ("to", "calibrate", "publish", "limit") if getattr(options, key)}
    if is_recipe(options.recipe):
        if not Path(options.recipe).expanduser().exists() and not options.recipe.endswith((".yaml", ".yml")):
            wanted = "give a recipe (see configs/), a Hub repo (owner/name), a folder or a .gguf"
            raise BadInputError(f"{options.recipe}: there is no such file or folder; {wanted}")
        if flags or options.public:
            given = ", ".join(f"--{key}" for key in [*flags, *["public"] * options.public])
            raise BadInputError(f"{given}: belongs to a MODEL; a recipe says that itself, or with --set KEY=VALUE")
        return load_recipe(options.recipe, options.set)
    from tasks.suggest import suggest

    return settled(suggest(options.recipe, **flags, private=not options.public).recipe, options.set)


def quantize(options: argparse.Namespace) -> int:
    """A folder in, a folder out."""
    from configs.from_flags import calibration_of, source_of, variant_of

    variant, spec, source = variant_of(options), calibration_of(options), source_of(options, options.source)
    from tasks.download.inspection import inspect_source
    from tasks.quantize.command import parse_size, quantize_folder
    from tasks.quantize.protocols import Request

    found = inspect_source(source)
    folder, calibration = found.path, None
    if found.kind != "folder" or found.adapter or variant.calibrate or variant.fit:  # else nothing need be hashed
        from tasks.download.task import download

        folder = (snapshot := download(source, found)).path
        if variant.calibrate:
            from tasks.calibrate.task import calibrate

            calibration = calibrate(snapshot, spec, variant.codes_part)
    request = Request(
        source=Path(str(folder)),
        out=Path(options.out),
        variant=variant,
        device=options.device,
        workers=options.workers,
        max_shard_size=None if options.max_shard_size is None else parse_size(options.max_shard_size),
        trust_remote_code=source.trust_remote_code,
        calibration=calibration,
    )
    if variant.fit:
        from tasks.fit.command import fitted

        request = fitted(request, snapshot, spec)
    made = quantize_folder(request, check=options.check)
    print(f"{options.out}  {made.bytes / 1e6:,.1f} MB, {made.bits_per_weight:.2f} bits a weight, sha256 {made.digest}")
    for note in made.notes:
        print(f"note: {note}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """One model, against a baseline or alone."""
    from configs.from_flags import evaluation_of, source_of

    spec, model = evaluation_of(options), source_of(options, options.model)
    base = source_of(options, options.baseline) if options.baseline else None
    from tasks.evaluate.command import evaluate_alone
    from tasks.report.terminal import numbers
    from tasks.result import write_file

    measured = evaluate_alone(model, base, spec, options.device)
    print(numbers(measured))
    if options.json:
        write_file(Path(options.json), measured.model_dump_json(indent=1) + "\n")
    return 0


def serve_check(options: argparse.Namespace) -> int:
    """Programs that open a checkpoint, or do not."""
    from configs.from_flags import source_of
    from tasks.serve.command import serve_check as check

    served = check(source_of(options, options.model), options.runtime or ["vllm"], options.device)
    if options.json:
        import json

        print(json.dumps([found.model_dump() for found in served], indent=1))
    else:
        print("\n".join(f"{'✓' if found.agrees else '✗'} {found.sentence}" for found in served))
    return 0 if all(found.agrees for found in served) else 1


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

    lines, code = look_after(options.action, options.remote, options.older_than, options.dry_run)
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
    return parser_of(
        (
            run,
            plan,
            init,
            quantize,
            evaluate,
            serve_check,
            publish,
            up,
            worker,
            provision,
            cache,
            report,
            track,
            completion,
        )
    )


def _rederive(options: argparse.Namespace) -> int:
    """Some tensors of a release, computed again from its source."""
    from tasks.publish.rederive import rederive

    found = rederive(options.check, options.rederive, options.source)
    print("\n".join(found.lines(options.check)))
    return 1 if found.problems else 0


def _say(error: BaseException | str, debug: bool, code: int) -> int:
    if debug and isinstance(error, BaseException):
        import traceback

        traceback.print_exception(error)
    print(f"tame: {line(error, limit=None)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
