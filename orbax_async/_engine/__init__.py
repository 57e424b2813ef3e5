"""Moving bytes between devices, host memory and storage.

Does:
  - own the process's one event loop and its workers (`loop`), which share the interpreter lock with
    the user's program (`gil`);
  - decide, purely, which process writes and reads which piece of which leaf (`plan`);
  - say what a leaf is on its way out, and what is written together (`leaf`);
  - hold bytes in flight under hard budgets (`budget`);
  - capture values from devices and host memory, and place them back (`transfer`);
  - run a plan to its end, or undo it (`save_pipeline`, `load_pipeline`, which also verifies).

Does not:
  - read the ambient context: it is handed plain values;
  - know what a checkpoint looks like on disk, or make one visible.
"""
