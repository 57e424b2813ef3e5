"""A run's checkpoints: saving, loading and keeping them, from sync loops and async trainers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar, cast, final

import jax

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._api import delete as deleting
from orbax_async._api import load as loading
from orbax_async._api import metadata as describing
from orbax_async._api.load import Selects, Shardings
from orbax_async._api.save import json_metadata
from orbax_async._engine import loop
from orbax_async._layouts.orbax import check_name, writes_in_place
from orbax_async._operation import older_method
from orbax_async._response import AsyncResponse
from orbax_async._trace import logger as package_logger
from orbax_async.handlers.read_plan import ShardingFunction
from orbax_async.options._group import flag
from orbax_async.path import Path, PathLike, pathlike
from orbax_async.path.step import NameFormat, standard_name_format
from orbax_async.training.queue import EntryLogger, SaveQueue
from orbax_async.training.save_decision_policies import Decision
from orbax_async.training.steps import (
    CheckpointMetadata,
    RootMetadata,
    RunDirectory,
    Step,
    Steps,
    step_number,
)
from orbax_async.tree.keypath import Select

__all__ = ["Checkpointer"]

P = ParamSpec("P")
T = TypeVar("T")
AnyStep: TypeAlias = int | CheckpointMetadata[Any]


def _blocking(begin: Callable[P, AsyncResponse[T] | None]) -> Callable[P, T]:
    """Returns the method that waits for the result of what a method ending in `_async` begins."""

    @functools.wraps(begin)
    def method(*args: P.args, **kwargs: P.kwargs) -> T:
        response = begin(*args, **kwargs)
        return cast("T", False) if response is None else response._finish()

    signature = inspect.signature(begin).replace(return_annotation=inspect.Signature.empty)
    method.__signature__ = signature  # type: ignore[attr-defined]
    method.__name__ = begin.__name__.removesuffix("_async")
    method.__doc__ = (
        f"Does what `{begin.__name__}` does, and returns its result once that is there.\n\n"
        f"{inspect.cleandoc(begin.__doc__ or '')}"
    )
    return method


@final
class Checkpointer:
    """The checkpoints of one run: which steps are saved, which are kept, and where they lie.

    Any thread may use it, and so may coroutines. What ends in `_async`, `ready` and `aclose` can be
    awaited. Everything else blocks its caller.

    Example:
      ::

        with training.Checkpointer(
            "/run",
            save_decision_policy=save_decision_policies.FixedIntervalPolicy(100),
            preservation_policy=preservation_policies.LatestN(3),
        ) as checkpointer:
            if checkpointer.latest is not None:
                state = checkpointer.load(abstract_state=state)
            for step in range(step, steps):
                state = train_step(state)
                checkpointer.save_async(step, state, metrics={"loss": loss})

        async with training.Checkpointer("/run") as checkpointer:
            await checkpointer.save_async(0, state, force=True)
            state = await checkpointer.load_async(0, abstract_state)

    One save writes at a time, and the next one waits for it. With `max_saves_in_flight` more may
    begin. Each is captured when it begins, and is written and committed in its turn.

    A save that fails leaves nothing behind, and the steps that were there stay. Its response tells
    of the failure. If nobody has asked for it, the next call of `save`, `wait` or `close` does.

    Steps that the preservation policy gives up go in the background. They are out of sight once the
    save is committed that made them superfluous, and their files go while the run goes on.

    Args:
      directory: the run's directory; it is made if need be.
      context: the options, which are copied; None copies those of the context that is active. A
        context that is active when a method is called counts instead.
      save_decision_policy: decides which steps are saved, or a plain function that does; None saves
        whenever no save is under way, and before a preemption.
      preservation_policy: decides which steps are kept, likewise; None keeps all.
      step_name_format: how steps are named; None for their bare numbers.
      custom_metadata: a dict of JSON values to remember of the run, unless it has one already.
      cleanup_tmp_directories: whether to remove what unfinished saves of dead processes left.
      lightweight_initialize: whether to list the steps when they are first asked for, not now.
      logger: has a method `log_entry`, which is given a dict about each save that has begun.
      max_saves_in_flight: how many saves may be under way at once, one of which writes.
      supersede_queued: whether a save that waits for its turn is cancelled when the next one
        begins. Needs at least two in flight.

    Raises:
      CommitError: the directory can't be made.
      NotJsonError: `custom_metadata` is no dict of JSON values.
      UnsupportedOptionError: `deletion.gcs_deletion_options` asks to move steps away.
      TypeError, ValueError: an argument is of the wrong type, or impossible.
    """

    def __init__(  # noqa: PLR0913 - Orbax's arguments
        self,
        directory: PathLike,
        *,
        context: ambient.Context | None = None,
        save_decision_policy: Any | None = None,
        preservation_policy: Any | None = None,
        step_name_format: NameFormat[Any] | None = None,
        custom_metadata: Any | None = None,
        cleanup_tmp_directories: bool = False,
        lightweight_initialize: bool = False,
        logger: EntryLogger | None = None,
        max_saves_in_flight: int = 1,
        supersede_queued: bool = False,
    ) -> None:
        self._context = ambient.Context(ambient.current() if context is None else context)
        deleting.check_options(self._context.deletion.gcs_deletion_options.todelete_full_path)
        self._directory = RunDirectory(
            pathlike.absolute(directory, self._context.file.path_class),
            step_name_format or standard_name_format(),
            needs_proof=writes_in_place(self._context),
        )
        self._steps = Steps(self._directory)
        self._queue = SaveQueue(
            self._steps,
            save_policy=save_decision_policy,
            keep_policy=preservation_policy,
            logger=logger,
            max_saves_in_flight=max_saves_in_flight,
            supersede_queued=supersede_queued,
        )
        is_cleaned = flag("cleanup_tmp_directories", cleanup_tmp_directories)
        said = None if custom_metadata is None else json_metadata(custom_metadata)
        self._directory.create()
        if multihost.is_primary_host(self._context.multiprocessing.primary_host):
            if said is not None:
                self._directory.write_root_metadata(said)
            if is_cleaned:
                self._directory.clean()
        if not flag("lightweight_initialize", lightweight_initialize):
            self._steps.reload()

    def __repr__(self) -> str:
        state = " (closed)" if self._queue.is_closed else ""
        return f"Checkpointer({str(self.directory)!r}){state}"

    # The run.

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self._directory.path)

    @property
    def checkpoints(self) -> Sequence[CheckpointMetadata[None]]:
        """The steps that are committed and kept, in ascending order.

        What others do in the directory is seen after `reload`. Each step's times, metrics and
        custom metadata are read when they are first asked for.
        """
        return self._steps.all()

    @property
    def latest(self) -> CheckpointMetadata[None] | None:
        """The last of `checkpoints`; None if there are none."""
        return next(reversed(self._steps.all()), None)

    @property
    def last_decision(self) -> Decision | None:
        """What was decided of the step that was last given to `save`, and why; None before that.

        Example:
          ::

            if not checkpointer.save(step, state):
                print(checkpointer.last_decision)     # skipped: FixedIntervalPolicy(interval=100)
        """
        return self._queue.last_decision

    def reload(self) -> None:
        """Lists the steps in the directory anew.

        Raises:
          ClosedError: the Checkpointer is closed.
          InvalidLayoutError: the directory can't be read.
        """
        self._check_open("reload")
        self._steps.reload()

    def root_metadata(self) -> RootMetadata:
        """Returns what was said of the run when it began.

        Raises:
          ClosedError: the Checkpointer is closed.
          InvalidLayoutError: the document is damaged, or can't be read.
        """
        self._check_open("root_metadata")
        said = self._directory.read_root_metadata()
        return RootMetadata(directory=self.directory, custom_metadata=said)

    # Saving.

    def should_save(self, step: int) -> bool:
        """Says whether `save` would save a step now.

        Among several processes, all have to ask.

        Raises:
          ClosedError: the Checkpointer is closed.
          TypeError: `step` is no integer.
          Exception: what the policy raises.
        """
        self._check_open("should_save")
        decision = self._queue.decide(
            self._steps.at_hand(step), self._options(), force=False, overwrite=False
        )
        return decision is not None and decision.is_saved

    def save_async(  # noqa: PLR0913 - Orbax's arguments
        self,
        step: int,
        state: Any,
        *,
        checkpointable_name: str = names.DEFAULT_CHECKPOINTABLE,
        force: bool = False,
        overwrite: bool = False,
        metrics: Any | None = None,
        custom_metadata: Any | None = None,
    ) -> AsyncResponse[bool] | None:
        """Saves a state as a step in the background, if the policy says so.

        It waits until there is room among the saves in flight, and returns once every value is
        captured, as `ocp.save_async` does. `await ready()` waits for room without blocking a loop.

        Args:
          step: the step's number.
          state: as for `ocp.save_async`.
          checkpointable_name: the name of the state inside the checkpoint.
          force: whether to save whatever the policy says, and even if a later step is there.
          overwrite: whether to replace the step if it is there; the old one stays until then.
          metrics: a JSON value, for policies and readers.
          custom_metadata: a dict of JSON values, which `metadata` returns.

        Returns:
          A response whose result is True; None if the step is not saved. Then `last_decision` and
          the log tell why.

        Raises:
          StepAlreadyExistsError: the step is there, or being saved, and `overwrite` is not set.
          ClosedError: the Checkpointer is closed.
          NotJsonError: the metrics are no JSON value.
          Exception: what the policy raises, what `ocp.save_async` raises, or what an earlier save
            has failed with that nobody has asked for its end. What the preservation policy raises,
            the response raises; the step is saved then, and nothing is removed.
        """
        named = [(checkpointable_name, state)]
        asked = self._steps.at_hand(step, metrics, custom_metadata)
        return self._save(asked, named, is_state=True, force=force, overwrite=overwrite)

    def save_checkpointables_async(
        self,
        step: int,
        checkpointables: dict[str, Any],
        *,
        force: bool = False,
        overwrite: bool = False,
        metrics: Any | None = None,
        custom_metadata: Any | None = None,
    ) -> AsyncResponse[bool] | None:
        """Saves several objects as a step in the background, if the policy says so.

        Args:
          step: the step's number.
          checkpointables: as for `ocp.save_checkpointables_async`.
          force: as for `save_async`, and so the others.
          overwrite: whether to replace the step if it is there.
          metrics: a JSON value, for policies and readers.
          custom_metadata: a dict of JSON values, which `metadata` returns.

        Returns:
          What `save_async` does; so it raises, and what `ocp.save_checkpointables_async` does.
        """
        asked = self._steps.at_hand(step, metrics, custom_metadata)
        return self._save(asked, checkpointables, is_state=False, force=force, overwrite=overwrite)

    save = _blocking(save_async)
    save_checkpointables = _blocking(save_checkpointables_async)

    def _save(
        self, step: Step, checkpointables: Any, *, is_state: bool, force: bool, overwrite: bool
    ) -> AsyncResponse[bool] | None:
        loop.refuse_engine_thread("save")
        self._check_open("save")
        with self._options():
            return self._queue.save(
                step,
                checkpointables,
                is_state=is_state,
                force=flag("force", force),
                overwrite=overwrite,
            )

    async def ready(self) -> None:
        """Waits until `save_async` could begin without waiting for another save."""
        await self._queue.room()

    def is_saving_in_progress(self) -> bool:
        """Says whether a save is under way."""
        return bool(self._queue.under_way())

    def cancel(self, step: AnyStep | None = None) -> bool:
        """Cancels the save of a step, or all that are under way.

        Their responses raise `OperationCancelledError`. What is committed, or about to be, stays.

        Args:
          step: the step; None for all.

        Returns:
          Whether a save was cancelled.
        """
        return self._queue.cancel(None if step is None else step_number(step))

    # Loading.

    def load_async(
        self,
        step: AnyStep | None = None,
        abstract_state: Any | None = None,
        *,
        checkpointable_name: str = names.DEFAULT_CHECKPOINTABLE,
        select: Select | None = None,
        sharding: jax.sharding.Sharding | ShardingFunction | None = None,
    ) -> AsyncResponse[Any]:
        """Loads the state of a step in the background.

        Args:
          step: its number, or what `checkpoints` has of it; None for the latest.
          abstract_state: as for `ocp.load_async`.
          checkpointable_name: which pytree of the step.
          select: which leaves to load, as for `ocp.load_async`.
          sharding: where jax arrays go of which the abstract tree says nothing, likewise.

        Returns:
          A response whose result is the state.

        Raises:
          StepNotFoundError: there is no such step, or none at all.
          ClosedError: the Checkpointer is closed.
          Exception: what `ocp.load_async` raises.
        """
        check_name(checkpointable_name, is_saved=True)
        return self._load(
            "load",
            step,
            lambda path: loading.load_async(
                path,
                abstract_state,
                checkpointable_name=checkpointable_name,
                select=select,
                sharding=sharding,
            ),
        )

    def load_checkpointables_async(
        self,
        step: AnyStep | None = None,
        abstract_checkpointables: dict[str, Any] | None = None,
        *,
        select: Selects | None = None,
        sharding: Shardings | None = None,
    ) -> AsyncResponse[dict[str, Any]]:
        """Loads several objects of a step in the background; metrics are none of them.

        Args:
          step: its number, or what `checkpoints` has of it; None for the latest.
          abstract_checkpointables: as for `ocp.load_checkpointables_async`.
          select: which leaves of pytrees to load: for all alike, or a dict by name.
          sharding: where jax arrays go of which the abstract trees say nothing, likewise.

        Returns:
          A response whose result is a dict of what was loaded. Errors are as of `load_async`.
        """
        return self._load(
            "load_checkpointables",
            step,
            lambda path: loading.load_checkpointables_async(
                path, abstract_checkpointables, select=select, sharding=sharding
            ),
        )

    load = _blocking(load_async)
    load_checkpointables = _blocking(load_checkpointables_async)

    def _load(
        self, verb: str, step: Any, load: Callable[[Path], AsyncResponse[T]]
    ) -> AsyncResponse[T]:
        """Begins to load a step, which is not removed until it is loaded."""
        self._check_open(verb)
        found, release = self._steps.hold(step)
        try:
            with self._options():
                response = load(found.path)
        except BaseException:
            release()
            raise
        response.add_done_callback(lambda _: release())
        return response

    def metadata(self, step: AnyStep | None = None) -> CheckpointMetadata[Any]:
        """Returns what a step holds as its state, without reading array data.

        Args:
          step: its number, or what `checkpoints` has of it; None for the latest.

        Raises:
          StepNotFoundError: there is no such step, or none at all.
          ClosedError: the Checkpointer is closed.
          InvalidLayoutError: the step holds no pytree, or is damaged.
        """
        return self._describe("metadata", step, describing.metadata)

    def checkpointables_metadata(
        self, step: AnyStep | None = None
    ) -> CheckpointMetadata[dict[str, Any]]:
        """Returns what all objects of a step are, without reading their data.

        Takes and raises what `metadata` does.
        """
        return self._describe("checkpointables_metadata", step, describing.checkpointables_metadata)

    def _describe(
        self, verb: str, step: Any, describe: Callable[[Path], describing.CheckpointMetadata[T]]
    ) -> CheckpointMetadata[T]:
        """Adds to what a checkpoint says of itself what its run knows."""
        self._check_open(verb)
        found, release = self._steps.hold(step)
        try:
            with self._options():
                described = describe(found.path)
            return CheckpointMetadata(
                found.step,
                found.path,
                metadata=described.metadata,
                init_timestamp_nsecs=described.init_timestamp_nsecs,
                commit_timestamp_nsecs=found.commit_timestamp_nsecs,
                custom_metadata=described.custom_metadata,
                metrics=found.metrics,
            )
        finally:
            release()

    # Deleting.

    def delete_async(
        self, step: AnyStep, *, checkpointable_name: str | None = None, missing_ok: bool = False
    ) -> AsyncResponse[bool]:
        """Deletes a step, or one object of it, in the background.

        Args:
          step: its number, or what `checkpoints` has of it.
          checkpointable_name: what to delete of it; None deletes all.
          missing_ok: whether it may be missing.

        Returns:
          A response whose result is whether anything was deleted.

        Raises:
          StepNotFoundError: there is no such step.
          ClosedError: the Checkpointer is closed.
          Exception: what `ocp.delete_async` raises.
        """
        self._check_open("delete")
        number = step_number(step)
        try:
            path = self._steps.find(number).path
        except errors.StepNotFoundError:
            if not missing_ok or number < 0:
                raise
            path = Path(self._directory.path_of(number))
        with self._context:
            response = deleting.delete_async(
                path, checkpointable_name=checkpointable_name, missing_ok=missing_ok
            )
        if checkpointable_name is None:
            self._steps.drop(number)
            # It is still there if it can't be deleted.
            response.add_done_callback(lambda _: self._steps.put_back(number))
        return response

    delete = _blocking(delete_async)

    # Ending.

    def wait(self) -> None:
        """Blocks until no save is under way, and no step to be removed is in sight.

        Raises:
          Exception: what a save has failed with that nobody has asked for its end; once.
        """
        loop.refuse_engine_thread("wait")
        self._queue.wait()

    async def wait_async(self) -> None:
        """Waits like `wait`, without blocking the caller's loop."""
        await self._queue.wait_async()

    def close(self) -> None:
        """Blocks until all that is under way has ended, and lets nothing new begin.

        Closing again does nothing. What is known of the run can still be asked for.

        Raises:
          Exception: what `wait` raises.
        """
        loop.refuse_engine_thread("close")
        self._queue.wait(is_last=True)

    async def aclose(self) -> None:
        """Closes like `close`, without blocking the caller's loop."""
        await self._queue.wait_async(is_last=True)

    def __enter__(self) -> Self:
        self._check_open("with")
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except Exception as failure:
            _tell_unless_replaced(failure, error)

    async def __aenter__(self) -> Self:
        self._check_open("async with")
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            await self.aclose()
        except Exception as failure:
            _tell_unless_replaced(failure, error)

    def _options(self) -> ambient.Context:
        """Returns the options of a call: those that are active, or else the run's own."""
        return ambient.current(self._context)

    def _check_open(self, verb: str) -> None:
        if self._queue.is_closed:
            raise errors.ClosedError(
                f"{verb}: the Checkpointer of {self.directory} is closed; make another one"
            )

    # Deprecated names.

    save_pytree = older_method("save")
    save_pytree_async = older_method("save_async")
    load_pytree = older_method("load")
    load_pytree_async = older_method("load_async")
    pytree_metadata = older_method("metadata")


def _tell_unless_replaced(error: Exception, first: BaseException | None) -> None:
    """Raises an error of a save, unless its block has failed for another reason."""
    if first is None:
        raise error
    package_logger.error("a save failed, too: %s", error, exc_info=error)
    first.add_note(f"a save failed, too: {type(error).__name__}: {error}")
