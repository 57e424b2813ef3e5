"""Moving bytes between devices, host memory and storage.

Does:
  - own the process's one event loop and its workers (`loop`);
  - decide, purely, which process writes and reads which piece of which leaf (`plan`);
  - hold bytes in flight under hard budgets (`budget`);
  - capture values from devices and host memory, and place them back (`transfer`);
  - run a plan to its end, or undo it (`save_pipeline`, `load_pipeline`, `verify_pipeline`);
  - tell callbacks what becomes of each leaf (`status`).

Does not:
  - read the ambient context: it is handed plain values;
  - know what a checkpoint looks like on disk, or make one visible.
"""
