"""Every exception that orbax_async raises on purpose, as one tree.

    CheckpointError
      InvalidLayoutError (ValueError)            not a checkpoint, or a damaged one
        NotACheckpointError (NotADirectoryError) a file, where a checkpoint should be deleted
        DeletionRecoveryError (RuntimeError)     a deletion that must, or can't, be finished
        UnreadableError (OSError)                the system refuses to read it
      DestinationExistsError (ValueError, FileExistsError)
        StepAlreadyExistsError                   the run has that step
      SaveInProgressError (ValueError)           another save owns the destination
      UnsupportedOptionError (NotImplementedError)
      NothingToDeleteError (FileNotFoundError)
      UnknownCheckpointableError (KeyError)      the checkpoint has no such name
      DeletionInProgressError (RuntimeError)     a deletion was begun and not finished
      MissingAbstractError (ValueError)          it can't be loaded without being told what it is
      NotJsonError (TypeError, ValueError)       a value that JSON can't hold
      HandlerError (TypeError, ValueError)       a handler does not keep to its protocol
      TreeMismatchError (ValueError)             every mismatch in one report
        UnknownTensorError (KeyError)            files of tensors don't hold what is asked for
      LeafError                                  carries .keypath
        UnsupportedLeafError (ValueError)
        AbstractLeafError (TypeError)            what can't be asked for
        DuplicateLeafError (ValueError)          two leaves, one stored name
        ShapeMismatchError (ValueError)
        DtypeMismatchError (ValueError)
        ShardingMismatchError (ValueError)       a sharding that the array does not fit
        StagingError (RuntimeError)
        WriteError (OSError)
        ReadError (OSError)
          CorruptDataError
      CommitError (OSError)
      PartialSaveError                           partial saves that can't be put together
        NoPartialSaveError (FileNotFoundError)   there is none to be finalized
        PartialSaveReplacementError (LeafError)  a key that is saved already
      StepNotFoundError (ValueError, FileNotFoundError)
      MultihostError (RuntimeError)
        BarrierTimeoutError (TimeoutError)       names the missing processes
      OperationTimeoutError (TimeoutError)
      OperationCancelledError (concurrent.futures.CancelledError)
      LoopError (RuntimeError)
      ClosedError (RuntimeError)                 a Checkpointer was used after its end

Each class also inherits the builtin that Orbax raises in the same place, so existing ``except``
clauses keep working. When several leaves fail at once the first `LeafError` is raised and the
others hang on its ``others`` attribute; a bare exception group never reaches a caller.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Self

__all__ = [
    "AbstractLeafError",
    "BarrierTimeoutError",
    "CheckpointError",
    "ClosedError",
    "CommitError",
    "CorruptDataError",
    "DeletionInProgressError",
    "DeletionRecoveryError",
    "DestinationExistsError",
    "DtypeMismatchError",
    "DuplicateLeafError",
    "HandlerError",
    "InvalidLayoutError",
    "LeafError",
    "LoopError",
    "MissingAbstractError",
    "MultihostError",
    "NoPartialSaveError",
    "NotACheckpointError",
    "NotJsonError",
    "NothingToDeleteError",
    "OperationCancelledError",
    "OperationTimeoutError",
    "PartialSaveError",
    "PartialSaveReplacementError",
    "ReadError",
    "SaveInProgressError",
    "ShapeMismatchError",
    "ShardingMismatchError",
    "StagingError",
    "StepAlreadyExistsError",
    "StepNotFoundError",
    "TreeMismatchError",
    "UnknownCheckpointableError",
    "UnknownTensorError",
    "UnreadableError",
    "UnsupportedLeafError",
    "UnsupportedOptionError",
    "WriteError",
]


class CheckpointError(Exception):
    """The root of every error that orbax_async raises on purpose."""


class InvalidLayoutError(CheckpointError, ValueError):
    """A path holds no checkpoint, an unfinished one, or a damaged one.

    Attributes:
      path: the file that is damaged, missing, or unreadable; None where it is not one file.
    """

    path: str | None = None

    @classmethod
    def of_file(cls, message: str, path: str) -> Self:
        """Makes the error of one file."""
        error = cls(message)
        error.path = path
        return error


class NotACheckpointError(InvalidLayoutError, NotADirectoryError):
    """A file lies where a checkpoint should be deleted."""


class DeletionRecoveryError(InvalidLayoutError, RuntimeError):
    """An interrupted deletion has to be finished first, or what it left is damaged."""


class UnreadableError(InvalidLayoutError, OSError):
    """The system refuses to read what lies at a path, so that nobody knows whether it is whole."""


class DestinationExistsError(CheckpointError, ValueError, FileExistsError):
    """Something is already at the path that a save was told to create."""


class StepAlreadyExistsError(DestinationExistsError):
    """A run has a checkpoint of the step that is to be saved, or one is being saved."""


class SaveInProgressError(CheckpointError, ValueError):
    """Another save of this process is still writing to the same path."""


class UnsupportedOptionError(CheckpointError, NotImplementedError):
    """An option asks for an effect that this version does not have."""


class NothingToDeleteError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint, or no such checkpointable in it, to be deleted."""


class UnknownCheckpointableError(CheckpointError, KeyError):
    """A checkpoint has no checkpointable of the name that was asked for."""

    # KeyError shows the repr of its argument, quotes and escapes included.
    __str__ = Exception.__str__


class DeletionInProgressError(CheckpointError, RuntimeError):
    """What is asked for is being deleted, or its deletion was interrupted."""


class MissingAbstractError(CheckpointError, ValueError):
    """What is stored can only be loaded as something, or into something, that is given."""


class NotJsonError(CheckpointError, TypeError, ValueError):
    """A value can't be written as JSON."""


class HandlerError(CheckpointError, TypeError, ValueError):
    """A handler can't be made, or does not do what its protocol asks."""


class TreeMismatchError(CheckpointError, ValueError):
    """An abstract tree and a checkpoint differ; the message lists every difference.

    Attributes:
      mismatches: one line for each difference, each beginning with its key path.
    """

    def __init__(self, message: str, mismatches: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.mismatches = mismatches


class UnknownTensorError(TreeMismatchError, KeyError):
    """Safetensors files hold no tensor of a name that was asked for."""

    __str__ = Exception.__str__


class LeafError(CheckpointError):
    """Something is wrong with one leaf (invariant I9: the message names its key path).

    Attributes:
      keypath: the leaf's key path as `jax.tree_util.keystr` prints it.
      others: the errors of further leaves that failed in the same operation.
    """

    def __init__(self, keypath: str, message: str) -> None:
        super().__init__(f"leaf {keypath or '<root>'}: {message}")
        self.keypath = keypath
        self._message = message
        self.others: tuple[LeafError, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.keypath, self._message), vars(self)


class UnsupportedLeafError(LeafError, ValueError):
    """A leaf is of a kind that a checkpoint cannot hold."""


class AbstractLeafError(LeafError, TypeError):
    """An abstract leaf is of a kind that nothing can be loaded as."""


class DuplicateLeafError(LeafError, ValueError):
    """Two leaves would be stored under one name, and one of them would be lost."""


class ShapeMismatchError(LeafError, ValueError):
    """The shape asked for is not the shape stored."""


class DtypeMismatchError(LeafError, ValueError):
    """The dtype asked for cannot hold what is stored without losing values."""


class ShardingMismatchError(LeafError, ValueError):
    """The sharding asked for does not fit the array, or what else was asked for."""


class StagingError(LeafError, RuntimeError):
    """A leaf's values could not be captured from its device or from host memory."""


class WriteError(LeafError, OSError):
    """A leaf could not be written."""


class ReadError(LeafError, OSError):
    """A leaf could not be read."""


class CorruptDataError(ReadError):
    """A leaf's stored bytes do not match their checksum, or are cut short."""


class CommitError(CheckpointError, OSError):
    """A checkpoint could not be made durable or visible."""


class PartialSaveError(CheckpointError):
    """Partial saves to one checkpoint do not fit together."""


class NoPartialSaveError(PartialSaveError, FileNotFoundError):
    """There is no partial save to be finalized."""


class PartialSaveReplacementError(PartialSaveError, LeafError):
    """A partial save holds what an earlier one has saved; it can only add."""


class StepNotFoundError(CheckpointError, ValueError, FileNotFoundError):
    """A run's directory has no checkpoint of the step that was asked for."""


class MultihostError(CheckpointError, RuntimeError):
    """Processes that should act together disagree or cannot reach each other."""


class BarrierTimeoutError(MultihostError, TimeoutError):
    """A barrier was not met in time.

    Attributes:
      missing: indices of the processes that did not arrive, as far as they are known.
    """

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class OperationTimeoutError(CheckpointError, TimeoutError):
    """An operation did not finish within its own time limit and was undone."""


class OperationCancelledError(CheckpointError, concurrent.futures.CancelledError):
    """An operation was cancelled before its commit point and left nothing visible."""


class LoopError(CheckpointError, RuntimeError):
    """A blocking call on the engine's own loop, or a call after the engine has stopped."""


class ClosedError(CheckpointError, RuntimeError):
    """A Checkpointer is asked to do something after it was closed."""


def with_notes(error: BaseException) -> str:
    """Returns what an error says, and the notes on it, such as the checkpointable's name."""
    notes = getattr(error, "__notes__", ())
    return f"{error} ({'; '.join(notes)})" if notes else str(error)


@contextlib.contextmanager
def reported_as(
    kind: Callable[[str], CheckpointError], problem: str, advice: str = ""
) -> Iterator[None]:
    """Turns an OSError that is raised inside the block into an error of ours.

    Errors of ours pass as they are.

    Args:
      kind: the class of the error, or what makes one from its message.
      problem: what could not be done. The message goes on with the cause, and with the file where
        the problem does not name it.
      advice: sentences at the end of the message.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        message = f"{problem}: {error.strerror or error}"
        file = error.filename
        if file is not None and error.strerror and str(file) not in message:
            message += f" ({file})"
        raise kind(f"{message}. {advice}" if advice else message) from error


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """Replaces an exception group by its first leaf error, or else by its first error.

    Further leaf errors are attached to the first as `others`.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        flat = list(_flatten(group))
        leaves = [error for error in flat if isinstance(error, LeafError)]
        if leaves:
            leaves[0].others += tuple(leaves[1:])
        first = (leaves or flat)[0]
        raise first from first.__cause__


def _flatten(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flatten(error)
        else:
            yield error
