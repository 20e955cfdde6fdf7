"""All that tame knows of the inside of lm-evaluation-harness: how its tasks are found, loaded and run over a model.

What is used here beyond its documented interface: the entries of `TaskManager.task_index`, `TaskManager.load`, a task's
`_instances`, `UNSAFE_CODE` and `MULTIMODAL`, the Jinja environment of its templates, and of `HFLM` the methods that `Adapter`
overrides.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError, line
from configs.schema import Evaluate
from tasks.evaluate.model import Loaded
from tasks.evaluate.output_head import backbone_of
from tasks.evaluate.samples import THOUGHTS

BUILDERS = ("json", "csv", "text", "parquet", "arrow", "pandas", "webdataset", "imagefolder", "audiofolder", "xml")
"""What a task may name as its data set when it means files: the loaders that `datasets` has."""
MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What a task may call the most tokens of an answer, in lm-evaluation-harness's order."""
FEWSHOT_SEED = 1234  # lm-evaluation-harness's own default: its published scores use it
Request = tuple[Any, list[int], list[int]]
"""Texts, and the tokens of a context and of its continuation."""
Likelihood = tuple[float, bool]
"""The logarithm of a continuation's probability, and whether it is what the model finds most likely."""


def read_index(folder: str | None) -> dict[str, dict[str, Any]]:
    """The fields of a `Definition` of every task in `folder`, or of lm-evaluation-harness's own, by name.

    Folders are relative to `folder`, or to the folder of lm-evaluation-harness's tasks.
    """
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    import lm_eval.tasks

    base = Path(folder) if folder else Path(lm_eval.tasks.__file__).parent
    index = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=folder is None).task_index
    return {name: _definition(entry, base, own=folder is not None) for name, entry in index.items()}


def _definition(entry: Any, base: Path, own: bool) -> dict[str, Any]:
    config = entry.cfg or {}
    top = "." if own or entry.yaml_path is None else entry.yaml_path.relative_to(base).parts[0]
    if entry.kind.name == "TAG":
        return {"folder": ".", "children": sorted(entry.tags)}
    if entry.kind.name == "GROUP":
        children = config.get("task") or []
        children = [children] if isinstance(children, str) else children
        names = [child if isinstance(child, str) else child.get("task") or child.get("group") for child in children]
        return {"folder": top, "children": [name for name in names if isinstance(name, str)]}
    kwargs = config.get("dataset_kwargs") or {}
    dataset = config.get("dataset_path")
    files = kwargs.get("data_files") or []
    files = [
        name
        for value in (files.values() if isinstance(files, dict) else [files])
        for name in ([value] if isinstance(value, str) else value)
    ]
    if isinstance(dataset, str) and dataset not in BUILDERS and Path(dataset).exists():
        files, dataset = [*files, dataset], None
    remote = isinstance(dataset, str) and dataset not in BUILDERS
    return {
        "folder": top,
        "dataset": dataset if remote else None,
        "revision": kwargs.get("revision") if remote else None,
        "files": [] if remote else [name for name in files if isinstance(name, str) and "://" not in name],
    }


def load_tasks(names: list[str], include: list[str], fewshot: int | None) -> Any:
    """Load tasks as lm_eval.simple_evaluate does, but without reading the definitions of all others.

    Args:
        names: Tasks, groups or tags.
        include: Folders that define them and what they consist of.
        fewshot: Examples in the prompt; None: each task's own default.

    Raises:
        BadInputError: a task that runs code, or that needs more than text.
        TameError: a definition that fails, or data that cannot be reached.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import env

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    if not hasattr(env.from_string, "cache_info"):  # else each template is compiled anew for every item, four times
        env.from_string = functools.lru_cache(maxsize=1000)(env.from_string)
    try:
        found = TaskManager(include_path=include, include_defaults=False).load(names)
    except Exception as error:
        raise TameError(
            f"evaluate.tasks {', '.join(names)}: {type(error).__name__}: {line(error)}; see that the data can be reached"
        ) from None
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise BadInputError(
                f"evaluate.tasks {name}: it runs code that the model writes, and tame does not; leave it out"
            )
        if getattr(task, "MULTIMODAL", False):
            raise BadInputError(
                f"evaluate.tasks {name}: it needs images or sound, and tame measures text; leave it out"
            )
        default = task.get_config("num_fewshot")
        if fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return found


def evaluate_tasks(
    loaded: Loaded, found: Any, batch_size: int, spec: Evaluate, only: dict[str, list[int]] | None = None
) -> Any:
    """Run what `load_tasks` returned, or the first items of each, as `spec` has it, or `only` the items of these numbers.

    Where the tokenizer has a chat template, prompts go through it, the examples in them as turns of the conversation.

    Returns what lm_eval.evaluate does: results, samples, versions, n-shot.
    """
    import random

    import numpy as np
    import torch
    from lm_eval import evaluate

    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    for task in found["tasks"].values():
        task._instances = None  # of a run that had no memory for its batches
    chat = loaded.tokenizer.chat_template is not None
    with torch.inference_mode():
        return evaluate(
            adapter(loaded, batch_size, spec.task_new_tokens),
            found,
            limit=None if only else spec.task_limit,
            samples=only,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )


def adapter(loaded: Loaded, batch_size: int, new_tokens: int | None = None) -> Any:
    """lm-evaluation-harness's own model class, with what it does not do, or does at length.

    It computes logits for the tokens that are scored and for no others: those of the question and of the padding would be
    thrown away. Prompts and choices that it stops at are scored: see `_split` and `_pieces`. No answer has more than
    `new_tokens` tokens, nor more than half of the model's window, where lm-evaluation-harness would stop.
    """
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):  # type: ignore[misc,unused-ignore]
        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            if add_special_tokens is None and self.prefix_token_id is None:  # it would decode that token
                ids = self.tokenizer.encode(string)
            else:
                ids = super().tok_encode(string, add_special_tokens=add_special_tokens, **options)
            loaded.check_tokens(ids)
            return list(ids)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Likelihood]:
            answered = [request for request in requests if request.args[1] != ""]
            found = iter(super().loglikelihood(answered, disable_tqdm=True))
            return [(0.0, True) if request.args[1] == "" else next(found) for request in requests]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            _cap(requests, [new_tokens or self.max_length, self.max_length // 2, self.max_gen_toks])
            return list(super().generate_until(requests, disable_tqdm=True))

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = super()._encode_pair(context, continuation)
            if not after and continuation:  # they share a token: it is taken apart
                before = self.tok_encode(context)
                after = self.tok_encode(continuation, add_special_tokens=False)
            return before, after

        def _loglikelihood_tokens(
            self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Likelihood]:
            pieces = [
                (index, piece)
                for index, (_, context, answer) in enumerate(requests)
                for piece in _pieces(*_split(context, answer), self.max_length)
            ]
            results: list[Likelihood] = [(0.0, True)] * len(requests)
            pairs = [piece for _, piece in pieces]
            found = _score(loaded, pairs, self.max_length, override_bs or self.batch_size, self.softmax_dtype)
            for (index, _), (chance, greedy) in zip(pieces, found, strict=True):
                results[index] = (results[index][0] + chance, results[index][1] and greedy)
            return results

    tokenizer = loaded.tokenizer
    if tokenizer.pad_token is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
        # HFLM would add a token that the model has no embedding for. What pads is masked, so any token will do.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    thought = next((mark for mark in THOUGHTS if mark in (tokenizer.chat_template or "")), None)
    options = {"batch_size": batch_size, "device": loaded.device, "think_end_token": thought}
    return Adapter(pretrained=loaded.model, tokenizer=tokenizer, **options)


def _cap(requests: Sequence[Any], limits: list[int]) -> None:
    """Give no answer more tokens than `limits`; the last of them is for requests that ask for no number."""
    for request in requests:
        options = dict(request.args[1])
        asked = [int(options.pop(name)) for name in MOST_TOKENS if options.get(name) is not None]
        options["max_gen_toks"] = min([*limits[:-1], *(asked[:1] or limits[-1:])])
        request.arguments = (request.args[0], options)


def _score(
    loaded: Loaded, pairs: list[tuple[list[int], list[int]]], window: int, batch: int, dtype: Any
) -> list[Likelihood]:
    """The likelihood of each answer after its context, the softmax in `dtype`; a context is cut to fit the window."""
    import torch

    head = loaded.head
    inputs = [tuple((context + answer)[-(window + 1) :][:-1]) for context, answer in pairs]
    order = sorted(set(inputs), key=lambda tokens: (-len(tokens), tokens))  # answers may share their input
    asked: dict[tuple[int, ...], list[int]] = {tokens: [] for tokens in order}
    for index, tokens in enumerate(inputs):
        asked[tokens].append(index)
    results: list[Likelihood] = [(0.0, True)] * len(pairs)
    with torch.inference_mode(), backbone_of(loaded.model) as backbone:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            padded = [[*tokens, *[0] * (len(rows[0]) - len(tokens))] for tokens in rows]
            states = backbone(torch.tensor(padded, device=loaded.device))
            for row, tokens in enumerate(rows):
                for index in asked[tokens]:
                    answer = torch.tensor(pairs[index][1])
                    logits = head(states[row, len(tokens) - len(answer) : len(tokens)])
                    chances = logits.log_softmax(-1, dtype=dtype).cpu()
                    chance = chances.gather(-1, answer[:, None]).sum()
                    results[index] = (float(chance), bool((chances.argmax(-1) == answer).all()))
    return results


def _split(context: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    """A context that is not empty. lm-evaluation-harness puts the BOS or EOS token before an empty prompt.

    A tokenizer may have neither; then the first token of the answer is given, and the others are scored.
    """
    if context and context[0] is None:
        context = context[1:]
    return (context, answer) if context else (answer[:1], answer[1:])


def _pieces(context: list[int], answer: list[int], window: int) -> list[tuple[list[int], list[int]]]:
    """The answer in pieces that fit the window, each after as much as fits of what is before it; mostly one piece.

    This is how lm-evaluation-harness scores long texts; an answer longer than the window stops it.
    """
    everything = context + answer
    starts = range(len(context), len(everything), window)
    return [(everything[:start], everything[start : start + window]) for start in starts]
