"""Making a checkpoint visible, whole and durable, or leaving nothing.

Does:
  - say what a commit is, commit by names or by a marker (`commits`), or part by part (`sessions`);
  - choose the commit by what lies at the path, and take its steps in one order (`sequence`);
  - tell whose unfinished work is, put back what was set aside, and sweep the rest (`leftovers`);
  - delete a checkpoint, or one checkpointable of it (`removal`).

Does not:
  - write array data, or know what a checkpointable holds;
  - know where files are: it asks a `Directory` what it can do.
"""
