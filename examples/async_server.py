"""A server that reads digits over HTTP while it trains on, checkpoints, and reloads what it saved.

    python examples/async_server.py --directory /tmp/digits --port 8000
    curl localhost:8000/status
    curl localhost:8000/predict -d "[0, 0, 5, 13, ... 64 numbers from 0 to 16]"
    kill %1                      # answers what was asked, saves the last step, and ends

It answers with what is on disk: a step is served once it is durable. With `--smoke` it asks itself,
over HTTP, what unseen digits are, and then sends itself the SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import re
import signal
import urllib.request
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import orbax_async as ocp
from orbax_async.training import Checkpointer
from orbax_async.training import preservation_policies as keep

SEED, HIDDEN, BATCH, TRAINED_ON, ROUND = 7, 128, 128, 1500, 20
State = dict[str, Any]

pixels, labels = load_digits(return_X_y=True)
shuffled = np.random.default_rng(SEED).permutation(len(labels))
PIXELS, LABELS = pixels[shuffled].astype(np.float32), labels[shuffled].astype(np.int32)
optimizer = optax.adam(1e-3)


def initial_state() -> State:
    """Returns the state before the first step: weights, and Adam's moments."""
    first, second = jax.random.split(jax.random.key(SEED))
    params = [jax.random.normal(first, (64, HIDDEN)) / 8, jnp.zeros(HIDDEN)]
    params += [jax.random.normal(second, (HIDDEN, 10)) / 8, jnp.zeros(10)]
    return {"params": params, "opt_state": optimizer.init(params)}


@jax.jit
def logits(params: Any, pixels: jax.Array) -> jax.Array:
    """Returns how likely each digit is, for each picture."""
    return jax.nn.relu(pixels / 16 @ params[0] + params[1]) @ params[2] + params[3]


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: State, pixels: jax.Array, labels: jax.Array) -> State:
    """Makes one step of Adam. It donates the old state, whose memory the new one takes over."""

    def loss_of(params: Any) -> jax.Array:
        read = logits(params, pixels)
        return optax.softmax_cross_entropy_with_integer_labels(read, labels).mean()

    grads = jax.grad(loss_of)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}


def train(state: State, first: int, steps: int) -> State:
    """Makes some steps; it blocks, and belongs in a thread."""
    for step in range(first, first + steps):
        chosen = np.random.default_rng([SEED, step]).integers(0, TRAINED_ON, BATCH)
        state = train_step(state, PIXELS[chosen], LABELS[chosen])
    return jax.block_until_ready(state)


class Reader:
    """Reads digits with the newest durable weights (`step`, `params`), and trains the next ones."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer, self.step = checkpointer, -1

    async def start(self) -> State:
        """Returns the state to train on from: the newest, or one that has had a first training."""
        if self.checkpointer.latest is None:
            state = await asyncio.to_thread(train, initial_state(), 0, 200)
            await self.checkpointer.save_async(200, state)
        await self.serve(self.checkpointer.latest.step)
        return await self.checkpointer.load_async(self.step, jax.eval_shape(initial_state))

    async def serve(self, step: int, saved: ocp.AsyncResponse[bool] | None = None) -> None:
        """Loads the weights of a step, once its save is durable, and serves them from then on."""
        if saved is not None:
            await saved
        abstract = {"params": jax.eval_shape(initial_state)["params"]}  # Adam's moments stay there
        loaded = await self.checkpointer.load_async(step, abstract)
        if step > self.step:
            self.step, self.params = step, loaded["params"]

    async def fine_tune(self, state: State, steps: int, stopping: asyncio.Event) -> None:
        """Trains on; saves whenever no save is under way, and at the end."""
        step = self.step
        async with asyncio.TaskGroup() as group:
            while step < steps and not stopping.is_set():
                state = await asyncio.to_thread(train, state, step, ROUND)
                step += ROUND
                if response := self.checkpointer.save_async(step, state):  # None: one is under way
                    group.create_task(self.serve(step, response))
                    await response.staged()  # the next round donates the state
        if self.checkpointer.should_save(step):  # unless it has been
            await self.serve(step, self.checkpointer.save_async(step, state))

    def answer(self, target: str, body: bytes) -> tuple[str, dict[str, Any]]:
        """Answers one request."""
        answer = {"step": self.step, "is_saving": self.checkpointer.is_saving_in_progress()}
        if target == "/status":
            return "200 OK", answer
        if target != "/predict":
            return "404 Not Found", {"error": "ask for /status or /predict"}
        try:
            found = logits(self.params, np.array(json.loads(body), np.float32).reshape(1, 64))[0]
        except (TypeError, ValueError) as error:
            return "400 Bad Request", {"error": f"send 64 numbers: {error}"}
        return "200 OK", answer | {"digit": int(found.argmax()), "logits": found.tolist()}

    async def respond(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Reads one HTTP request, answers it, and closes the connection."""
        try:
            async with asyncio.timeout(10):
                head = (await source.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)\ncontent-length: *(\d+)", head)
                body = await source.readexactly(int(length[1]) if length else 0)
                status, answer = self.answer(head.split()[1], body)
                text = json.dumps(answer)
                head = f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\nConnection: close"
                sink.write(f"{head}\r\n\r\n{text}".encode())
                await sink.drain()
        except Exception as error:  # a client's fault must not end the server
            print(f"a request failed: {error!r}", flush=True)
        finally:
            sink.close()


async def run(directory: Path, steps: int, port: int, is_smoke: bool) -> None:
    """Serves until SIGTERM or Ctrl-C; ends when all is answered, and the last step is durable."""
    stopping = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stopping.set)
    context = ocp.Context()
    context.asynchronous.staging = "lazy"  # saving never blocks the loop
    context.pytree.loading.partial_load = True  # what is not asked for is not read
    three = keep.LatestN(3)
    async with Checkpointer(directory, context=context, preservation_policy=three) as checkpointer:
        reader = Reader(checkpointer)
        state = await reader.start()
        async with asyncio.TaskGroup() as group:
            server = await asyncio.start_server(
                lambda *streams: group.create_task(reader.respond(*streams)), "127.0.0.1", port
            )
            async with server:  # it accepts no connection after this block
                address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
                print(f"serving step {reader.step} on {address}", flush=True)
                group.create_task(reader.fine_tune(state, steps, stopping))
                if is_smoke:
                    group.create_task(asyncio.to_thread(smoke, address))
                await stopping.wait()
    print(f"stopped at step {reader.step}")


def smoke(address: str) -> None:
    """Asks what all unseen digits are, until a newer step has been loaded; then ends the server."""
    steps: set[int] = set()
    while len(steps) < 2:
        digits = []
        for picture in PIXELS[TRAINED_ON:]:
            body = json.dumps(picture.tolist()).encode()
            with urllib.request.urlopen(f"{address}/predict", body, timeout=10) as response:
                answer = json.load(response)
            digits.append(answer["digit"])
            steps.add(answer["step"])
    print(f"{np.mean(digits == LABELS[TRAINED_ON:]):.3f} read right, by {len(steps)} steps in all")
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="for the checkpoints")
    parser.add_argument("--steps", type=int, default=20_000, help="how far to train")
    parser.add_argument("--port", type=int, default=0, help="0 for any that is free")
    parser.add_argument("--smoke", action="store_true", help="ask, and end by itself")
    given = parser.parse_args()
    asyncio.run(run(given.directory, given.steps, given.port, given.smoke))
