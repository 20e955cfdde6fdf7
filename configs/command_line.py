"""What the command line takes: every command, its arguments, and what each is for."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from configs.argument_types import days, fit, index, limit, positive
from configs.method_names import METHODS, RUNTIMES

NEXT = """\
tame makes a language model smaller, measures what that cost, and publishes it with the proof.

  tame plan Qwen/Qwen3-0.6B                      what it would do, how long about; nothing is touched
  tame run Qwen/Qwen3-0.6B --to nf4,int8         do it: a Hub repo, a folder or a .gguf
  tame run Qwen/Qwen3-0.6B --to nf4 --publish me the same, and to the Hub as me/Qwen3-0.6B-nf4 (HF_TOKEN may write there)
  tame init Qwen/Qwen3-0.6B -o recipe.yaml       a recipe to edit; tame run recipe.yaml
  tame up                                        pages with forms, schedules and results, in the browser

tame --help lists every command, tame COMMAND --help what it takes."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the nearest word that it knows."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2, and with a line that says what is wrong."""
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            choices = re.findall(r"'([^']*)'", found[2])
            if near := difflib.get_close_matches(found[1], choices, n=1, cutoff=0.5):
                message += f"; did you mean {near[0]}?"
        super().error(message)


class Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it, and end."""
        from importlib.metadata import version

        print(f"tame {version('tame')}")
        parser.exit()


def parser_of(functions: Sequence[Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of all commands; each of `functions` does the command of its name, and is `command` of what is parsed."""
    does = {function.__name__.replace("_", "-"): function for function in functions}
    parser = Parser(
        prog="tame",
        description="Download a language model, quantize it, measure honestly what that cost, and publish it.",
        epilog="exit codes: 0 passed and published, 1 something failed, 2 wrong recipe or arguments, 3 the gate rejected",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version, and end")
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="more is logged, and errors come with a traceback")
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, text: str) -> Parser:
        command = commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
        command.set_defaults(command=does[name])
        return command

    _takes_a_recipe(add("run", "release a model: the whole flow"), "print result.json instead of the table")
    command = add("plan", "say what a run would do, and do nothing")
    _takes_a_recipe(command, "print the plan as JSON")
    command.add_argument(
        "--exact", action="store_true", help="sizes to the byte, and what stays in 16 bits and why; takes some seconds"
    )
    command = add("init", "write a recipe that suits a model and this machine, to edit")
    command.add_argument("model", metavar="MODEL", help="a Hub repo, a folder, a .gguf or package:NAME/FILE")
    command.add_argument("-o", "--output", metavar="FILE", help="where it goes; by default it is printed")
    _of_quantize(add("quantize", "quantize a model, and nothing else"))
    _of_evaluate(add("evaluate", "measure a model, and nothing else"))
    _of_serve_check(add("serve-check", "open a model with the programs that serve it, and compare what they compute"))
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
    command = add("completion", "print a script by which a shell completes tame's commands and options")
    command.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _takes_a_recipe(command: argparse.ArgumentParser, json: str) -> None:
    command.add_argument(
        "recipe",
        metavar="RECIPE|MODEL",
        help="a YAML file, as in configs/; or a Hub repo, a folder, a .gguf, package:NAME/FILE",
    )
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe")
    command.add_argument("--out", metavar="DIR", help="where result.json and report.html go")
    command.add_argument("--json", action="store_true", help=json)
    command.add_argument("--show-recipe", action="store_true", help="print the recipe, and do nothing")
    of_model = command.add_argument_group("with a MODEL instead of a recipe")
    of_model.add_argument(
        "--to",
        metavar="FORMATS",
        help=f"separated by commas, of {', '.join(METHODS)}; nf4-dq quantizes the scales too; by default what suits the model",
    )
    of_model.add_argument(
        "--calibrate",
        nargs="?",
        const="true",
        choices=("true", "fast", "best"),
        help="choose 4-bit codes on a text: same size, a fraction of the damage, minutes more",
    )
    of_model.add_argument(
        "--publish",
        metavar="OWNER",
        help="to the Hub as OWNER/MODEL-FORMAT, private; or into a folder, such as ./published",
    )
    of_model.add_argument("--public", action="store_true", help="with --publish: visible to everybody")
    of_model.add_argument(
        "--limit",
        metavar="KL",
        type=limit,
        help="most damage that is published, KL in nats a token; by default by size",
    )


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
        "--fit",
        metavar="LIMIT",
        type=fit,
        help="max_mean_kl=X: the smallest mix with 16 bits whose KL is at most X nats a token; max_bytes=X: the best that fits, "
        "such as 1.2GB; of nf4, fp4, w4a16 and w8a16, measured on the texts of --calibrate or Python's own library",
    )
    command.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        help="weights of nf4, fp4, w4a16 and w8a16 that share a scale: 128, 64, 32, or -1 for a whole row of integers",
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
    command.add_argument("--task-new-tokens", metavar="N", type=positive, help="most tokens generated for an item")
    command.add_argument("--batch-size", metavar="N", type=positive, help="windows in a batch")
    command.add_argument(
        "--bos",
        choices=("auto", "always", "never", "once"),
        help="auto: windows begin with BOS where the tokenizer adds one; once: the text alone does",
    )
    command.add_argument(
        "--chat", choices=("auto", "always", "never"), help="tasks and samples through the model's chat template"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that MODEL and BASE bring with them"
    )
    command.add_argument("--speed", action="store_true", help="time a prompt and the tokens after it, and take memory")
    command.add_argument("--samples", action="store_true", help="show what it answers to a few prompts")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--json", metavar="OUT", help="write the numbers to a file")


def _of_serve_check(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder or a Hub repo")
    command.add_argument(
        "--runtime",
        choices=RUNTIMES,
        nargs="+",
        action="extend",
        help="by default vllm; peft also trains a LoRA for a few steps. Each runs in the Python that a variable names: TAME_VLLM "
        "(make vllm makes one), TAME_TRANSFORMERS and TAME_PEFT (by default tame's own)",
    )
    command.add_argument("--revision", default="main", help="branch, tag or commit of a Hub repo")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code of the model; read it first"
    )
    command.add_argument("--device", default="auto", help="where transformers runs: auto, cpu, cuda or cuda:N")
    command.add_argument("--json", action="store_true", help="print all that was found as JSON")


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
    command.add_argument("--dry-run", action="store_true", help="prune: say what would be removed, and remove nothing")
    command.add_argument("--remote", action="store_true", help="the shared one, at TAME_STORE")
    command.add_argument(
        "--older-than", metavar="DAYS", type=days, help="prune: also what was not used for so long (0: all)"
    )


def is_recipe(name: str) -> bool:
    """Whether RECIPE|MODEL is the path of a recipe, rather than a model."""
    path = Path(name).expanduser()
    if name.endswith(".gguf") or name.startswith("package:") or path.is_dir():
        return False
    return path.is_file() or name.endswith((".yaml", ".yml")) or name.count("/") != 1
