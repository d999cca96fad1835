"""Fetches checkpoints from the Hugging Face Hub, or finds them in its cache."""

import re
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path

from pallas_attn_models.checkpoints.files import CONFIG, INDEX, WEIGHTS, OpenCheckpoint, as_path, open_checkpoint
from pallas_attn_models.checkpoints.safetensors_file import StoredTensor
from pallas_attn_models.text_files import read_json

# Published shards have such names, though others are possible. Repositories often hold the same weights once more,
# as consolidated.safetensors or original/model.safetensors.
CHECKPOINT_FILES = (CONFIG, WEIGHTS, INDEX, "model*-of-*.safetensors")

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


def local_directory(
    name: str,
    value: str | PathLike[str],
    revision: str | None = None,
    files: Sequence[str] = CHECKPOINT_FILES,
) -> Path:
    """The directory of a checkpoint: ``value`` if it is one, or else a snapshot of the model with this id on the Hub.

    An id is ``"org/name"`` where nothing has that path. Files that are not in the Hub's cache are fetched.

    Args:
      name: of the argument, for messages.
      value: a path or an id.
      revision: a branch, tag or commit of the model on the Hub; default: its main branch. Not used for a directory.
      files: patterns of the files to fetch.

    Raises:
      FileNotFoundError: there is neither such a directory nor such a model or revision, or the Hub cannot be reached.
      NotADirectoryError: a file.
      PermissionError: the Hub wants a token, or other rights.
      OSError: another failure of the network.
      TypeError, ValueError: not a path; or a revision that is not a string.
    """
    path = as_path(name, value)
    if not isinstance(revision, str | None):
        raise TypeError(f"revision: expected a string or None, got {type(revision).__name__}")
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{name}: expected a directory with a checkpoint, got {path}, where a file is")
    if not _ID.fullmatch(fspath(value)):
        raise FileNotFoundError(f"{name}: expected a directory with a checkpoint, got {path}, where nothing is")
    return _snapshot(name, fspath(value), revision, files)


def open_headers(name: str, value: str | PathLike[str], revision: str | None, directory: Path) -> OpenCheckpoint:
    """A checkpoint with the names, shapes and dtypes of its tensors; from the Hub, only the headers of its files.

    Args:
      name, value, revision: as for :func:`local_directory`.
      directory: from it, with at least ``config.json``. If it holds all weights, too, their headers are read.

    Raises:
      FileNotFoundError, ValueError: as :func:`~pallas_attn_models.checkpoints.load_hf`.
      OSError: the headers are not in the Hub's cache and cannot be fetched.
    """
    if Path(value) == directory:
        return open_checkpoint(directory)
    with suppress(FileNotFoundError):  # all of it may be in the Hub's cache
        return open_checkpoint(directory)
    return _remote_headers(name, fspath(value), revision, directory)


def _remote_headers(name: str, model: str, revision: str | None, directory: Path) -> OpenCheckpoint:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        repository = huggingface_hub.get_safetensors_metadata(model, revision=revision)
    except errors.NotASafetensorsRepoError as error:
        raise FileNotFoundError(f"{name}: expected {WEIGHTS} or {INDEX} in {model}, found neither") from error
    except Exception as error:
        raise OSError(f"{name}: expected the headers of {model}, got: {_first_line(error)}") from error
    tensors = {
        tensor: StoredTensor(directory / file, tensor, tuple(entry.shape), entry.dtype, first, end - first, None)
        for file, header in repository.files_metadata.items()
        for tensor, entry in header.tensors.items()
        for first, end in [entry.data_offsets]
    }
    return OpenCheckpoint(directory / CONFIG, read_json(directory / CONFIG), tensors)


def _snapshot(name: str, model: str, revision: str | None, files: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = "" if revision is None else f" at revision {revision!r}"
    expected = f"{name}: expected a directory, or a model on the Hugging Face Hub, got {model!r}{at}"
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=[*files]))
    except errors.LocalEntryNotFoundError as error:
        cache = huggingface_hub.constants.HF_HUB_CACHE
        tried = f"no such directory, no complete snapshot in {cache}, no way to the Hub ({_first_line(error)})"
        hint = f"to work offline (HF_HUB_OFFLINE=1), run `hf download {model}` while online, or give a local directory"
        raise FileNotFoundError(f"{expected}: {tried}; {hint}") from error
    except errors.GatedRepoError as error:
        hint = "ask for access on its page, and log in by `hf auth login`"
        raise PermissionError(f"{expected}, whose license the Hub wants accepted: {hint}") from error
    except errors.RepositoryNotFoundError as error:
        hint = "for a private one, log in by `hf auth login`"
        raise FileNotFoundError(f"{expected}: no such directory, and no such model on the Hub; {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"revision: expected a branch, tag or commit of {model}, got {revision!r}") from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{expected}: no such directory, and not an id ({_first_line(error)})") from error
    except Exception as error:  # of the HTTP library, whose classes differ between versions
        raise OSError(f"{expected}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
