"""Making a checkpoint visible, whole and durable, or leaving nothing.

Does:
  - name, create, publish, recover and sweep temporary directories (`atomicity`);
  - write a checkpoint's own documents, sync everything, and commit (`finalize`);
  - gather partial saves until they are put together (`session`).

Does not:
  - write array data, or know what a checkpointable holds.
"""
