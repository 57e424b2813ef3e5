"""How leaves and documents lie on disk.

Does:
  - names every file and key of the format, once (`names`);
  - opens key-value stores and merges per-process databases (`kvstore`, `ocdbt`);
  - reads values straight from a local database's files (`direct`), and tensors from safetensors
    files (`safetensors`);
  - encodes and decodes zarr arrays, with checksums (`zarr`).

Does not:
  - know about pytrees, options or contexts;
  - decide what is written when: that is the engine's.
"""
