"""Turns a source into a snapshot: a folder of files whose sha256 are known.

A source is a Hub repo, a local folder, a .gguf file, or one of both inside an installed package. Only what a release needs is
taken: the weights that transformers would load, configuration, tokenizer, licence.
"""

from pathlib import Path

from configs.errors import ChangedError, TameError
from configs.schema import Source
from tasks.download.adapter import base_of, merged
from tasks.download.folder import check_weights
from tasks.download.gguf_source import dequantized
from tasks.download.hub_source import compare, fetch
from tasks.download.inspection import inspect_source
from tasks.runtime.progress import Progress, show
from tasks.store import on_disk
from tasks.store.digests import sha256_files
from tasks.values import Found, Snapshot


def download(
    source: Source, found: Found | None = None, *, quantized: bool = False, progress: Progress = show
) -> Snapshot:
    """Bring `source` onto this disk, and know the sha256 of every file of it. `found` is what a look at it told, if there was one.

    A Hub repo goes into the Hub client's own cache (HF_HOME), resumed where a killed run left it, and its large files are
    compared with the sha256 that the Hub names. With TAME_STORE, one machine does so and the others fetch from it.
    A .gguf is dequantized to bf16 safetensors, once, in the artifact store. `quantized` as in `inspect_source`.

    Raises:
        BadInputError: as `inspect_source`.
        TameError: a download that does not match its digest, a damaged .gguf, no space.
    """
    found = found or inspect_source(source, quantized)
    quantized = quantized or found.quantized
    if found.adapter is not None:
        alone = found.model_copy(update={"adapter": None})
        base = download(base_of(source, found.adapter), alone, quantized=quantized, progress=progress)
        return merged(base, found.adapter, found.name, progress)
    if found.kind == "gguf":
        return dequantized(source, Path(str(found.path)), progress)
    if found.kind == "folder":
        folder, cached = Path(str(found.path)), True
    else:
        try:
            folder, cached = fetch(source, found, progress)
        except ChangedError:  # since it was looked at, which may be a while ago
            found = inspect_source(source, quantized)
            folder, cached = fetch(source, found, progress)
    try:
        files = sha256_files(folder, sorted(found.files))
    except OSError as error:
        raise TameError(f"{error.filename}: {error.strerror}; it was there a moment ago, run it again") from None
    if found.kind == "hub":
        compare(source.model, folder, files, found.sha256)
        check_weights(folder, quantized)
    return Snapshot(
        path=str(folder),
        model=source.model,
        name=found.name,
        revision=source.revision if found.kind == "hub" else None,
        commit=found.commit,
        files=files,
        digest=on_disk.digest_of(files),
        trust_remote_code=source.trust_remote_code,
        cached=cached,
    )
