"""The verbs: each is one coroutine, with a blocking and an awaitable door.

Does:
  - check what it is given before any work starts, and find checkpointables in a checkpoint;
  - run an operation until it is committed or undone;
  - keep the names that Orbax has deprecated, and show all public names (`public`).

Does not:
  - know how arrays are stored, or how bytes are scheduled.
"""
