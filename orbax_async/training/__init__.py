"""A run's checkpoints: which steps are saved, and which of them are kept.

Does:
  - save, load, list and remove the steps of a run (`checkpointer`, and behind it `run`, with the
    saves under way in `save_queue`, the steps in `run_steps` and `run_directory`, and what becomes
    of those that go in `retirement`);
  - describe a step as policies see it (`checkpoint_info`);
  - decide when a step is saved (`save_decision_policies`), and why;
  - decide which steps are kept (`preservation_policies`), and why;
  - foretell both for a whole run (`retention.plan`);
  - know when the job is about to be preempted (`preemption`).

Does not:
  - name or find steps: that is `path.step`;
  - know what a checkpoint holds, or how it becomes durable.
"""

from __future__ import annotations

from orbax_async import errors as errors
from orbax_async.training import preemption as preemption
from orbax_async.training import preservation_policies as preservation_policies
from orbax_async.training import save_decision_policies as save_decision_policies
from orbax_async.training.checkpoint_info import CheckpointInfo as CheckpointInfo
from orbax_async.training.checkpoint_info import CheckpointMetadata as CheckpointMetadata
from orbax_async.training.checkpoint_info import RootMetadata as RootMetadata
from orbax_async.training.checkpointer import Checkpointer as Checkpointer
from orbax_async.training.retention import Plan as Plan
from orbax_async.training.retention import PlannedStep as PlannedStep
from orbax_async.training.retention import plan as plan
from orbax_async.training.retention import retain as retain

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
