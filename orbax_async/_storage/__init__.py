"""How leaves and documents lie on disk.

Does:
  - say what a directory is, and read JSON documents from one in bounds (`directory`);
  - say which directory a path means, with that of a file system (`local`);
  - open stores of arrays, and merge per-process databases (`array_store`);
  - read values straight from data files (`direct`), and tensors from safetensors files
    (`safetensors`);
  - describe zarr arrays (`zarr`), and encode and decode their chunks, with checksums (`codecs`).

Does not:
  - know about options or contexts, or what a checkpointable is;
  - decide what is written when: that is the engine's.
"""
