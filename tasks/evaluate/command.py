"""`tame evaluate`: measure one model outside of a release."""

from pathlib import Path

from configs.schema import Evaluate, Source
from tasks.download.folder import check_measurable
from tasks.download.inspection import inspect_source, tokenizer_folder
from tasks.download.task import download
from tasks.download.text import check_text, load_text
from tasks.download.tokenizer_files import chat_template, check_bos
from tasks.evaluate.lm_eval_index import check_tasks
from tasks.evaluate.task import evaluate_baseline, evaluate_variant
from tasks.result import Measured, measured, sizes_of
from tasks.values import Checkpoint


def evaluate_alone(model: Source, baseline: Source | None, spec: Evaluate, device: str) -> Measured:
    """Measure `model`, compared with `baseline` if there is one. Either may be quantized.

    Raises:
        BadInputError: a model, text or task that cannot be measured, found before any work; another vocabulary.
        TameError: as `tasks.evaluate.task.evaluate_baseline`.
    """
    text = load_text(spec.text)
    found = {source.model: inspect_source(source, quantized=True) for source in (model, baseline) if source}
    for source in [model, *([baseline] if baseline else [])]:
        check_measurable(found[source.model], source.model, source.trust_remote_code)
        if folder := tokenizer_folder(source, found[source.model]):
            check_text(text, spec.window, folder, source.trust_remote_code)
            check_bos(folder, spec.bos)
            chat_template(folder, spec.chat)
    check_tasks(spec.tasks, spec.task_path)
    snapshot = download(model, found[model.model], quantized=True)
    sizes = sizes_of(Path(snapshot.path), list(snapshot.files))
    if baseline is None:
        return measured(evaluate_baseline(snapshot, spec, text=text, compared=False, device=device), sizes)
    base = download(baseline, found[baseline.model], quantized=True)
    against = evaluate_baseline(base, spec, text=text, device=device)
    checkpoint = Checkpoint(path=snapshot.path, digest=snapshot.digest, label=snapshot.name)
    return measured(evaluate_variant(checkpoint, against, base, spec, device=device), sizes)
