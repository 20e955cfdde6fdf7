"""`tame serve-check`: what programs make of one checkpoint, outside of a release."""

from collections.abc import Sequence

from configs.schema import Source
from tasks.download.inspection import inspect_source
from tasks.download.task import download
from tasks.serve.runtimes import versions_of
from tasks.serve.task import serve
from tasks.values import Checkpoint, Served


def serve_check(source: Source, runtimes: Sequence[str], device: str) -> list[Served]:
    """Open `source`, a folder or a Hub repo, with each of `runtimes`.

    Raises:
        BadInputError: a runtime that has no environment, found before any work; or not a language model.
        TameError: transformers itself does not load it.
    """
    for runtime in runtimes:
        versions_of(runtime)
    snapshot = download(source, inspect_source(source, quantized=True), quantized=True)
    checkpoint = Checkpoint(path=snapshot.path, digest=snapshot.digest, label=snapshot.name)
    trust = source.trust_remote_code
    return [serve(checkpoint, runtime, trust, device=device) for runtime in runtimes]
