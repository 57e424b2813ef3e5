"""The saves of one run: which are due, in which order they write, and what follows from each.

Rules
  - Saves write, and commit, in the order in which they began, one at a time. The others are
    captured and wait.
  - No more than a fixed number are under way. Who comes then waits for the oldest to end.
  - A failure is told once: by its own response, or else by the next call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeAlias

from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._api.save import SaveRequest, prepare
from orbax_async._engine import loop
from orbax_async._operation import starting
from orbax_async._response import AsyncResponse
from orbax_async._trace import logger as package_logger
from orbax_async.options._group import flag, whole
from orbax_async.training import policy, preemption, retention
from orbax_async.training import preservation_policies as keep
from orbax_async.training.retirement import Retirement
from orbax_async.training.save_decision_policies import DEFAULT, Decision, DecisionContext
from orbax_async.training.steps import Step, Steps

__all__ = ["EntryLogger", "SaveQueue"]

Futures: TypeAlias = "list[concurrent.futures.Future[Any]]"


class EntryLogger(Protocol):
    """What a Checkpointer tells of each save that has begun."""

    def log_entry(self, entry: dict[str, Any]) -> None:
        """Takes a dict about a save."""
        ...


async def _until_done(futures: Iterable[concurrent.futures.Future[Any]]) -> None:
    """Waits until all are done, well or not, without blocking the caller's loop."""
    await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)


class SaveQueue:
    """The steps of one run that are being saved.

    Args:
      steps: those that the run has.
      save_policy: decides which are saved; None stands for the default.
      keep_policy: decides which are kept; None keeps all.
      logger: is told of each save; None if nobody is.
      max_saves_in_flight: how many may be under way.
      supersede_queued: whether those that wait give way to the next one.

    Raises:
      TypeError, ValueError: an argument is of the wrong type, or impossible.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        save_policy: Any | None,
        keep_policy: Any | None,
        logger: EntryLogger | None,
        max_saves_in_flight: int,
        supersede_queued: bool,
    ) -> None:
        self._most: int = whole(at_least=1)("max_saves_in_flight", max_saves_in_flight)
        self._is_superseding: bool = flag("supersede_queued", supersede_queued)
        if self._is_superseding and self._most < 2:
            raise ValueError(
                "supersede_queued is for saves that wait for their turn; with "
                "max_saves_in_flight=1 there are none. Allow at least 2"
            )
        self._save_policy = save_policy or DEFAULT
        self._keep_policy = keep_policy
        policy.check("save_decision_policy", self._save_policy, "should_save")
        if keep_policy is not None:
            policy.check("preservation_policy", keep_policy, "should_preserve")
        self._steps = steps
        self._logger = logger
        self._last_began: float | None = None
        self._retirement = Retirement(steps, is_busy=lambda: bool(self.under_way()))
        self._beginning = threading.RLock()  # one save begins at a time
        self._lock = threading.Lock()
        self._under_way: list[Step] = []
        self._responses: list[AsyncResponse[bool]] = []  # whose end nobody has looked at here
        self.is_closed = False
        self.last_decision: Decision | None = None

    # Deciding.

    def decide(
        self, step: Step, options: ambient.Context, *, force: bool, overwrite: bool
    ) -> Decision | None:
        """Says whether a step is saved now, and why, alike on every process.

        Returns:
          The decision; None if the step is there already, and is not to be overwritten.
        """
        processes = options.multiprocessing
        is_preempted = preemption.reached(step.step)

        def decide() -> Decision | None:
            staying = [each for each in self.under_way() if not each.is_withdrawn]
            present = {each.step: each for each in [*self._steps.all(), *staying]}
            if step.step in present and not overwrite:
                return None
            context = DecisionContext(
                is_saving_in_progress=self.is_full,
                reached_preemption=is_preempted,
                multiprocessing_options=processes,
            )
            ascending = [present[number] for number in sorted(present)]
            return retention.due(self._save_policy, step, ascending, context=context, force=force)

        if len(multihost.participants(processes.active_processes)) < 2:
            return decide()

        def say() -> str:
            decision = decide()
            told = None if decision is None else dataclasses.asdict(decision)
            return json.dumps([told, [each.step for each in self._steps.all()]])

        text = multihost.tell(
            f"whether step {step.step} is saved",
            say,
            primary=processes.primary_host,
            active=processes.active_processes,
            prefix=processes.barrier_sync_key_prefix,
        )
        told, numbers = json.loads(text)
        if not multihost.is_primary_host(processes.primary_host):
            self._steps.follow(numbers)
        return None if told is None else Decision(**told)

    # Saving.

    def save(
        self, step: Step, checkpointables: Any, *, is_state: bool, force: bool, overwrite: bool
    ) -> AsyncResponse[bool] | None:
        """Begins a save under the active options, if it is due; returns once it is captured.

        Args:
          step: the step, with what it is saved with.
          checkpointables: the objects by name; for a state one pair of its name and itself.
          is_state: whether it is a state.
          force: whether to save whatever the policy says.
          overwrite: whether to replace the step if it is there.
        """
        options = ambient.current()
        with self._beginning:
            step.time = datetime.datetime.now(tz=datetime.UTC)  # others may have begun until now
            if len(multihost.participants(options.multiprocessing.active_processes)) < 2:
                self.raise_failures()
            decision = self.decide(step, options, force=force, overwrite=overwrite)
            if decision is None:
                raise self._exists(step)
            self.last_decision = decision
            package_logger.debug("step %d of %s is %s", step.step, step.path.parent, decision)
            if not decision.is_saved:
                return None
            return self._start(step, checkpointables, is_state, overwrite)

    def _start(
        self, step: Step, checkpointables: Any, is_state: bool, overwrite: bool
    ) -> AsyncResponse[bool]:
        """Starts the save of a step; this is the one place where a run meets the door."""
        began = step.time.timestamp()
        is_primary = multihost.is_primary_host(ambient.current().multiprocessing.primary_host)

        async def run() -> bool:
            try:
                with self._naming_the_step(step, overwrite):
                    await save.run(lambda: loop.to_worker(self._note_commit, step, is_primary))
            finally:
                self._leave(step)
            return True

        try:
            with self._naming_the_step(step, overwrite), starting("save") as operation:
                self._make_room(step)
                self.raise_failures()
                # An older one of that number may still be on its way out.
                concurrent.futures.wait(self._retirement.out_of_sight(step.step))
                began_capture = time.time()
                self._enter(step)
                request = SaveRequest(
                    path=step.path,
                    checkpointables=checkpointables,
                    is_state=is_state,
                    overwrite=overwrite,
                    custom_metadata=step.custom_metadata,
                    metrics=step.metrics,
                    may_write=step.may_write,
                )
                save = prepare(operation, request)
                response = operation.start(f"save to {step.path}", run)
                self._note_response(step, response)
        except BaseException as error:
            if step.response is None:  # what was never begun is not in progress
                self._leave(step)
            if isinstance(error, errors.DestinationExistsError):
                self._steps.put_back(step.step)  # somebody else has saved it, and nobody knew here
            raise
        self._log_entry(step, began, began_capture)
        return response

    def _note_commit(self, step: Step, is_primary: bool) -> None:
        """Adds a step that is now visible, and gives up those that it makes superfluous."""
        step.read_documents()
        self._steps.add(step)
        if self._keep_policy is None or not is_primary:
            return
        try:
            listed = self._steps.all()
            verdicts = keep.judge(self._keep_policy, listed)
        except Exception as error:
            error.add_note(f"step {step.step} is saved, and nothing was removed")
            raise
        self._retirement.retire(
            [each for each, verdict in zip(listed, verdicts, strict=True) if not verdict.is_kept]
        )

    @contextlib.contextmanager
    def _naming_the_step(self, step: Step, overwrite: bool) -> Iterator[None]:
        try:
            yield
        except (errors.DestinationExistsError, errors.SaveInProgressError) as error:
            if overwrite:
                raise
            raise self._exists(step) from error

    def _exists(self, step: Step) -> errors.StepAlreadyExistsError:
        return errors.StepAlreadyExistsError(
            f"Step {step.step} already exists in {self._steps.directory.path}, or is being saved. "
            "overwrite=True replaces it."
        )

    def _log_entry(self, step: Step, began: float, began_capture: float) -> None:
        """Tells the user's logger, under Orbax's keys, of a save whose values are captured.

        It was called when it `began`; no earlier save was in its way from `began_capture` on.
        """
        now = time.time()
        before, self._last_began = self._last_began, began
        if self._logger is None:
            return
        self._logger.log_entry(
            {
                "step": step.step,
                "event_type": "save",
                "directory": self._steps.directory.path,
                "reached_preemption": preemption.is_noticed(),
                "preemption_received_at": preemption.noticed_at(),
                "synchronous": False,
                "wait_for_prev_start_time": began,
                "wait_for_prev_duration_secs": began_capture - began,
                "time_between_consecutive_saves_sec": None if before is None else began - before,
                "checkpointer_blocking_start_time": began_capture,
                "checkpointer_blocking_duration_secs": now - began_capture,
                "checkpoint_manager_blocking_start_time": began,
                "checkpoint_manager_blocking_duration_secs": now - began,
            }
        )

    # The order of saves.

    def under_way(self) -> list[Step]:
        """Returns the steps that are being saved, the oldest save first."""
        with self._lock:
            return list(self._under_way)

    @property
    def is_full(self) -> bool:
        """Whether another save would have to wait for one that is under way."""
        with self._lock:
            return sum(not self._gives_way(each) for each in self._under_way) >= self._most

    def _gives_way(self, step: Step) -> bool:
        return self._is_superseding and not step.may_write.done()

    async def room(self) -> None:
        """Waits until another save could begin at once."""
        while self.is_full:
            with self._lock:
                endings = _endings(self._under_way[:1])
            await _until_done(endings)

    def _make_room(self, step: Step) -> None:
        """Blocks until another save may begin; those that give way to it are cancelled."""
        with self._lock:
            withdrawn = [each for each in self._under_way if self._gives_way(each)]
            for each in withdrawn:
                each.is_withdrawn = True
            staying = [each for each in self._under_way if not each.is_withdrawn]
            surplus = max(0, len(staying) - self._most + 1)
            endings = _endings(withdrawn + staying[:surplus])
            superseded = [(each.step, each.response) for each in withdrawn]
        for number, response in superseded:
            package_logger.info("step %d gives way to step %d; it is not saved", number, step.step)
            if response is not None:
                response.cancel()
        concurrent.futures.wait(endings)

    def _enter(self, step: Step) -> None:
        with self._lock:
            if self.is_closed:
                raise errors.ClosedError(
                    f"step {step.step} is not saved: the Checkpointer was closed meanwhile"
                )
            self._under_way.append(step)
            self._let_the_first_write()

    def _note_response(self, step: Step, response: AsyncResponse[bool]) -> None:
        with self._lock:
            self._responses.append(response)
            if any(each is step for each in self._under_way):
                step.response = response
        if step.is_withdrawn:
            response.cancel()

    def _leave(self, step: Step) -> None:
        """Removes a step whose save has ended, or never started; the next one may write."""
        with self._lock:
            staying = [each for each in self._under_way if each is not step]
            if len(staying) == len(self._under_way):
                return
            self._under_way = staying
            step.response = None  # a step that is listed keeps nothing of its save alive
            self._let_the_first_write()
        step.ended.set_result(None)

    def _let_the_first_write(self) -> None:
        staying = [each for each in self._under_way if not each.is_withdrawn]
        if staying and not staying[0].may_write.done():
            staying[0].may_write.set_result(None)

    # The end of saves.

    def cancel(self, number: int | None) -> bool:
        """Cancels the save of a step, or all; returns whether any had not committed yet."""
        with self._lock:
            responses = [each.response for each in self._under_way if number in (None, each.step)]
        return any([response.cancel() for response in responses if response is not None])

    def wait(self, *, is_last: bool = False) -> None:
        """Blocks until no save is under way, and no step to be removed is in sight.

        Args:
          is_last: whether no save may begin any more, and files are waited for, too.

        Raises:
          Exception: what a save has failed with, unless that was told already.
        """
        for futures in self._endings(is_last):
            concurrent.futures.wait(futures)
        self.raise_failures()

    async def wait_async(self, *, is_last: bool = False) -> None:
        """Waits like `wait`, without blocking the caller's loop."""
        for futures in self._endings(is_last):
            await _until_done(futures)
        self.raise_failures()

    def _endings(self, is_last: bool) -> Iterator[Iterable[concurrent.futures.Future[Any]]]:
        """Yields what has to end: first the saves, then the removals that they have begun."""
        with self._lock:
            self.is_closed |= is_last
            saves = _endings(self._under_way)
            saves += [response._committed for response in self._responses]
        yield saves
        yield self._retirement.gone() if is_last else self._retirement.out_of_sight()

    def raise_failures(self) -> None:
        """Raises what a save has failed with, unless that was told already."""
        with self._lock:
            ended = [response for response in self._responses if response.done()]
            self._responses = [each for each in self._responses if each not in ended]
        failed = []
        for response in ended:
            if not response._is_reported and (error := response.exception()) is not None:
                failed.append(error)
        if not failed:
            return
        for error in failed[1:]:
            failed[0].add_note(f"another save failed too: {type(error).__name__}: {error}")
        raise failed[0]


def _endings(steps: Iterable[Step]) -> Futures:
    """Returns what is done once the saves of steps are over, for the run and for their callers."""
    endings: Futures = []
    for step in steps:
        endings.append(step.ended)
        if step.response is not None:
            endings.append(step.response._committed)
    return endings
