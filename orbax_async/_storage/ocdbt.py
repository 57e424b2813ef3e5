"""Merging the databases of several processes into the one that readers open.

Each process writes `ocdbt.process_<i>/` below the checkpointable's directory. The merged database
in the directory itself refers to their data files: no array byte is copied, and the files must
stay where they are.
"""

from __future__ import annotations

import os
import pathlib

import tensorstore as ts

from orbax_async import _names as names

__all__ = ["merge_process_databases"]


def merge_process_databases(directory: str) -> int:
    """Merges all `ocdbt.process_*` databases below `directory` in one atomic commit.

    Returns:
      How many databases were merged.
    """
    pattern = names.PROCESS_DATABASE.format("*")
    databases = sorted(
        path
        for path in pathlib.Path(directory).glob(pattern)
        if (path / names.OCDBT_MANIFEST).exists()
    )
    if not databases:
        return 0
    # Copying by reference needs one context for source and target.
    context = ts.Context({"file_io_sync": False})
    base = pathlib.Path(os.path.abspath(directory)).as_uri()
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}
    target = ts.KvStore.open(
        {"driver": "ocdbt", "base": f"{base}/", "config": config}, context=context
    ).result()
    transaction = ts.Transaction(atomic=True)
    pending = [
        ts.KvStore.open({"driver": "ocdbt", "base": f"{base}/{path.name}/"}, context=context)
        .result()
        .experimental_copy_range_to(target.with_transaction(transaction))
        for path in databases
    ]
    for copied in pending:
        copied.result()
    transaction.future.result()  # begins the commit, without the GIL that commit_async holds
    return len(databases)
