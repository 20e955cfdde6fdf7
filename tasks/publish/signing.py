"""Signatures of published models, in the format of OpenSSF Model Signing (https://github.com/ossf/model-signing-spec).

`TAME_SIGNING_KEY` names a file with a private elliptic-curve key (PEM) to sign with, `TAME_SIGNING_PUBLIC_KEY` one with
the public key to verify with. The signature is `model.sig`, over every other file; the `model_signing` program of the
package of that name verifies it too.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError
from configs.settings import SIGNING_KEY, SIGNING_PUBLIC_KEY, Setting, file_of
from tasks.publish.repo import SIGNATURE, Wanted


def signer(repo: str) -> Callable[[dict[str, Wanted]], bytes] | None:
    """What makes the signature for `repo`, or None when no key is configured.

    Raises:
        BadInputError: the key cannot be read, or model-signing is not installed.
    """
    key = _key(SIGNING_KEY)
    return None if key is None else lambda files: _sign(files, key, repo.split("/")[-1])


def problem(folder: Path) -> str | None:
    """What is wrong with the signature in `folder`; None if it is right, or no public key is configured.

    Raises:
        BadInputError: the key cannot be read, or model-signing is not installed.
    """
    key = _key(SIGNING_PUBLIC_KEY)
    if key is None:
        return None
    if not (folder / SIGNATURE).exists():
        return f"{SIGNATURE} is missing: it is not signed"
    from model_signing import hashing, verifying

    every = hashing.Config().set_ignored_paths(paths=[SIGNATURE]).set_allow_symlinks(True)
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(every)
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:  # the package has no exception of its own
        return f"{SIGNATURE} does not verify with TAME_SIGNING_PUBLIC_KEY: {str(error).splitlines()[0][:300]}"
    return None


def _key(setting: Setting) -> Path | None:
    key = file_of(setting)
    if key is None:
        return None
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise BadInputError(
            f"{setting.name} is set, but {error.name} is not installed: pip install 'tame[sign]'"
        ) from None
    return key


def _sign(files: dict[str, Wanted], key: Path, name: str) -> bytes:
    """Sign `files` where they lie: a folder of links to them is all that the package needs."""
    from model_signing import hashing, signing

    with tempfile.TemporaryDirectory(prefix="tame-") as temporary:
        folder, signature = Path(temporary) / name, Path(temporary) / SIGNATURE
        for path, file in files.items():
            signed = folder / path
            signed.parent.mkdir(parents=True, exist_ok=True)
            if file.path:
                signed.symlink_to(Path(file.path).resolve())
            else:
                signed.write_bytes(file.content or b"")
        try:
            config: Any = signing.Config().use_elliptic_key_signer(private_key=key)
            config.set_hashing_config(hashing.Config().set_allow_symlinks(True)).sign(folder, signature)
        except ValueError as error:
            raise TameError(f"TAME_SIGNING_KEY: {key} cannot be used to sign: {error}") from None
        return signature.read_bytes()
