"""Where checkpoints lie, and how leaves and documents lie there.

Does:
  - say what a directory is (`directory`), be one of a local file system (`local`), and find the
    one that a path means (`openers`);
  - open stores of arrays and merge the databases of processes (`array_store`);
  - read values straight from a local database's files (`direct`), and tensors from safetensors
    files (`safetensors`);
  - describe zarr arrays (`zarr`), encode and decode them, with checksums (`codecs`);
  - read JSON documents in bounds (`json_documents`).

Does not:
  - know about pytrees, options or contexts;
  - decide what is written when: that is the engine's.
"""
