"""A run's checkpoints: saving, loading and keeping them, from sync loops and async trainers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, final

import jax

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async._api import load as loading
from orbax_async._api import metadata as describing
from orbax_async._api.deprecated import older_method
from orbax_async._api.load import Selects, Shardings
from orbax_async._layouts.orbax import check_name
from orbax_async._response import AsyncResponse
from orbax_async._trace import logger as package_logger
from orbax_async.handlers.read_plan import ShardingFunction
from orbax_async.options._group import flag
from orbax_async.path import Path, PathLike
from orbax_async.path.step import NameFormat, as_step
from orbax_async.training import step_access
from orbax_async.training.checkpoint_info import CheckpointMetadata, RootMetadata
from orbax_async.training.entry_log import EntryLogger
from orbax_async.training.run import Run, StepToSave
from orbax_async.training.run_steps import step_number
from orbax_async.training.save_decision_policies import Decision
from orbax_async.tree.selection import Select

__all__ = ["Checkpointer"]

Step = int | CheckpointMetadata[Any]


@final
class Checkpointer:
    """The checkpoints of one run: which steps are saved, which are kept, and where they lie.

    It can be used from any thread, and from coroutines: what ends in `_async` returns something
    that can be awaited, and everything else blocks its caller.

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
    begin: each is captured when it begins, and written, and committed, in its turn.

    A save that fails leaves nothing behind, and the steps that were there stay. Its response tells
    of it; if nobody has asked, the next call of `save`, `wait` or `close` does.

    Steps that the preservation policy gives up go in the background: out of sight when the save is
    committed that made them superfluous, and from disk while the run goes on.

    Args:
      directory: the run's directory; it is made if need be.
      context: the options, which are copied; None copies those of the context that is active. A
        context that is active when a method is called counts instead.
      save_decision_policy: decides which steps are saved, or a plain function that does; None saves
        whenever no save is under way, and before a preemption.
      preservation_policy: decides which steps are kept, or a plain function that does; None keeps
        all.
      step_name_format: how steps are named; None for their bare numbers.
      custom_metadata: a dict of JSON values to remember of the run; what is remembered already
        stays.
      cleanup_tmp_directories: whether to remove what unfinished saves of dead processes left.
      lightweight_initialize: whether to list the steps when they are first asked for, not now.
      logger: has a method `log_entry`, which is given a dict about each save that has begun.
      max_saves_in_flight: how many saves may be under way at once, one of which writes.
      supersede_queued: whether a save that waits for its turn gives way to the next one: it is
        cancelled. Needs at least two in flight.

    Raises:
      CommitError: the directory can't be made.
      NotJsonError: `custom_metadata` is no dict of JSON values.
      UnsupportedOptionError: `deletion.gcs_deletion_options` asks to move steps away.
      TypeError, ValueError: an argument is of the wrong type, or impossible.
    """

    def __init__(
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
        self._run = Run(
            directory,
            context=context,
            save_decision_policy=save_decision_policy,
            preservation_policy=preservation_policy,
            step_name_format=step_name_format,
            logger=logger,
            max_saves_in_flight=max_saves_in_flight,
            supersede_queued=supersede_queued,
        )
        self._run.open(
            custom_metadata=custom_metadata,
            clean=flag("cleanup_tmp_directories", cleanup_tmp_directories),
        )
        if not flag("lightweight_initialize", lightweight_initialize):
            self._run.steps.reload()

    def __repr__(self) -> str:
        state = " (closed)" if self._run.is_closed else ""
        return f"Checkpointer({str(self.directory)!r}){state}"

    # The run.

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self._run.directory.path)

    @property
    def checkpoints(self) -> Sequence[CheckpointMetadata[None]]:
        """The steps that are committed and kept, in ascending order.

        What others do in the directory is seen after `reload`. Each step's times, metrics and
        custom metadata are read when they are first asked for.
        """
        return self._run.steps.all()

    @property
    def latest(self) -> CheckpointMetadata[None] | None:
        """The last of `checkpoints`; None if there are none."""
        steps = self._run.steps.all()
        return steps[-1] if steps else None

    @property
    def last_decision(self) -> Decision | None:
        """What was decided of the step that was last given to `save`, and why; None before that.

        Example:
          ::

            if not checkpointer.save(step, state):
                print(checkpointer.last_decision)     # skipped: FixedIntervalPolicy(interval=100)
        """
        return self._run.last_decision

    def reload(self) -> None:
        """Lists the steps in the directory anew.

        Raises:
          ClosedError: the Checkpointer is closed.
        """
        self._run.check_open("reload")
        self._run.steps.reload()

    def root_metadata(self) -> RootMetadata:
        """Returns what was said of the run when it began.

        Raises:
          ClosedError: the Checkpointer is closed.
          InvalidLayoutError: the document is damaged.
        """
        self._run.check_open("root_metadata")
        return RootMetadata(
            directory=self.directory, custom_metadata=self._run.directory.read_root_metadata()
        )

    # Saving.

    def should_save(self, step: int) -> bool:
        """Says whether `save` would save a step now.

        Among several processes, all have to ask.

        Raises:
          ClosedError: the Checkpointer is closed.
          TypeError: `step` is no integer.
          Exception: what the policy raises.
        """
        self._run.check_open("should_save")
        decision = self._run.decide(as_step(step))
        return decision is not None and decision.is_saved

    def save(
        self,
        step: int,
        state: Any,
        *,
        checkpointable_name: str = names.DEFAULT_CHECKPOINTABLE,
        force: bool = False,
        overwrite: bool = False,
        metrics: Any | None = None,
        custom_metadata: Any | None = None,
    ) -> bool:
        """Saves a state as a step, if the policy says so, and returns once it is durable.

        Takes and raises what `save_async` does.

        Returns:
          Whether it was saved; `last_decision` tells why, or why not.
        """
        response = self.save_async(
            step,
            state,
            checkpointable_name=checkpointable_name,
            force=force,
            overwrite=overwrite,
            metrics=metrics,
            custom_metadata=custom_metadata,
        )
        return response is not None and response.result()

    def save_async(
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

        It waits until there is room among the saves in flight (`await ready()` waits for that
        without blocking a loop), and returns once every value is captured, as `ocp.save_async`.

        Args:
          step: the step's number.
          state: as for `ocp.save_async`.
          checkpointable_name: the name of the state inside the checkpoint.
          force: whether to save whatever the policy says, and even if a later step is there.
          overwrite: whether to replace the step if it is there; the old one stays until then.
          metrics: a JSON value, for policies and readers.
          custom_metadata: a dict of JSON values, which `metadata` returns.

        Returns:
          A response whose result is True; None if the step is not saved, for which
          `last_decision` and the log tell the reason.

        Raises:
          StepAlreadyExistsError: the step is there, or being saved, and `overwrite` is not set.
          ClosedError: the Checkpointer is closed.
          NotJsonError: the metrics are no JSON value.
          Exception: what the policy raises, or an earlier save that nobody has asked for its
            end; and all that `ocp.save_async` raises. What the preservation policy raises, the
            response raises; the step is saved then, and nothing removed.
        """
        pair = [(checkpointable_name, state)]
        return self._run.save(
            StepToSave(
                as_step(step), pair, True, flag("force", force), overwrite, metrics, custom_metadata
            )
        )

    def save_checkpointables(
        self,
        step: int,
        checkpointables: dict[str, Any],
        *,
        force: bool = False,
        overwrite: bool = False,
        metrics: Any | None = None,
        custom_metadata: Any | None = None,
    ) -> bool:
        """Saves several objects as a step, if the policy says so, and returns once that is durable.

        Takes and raises what `save_checkpointables_async` does, and returns what `save` does.
        """
        response = self.save_checkpointables_async(
            step,
            checkpointables,
            force=force,
            overwrite=overwrite,
            metrics=metrics,
            custom_metadata=custom_metadata,
        )
        return response is not None and response.result()

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
        return self._run.save(
            StepToSave(
                as_step(step),
                checkpointables,
                False,
                flag("force", force),
                overwrite,
                metrics,
                custom_metadata,
            )
        )

    async def ready(self) -> None:
        """Waits until `save_async` could begin without waiting for another save."""
        await self._run.queue.room()

    def is_saving_in_progress(self) -> bool:
        """Says whether a save is under way."""
        return bool(self._run.queue.pending())

    def cancel(self, step: Step | None = None) -> bool:
        """Cancels the save of a step, or all that are under way.

        Their responses raise `OperationCancelledError`. What is committed, or about to be, stays.

        Args:
          step: the step; None for all.

        Returns:
          Whether a save was cancelled.
        """
        return self._run.queue.cancel(None if step is None else step_number(step))

    # Loading.

    def load(
        self,
        step: Step | None = None,
        abstract_state: Any | None = None,
        *,
        checkpointable_name: str = names.DEFAULT_CHECKPOINTABLE,
        select: Select | None = None,
        sharding: jax.sharding.Sharding | ShardingFunction | None = None,
    ) -> Any:
        """Loads the state of a step and returns it.

        Takes and raises what `load_async` does.
        """
        return self.load_async(
            step,
            abstract_state,
            checkpointable_name=checkpointable_name,
            select=select,
            sharding=sharding,
        ).result()

    def load_async(
        self,
        step: Step | None = None,
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
        return step_access.load(
            self._run,
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

    def load_checkpointables(
        self,
        step: Step | None = None,
        abstract_checkpointables: dict[str, Any] | None = None,
        *,
        select: Selects | None = None,
        sharding: Shardings | None = None,
    ) -> dict[str, Any]:
        """Loads several objects of a step, and returns them by name.

        Takes and raises what `load_checkpointables_async` does.
        """
        return self.load_checkpointables_async(
            step, abstract_checkpointables, select=select, sharding=sharding
        ).result()

    def load_checkpointables_async(
        self,
        step: Step | None = None,
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
        return step_access.load(
            self._run,
            "load_checkpointables",
            step,
            lambda path: loading.load_checkpointables_async(
                path, abstract_checkpointables, select=select, sharding=sharding
            ),
        )

    def metadata(self, step: Step | None = None) -> CheckpointMetadata[Any]:
        """Returns what a step holds as its state, without reading array data.

        Args:
          step: its number, or what `checkpoints` has of it; None for the latest.

        Raises:
          StepNotFoundError: there is no such step, or none at all.
          ClosedError: the Checkpointer is closed.
          InvalidLayoutError: the step holds no pytree, or is damaged.
        """
        return step_access.describe(self._run, "metadata", step, describing.metadata)

    def checkpointables_metadata(
        self, step: Step | None = None
    ) -> CheckpointMetadata[dict[str, Any]]:
        """Returns what all objects of a step are, without reading their data.

        Takes and raises what `metadata` does.
        """
        return step_access.describe(
            self._run, "checkpointables_metadata", step, describing.checkpointables_metadata
        )

    # Deleting.

    def delete(
        self, step: Step, *, checkpointable_name: str | None = None, missing_ok: bool = False
    ) -> bool:
        """Deletes a step, or one object of it.

        Takes and raises what `delete_async` does.
        """
        return self.delete_async(
            step, checkpointable_name=checkpointable_name, missing_ok=missing_ok
        ).result()

    def delete_async(
        self, step: Step, *, checkpointable_name: str | None = None, missing_ok: bool = False
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
        return step_access.delete(self._run, step, checkpointable_name, missing_ok)

    # Ending.

    def wait(self) -> None:
        """Blocks until no save is under way, and no step to be removed is in sight.

        Raises:
          Exception: what a save has failed with that nobody has asked for its end; once.
        """
        self._run.wait()

    async def wait_async(self) -> None:
        """Waits like `wait`, without blocking the caller's loop."""
        await self._run.wait_async()

    def close(self) -> None:
        """Blocks until all that is under way has ended, and lets nothing new begin.

        Closing again does nothing. What is known of the run can still be asked for.

        Raises:
          Exception: what `wait` raises.
        """
        self._run.close()

    async def aclose(self) -> None:
        """Closes like `close`, without blocking the caller's loop."""
        await self._run.close_async()

    def __enter__(self) -> Self:
        self._run.check_open("with")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as error:
            _tell_unless_replaced(error, exc_value)

    async def __aenter__(self) -> Self:
        self._run.check_open("async with")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.aclose()
        except Exception as error:
            _tell_unless_replaced(error, exc_value)

    # The older names.

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
