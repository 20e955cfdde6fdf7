"""The model card and what is published beside it: complete, true to the result, and the same for the same result."""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from pydantic import ValidationError

from configs.errors import TameError
from configs.schema import CardFacts, Recipe
from tasks import sentences
from tasks.formatting import figure, label
from tasks.gate import judge
from tasks.publish import benchmarks, provenance
from tasks.publish.benchmarks import Benchmark
from tasks.publish.card import plain_files, release_files
from tasks.publish.usage import memory
from tasks.report.html import render
from tasks.result import Result
from tasks.sentences import advice, meaning
from tasks.values import Unquantized
from tests.hub import Hub
from tests.results import make

BASE_CARD = {
    "license": "llama3.2",
    "license_name": "the-name",
    "license_link": "LICENSE",
    "language": ["en", "de"],
    "datasets": ["HuggingFaceTB/smol-smoltalk"],
    "tags": ["best-model-ever"],
    "model-index": [{"name": "base", "results": [{"metrics": [{"type": "acc", "value": 31.7}]}]}],
    "pipeline_tag": "text-generation",
}


@pytest.fixture
def result() -> Result:
    made = make()
    return made.model_copy(update={"source": made.source.model_copy(update={"card": BASE_CARD, "licence": "llama3.2"})})


def changed(result: Result, label: str = "int8", **update: Any) -> Result:
    variants = [v.model_copy(update=update) if v.name == label else v for v in result.variants]
    return result.model_copy(update={"variants": variants})


def text(result: Result, name: str = "int8") -> str:
    return release_files(result, name)["README.md"].decode()


def test_front_matter_is_valid_and_says_what_it_comes_from(result: Result) -> None:
    content = ModelCard(text(result))
    data = content.data
    assert isinstance(data, ModelCardData)
    assert (data.base_model, data["base_model_relation"]) == (result.source.model, "quantized")
    assert (data.license, data.license_name) == ("llama3.2", "the-name")
    assert data.license_link == f"https://huggingface.co/{result.source.model}/blob/{result.source.commit}/LICENSE"
    assert (data.language, data.datasets) == (["en", "de"], ["HuggingFaceTB/smol-smoltalk"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"bitsandbytes", "8-bit", "int8"} <= set(data.tags)
    assert "4-bit" in ModelCard(text(result, "nf4-dq")).data.tags


def test_the_decision_comes_first_and_says_what_its_words_mean(result: Result) -> None:
    title, decision, words, *_ = text(result, "nf4-dq").split("---\n")[2].strip().split("\n\n")
    assert title == "# SmolLM2-135M-Instruct nf4-dq"
    assert decision == f"**{advice(result)}**"
    assert "than the original" in decision
    assert words == meaning(result)
    alone = result.model_copy(update={"variants": result.variants[:1]})
    before, after = text(alone).split("---\n")[2].split(meaning(result))
    assert "KL" not in before
    assert after.strip().startswith("| | Base model")
    plain = changed(alone, metrics={"size_bytes": 1e9})
    assert "KL (" not in text(plain)


def test_the_card_says_each_number_in_one_way(result: Result) -> None:
    """No number beside another that is itself with other digits, as 0.0209 and 0.02093 are."""
    finer = changed(result, metrics={**result.variants[0].metrics, "kl_mean_high": 0.020934})
    finer = changed(finer, gate=judge(finer.variants[0].metrics, finer.recipe.gate))
    assert "KL up to 0.0209 ≤ limit 0.1" in text(finer)
    for page in (text(finer).split("## Reproduce")[0].split("---\n")[2], render(finer), sentences.markdown(finer)):
        assert "0.0209" in page
        assert "0.02093" not in page


def test_nothing_of_the_base_cards_claims(result: Result) -> None:
    assert "31.7" not in text(result)
    assert "best-model-ever" not in text(result)


def test_model_index_has_the_results_numbers_in_full(result: Result) -> None:
    metrics = result.variants[0].metrics
    front = yaml.safe_load(text(result).split("---\n")[1])
    _, found = model_index_to_eval_results(front["model-index"])
    assert {r.metric_type: r.metric_value for r in found} == {
        "perplexity": metrics["perplexity"],
        "kl_divergence": metrics["kl_mean"],
        "top1_agreement": metrics["top1_agreement"],
        "acc": metrics["task/piqa/acc"],
    }


@pytest.mark.parametrize("name", ["int8", "nf4-dq"])
def test_every_number_in_the_tables_is_the_results(result: Result, name: str) -> None:
    variant, base = result.variant(name), result.baseline
    assert base is not None
    rows = [line.split(" | ") for line in text(result, name).splitlines() if re.match(r"\| .* \|$", line)]
    cells = {row[0].removeprefix("| "): [cell.strip(" |") for cell in row[1:]] for row in rows}
    told = set()
    for metric, value in {**base.metrics, **variant.metrics}.items():
        if (what := label(metric)) in cells:
            assert cells[what][0] == figure(metric, base.metrics.get(metric))
            assert cells[what][1] == figure(metric, variant.metrics.get(metric))
            told.add(what)
        else:  # an interval's end, or the difference to the base: in the row of its metric
            assert figure(metric, value) in text(result, name) or metric.endswith("_p")
    siblings = {f"{v.name}: `me/SmolLM2-135M-Instruct-{v.name}`" for v in result.variants} | {"baseline"}
    for row in [result.baseline, *result.variants]:
        told_of = cells[
            f"**{row.name}** (this one)" if row.name == name else next(s for s in siblings if s.startswith(row.name))
        ]
        compared = ("size_bytes", "perplexity", "kl_mean", "top1_agreement")
        assert told_of[:4] == [figure(metric, row.metrics.get(metric)) for metric in compared]
    cells = {what: row for what, row in cells.items() if what not in siblings and not what.startswith("**")}
    numbers = {what for what, row in cells.items() if re.search(r"\d", "".join(row[:2]))}
    left = {f"`{left.module}`" for left in variant.left}
    assert numbers - left == told - {what for what in told if what not in numbers}


def test_machine_text_protocol_and_what_was_left_are_told(result: Result) -> None:
    content = text(result)
    for word in (
        result.source.commit,
        "python-docs of CPython 3.11.9",
        "window 512",
        "batch size 8",
        result.hardware["cpu"],
        "`model.embed_tokens` | 28,311,552 | embedding",
        *result.variants[0].notes,
        *(f"{name} {version}" for name, version in result.versions.items()),
        "max_mean_kl: 0.1",
        "me/SmolLM2-135M-Instruct-nf4-dq",
    ):
        assert str(word) in content


def test_equal_results_make_equal_bytes_whatever_ran_and_when(result: Result) -> None:
    files = release_files(result, "int8")
    assert release_files(make().model_copy(update={"source": result.source}), "int8") == files
    later = result.model_copy(update={"started": "2030-01-01T00:00:00Z", "seconds": 9.0})
    assert release_files(later, "int8") == files
    other = later.model_copy(update={"prefect_run": "another", "mlflow_run": "another"})
    faster = changed(other, metrics={**other.variants[0].metrics, "decode_tokens_per_second": 99.0})
    again = release_files(faster, "int8")
    assert provenance.same_release(again["tame.json"], files["tame.json"])
    assert provenance.settled(files, again) == files
    worse = changed(result, metrics={**result.variants[0].metrics, "perplexity": 99.0})
    assert not provenance.same_release(release_files(worse, "int8")["tame.json"], files["tame.json"])
    edited = {**files, "README.md": files["README.md"] + b"better than ever"}
    assert provenance.settled(edited, again) == again


def test_provenance_has_every_digest_and_number(result: Result) -> None:
    files = release_files(result, "int8")
    told, variant = json.loads(files["tame.json"]), result.variants[0]
    assert variant.artifact is not None
    assert told["artifact"]["files"] == variant.artifact.files
    assert told["source"]["files"] == result.source.files
    assert told["source"]["commit"] == result.source.commit
    assert told["metrics"] | told["run"]["metrics"] == variant.metrics
    assert told["documents"].keys() == files.keys() - {"tame.json"}
    assert told["versions"] == result.versions
    assert provenance.tag(files, {}) == f"tame-{result.versions['tame']}-int8-{result.source.commit[:12]}"


def test_paths_of_this_machine_are_told_to_nobody(result: Result) -> None:
    recipe = result.recipe.model_dump(mode="json")
    recipe["source"]["model"] = "/home/me/secret-project/model.Q4_1.gguf"
    recipe["evaluate"]["text"] = {"files": ["/home/me/secret-project/text.txt"]}
    recipe["evaluate"]["task_path"] = "/home/me/secret-project/tasks"
    recipe["publish"] = {**recipe["publish"], "to": "folder", "repo": "/home/me/secret-project/{variant}"}
    source = result.source.model_copy(update={"model": recipe["source"]["model"], "commit": None, "revision": None})
    files = release_files(
        result.model_copy(update={"recipe": Recipe.model_validate(recipe), "source": source}),
        "int8",
        {"int8": "/home/me/secret-project/int8"},
    )
    everything = b"".join(files.values()).decode()
    assert "secret-project" not in everything
    assert "/tmp/tame" not in everything  # where the artifact lies
    assert "base_model" not in ModelCard(files["README.md"].decode()).data.to_dict()
    assert 'pipeline("text-generation", "int8"' in everything


def test_results_of_whole_benchmarks_are_told_in_the_hubs_newest_form(result: Result) -> None:
    from huggingface_hub._eval_results import parse_eval_result_entries

    metrics = {**result.variants[0].metrics, "task/gsm8k/exact_match": 0.4125}
    evaluate = result.recipe.evaluate.model_copy(update={"tasks": ["gsm8k"]})
    recipe = result.recipe.model_copy(update={"evaluate": evaluate})
    known = {"task/gsm8k/exact_match": Benchmark(dataset="openai/gsm8k", task_id="gsm8k")}
    files = release_files(changed(result.model_copy(update={"recipe": recipe}), metrics=metrics), "int8", None, known)
    entry = parse_eval_result_entries(yaml.safe_load(files[".eval_results/gsm8k.yaml"]))[0]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 41.25)
    assert (entry.date, entry.source_name) == (result.started[:10], "tame.json")
    assert entry.source_url == "https://huggingface.co/me/SmolLM2-135M-Instruct-int8/blob/main/tame.json"
    evaluate = evaluate.model_copy(update={"task_limit": 10})  # ten questions are not the benchmark
    recipe = result.recipe.model_copy(update={"evaluate": evaluate})
    files = release_files(changed(result.model_copy(update={"recipe": recipe}), metrics=metrics), "int8", None, known)
    assert list(files) == ["README.md", "tame.json"]


EVAL = """
name: GPQA
tasks:
  - {id: gpqa_d1am0nd, config: gpqa_diamond, split: train}
  - {id: gpqa_main, config: gpqa_main, split: train}
"""


def test_the_ids_of_benchmarks_are_read_from_their_data_sets(
    tmp_path: Path, tame_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["gpqa_diamond_zeroshot", "gsm8k", "mmlu_pro", "piqa"]
    files = {"Idavidrein/gpqa": EVAL, "openai/gsm8k": "tasks: [{id: only_one}]", "TIGER-Lab/MMLU-Pro": "tasks: 7"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name, content in files.items():
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "eval.yaml").write_text(content)
            hub.add_dataset(name, tmp_path / name, gated=name.startswith("Idavidrein"))
        _, notes = benchmarks.find(tasks)
        assert "gated" in notes[1]
        monkeypatch.setenv("HF_TOKEN", hub.token())
        hub.grant("me", "Idavidrein/gpqa")
        found, notes = benchmarks.find(tasks)
        (tmp_path / "openai/gsm8k/eval.yaml").unlink()
        hub.add_dataset("openai/gsm8k", tmp_path / "openai/gsm8k")
        assert any("404" in note for note in benchmarks.find(["gsm8k"]).notes)
    assert {metric: (b.dataset, b.task_id) for metric, b in found.items()} == {
        "task/gpqa_diamond_zeroshot/acc": ("Idavidrein/gpqa", "gpqa_d1am0nd"),
        "task/gsm8k/exact_match": ("openai/gsm8k", "only_one"),
    }
    said = "the eval.yaml of TIGER-Lab/MMLU-Pro has no list of tasks with ids"
    assert notes == [f"the score of mmlu_pro is on the card, but not in .eval_results: {said}"]


def test_a_folder_says_what_its_configuration_tells(tmp_path: Path) -> None:
    def card(quantization: dict[str, Any] | None) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
        return plain_files(tmp_path, {"config.json": "0" * 64}, "me/mine")["README.md"].decode()

    quantized = card({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True})
    assert "Quantized to 4-bit NormalFloat (NF4) with double quantization with bitsandbytes." in quantized
    assert ModelCard(quantized).data.tags == ["bitsandbytes", "4-bit", "nf4", "quantized", "tame"]
    for plain in (card(None), card({"quant_method": "never heard of"})):
        assert "bitsandbytes" not in plain
        assert ModelCard(plain).data.tags == ["tame"]


def test_numbers_that_are_none_are_not_published(result: Result) -> None:
    broken = changed(result, metrics={**result.variants[0].metrics, "perplexity": float("inf")})
    with pytest.raises(TameError, match="int8: perplexity is inf, so it is not published"):
        release_files(broken, "int8")


def test_speed_is_told_of_the_machine_that_measured(result: Result) -> None:
    cached = changed(
        result, protocol=result.variants[0].protocol.model_copy(update={"device": "NVIDIA H100 80GB HBM3"})
    )
    assert "On NVIDIA H100 80GB HBM3, one sequence" in text(cached)


def test_a_path_with_a_space_is_quoted_where_it_is_typed(result: Result) -> None:
    place = '/home/me/my models/it\'s "8 bit"'
    card = release_files(result, "int8", {"int8": place})["README.md"].decode()
    [command] = re.findall(r"`(vllm serve [^`]*)`", card)
    name = place.rsplit("/", 1)[-1]
    assert shlex.split(command) == ["vllm", "serve", name]
    [call] = re.findall(r"^generate = (pipeline\(.*\))$", card, re.M)
    assert ast.literal_eval(ast.parse(call).body[0].value.args[1]) == name  # type: ignore[attr-defined]
    assert re.findall(r"`(vllm serve [^`]*)`", text(result)) == ["vllm serve me/SmolLM2-135M-Instruct-int8"]


def test_hostile_names_do_not_break_the_card(result: Result) -> None:
    left = [Unquantized(module="a|b`c", tensors=1, parameters=1, reason="x | y\n# Buy now")]
    content = text(changed(result, left=left, notes=["<script>alert(1)</script>\n# Buy now"]))
    assert ModelCard(content).data.base_model == result.source.model
    assert "\n# Buy now" not in content
    assert "<script>" not in content
    rows = [line for line in content.splitlines() if line.startswith("| `a")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 4


def test_odd_values_in_the_base_card_are_not_inherited(result: Result) -> None:
    source = result.source.model_copy(update={"card": {**BASE_CARD, "language": {"en": 1}, "license": 7}})
    data = ModelCard(text(result.model_copy(update={"source": source}))).data
    assert (data.language, data.license) == (None, "llama3.2")


def test_a_chat_model_is_shown_by_messages_and_memory_by_its_layers(result: Result, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    assert memory(tmp_path, 10**8) == {2048: 10**8 + 2048 * 23_040, 8192: 10**8 + 8192 * 23_040}
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_types": ["linear_attention"]}))
    assert memory(tmp_path, 10**8) == {}
    artifact = result.variants[0].artifact
    assert artifact is not None
    chat = text(changed(result, artifact=artifact.model_copy(update={"path": str(tmp_path)})))
    assert 'messages = [{"role": "user"' in chat
    assert 'messages = [{"role": "user"' not in text(result)


def test_an_answer_stands_beside_the_base_models_and_cannot_leave_its_block(result: Result) -> None:
    sample = result.variants[0].samples[0].model_copy(update={"answer": "ends\n```\n# not a title", "diverges_at": 3})
    card = text(changed(result, samples=[sample]))
    told = card.split("## An answer of each")[1].split("\n## ")[0]
    assert f"```text\n{sample.prompt}\n```" in told
    assert f"```text\n{sample.baseline}\n```" in told
    assert "````text\nends\n```\n# not a title\n````" in told
    assert "differ from character 3 on" in told
    assert "## An answer of each" not in text(changed(result, samples=[]))
    same = text(changed(result, samples=[sample.model_copy(update={"diverges_at": None})]))
    assert "Both answered the same." in same
    assert "This model:" not in same


def test_what_each_task_recovered_is_in_per_cent(result: Result) -> None:
    metrics = {**result.variants[0].metrics, "task/piqa/acc_recovery": 0.9925}
    assert "| piqa: acc, recovered | – | 99.25 % |" in text(changed(result, metrics=metrics))


def test_what_a_local_source_is_can_be_told(result: Result) -> None:
    facts = {
        "base_model": "org/base",
        "new_version": "org/better",
        "license": "mit",
        "language": ["de"],
        "tags": ["chat"],
    }
    recipe = Recipe.model_validate(
        {**result.recipe.model_dump(), "publish": {**result.recipe.publish.model_dump(), "card": facts}}
    )
    local = result.source.model_copy(update={"model": "./my-fine-tune", "commit": None, "card": {}, "licence": None})
    data = ModelCard(text(result.model_copy(update={"recipe": recipe, "source": local}))).data
    assert isinstance(data, ModelCardData)
    assert (data.base_model, data.license, data.language) == ("org/base", "mit", ["de"])
    assert data["new_version"] == "org/better"
    assert "chat" in data.tags
    with pytest.raises(ValidationError, match="not a Hub repo id"):
        CardFacts(base_model="my-fine-tune")


def test_the_recipe_on_the_card_is_what_was_asked(result: Result) -> None:
    recipe = text(result).split("and this recipe:")[1].split("```yaml\n")[1].split("```")[0]
    asked = yaml.safe_load(recipe)
    assert Recipe.model_validate(asked) == Recipe.model_validate(provenance.without_paths(result.recipe))
    assert "null" not in recipe
