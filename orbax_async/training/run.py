"""A run: its directory, the saves under way, and what its policies decide."""

from __future__ import annotations

import dataclasses
import datetime
import json
import threading
import time
from typing import Any

from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._api import delete as deleting
from orbax_async._api.save import SaveRequest, prepare
from orbax_async._engine import loop
from orbax_async._layouts.orbax import writes_in_place
from orbax_async._operation import starting
from orbax_async._response import AsyncResponse
from orbax_async._trace import logger as package_logger
from orbax_async.options._group import flag, whole
from orbax_async.path import PathLike, pathlike
from orbax_async.path.step import NameFormat, StepMetadata, standard_name_format
from orbax_async.training import preemption
from orbax_async.training import preservation_policies as keep
from orbax_async.training import save_decision_policies as decisions
from orbax_async.training.checkpoint_info import CheckpointInfo
from orbax_async.training.entry_log import EntryLog, EntryLogger
from orbax_async.training.retirement import Retirement
from orbax_async.training.run_directory import ListedCheckpoint, RunDirectory, json_dict
from orbax_async.training.run_steps import RunSteps
from orbax_async.training.save_decision_policies import Decision, DecisionContext
from orbax_async.training.save_queue import Pending, SaveQueue

__all__ = ["Run", "StepToSave"]


@dataclasses.dataclass(frozen=True)
class StepToSave:
    """What is asked of a save.

    Attributes:
      step: the step's number.
      checkpointables: the objects by name; for a state one pair of its name and itself.
      is_state: whether it is a state.
      force: whether to save whatever the policy says.
      overwrite: whether to replace the step if it is there.
      metrics: a JSON value; None for none.
      custom_metadata: a dict of JSON values; None for none.
    """

    step: int
    checkpointables: Any
    is_state: bool
    force: bool
    overwrite: bool
    metrics: Any
    custom_metadata: Any


@dataclasses.dataclass(frozen=True)
class _Now:
    """The step at hand, as policies see it."""

    step: int
    time: datetime.datetime
    metrics: Any


class Run:
    """All that a Checkpointer has; its arguments are those of the Checkpointer."""

    def __init__(
        self,
        directory: PathLike,
        *,
        context: ambient.Context | None,
        save_decision_policy: Any | None,
        preservation_policy: Any | None,
        step_name_format: NameFormat[Any] | None,
        logger: EntryLogger | None,
        max_saves_in_flight: int,
        supersede_queued: bool,
    ) -> None:
        most = whole(at_least=1)("max_saves_in_flight", max_saves_in_flight)
        if flag("supersede_queued", supersede_queued) and most < 2:
            raise ValueError(
                "supersede_queued is for saves that wait for their turn; with "
                "max_saves_in_flight=1 there are none. Allow at least 2"
            )
        self.context = ambient.Context(ambient.current() if context is None else context)
        deleting.check_options(self.context.deletion.gcs_deletion_options.todelete_full_path)
        self._save_policy = save_decision_policy or decisions.DEFAULT
        self._keep_policy = preservation_policy
        decisions.check_policy("save_decision_policy", self._save_policy)
        if preservation_policy is not None:
            keep.check_policy("preservation_policy", preservation_policy)
        name_format = step_name_format or standard_name_format()
        if not isinstance(name_format, NameFormat):
            raise TypeError(
                "step_name_format must have build_name, find_all and find_step; "
                f"{name_format!r} has not"
            )
        path = pathlike.absolute(directory, self.context.file.path_class)
        is_in_place = writes_in_place(self.context)
        self.directory = RunDirectory(path, name_format, needs_proof=is_in_place)
        self._entries = EntryLog(path, logger)
        self.queue = SaveQueue(most, supersede_queued)
        self._retirement = Retirement(
            path,
            is_busy=lambda: bool(self.queue.pending()),
            put_back=lambda step: self.steps.put_back(step),
        )
        self.steps = RunSteps(self.directory, self._retirement)
        self.last_decision: Decision | None = None
        self.is_closed = False
        self._beginning = threading.RLock()  # one save begins at a time

    def open(self, *, custom_metadata: Any, clean: bool) -> None:
        """Prepares the directory; the primary process writes what is to be written."""
        said = None if custom_metadata is None else json_dict("custom_metadata", custom_metadata)
        self.directory.create()
        if not multihost.is_primary_host(self.context.multiprocessing.primary_host):
            return
        if said is not None:
            self.directory.write_root_metadata(said)
        if clean:
            self.directory.clean()

    def options(self) -> ambient.Context:
        """Returns the options of a call: those that are active, or else the run's own."""
        return ambient.current(self.context)

    def check_open(self, verb: str) -> None:
        """Raises ClosedError if the run is closed (W38)."""
        if self.is_closed:
            raise errors.ClosedError(
                f"{verb}: the Checkpointer of {self.directory.path} is closed; make another one"
            )

    # Deciding.

    def decide(
        self, step: int, *, force: bool = False, overwrite: bool = False, metrics: Any = None
    ) -> Decision | None:
        """Says whether a step is saved now, and why, alike on every process.

        Returns:
          The decision; None if the step is there already, and is not to be overwritten.
        """
        options = self.options().multiprocessing
        is_preempted = preemption.reached(step)
        now = _Now(step, datetime.datetime.now(tz=datetime.UTC), metrics)
        if len(multihost.participants(options.active_processes)) < 2:
            return self._verdict(now, force, overwrite, is_preempted)

        def say() -> str:
            verdict = self._verdict(now, force, overwrite, is_preempted)
            told = None if verdict is None else dataclasses.asdict(verdict)
            return json.dumps([told, [each.step for each in self.steps.all()]])

        text = multihost.tell(
            f"whether step {step} is saved",
            say,
            primary=options.primary_host,
            active=options.active_processes,
            prefix=options.barrier_sync_key_prefix,
        )
        told, steps = json.loads(text)
        if not multihost.is_primary_host(options.primary_host):
            self.steps.follow(steps)
        return None if told is None else Decision(**told)

    def _verdict(
        self, now: _Now, force: bool, overwrite: bool, is_preempted: bool
    ) -> Decision | None:
        present: dict[int, CheckpointInfo] = {each.step: each for each in self.steps.all()}
        present |= {each.step: each for each in self.queue.pending() if not each.is_withdrawn}
        if now.step in present and not overwrite:
            return None
        if force:
            return Decision(True, "force=True")
        previous = [present[step] for step in sorted(present) if step != now.step]
        if previous and now.step < previous[-1].step:
            return Decision(
                False,
                f"step {previous[-1].step} is there already, and later; force=True saves it anyway",
            )
        context = DecisionContext(
            is_saving_in_progress=self.queue.is_full,
            reached_preemption=is_preempted,
            multiprocessing_options=self.options().multiprocessing,
        )
        return decisions.decide(self._save_policy, now, previous, context=context)

    # Saving.

    def save(self, wanted: StepToSave) -> AsyncResponse[bool] | None:
        """Begins a save, if the policy says so; returns once it is captured."""
        loop.refuse_engine_thread("save")
        self.check_open("save")
        with self._beginning, self.options() as options:
            began = time.time()
            if len(multihost.participants(options.multiprocessing.active_processes)) < 2:
                self.queue.raise_failures()
            decision = self.decide(
                wanted.step,
                force=wanted.force,
                overwrite=wanted.overwrite,
                metrics=wanted.metrics,
            )
            if decision is None:
                raise self._exists(wanted.step)
            self.last_decision = decision
            package_logger.debug("step %d of %s is %s", wanted.step, self.directory.path, decision)
            if not decision.is_saved:
                return None
            return self._start(wanted, options, began)

    def _start(
        self, wanted: StepToSave, options: ambient.Context, began: float
    ) -> AsyncResponse[bool]:
        step, path = wanted.step, self.directory.path_of(wanted.step)
        now = datetime.datetime.now(tz=datetime.UTC)
        pending = Pending(step, now, wanted.metrics)
        is_primary = multihost.is_primary_host(options.multiprocessing.primary_host)

        async def run() -> bool:
            try:
                await save.run(lambda: loop.to_worker(self._note_commit, step, path, is_primary))
            except errors.DestinationExistsError as error:
                if wanted.overwrite:
                    raise
                raise self._exists(step) from error
            finally:
                self.queue.leave(pending)
            return True

        try:
            with starting("save") as operation:
                self.queue.make_room(step)
                self.queue.raise_failures()
                self._retirement.wait_out_of_sight([step])  # an older one of that number
                began_capture = time.time()
                self.queue.enter(pending)
                save = prepare(
                    operation,
                    SaveRequest(
                        path=path,
                        checkpointables=wanted.checkpointables,
                        is_state=wanted.is_state,
                        overwrite=wanted.overwrite,
                        custom_metadata=wanted.custom_metadata,
                        metrics=wanted.metrics,
                        may_write=pending.may_write,
                    ),
                )
                response = operation.start(f"save to {path}", run)
                self.queue.started(pending, response)
        except (errors.DestinationExistsError, errors.SaveInProgressError) as error:
            self._forget_unstarted(pending)
            self.steps.put_back(step)  # somebody else has saved it, and it was not known here
            if wanted.overwrite:
                raise
            raise self._exists(step) from error
        except BaseException:
            self._forget_unstarted(pending)
            raise
        self._entries.begun(step, began=began, began_capture=began_capture)
        return response

    def _forget_unstarted(self, pending: Pending) -> None:
        if pending.response is None:  # what was never begun is not in progress
            self.queue.leave(pending)

    def _exists(self, step: int) -> errors.StepAlreadyExistsError:
        return errors.StepAlreadyExistsError(
            f"Step {step} already exists in {self.directory.path}, or is being saved. "
            "overwrite=True replaces it."
        )

    def _note_commit(self, step: int, path: str, is_primary: bool) -> None:
        """Adds a step that is now visible, and gives up those that it makes superfluous."""
        found = ListedCheckpoint(StepMetadata(step, path))
        found.read()
        self.steps.add(found)
        if self._keep_policy is None or not is_primary:
            return
        listed = self.steps.all()
        try:
            verdicts = keep.judge(self._keep_policy, listed)
        except Exception as error:
            error.add_note(f"step {step} is saved, and nothing was removed")
            raise
        going = [
            each for each, verdict in zip(listed, verdicts, strict=True) if not verdict.is_kept
        ]
        for each in going:
            self.steps.drop(each.step)
        self._retirement.retire([(each.step, str(each.path)) for each in going])

    # Ending.

    def wait(self) -> None:
        """Blocks until no save is under way, and no step to be removed is in sight."""
        loop.refuse_engine_thread("wait")
        self.queue.wait()
        self._retirement.wait_out_of_sight()
        self.queue.raise_failures()

    async def wait_async(self) -> None:
        """Waits like `wait`."""
        await self.queue.wait_async()
        await self._retirement.wait_out_of_sight_async()
        self.queue.raise_failures()

    def close(self) -> None:
        """Lets nothing begin any more, and waits for all that has."""
        loop.refuse_engine_thread("close")
        self.is_closed = True
        self.queue.close()
        self.queue.wait()
        self._retirement.wait()
        self.queue.raise_failures()

    async def close_async(self) -> None:
        """Closes like `close`."""
        self.is_closed = True
        self.queue.close()
        await self.queue.wait_async()
        await self._retirement.wait_async()
        self.queue.raise_failures()
