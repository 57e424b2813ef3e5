"""The ways in which a checkpoint can lie in a directory.

Does:
  - tell which layout lies at a path, by one rule over a table, and read a checkpoint as one whole,
    also while it is being replaced (`reader`);
  - say what a layout answers (`layout`), with a module for each (`orbax`, `tensors`): what a
    checkpoint holds, how a stored tree of it is read, and what of it is damaged.

Does not:
  - read values (the engine does), choose handlers, or write: Orbax's layout is written by handlers
    and the commit.

A new layout is a module here and a row of `reader.TABLE`.
"""
