"""Making a checkpoint visible, whole and durable, or leaving nothing.

Does:
  - say what may lie at a path, and how a save is committed there (`destination`);
  - take a save through its one sequence of steps (`sequence`), whatever commits it
    (`commit_protocol`): a change of names (`rename`), or a marker (`marker`);
  - tell the living from the dead, put back, and sweep what the dead have left (`leftovers`);
  - gather partial saves until they are put together (`sessions`);
  - delete (`removal`).

Does not:
  - write array data, or know what a checkpointable holds.
"""
