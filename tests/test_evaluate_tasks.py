"""Tasks: the scores of plain lm-evaluation-harness, paired with the baseline item by item."""

import json
from pathlib import Path

import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Evaluate, TextSource
from tasks.evaluate.lm_eval_index import check_tasks, find_tasks, inputs_of, work_of
from tests.models import tiny

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: {kind}
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
doc_to_choice: "{{{{[first, second]}}}}"
metric_list: [{metrics}]
metadata: {{version: 3}}
"""
ITEMS = 24


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks of one's own, and their data."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("tasks")
    words = " ".join(topics[key] for key in sorted(topics)[:40]).split()
    rows = [
        {"question": " ".join(words[i : i + 12]), "first": words[i + 12], "second": words[i + 90], "label": i % 2}
        for i in range(1000, 1000 + 7 * ITEMS, 7)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = "{metric: acc}, {metric: acc_norm}"
    choice = YAML.format(
        name="own_choice", data=folder / "data.jsonl", kind="multiple_choice", target="label", metrics=accuracy
    )
    (folder / "choice.yaml").write_text(choice)
    exact = "{metric: exact_match}"
    written = YAML.format(
        name="own_written", data=folder / "data.jsonl", kind="generate_until", target="first", metrics=exact
    )
    written += 'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\n'
    (folder / "written.yaml").write_text(written.replace('doc_to_choice: "{{[first, second]}}"\n', ""))
    return folder


def spec_of(folder: Path, **options) -> Evaluate:
    asked = {"tasks": ["own_choice", "own_written"], "task_path": str(folder), "batch_size": 4, **options}
    return Evaluate(text=TextSource(builtin="python-docs"), speed=None, samples=None, **asked)


@pytest.fixture(scope="module")
def ran(own_tasks: Path, tmp_path_factory: pytest.TempPathFactory):
    """Two float32 models, run by tame; the folders of their results, and the first one, loaded."""
    from tasks.evaluate.lm_eval_run import run_tasks
    from tasks.evaluate.model import load

    spec = spec_of(own_tasks)
    work = work_of(spec.tasks, find_tasks(spec.tasks, spec.task_path))
    root = tmp_path_factory.mktemp("ran")
    for seed in (0, 1):
        loaded = load(tiny(root / f"model-{seed}", dtype="float32", seed=seed), "cpu")
        (root / str(seed)).mkdir()
        run_tasks(loaded, work, spec, root / str(seed), floor=seed == 0)
    return root, load(root / "model-1", "cpu")


def test_scores_are_those_of_plain_lm_eval(ran, own_tasks: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root, loaded = ran
    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
    plain = lm_eval.simple_evaluate(
        model=model, tasks=["own_choice", "own_written"], task_manager=manager, bootstrap_iters=0
    )
    ours = json.loads((root / "1" / "result.json").read_text())["tasks"]
    assert ours["own_choice"]["metrics"]["acc"] == plain["results"]["own_choice"]["acc,none"]
    assert ours["own_choice"]["metrics"]["acc_norm"] == plain["results"]["own_choice"]["acc_norm,none"]
    assert ours["own_written"]["metrics"]["exact_match"] == plain["results"]["own_written"]["exact_match,none"]
    assert ours["own_choice"]["items"] == ITEMS
    assert ours["own_choice"]["version"] == 3
    rows = [json.loads(line) for line in (root / "1" / "own_choice.jsonl").read_text().splitlines()]
    assert [row["acc"] for row in rows] == [sample["acc"] for sample in plain["samples"]["own_choice"]]


def test_the_batch_size_that_fitted_is_the_one_that_is_recorded(ran, own_tasks: Path, tmp_path: Path) -> None:
    import torch

    from tasks.evaluate.lm_eval_run import run_tasks

    root, loaded = ran
    limit = 1

    def short_of_memory(module, arguments) -> None:
        if arguments[0].shape[0] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    spec = spec_of(own_tasks)
    work = work_of(spec.tasks, find_tasks(spec.tasks, spec.task_path))
    hook = loaded.model.model.embed_tokens.register_forward_pre_hook(short_of_memory)
    try:
        run_tasks(loaded, work, spec, tmp_path, floor=True)
        result = json.loads((tmp_path / "result.json").read_text())
        assert spec.batch_size == 4
        assert result["protocol"]["batch_size"] == 1
        assert (
            result["tasks"]["own_choice"]["metrics"]
            == (json.loads((root / "1" / "result.json").read_text())["tasks"]["own_choice"]["metrics"])
        )
        assert "floor" not in result["tasks"]["own_choice"]  # no memory for a second batch shape
        limit = 0
        with pytest.raises(TameError, match="no memory for one item of a task"):
            run_tasks(loaded, work, spec, tmp_path)
    finally:
        hook.remove()


def compared(root: Path, evidence: Path):
    """What the comparison says of the two models that ran."""
    from tasks.evaluate.comparison import Pair, _read, _tasks

    return _tasks({"own": Pair(_read(root / "1"), _read(root / "0"), 0, evidence)}, True, evidence)


def test_flips_are_a_count_over_the_items(ran, tmp_path: Path) -> None:
    root, _ = ran
    floor = json.loads((root / "0" / "result.json").read_text())["tasks"]["own_choice"]["floor"]
    metrics = compared(root, tmp_path).metrics
    files = [(root / seed / "own_choice.jsonl").read_text().splitlines() for seed in ("0", "1")]
    before, after = ([json.loads(line)["acc"] for line in lines] for lines in files)
    flips = sum(a != b for a, b in zip(before, after, strict=True))
    assert flips > 0
    assert metrics["task/own_choice/flips"] == flips
    difference = metrics["task/own_choice/acc_difference"]
    assert difference == pytest.approx((sum(after) - sum(before)) / ITEMS)
    assert metrics["task/own_choice/acc_difference_low"] <= difference <= metrics["task/own_choice/acc_difference_high"]
    assert 0 < metrics["task/own_choice/acc_p"] <= 1
    assert floor == {"items": ITEMS // 10, "flips": 0}  # a tenth; in float32, padding moves nothing


def test_answers_that_changed_are_kept_in_words(ran, own_tasks: Path, tmp_path: Path) -> None:
    from tasks.evaluate import evidence
    from tasks.evaluate.comparison import EXAMPLES

    root, _ = ran
    compared(root, tmp_path)
    asked = [json.loads(line) for line in (own_tasks / "data.jsonl").read_text().splitlines()]
    (root / "evidence").mkdir(exist_ok=True)
    (root / "evidence" / "tasks").symlink_to(root / "0")
    (changed, *_) = evidence.flips(str(root / "evidence"), str(tmp_path))
    shown = evidence.examples(str(tmp_path))["own_choice"]
    assert [item.doc_id for item in shown] == [*changed.lost[:EXAMPLES], *changed.won[:EXAMPLES]]
    for item in shown:
        document = asked[item.doc_id]
        choices = [document["first"], document["second"]]
        assert item.question == document["question"]
        assert item.right == choices[document["label"]]
        assert (item.baseline == item.right) == item.lost == (item.doc_id in changed.lost)
        assert (item.variant == item.right) == (item.doc_id in changed.won)
        assert {item.baseline, item.variant} <= set(choices)
    rows = [json.loads(line) for line in (root / "1" / "own_written.jsonl").read_text().splitlines()]
    assert all(isinstance(row["answer"], str) and len(row["answer"]) <= 160 for row in rows)
    assert not (root / "1" / "own_choice.questions.jsonl").exists()  # they are the baseline's


@pytest.mark.parametrize(
    ("item", "answer", "question"),
    [
        (  # a gap to fill: the choices are in the prompts
            {"arguments": [("He saw Ann", " run."), ("He saw Bob", " run.")], "filtered_resps": [(-2.0, False), (-1.0, True)]},
            1,
            {"doc_id": 7, "question": "", "choices": ["He saw Ann run.", "He saw Bob run."]},
        ),
        (  # by the likelihood of a character
            {
                "arguments": [("Q", " a"), ("Q", " a much longer answer")], "filtered_resps": [(-2.0, False), (-3.0, True)],
                "metrics": ["acc_norm"],
            },
            1,
            {"doc_id": 7, "question": "Q", "choices": ["a", "a much longer answer"]},
        ),
        (  # one continuation, right if it is what the model would say
            {"arguments": [("The sky is", " blue")], "filtered_resps": [(-2.0, True)], "target": " blue"},
            None,
            {"doc_id": 7, "question": "The sky is", "expected": " blue"},
        ),
        (  # a text without a prompt, and filters that make lists of answers
            {"arguments": [("a text",)], "filtered_resps": [["x", "y"]], "target": "x", "metrics": ["exact_match"]},
            None,
            {"doc_id": 7, "question": "a text", "expected": "x"},
        ),
    ],
    ids=["gap", "norm", "continuation", "rolling"],
)  # fmt: skip
def test_items_of_other_kinds(item, answer, question) -> None:
    from tasks.evaluate.lm_eval_run import _answer, _question

    item = {"doc_id": 7, "metrics": ["acc"], **item}
    assert _answer(item) == answer
    assert _question(item) == question


def test_the_key_covers_definition_data_and_limits(own_tasks: Path, tmp_path: Path, tame_home: Path) -> None:
    import shutil

    folder = shutil.copytree(own_tasks, tmp_path / "tasks")
    (folder / "choice.yaml").write_text((folder / "choice.yaml").read_text().replace(str(own_tasks), str(folder)))

    def key(**options) -> str:
        from tasks.store.on_disk import key_of

        spec = spec_of(folder, **options)
        return key_of(inputs_of(spec, find_tasks(spec.tasks, spec.task_path)))

    def of_the_other(**options) -> str:
        from tasks.store.on_disk import key_of

        spec = spec_of(folder, **options)
        return key_of(inputs_of(spec, find_tasks(spec.tasks, spec.task_path))["own_written"])

    other = of_the_other()
    assert of_the_other(tasks=["own_written"]) == other  # asking for one more task measures no other again
    first = key()
    assert key() == first
    assert key(task_limit=3) != first
    assert key(task_fewshot=2) != first
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace('"label": 1', '"label": 0', 1))
    assert key() != first
    (folder / "data.jsonl").unlink()
    with pytest.raises(BadInputError, match=r"evaluate.tasks own_choice: its data .*data.jsonl: No such file"):
        key()


def test_a_task_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not a folder"):
        check_tasks(["piqa"], str(tmp_path / "nowhere"))


@pytest.mark.e2e
def test_unknown_tasks_are_refused_with_the_nearest_names(own_tasks: Path, tame_home: Path) -> None:
    check_tasks(["piqa", "mmlu", "ai2_arc", "own_choice"], str(own_tasks))
    with pytest.raises(BadInputError, match=r"evaluate.tasks pika: .* no such task; did you mean .*piqa"):
        check_tasks(["pika"], None)
    assert {"mmlu_stem", "mmlu_anatomy"} <= find_tasks(["mmlu"], None).keys()


def likelihoods(loaded, pairs: list[tuple[str, str]], batch: int = 2) -> list[tuple[float, bool]]:
    """What the model class that tame hands to lm-evaluation-harness says of (context, continuation) pairs."""
    from lm_eval.api.instance import Instance

    from tasks.evaluate.lm_eval_adapter import adapter

    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    return list(adapter(loaded, batch).loglikelihood(requests))


def plain_likelihood(loaded, ids: list[int], start: int, window: int) -> float:
    """The log-probability of `ids` from `start` on, in pieces of `window` tokens, by a loop over all logits."""
    import torch

    total = 0.0
    for at in range(start, len(ids), window):
        piece = torch.tensor([ids[max(0, min(at + window, len(ids)) - window - 1) : at + window]])
        with torch.no_grad():
            chances = loaded.model(piece[:, :-1]).logits[0].log_softmax(-1)
        scored = len(ids[at : at + window])
        total += float(chances[-scored:].gather(-1, piece[0, -scored:, None]).sum())
    return total


def test_choices_that_lm_eval_stops_at_have_the_likelihood_of_a_plain_loop(ran) -> None:
    _, loaded = ran
    window = loaded.model.config.max_position_embeddings
    context, long = "The import statement", " word" * (2 * window)
    found = likelihoods(loaded, [(context, ""), (context, long), (context, " is"), ("", long), ("", "")])
    encode = loaded.tokenizer.encode
    first, ids = len(encode(context)), encode(context + long)
    assert len(ids) - first > window
    assert found[0] == found[4] == (0.0, True)  # nothing follows for certain
    assert found[1][0] == pytest.approx(plain_likelihood(loaded, ids, first, window), rel=1e-5)
    assert found[2][0] == pytest.approx(plain_likelihood(loaded, encode(context + " is"), first, window), rel=1e-5)
    begun = [loaded.tokenizer.bos_token_id, *encode(long)]
    assert found[3][0] == pytest.approx(plain_likelihood(loaded, begun, 1, window), rel=1e-5)


def test_an_empty_prompt_without_bos_or_eos_gives_the_first_token(tmp_path: Path) -> None:
    from tasks.evaluate.model import load

    folder = tiny(tmp_path / "model", dtype="float32")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token"):
        del config[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load(folder, "cpu")
    assert loaded.tokenizer.bos_token_id is loaded.tokenizer.eos_token_id is None
    text = "The import statement"
    (found, single) = likelihoods(loaded, [("", text), ("", "T")])
    assert found[0] == pytest.approx(plain_likelihood(loaded, loaded.tokenizer.encode(text), 1, 512), rel=1e-5)
    assert single == (0.0, True)
    assert len(loaded.tokenizer) == 512  # no token was added that the model has no embedding for


def test_a_task_with_an_empty_choice_and_an_empty_prompt_runs(ran, own_tasks: Path, tmp_path: Path) -> None:
    from tasks.evaluate.lm_eval_run import run_tasks

    _, loaded = ran
    rows = [
        {"question": "", "first": "one", "second": "two", "label": 0},
        {"question": "The import statement", "first": "", "second": "is " * 600, "label": 1},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (own_tasks / "choice.yaml").read_text().replace(str(own_tasks), str(tmp_path))
    (tmp_path / "choice.yaml").write_text(text)
    (tmp_path / "out").mkdir()
    spec = spec_of(tmp_path).model_copy(update={"tasks": ["own_choice"]})
    run_tasks(loaded, work_of(spec.tasks, find_tasks(spec.tasks, spec.task_path)), spec, tmp_path / "out", floor=True)
    items = [json.loads(line) for line in (tmp_path / "out" / "own_choice.jsonl").read_text().splitlines()]
    assert [item["doc_id"] for item in items] == [0, 1]
    assert items[1]["answer"] == 0  # an empty choice is certain
    assert items[1]["acc"] == 0
