"""Files and directories that exist whole or not at all, also when several processes write them."""

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# In ``DST.unfinished``: which process writes there, and what was begun.
LOCK = "mlx-m3.lock"
STATE = "mlx-m3-convert.json"
# The state of something that cannot be resumed: the holder of the lock may delete all of it.
_DISPOSABLE = {"resumable": False}
_TRIES = 1000
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def new_directory(directory: Path, command: str, *, resumable: bool = False) -> Iterator[Path]:
    """Yields ``DST.unfinished`` to write into, and renames it to ``directory`` if nothing failed.

    It is locked until then: ``mlx-m3 demo`` and ``mlx-m3 convert`` cannot write one target together.

    Args:
        command: of ``mlx-m3``, for the error in other processes.
        resumable: after an error keep what was written, if the caller wrote a ``STATE``.

    Raises:
        FileExistsError: ``directory`` is not empty, or what is in ``DST.unfinished`` is not disposable.
        BlockingIOError: another process is writing it.
    """
    directory = directory.expanduser().resolve()
    unfinished = unfinished_of(directory)
    _refuse_existing(directory)
    doing = f"`mlx-m3 {command}` is writing to {directory}"
    with locked(unfinished / LOCK, doing, "choose another destination") as lock:
        try:
            # Again, for another process may have finished it since.
            _refuse_existing(directory)
            _begin(unfinished, resumable)
            yield unfinished
            mask = os.umask(0)
            os.umask(mask)
            unfinished.chmod(0o777 & ~mask)
            # Fails if there is anything but an empty directory of that name.
            os.rename(unfinished, directory)
        finally:
            _leave(lock, directory, unfinished)


def unfinished_of(directory: Path) -> Path:
    """Where ``directory`` is written until it is whole."""
    directory = directory.expanduser().resolve()
    return directory.with_name(directory.name + ".unfinished")


def contents(unfinished: Path) -> list[Path]:
    """What is in it, except the lock and the first file of a process that was killed while writing it."""
    return [file for file in unfinished.iterdir() if file.name not in (LOCK, _temporary(file, STATE).name)]


@contextmanager
def locked(file: Path, doing: str, instead: str) -> Iterator[int]:
    """Hold the lock ``file``; one process at a time can.  The system frees it when the process ends.

    Creates the file and its directory.  The holder may rename or delete them.

    Args:
        doing: for the error in other processes, such as "`mlx-m3 convert` is writing to DST".
        instead: what those can do instead of waiting.

    Raises:
        BlockingIOError: another process holds it; says which one.
        OSError: the file cannot be created.
    """
    descriptor = _open_locked(file, instead)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n{doing}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def replace_text(file: Path, text: str) -> None:
    """Write ``file`` so that no part of it is ever seen alone.  One process at a time."""
    temporary = _temporary(file, file.name)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def check_can_write(file: Path) -> None:
    """See, without leaving anything behind, that ``file`` can be written later.

    Raises:
        OSError: it cannot; names it.
    """
    existed = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise OSError(f"cannot write {file}: {error.strerror}") from error
    if not existed:
        file.unlink()


def _temporary(beside: Path, name: str) -> Path:
    # One name, so that the next writer replaces what a killed one has left.
    return beside.with_name(f"{name}.tmp")


def _refuse_existing(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} exists already and is never overwritten; remove it or choose another directory"
        )


def _begin(unfinished: Path, resumable: bool) -> None:
    if _is_disposable(unfinished):
        # Left by a killed process.
        _clear(unfinished)
    if resumable:
        return
    if contents(unfinished):
        raise FileExistsError(
            f"{unfinished} holds an unfinished conversion; finish that one, or delete the directory"
        )
    replace_text(unfinished / STATE, json.dumps(_DISPOSABLE))


def _is_disposable(unfinished: Path) -> bool:
    with suppress(FileNotFoundError, ValueError):
        return bool(json.loads((unfinished / STATE).read_text(encoding="utf-8")) == _DISPOSABLE)
    return False


def _clear(unfinished: Path) -> None:
    """Delete all but the lock, and the state that allows it last."""
    for file in sorted(contents(unfinished), key=lambda file: file.name == STATE):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def _leave(lock: int, directory: Path, unfinished: Path) -> None:
    """Remove the files for a writer alone, just before the lock is freed."""
    # Only where our lock is: another process may have begun a new ``unfinished`` after the rename.
    if _is(lock, directory / LOCK):
        (directory / STATE).unlink(missing_ok=True)
        (directory / LOCK).unlink()
    elif _is(lock, unfinished / LOCK):
        if _is_disposable(unfinished):
            _clear(unfinished)
        if not (unfinished / STATE).exists():
            (unfinished / LOCK).unlink()
            with suppress(OSError):
                unfinished.rmdir()


def _open_locked(file: Path, instead: str) -> int:
    for _ in range(_TRIES):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # The holder has just renamed or deleted the directory.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another {_holder(descriptor)}; wait for it, or {instead}"
            os.close(descriptor)
            raise BlockingIOError(message) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warnings.warn(f"{file}: this disk has no locks; let one process write there", stacklevel=4)
        # A lock on a file that was renamed or deleted since it was opened protects nothing.
        if _is(descriptor, file):
            return descriptor
        os.close(descriptor)
    raise OSError(f"{file}: cannot lock it, because something keeps deleting it")


def _holder(descriptor: int) -> str:
    process, _, doing = os.pread(descriptor, 8192, 0).decode(errors="replace").partition("\n")
    return f"{doing} (process {process})" if doing else "process is writing there"


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False
