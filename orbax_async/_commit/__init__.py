"""Making a checkpoint visible, whole and durable, or leaving nothing.

Does:
  - say what a commit is (`commit_protocol`), and take its steps in one order (`sequence`);
  - commit by names (`rename`), in place (`marker`), or part by part (`sessions`), as what lies at
    the path allows (`destination`);
  - tell whose unfinished work is, put back what was set aside, and sweep the rest (`leftovers`);
  - delete a checkpoint, or one checkpointable of it (`removal`).

Does not:
  - write array data, or know what a checkpointable holds;
  - know where files are: it asks a `Directory` what it can do.
"""
