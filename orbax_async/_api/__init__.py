"""The verbs: each is one coroutine, with a blocking and an awaitable door.

Does:
  - check what they are given before any work starts, and start it through the one door;
  - read a checkpoint as one whole, also while it is being replaced (`reader`);
  - keep the names that Orbax has deprecated, and show all public names (`public`).

Does not:
  - know how arrays are stored, or how bytes are scheduled.
"""
