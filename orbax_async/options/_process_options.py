"""How an operation runs: in the background, on several processes, on Pathways."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from orbax_async.options._checks import (
    each,
    function,
    instance_of,
    must_be,
    number,
    one_of,
    optional,
    whole,
)
from orbax_async.options._group import OptionGroup


@dataclass(kw_only=True)
class AsyncOptions(OptionGroup):
    """How a save runs in the background.

    Attributes:
      timeout_secs: seconds for the background part of a save, after which it fails with
        `OperationTimeoutError`; zero or less fails at once, None means no limit. 20 minutes.
        Several processes wait for one another at most four fifths of it, or 16 minutes.
      post_finalization_callback: called without arguments after each commit, before the response
        is done; what it raises, the response raises. None means no call.
      create_directories_asynchronously: whether `save_async` may return before the temporary
        directory exists.
      staging: `'eager'` captures every value before `save_async` returns; `'lazy'` returns at once
        and captures in the background, and the caller promises to leave the values as they are
        until the response is `staged`.
      exit_grace_secs: seconds that the end of the interpreter waits for running saves to commit
        before it gives them up and says so on stderr.
    """

    timeout_secs: float | None = field(default=1200, metadata=must_be(optional(number())))
    post_finalization_callback: Callable[[], None] | None = field(
        default=None, metadata=must_be(function)
    )
    create_directories_asynchronously: bool = True
    staging: Literal["eager", "lazy"] = field(
        default="eager", metadata=must_be(one_of("eager", "lazy"))
    )
    exit_grace_secs: float = field(default=5.0, metadata=must_be(number(at_least=0)))


@dataclass(kw_only=True)
class MultiprocessingOptions(OptionGroup):
    """Which processes take part, and how they meet.

    Attributes:
      primary_host: index of the process that creates directories, writes metadata and commits;
        None makes every process primary, each with storage of its own, which a save of several
        processes refuses in this version. Process 0.
      active_processes: indices of the processes that call the operation; None means all.
      barrier_sync_key_prefix: put before the name of each barrier, to keep apart operations that
        different subsets of processes run at the same time; None means no prefix.
    """

    primary_host: int | None = field(default=0, metadata=must_be(optional(whole(at_least=0))))
    active_processes: set[int] | None = field(
        default=None, metadata=must_be(each(whole(at_least=0), set))
    )
    barrier_sync_key_prefix: str | None = field(default=None, metadata=must_be(instance_of(str)))


class CheckpointingImpl(enum.Enum):
    """The ways to checkpoint on Pathways."""

    COLOCATED_PYTHON = 1
    PERSISTENCE = 2
    NO_DISPATCHER = 3


@dataclass(kw_only=True)
class PathwaysOptions(OptionGroup):
    """How checkpointing works on Pathways.

    Attributes:
      checkpointing_impl: the way to use; None chooses by what the backend offers.
    """

    checkpointing_impl: CheckpointingImpl | None = field(
        default=None, metadata=must_be(instance_of(CheckpointingImpl))
    )
