"""Where a model lies: a local folder, a GGUF file, or the cache of the hub that an id names.

Only weights, configurations and tokenizers are fetched, never code.  A fetched model is a local
folder named by its commit, which is what the manifest of a stage keeps of it.
"""

from __future__ import annotations

import re
from pathlib import Path

from tppo.errors import DataError
from tppo.progress import say_once

GGUF = ".gguf"
_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")  # owner/name
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*"]
_PICKLES = ["*.bin"]
_EXPECTED = ("expected a local folder as save_pretrained writes it, a .gguf file, or the id of a "
             "model on the Hugging Face hub, owner/name")  # fmt: skip


def locate(
    given: str | Path, revision: str | None = None, *, flag: str = "--model", pickles: bool = False
) -> Path:
    """The folder or GGUF file of a model; a hub id, owner/name, is fetched where it is not cached.

    revision: branch, tag or commit of a hub id; None is its main branch.
    pickles: fetch weights in pickles too.
    Errors: DataError naming what was given, what is wrong with it and the remedy.
    """
    path = Path(given)
    if not path.exists():
        if _ID.fullmatch(str(given)):
            return _fetch(str(given), revision, flag, pickles)
        raise DataError(f"{path}: no such file or folder; is the path right? {_EXPECTED}")
    if revision is not None:
        raise DataError(f"{path}: a local model, and {_flag(flag)} was {revision!r}; expected no "
                        "revision: only an id of a hub has some")  # fmt: skip
    if not path.is_dir():
        if not is_gguf(path):
            raise DataError(f"{path}: a file, {_EXPECTED}")
        _check_gguf(path)
    return path


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return Path(path).suffix.lower() == GGUF


def _flag(model: str) -> str:
    """The flag of a revision beside that of its model."""
    return f"{model.removesuffix('.model')}.revision"


def _check_gguf(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise DataError(f"{path}: it begins with {start!r}, expected the four bytes GGUF; was the "
                        "download cut, or is it a pointer of Git LFS?")  # fmt: skip


def _fetch(name: str, revision: str | None, flag: str, pickles: bool) -> Path:
    """The folder of a commit of a hub's model in the cache."""
    from huggingface_hub import errors, snapshot_download

    which = f"{name}: no local path; as an id of the hub it"
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_FILES + _PICKLES * pickles,
            ignore_patterns=["*/*"],
        )
    except errors.GatedRepoError:
        raise DataError(f"{which} needs its owner's consent: ask for it on the model's page, "
                        "and sign in with `hf auth login`") from None  # fmt: skip
    except errors.RepositoryNotFoundError:
        raise DataError(f"{which} is not found; is the name right? A private one needs `hf auth "
                        "login`") from None  # fmt: skip
    except errors.RevisionNotFoundError:
        raise DataError(f"{name}: {_flag(flag)} was {revision!r}, expected a branch, tag or "
                        "commit that the hub has of it") from None  # fmt: skip
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        at = f" at {revision!r}" if revision else ""
        raise DataError(
            f"{which} is not whole in the cache{at}, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set); fetch it where there is a network (`hf download "
            f"{name}`), or give a local folder"
        ) from None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(f"{which} cannot be fetched: {str(error).splitlines()[0]}") from None
    say_once(f"{name}: commit {Path(folder).name}, in the hub's cache")
    return Path(folder)
