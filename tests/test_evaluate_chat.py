"""Chat models: through their own template, for samples and tasks, and to where they end their turn."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.errors import BadInputError
from configs.schema import Evaluate, Samples
from tasks.download.tokenizer_files import chat_template, thinks
from tasks.evaluate.generate import _ends
from tasks.evaluate.lm_eval_index import find_tasks, work_of
from tasks.evaluate.model import Loaded, load
from tasks.evaluate.samples import CONVERSATIONS, TEXTS, _apart, answer_samples
from tests.models import tiny
from tests.test_evaluate_speed import most_likely, text_of
from tests.test_evaluate_tasks import ITEMS, own_tasks, spec_of

__all__ = ["own_tasks"]

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NEW = 8


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32 with a chat template, none of whose tokens end a text."""
    folder = tiny(tmp_path_factory.mktemp("models") / "chat", dtype="float32", spread=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 511}))
    return folder


def answers(loaded: Loaded, folder: Path, **asked: Any) -> dict[str, Any]:
    folder.mkdir()
    answer_samples(loaded, Samples(new_tokens=NEW, **asked), folder)
    return dict(json.loads((folder / "result.json").read_text()))


def test_samples_go_through_the_template_and_conversations_have_turns(chat_model: Path, tmp_path: Path) -> None:
    loaded = load(chat_model, "cpu")
    result = answers(loaded, tmp_path / "chat", prompts=["Hi", ["One?", "Yes.", "Two?"]])
    assert result["prompts"] == ["Hi", "User: One?\n\nAssistant: Yes.\n\nUser: Two?"]
    written = [
        "[user] Hi<|end|>\n[assistant] ",
        "[user] One?<|end|>\n[assistant] Yes.<|end|>\n[user] Two?<|end|>\n[assistant] ",
    ]
    for text, found in zip(written, result["answers"], strict=True):
        ids = most_likely(loaded, text, NEW)
        ids = ids[: ids.index(0)] if 0 in ids else ids  # <|end|>, after which the template has the user's turn
        assert found == text_of(loaded, ids)
    assert result["thoughts"] == [None, None]
    assert result["protocol"]["chat_template"] == "the model's"
    assert len(answers(loaded, tmp_path / "usual")["answers"]) == len(CONVERSATIONS)
    loaded.tokenizer.chat_template = None
    plain = answers(loaded, tmp_path / "plain")
    assert plain["prompts"] == TEXTS
    assert plain["answers"][0] == text_of(loaded, most_likely(loaded, str(TEXTS[0]), NEW))


def test_an_answer_ends_with_its_turn(chat_model: Path, tmp_path: Path) -> None:
    loaded = load(chat_model, "cpu")
    assert _ends(loaded) == [0, 511]  # <|end|>, which the template puts after an answer
    loaded.model.generation_config.eos_token_id = [7, 511]  # a model that says where it ends
    assert _ends(loaded) == [7, 511]
    ids = most_likely(loaded, "[user] Hi<|end|>\n[assistant] ", NEW)
    loaded.model.generation_config.eos_token_id = [510, ids[2]]
    found = answers(loaded, tmp_path / "chat", prompts=["Hi"])["answers"]
    assert found == [text_of(loaded, ids[: ids.index(ids[2]) + 1])]


@pytest.mark.parametrize(
    ("said", "before", "text", "thought"),
    [
        ("<think>two and two</think>\n\nFour.", "", "Four.", "two and two"),
        ("two and two</think>Four.", "[assistant] <think>\n", "Four.", "two and two"),
        ("<think>two and", "", "", "two and"),
        ("Four.", "[assistant] ", "Four.", None),
    ],
)
def test_a_thought_is_told_apart_from_the_answer(
    chat_model: Path, said: str, before: str, text: str, thought: str | None
) -> None:
    loaded = load(chat_model, "cpu")
    assert _apart(loaded, loaded.tokenizer(said)["input_ids"], before) == (text, thought)


def test_a_thinking_model_has_room_for_its_thought(chat_model: Path, tmp_path: Path) -> None:
    loaded = load(chat_model, "cpu")
    loaded.tokenizer.chat_template = TEMPLATE + "{% if enable_thinking %}{% endif %}<think>"
    assert thinks(loaded.tokenizer.chat_template)
    result = answers(loaded, tmp_path / "thinking", prompts=["Hi"], thinking_tokens=24)
    assert result["answers"] == [""]  # it never ends it
    assert len(loaded.tokenizer(result["thoughts"][0])["input_ids"]) > NEW


def test_which_template_a_folder_has(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    with pytest.raises(BadInputError, match=r"evaluate.chat always: .* has no chat template"):
        chat_template(tmp_path, "always")
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert chat_template(tmp_path) == "j"
    assert chat_template(tmp_path, "never") is None


def test_a_conversation_ends_with_the_user() -> None:
    with pytest.raises(ValidationError, match="the last is the assistant's"):
        Samples(prompts=[["Hi", "Hello"]])


def test_task_scores_are_those_of_lm_eval_with_its_chat_template(
    chat_model: Path,
    own_tasks: Path,
    tmp_path: Path,
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from tasks.evaluate.lm_eval_run import run_tasks

    spec = spec_of(own_tasks, task_fewshot=2)
    loaded = load(chat_model, "cpu")
    run_tasks(loaded, work_of(spec.tasks, find_tasks(spec.tasks, spec.task_path)), spec, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["protocol"]["chat_template"] == "the model's, examples as turns"
    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
    plain = lm_eval.simple_evaluate(
        model=model, tasks=spec.tasks, task_manager=manager, bootstrap_iters=0, num_fewshot=2,
        apply_chat_template=True, fewshot_as_multiturn=True,
    )  # fmt: skip
    for name, metrics in (("own_choice", ("acc", "acc_norm")), ("own_written", ("exact_match",))):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == ITEMS
        for metric in metrics:
            assert result["tasks"][name]["metrics"][metric] == plain["results"][name][f"{metric},none"]
            assert [row[metric] for row in rows] == [sample[metric] for sample in plain["samples"][name]]
    said = [str(sample["filtered_resps"][0])[:160] for sample in plain["samples"]["own_written"]]
    assert [row["answer"] for row in rows] == said
    assert "[assistant]" in plain["samples"]["own_written"][0]["arguments"][0][0]


def test_no_answer_of_a_task_is_longer_than_it_may_be(
    chat_model: Path,
    own_tasks: Path,
    tmp_path: Path,
) -> None:
    from tasks.evaluate.lm_eval_run import run_tasks

    loaded = load(chat_model, "cpu")
    spec = spec_of(own_tasks, tasks=["own_written"], task_new_tokens=2)
    forwards: list[int] = []
    loaded.model.register_forward_hook(lambda module, arguments, output: forwards.append(1))
    run_tasks(loaded, work_of(spec.tasks, find_tasks(spec.tasks, spec.task_path)), spec, tmp_path)
    assert len(forwards) == 2 * ITEMS / spec.batch_size  # a token each, batched
    assert json.loads((tmp_path / "result.json").read_text())["protocol"]["new_tokens"] == 2


def test_the_key_has_the_template_and_where_bos_stands(chat_model: Path, own_tasks: Path) -> None:
    from tasks.evaluate.run import Work
    from tasks.evaluate.task import _wanted
    from tasks.store.on_disk import key_of

    def keys(template: str | None, **asked: Any) -> dict[str, str]:
        spec = Evaluate(tasks=["own_choice"], task_path=str(own_tasks), **asked)
        work = Work(
            model=str(chat_model),
            label="m",
            device="cpu",
            trust_remote_code=False,
            spec=spec,
            role="alone",
            template=template,
        )
        return {name: key_of(wanted.inputs) for name, wanted in _wanted(work, "digest", {"bos": spec.bos}).items()}

    first = keys(TEMPLATE)
    assert {name for name, key in keys(None).items() if key != first[name]} == {"tasks/own_choice", "samples"}
    assert {name for name, key in keys(TEMPLATE, bos="once").items() if key != first[name]} == {"scores"}
