"""The verbs: each is one coroutine, with a blocking and an awaitable door.

Does:
  - check what they are given before any work starts, and start it through the one door;
  - keep the names that Orbax has deprecated.

Does not:
  - know how arrays are stored, or how bytes are scheduled.
"""
