"""A run's checkpoints: which steps are saved, and which of them are kept.

Does:
  - save, load, list and delete the steps of a run (`checkpointer`);
  - know each step as one record, and the directory that they lie in (`steps`);
  - decide which saves are due, and order them (`queue`); remove old steps (`retirement`);
  - ask policies which steps are saved (`save_decision_policies`) and which are kept
    (`preservation_policies`), and tell why (`policy`);
  - foretell both for a whole run (`retention`);
  - know when the job is about to be preempted (`preemption`).

Does not:
  - name steps, or find them by name: that is `path.step`;
  - know what a checkpoint holds, or how it becomes durable.
"""

from __future__ import annotations

from orbax_async import errors as errors
from orbax_async.training import preemption as preemption
from orbax_async.training import preservation_policies as preservation_policies
from orbax_async.training import save_decision_policies as save_decision_policies
from orbax_async.training.checkpointer import Checkpointer as Checkpointer
from orbax_async.training.policy import CheckpointInfo as CheckpointInfo
from orbax_async.training.retention import Plan as Plan
from orbax_async.training.retention import PlannedStep as PlannedStep
from orbax_async.training.retention import plan as plan
from orbax_async.training.retention import retain as retain
from orbax_async.training.steps import CheckpointMetadata as CheckpointMetadata
from orbax_async.training.steps import RootMetadata as RootMetadata

__all__ = [
    "CheckpointInfo",
    "CheckpointMetadata",
    "Checkpointer",
    "Plan",
    "PlannedStep",
    "RootMetadata",
    "errors",
    "plan",
    "preemption",
    "preservation_policies",
    "retain",
    "save_decision_policies",
]
