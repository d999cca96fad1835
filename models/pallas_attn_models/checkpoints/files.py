"""The files of a checkpoint, read and replaced as one.

A checkpoint is ``config.json`` and either ``model.safetensors`` or, if there is none, an index and the shards that it
names. The weights or the index *decide* which checkpoint it is: they are one file, and one file can be replaced at
once. A save

1. writes all files into a folder of its own, ``.save-ID``;
2. moves the shards out of it, under names that are not taken;
3. moves the file that decides, in which ID stands, to its place: from now on the new checkpoint counts;
4. moves ``config.json`` to its place, and removes the files of the old checkpoint.

Every step is on the disk before the next one begins. Between 3 and 4 the config is in ``.save-ID``, where
:func:`reading` looks first. The next save finishes, or clears away, what a killed one has left.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from pallas_attn_models.checks import listed, shown
from pallas_attn_models.text_files import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SAVE = "pallas_attn_save"  # in the metadata of the index and of every safetensors file: the ID of the save

_FOLDER = ".save-"
_ID = "[a-z0-9_]{8}"  # as tempfile makes them
_SHARD = re.compile(rf"model(-(?P<save>{_ID}))?-[0-9]{{5}}-of-[0-9]{{5}}\.safetensors")
_ATTEMPTS = 1000


class StoredTensor(NamedTuple):
    """A tensor of an open file: ``shape``, and ``dtype`` as safetensors spells it. :meth:`read` reads the values."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Any

    def read(self) -> np.ndarray:
        try:
            return self.file.get_tensor(self.name)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: {self.name}: expected a tensor that can be read, got: {error}") from error


class OpenCheckpoint(NamedTuple):
    """The config's file and fields, and every tensor by its name."""

    config_path: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


@contextmanager
def reading(directory: Path) -> Iterator[OpenCheckpoint]:
    """A checkpoint of which every file is open, and stays so although a save replaces them meanwhile.

    Raises:
      FileNotFoundError: a file is missing; named.
      ValueError: a file that cannot be parsed, or an index that does not fit its shards; named.
    """
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            before = _state(directory)
            try:
                checkpoint = _open_checkpoint(directory, stack)
            except (OSError, ValueError):
                if _state(directory) == before:
                    raise
                continue
            if _state(directory) == before:
                yield checkpoint
                return
    raise OSError(f"{directory}: expected a checkpoint to read, got a new one each time, {_ATTEMPTS} times")


@dataclasses.dataclass(frozen=True)
class Save:
    """A save under way.

    Attributes:
      directory: where the checkpoint will be.
      folder: beside it, for the files until they are whole.
      is_alone: no other save of this directory is under way.
    """

    directory: Path
    folder: Path
    is_alone: bool

    @property
    def id(self) -> str:
        return self.folder.name.removeprefix(_FOLDER)

    def shard_names(self, number: int) -> list[str]:
        """The usual names, or, where files have these, names that no other save uses."""
        shards = filter(None, (_SHARD.fullmatch(path.name) for path in self.directory.iterdir()))
        is_free = self.is_alone and all(shard["save"] for shard in shards)
        prefix = "model" if is_free else f"model-{self.id}"
        return [f"{prefix}-{index:05}-of-{number:05}.safetensors" for index in range(1, number + 1)]


@contextmanager
def replacing(directory: Path) -> Iterator[Save]:
    """A folder for the files of a checkpoint, which takes the place of what is in ``directory`` when the block ends.

    Waits for other saves of the same directory to end, if the system has locks. If the block raises, all stays as it
    was.
    """
    with _locked(directory) as is_alone:
        if is_alone:
            _recover(directory)
        save = Save(directory, Path(tempfile.mkdtemp(dir=directory, prefix=_FOLDER)), is_alone)
        own = {save.folder.name}
        try:
            yield save
            own |= {path.name for path in save.folder.iterdir()}
            _switch(save)
        finally:
            _recover(directory, own, others=is_alone)


def writable_directory(name: str, value: str | os.PathLike[str], *files: str) -> Path:
    """A directory, made if it is not there, in which a checkpoint and other ``files`` can be saved.

    Raises:
      OSError: no file can be made in it, or a directory is where one would be; names the argument.
      TypeError, ValueError: what cannot be a path.
    """
    path = as_path(name, value)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{name}: expected a directory, got {path}, where a file is in the way") from error
    except OSError as error:
        expected = f"{name}: expected a directory in which files can be made"
        raise type(error)(f"{expected}, got {path}: {error.strerror}") from error
    for file in (CONFIG, WEIGHTS, INDEX, *files):
        if (path / file).is_dir():
            raise IsADirectoryError(f"{name}: expected a file or nothing at {path / file}, got a directory")
    return path


def as_path(name: str, value: str | os.PathLike[str]) -> Path:
    """``value`` as a path, or a TypeError or ValueError that names the argument."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise TypeError(f"{name}: expected a path, got {type(value).__name__}")
    if not path or "\0" in path:
        raise ValueError(f"{name}: expected a path, got {path!r}")
    return Path(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _open_checkpoint(directory: Path, stack: ExitStack) -> OpenCheckpoint:
    deciding = _deciding(directory)
    if deciding.name == WEIGHTS:
        file = stack.enter_context(_opened(deciding))
        save = _id_of(deciding, file.metadata())
        tensors = _stored(deciding, file)
    else:
        index = read_json(deciding)
        save = _id_of(deciding, index.get("metadata"))
        tensors = _open_shards(deciding, _weight_map_of(deciding, index), save, stack)
    # The config is in its place, unless the save is between its last two steps or was killed there.
    path = directory / f"{_FOLDER}{save}" / CONFIG
    with suppress(FileNotFoundError):
        if save is not None:
            return OpenCheckpoint(path, read_json(path), tensors)
    return OpenCheckpoint(directory / CONFIG, read_json(directory / CONFIG), tensors)


def _open_shards(
    index: Path, weight_map: dict[str, str], save: str | None, stack: ExitStack
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ValueError(f"{index}: expected the names of files beside it, got {shown(name)}")
        path = index.parent / name
        file = stack.enter_context(_opened(path))
        if save is not None and _id_of(path, file.metadata()) not in (None, save):
            raise ValueError(f"{path}: expected a file of the same save as {index.name}, got one of another")
        held = _stored(path, file)
        if twice := tensors.keys() & held.keys():
            raise ValueError(f"{path}: expected every tensor once, got again {listed(twice)}")
        tensors |= held
    indexed = {(name, index.parent / file) for name, file in weight_map.items()}
    if wrong := {name for name, _ in indexed ^ {(name, tensor.path) for name, tensor in tensors.items()}}:
        raise ValueError(f"{index}: expected what the shards hold, differs in {listed(wrong)}")
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got: {error}") from error
    except OSError as error:
        raise type(error)(f"{path}: expected a safetensors file that can be read, got: {error}") from error
    with file:
        yield file


def _stored(path: Path, file: Any) -> dict[str, StoredTensor]:
    tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file is no dict
    return {
        name: StoredTensor(path, name, tuple(tensor.get_shape()), tensor.get_dtype(), file)
        for name, tensor in tensors.items()
    }


def _deciding(directory: Path) -> Path:
    for name in (WEIGHTS, INDEX):
        if (directory / name).exists():
            return directory / name
    raise FileNotFoundError(f"{directory}: expected {WEIGHTS} or {INDEX}, found neither")


def _state(directory: Path) -> tuple | None:
    """What changes whenever the file that decides does; None if there is none."""
    try:
        path = _deciding(directory)
        stat = path.stat()
    except FileNotFoundError:
        return None
    return path, stat.st_ino, stat.st_mtime_ns, stat.st_size


def _current(directory: Path) -> tuple[str | None, set[str]]:
    """The ID of the save that made the checkpoint, None if :func:`replacing` did not; and the names of its shards."""
    deciding = _deciding(directory)
    if deciding.name == WEIGHTS:
        with _opened(deciding) as file:
            return _id_of(deciding, file.metadata()), set()
    index = read_json(deciding)
    return _id_of(deciding, index.get("metadata")), set(_weight_map_of(deciding, index).values())


def _weight_map_of(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path}: expected an object weight_map from tensors to files")
    return weight_map


def _id_of(path: Path, metadata: Any) -> str | None:
    if not isinstance(metadata, dict | None):
        raise ValueError(f"{path}: expected an object metadata, got {shown(metadata)}")
    save = (metadata or {}).get(SAVE)
    if save is not None and not (isinstance(save, str) and re.fullmatch(_ID, save)):
        raise ValueError(f"{path}: expected 8 letters, digits or underscores as {SAVE}, got {shown(save)}")
    return save


def _switch(save: Save) -> None:
    """Steps 2 to 4."""
    directory, folder = save.directory, save.folder
    mode = (folder / CONFIG).stat().st_mode
    written = {path.name for path in folder.iterdir()}
    for name in written:
        (folder / name).chmod(mode)  # safetensors lets only the owner read what it writes
        _sync(folder / name)
    _sync(folder)
    for name in written - {CONFIG, WEIGHTS, INDEX}:
        os.replace(folder / name, directory / name)
    _sync(directory)
    if WEIGHTS in written:
        os.replace(folder / WEIGHTS, directory / WEIGHTS)
    else:
        os.replace(folder / INDEX, directory / INDEX)
        _sync(directory)
        (directory / WEIGHTS).unlink(missing_ok=True)  # as long as it is there, it decides
    _sync(directory)
    os.replace(folder / CONFIG, directory / CONFIG)
    _sync(directory)
    for path in directory.iterdir():
        if path.name not in written and (path.name == INDEX or _SHARD.fullmatch(path.name)):
            _remove(path)


def _recover(directory: Path, own: Collection[str] = (), others: bool = True) -> None:
    """Takes the last step of a save that could not, and removes what belongs to no checkpoint.

    Args:
      directory: of the checkpoint.
      own: names that a save which has just ended gave to its folder and files.
      others: whether to do so for all other saves, too, none of which is under way.
    """
    try:
        current, files = _current(directory)
    except FileNotFoundError:
        current, files = None, set()
    except (OSError, ValueError):
        return  # there is no telling what belongs to a checkpoint that is broken
    folder = f"{_FOLDER}{current}"
    if folder in own or others:
        with suppress(FileNotFoundError):
            os.replace(directory / folder / CONFIG, directory / CONFIG)
            _sync(directory)
    for path in directory.iterdir():
        name, shard = path.name, _SHARD.fullmatch(path.name)
        left = others and (re.fullmatch(_FOLDER + _ID, name) or (shard and shard["save"]))
        if (name in own or left) and name not in files | {CONFIG, WEIGHTS, INDEX}:
            _remove(path)
    # A save of shards that got no further than its index.
    if (directory / WEIGHTS).exists() and (folder in own or others):
        with suppress(OSError, ValueError):
            if SAVE in read_json(directory / INDEX).get("metadata", {}):
                _remove(directory / INDEX)


def _remove(path: Path) -> None:
    """If it can be: the next save tries again."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Waits for other saves of the directory; whether this is the only one now, which is False without locks."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # some network file systems have none
            is_locked = False
        yield is_locked
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if a forked process has the descriptor
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # which cannot be asked there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
