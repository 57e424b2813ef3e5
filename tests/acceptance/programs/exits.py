"""Starts a save, never waits for it, and ends in one of many ways.

    exits.py DIRECTORY WAY

Prints the monotonic time of the end of what the user wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import threading
import time
from pathlib import Path

from acceptance import states

import orbax_async as ocp

directory, way = Path(sys.argv[1]), sys.argv[2]
final = directory / "checkpoint"


def save(mebibytes: float = 2) -> None:
    """Starts a save that nobody waits for."""
    ocp.save_async(final, states.make(0, mebibytes=mebibytes))


async def save_from_a_loop() -> None:
    """Starts a save on a loop that ends at once."""
    save()
    if way == "loop_raise":
        raise RuntimeError("the end of the loop")


def note_end() -> None:
    """Tells when the script had nothing left to do."""
    print(time.monotonic(), flush=True)


match way:
    case "end":
        save()
        note_end()
    case "raise":
        save()
        note_end()
        raise RuntimeError("the end of the script")
    case "sys_exit":
        save()
        note_end()
        sys.exit(3)
    case "loop_end":
        asyncio.run(save_from_a_loop())
        note_end()
    case "loop_raise":
        note_end()
        asyncio.run(save_from_a_loop())
    case "thread":
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
        note_end()
    case "late_thread":  # still saves when the main thread has ended
        ocp.save(directory / "before", {"step": 1})  # the engine is there
        threading.Thread(target=save).start()
        note_end()
    case "slow":
        context = ocp.Context()
        context.asynchronous.exit_grace_secs = 0.01
        with context:
            save(mebibytes=96)
        note_end()
    case "lazy":
        context = ocp.Context()
        context.asynchronous.staging = "lazy"
        with context:
            save()
        note_end()
    case "grain":  # its iterators write with `asyncio.to_thread`
        import grain

        data = iter(grain.MapDataset.range(100).shuffle(seed=3).batch(4).to_iter_dataset())
        next(data)
        save(mebibytes=32)  # holds up the next one until the interpreter is exiting
        both = {"state": states.make(0, mebibytes=2), "data": data}
        ocp.save_checkpointables_async(final, both, overwrite=True)
        note_end()
    case "parent_is_gone":
        final = directory / "parent" / "checkpoint"
        final.parent.mkdir()
        save(mebibytes=32)
        while not final.parent.is_file():  # the save may just be making it again
            shutil.rmtree(final.parent, ignore_errors=True)
            with contextlib.suppress(IsADirectoryError):
                final.parent.write_text("now a file")
        note_end()
