"""The verbs: each is one coroutine, with a blocking and an awaitable door.

Does:
  - check what it is given before any work starts, and take a snapshot of the options;
  - run an operation on the engine, under its time limit, until it is committed or undone
    (`save`, `load`, `metadata`);
  - keep the names that Orbax has deprecated (`older_names`);
  - hand out responses (`response`) and find checkpointables in a checkpoint (`layout`).

Does not:
  - know how arrays are stored, or how bytes are scheduled.
"""
