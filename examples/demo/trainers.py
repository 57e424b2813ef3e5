"""Three trainers of the same model: without saving, sync, and async.

All of them can save while they train. A step has two halves, as in most training code: `gradients`
reads the state, `update` donates it. That is all a saver has to know: what a save still reads must
not be donated before the save has captured it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax
import model

import orbax_async as ocp

Tell = Callable[[str], None]


@dataclasses.dataclass
class Saved:
    """One save: when it was called, and when the training stood still because of it."""

    called: float
    response: ocp.AsyncResponse[None]
    waits: list[tuple[float, float]]

    @property
    def waited_secs(self) -> float:
        """How long the training stood still."""
        return sum(ended - begun for begun, ended in self.waits)


@dataclasses.dataclass
class Run:
    """What a training run did, for the report.

    Attributes:
      name: how the table calls it.
      losses: the loss by step.
      saves: its saves.
      steps: when each step began and ended.
      secs: from the first step to the last commit.
      state: the trained state.
    """

    name: str
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    saves: list[Saved] = dataclasses.field(default_factory=list)
    steps: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    secs: float = 0.0
    state: model.State = dataclasses.field(default_factory=dict)

    def save(self, path: Path, step: int, state: model.State) -> ocp.AsyncResponse[None]:
        """Starts a save; the state is donated to the next step as soon as it is staged."""
        called = time.perf_counter()
        response = ocp.save_async(path, {"train": state, "step": step})
        self.saves.append(Saved(called, response, [(called, time.perf_counter())]))
        return response

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Notes that the training waits for its last save."""
        began = time.perf_counter()
        yield
        self.saves[-1].waits.append((began, time.perf_counter()))


def latest(folder: Path) -> Path | None:
    """Returns the newest committed checkpoint; what a killed save left behind is none."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()]
    committed = [path for path in steps if ocp.is_orbax_checkpoint(path)]
    return max(committed, key=lambda path: int(path.name), default=None)


def _abstract() -> dict[str, object]:
    return {"train": model.abstract_state(), "step": 0}


def load_latest(folder: Path) -> tuple[model.State, int]:
    """Returns the newest state and its step, or a fresh state and 0."""
    path = latest(folder)
    if path is None:
        return model.start(), 0
    loaded = ocp.load(path, _abstract())
    return loaded["train"], loaded["step"]


async def load_latest_async(folder: Path) -> tuple[model.State, int]:
    """Does what `load_latest` does, without blocking the loop."""
    path = await asyncio.to_thread(latest, folder)
    if path is None:
        return model.start(), 0
    loaded = await ocp.load_async(path, _abstract())
    return loaded["train"], loaded["step"]


def warm_up(folder: Path) -> None:
    """Compiles both halves of a step, and starts the engine, so that no run pays for it."""
    state = model.start()
    ocp.save(folder, state)
    _, grads = model.gradients(state, *model.batch(0))
    jax.block_until_ready(model.update(state, grads))


def train_sync(
    name: str,
    folder: Path | None,
    *,
    steps: int,
    save_every: int,
    waits: Literal["at once", "before the next save"] = "before the next save",
) -> Run:
    """Trains in a plain loop; without a folder it saves nothing."""
    run, state, response = Run(name), model.start(), None
    began = time.perf_counter()
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        loss, grads = model.gradients(state, *model.batch(step))
        state = jax.block_until_ready(model.update(state, grads))
        run.steps.append((begun, time.perf_counter()))
        run.losses[step] = float(loss)
        if folder is not None and step % save_every == 0:
            if response is not None:
                with run.waiting():
                    response.result()
            response = run.save(folder / str(step), step, state)
            if waits == "at once":
                with run.waiting():
                    response.result()
    if response is not None:
        response.result()
    run.secs, run.state = time.perf_counter() - began, state
    return run


async def train_async(
    name: str,
    folder: Path,
    *,
    steps: int,
    save_every: int,
    staging: Literal["eager", "lazy"],
    tell: Tell = lambda line: None,
) -> Run:
    """Trains in a coroutine, from the newest checkpoint in `folder` on."""
    context = ocp.Context()
    context.asynchronous.staging = staging
    run, response = Run(name), None
    state, done = await load_latest_async(folder)
    began = time.perf_counter()
    with context:
        for step in range(done + 1, steps + 1):
            begun = time.perf_counter()
            loss, grads = model.gradients(state, *model.batch(step))
            if response is not None and (step - 1) % save_every == 0:
                # The update donates what the last save reads, which must be captured before. Eager
                # staging did that in the call; lazy staging did it beside the lines above.
                with run.waiting():
                    await response.staged()
            state = model.update(state, grads)
            await asyncio.to_thread(jax.block_until_ready, state)
            run.steps.append((begun, time.perf_counter()))
            run.losses[step] = float(loss)
            tell(f"step {step} {run.losses[step]!r}")
            if step % save_every == 0:
                if response is not None:
                    with run.waiting():
                        await response
                tell(f"saving {step}")
                response = run.save(folder / str(step), step, state)
                response.on_complete(lambda _, step=step: tell(f"committed {step}"))
        if response is not None:
            await response
    run.secs, run.state = time.perf_counter() - began, state
    return run
