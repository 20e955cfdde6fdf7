"""What the command line takes: every command, its arguments, and what each is for."""

import argparse
from collections.abc import Callable, Sequence

from configs.argument_types import days, index, positive
from configs.method_names import METHODS


def parser_of(functions: Sequence[Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of all commands; each of `functions` does the command of its name, and is `command` of what is parsed."""
    does = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(
        prog="tame",
        description="Download a language model, quantize it, measure honestly what that cost, and publish it.",
        epilog="exit codes: 0 passed and published, 1 something failed, 2 wrong recipe or arguments, 3 the gate rejected",
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="more is logged, and errors come with a traceback")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
        command.set_defaults(command=does[name])
        return command

    _takes_a_recipe(add("run", "release a model: the whole flow"))
    _takes_a_recipe(add("plan", "say what a run would do, and do nothing"))
    _of_quantize(add("quantize", "quantize a model, and nothing else"))
    _of_evaluate(add("evaluate", "measure a model, and nothing else"))
    _of_publish(add("publish", "publish a folder to the Hub, verified"))
    command = add("up", "Prefect, MLflow, the deployments and a worker on this machine")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")
    _of_worker(add("worker", "work for the Prefect server of PREFECT_API_URL, on the CPU unless a GPU is named"))
    add("provision", "make the work pool, queues, automations and deployments on the server of PREFECT_API_URL")
    _of_cache(add("cache", "the artifact store"))
    command = add("report", "all releases over time, from MLflow")
    command.add_argument("--model", help="of one model only")
    command.add_argument("--out", metavar="FILE", default="history.html")
    command = add("track", "catch up with MLflow")
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
        help="choose the codes of nf4, fp4 and w4a16 on these UTF-8 texts, mixed evenly; without a FILE, on Python's own library",
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
    command.add_argument(
        "--scale", choices=("search",), help="of methods for vLLM: the scales with the least squared error"
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
    command.add_argument(
        "--rederive",
        metavar="K",
        type=int,
        help="with --check: read K random tensors of the repo and of its source alone, and compute them again, byte for byte",
    )


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
