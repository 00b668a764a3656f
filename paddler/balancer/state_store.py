"""Where the desired state is kept: in memory or in a file.

A store keeps one document and says None while there is none; what the default is, and when it is
written, is decided in reconciliation.py. There is one writer, its service task.
"""

import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Protocol

import attrs
import trio

from paddler.errors import ConfigurationError, RemoteProtocolError, StateStoreError
from paddler.messages.state import DesiredState
from paddler.messages.wire import decode, unstructure

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Far above the longest document (JSON bodies end at 2 MiB), far below what would hurt to read."""

FILE_VERSION = "1"


class StateStore(Protocol):
    """Keeps the desired state. Both calls raise StateStoreError."""

    async def load(self) -> DesiredState | None:
        """Return the state, or None when none has been stored."""

    async def store(self, state: DesiredState) -> None:
        """Replace the state; a cancelled call has stored either all or nothing."""


def open_state_store(url: str) -> StateStore:
    """Return the store that a `--state-database` value names. Touches no file. Raises ConfigurationError."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    if scheme is None:
        raise ConfigurationError(f"state database {url!r} is not a URL: use memory:// or file:///path")
    match scheme[1].lower():
        case "memory":
            return MemoryStore()
        case "file":
            return FileStore(_file_path(url))
        case other:
            raise ConfigurationError(f"unsupported scheme {other!r} in state database {url!r}")


def _file_path(url: str) -> Path:
    """Return what stands after `file://`, taken literally."""
    if not url.startswith("file://"):
        raise ConfigurationError(f"invalid file URL {url!r}: it begins with file://")
    path = url.removeprefix("file://").strip()
    if not path:
        raise ConfigurationError(f"path cannot be empty in state database {url!r}")
    if not path.startswith("/"):
        raise ConfigurationError(
            f"an absolute path is required in state database {url!r}: "
            f"did you mean --state-database file://{_absolute(path)}"
        )
    return Path(path)


def _absolute(path: str) -> Path:
    """Guess what a relative path was meant to be: with folders in it, most likely a slash was forgotten."""
    if "/" in path and not path.startswith((".", "~")):
        return Path("/", path)
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 Path's raises for ~unknown


class MemoryStore:
    """Forgets the state at the end of the process."""

    def __init__(self) -> None:
        self._state: DesiredState | None = None

    async def load(self) -> DesiredState | None:
        return self._state

    async def store(self, state: DesiredState) -> None:
        self._state = state


@attrs.frozen
class _Document:
    """The content of the file."""

    balancer_desired_state: DesiredState
    version: str = FILE_VERSION


class FileStore:
    """Keeps the state in a JSON file, read for every load and replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def load(self) -> DesiredState | None:
        document = await trio.to_thread.run_sync(self._read)
        return document.balancer_desired_state if document is not None else None

    async def store(self, state: DesiredState) -> None:
        await trio.to_thread.run_sync(self._replace, state)

    def _read(self) -> _Document | None:
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):  # a FIFO would keep the thread for ever
                raise StateStoreError(f"state database {self._path} is not a regular file")
            with self._path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateStoreError(f"cannot read state database {self._path}: {error.strerror}") from error
        if len(content) > MAX_FILE_BYTES:
            raise StateStoreError(f"state database {self._path} is larger than {MAX_FILE_BYTES} bytes")
        if not content:
            return None
        try:
            return decode(content, _Document)
        except RemoteProtocolError as error:
            raise StateStoreError(
                f"cannot parse state database {self._path}: {error}; "
                "the file is damaged or was written by an incompatible version"
            ) from error

    def _replace(self, state: DesiredState) -> None:
        """Keep the version that was read, and refuse to overwrite what cannot be read."""
        found = self._read()
        document = _Document(state, found.version if found is not None else FILE_VERSION)
        text = json.dumps(unstructure(document), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path = self._path.resolve()  # a symbolic link stays one
        try:
            _write_atomically(path, text.encode())
        except OSError as error:  # its own text would name a temporary file
            reason = error.strerror
            if isinstance(error, FileNotFoundError):
                reason = f"the folder {path.parent} does not exist"
            elif isinstance(error, PermissionError):
                reason = f"the folder {path.parent} is not writable"
            raise StateStoreError(f"cannot write state database {self._path}: {reason}") from error


def _write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a crash at any moment leaves either the old content or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 a descriptor, not a path
            file.write(content)
            file.flush()
            if path.exists():
                os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            os.fsync(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)  # makes the new name itself survive a power cut
    finally:
        os.close(directory)
