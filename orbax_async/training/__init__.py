"""A run's checkpoints: which steps are saved, and which of them are kept.

Does:
  - describe a step as policies see it (`checkpoint_info`);
  - decide when a step is saved (`save_decision_policies`), and why;
  - decide which steps are kept (`preservation_policies`), and why;
  - foretell both for a whole run (`retention.plan`).

Does not:
  - name or find steps: that is `path.step`;
  - know what a checkpoint holds, or how it becomes durable.
"""

from __future__ import annotations

from orbax_async import errors as errors
from orbax_async.training import preservation_policies as preservation_policies
from orbax_async.training import save_decision_policies as save_decision_policies
from orbax_async.training.checkpoint_info import CheckpointInfo as CheckpointInfo
from orbax_async.training.checkpoint_info import CheckpointMetadata as CheckpointMetadata
from orbax_async.training.checkpoint_info import RootMetadata as RootMetadata
from orbax_async.training.retention import Plan as Plan
from orbax_async.training.retention import PlannedStep as PlannedStep
from orbax_async.training.retention import plan as plan
from orbax_async.training.retention import retain as retain

__all__ = [
    "CheckpointInfo",
    "CheckpointMetadata",
    "Plan",
    "PlannedStep",
    "RootMetadata",
    "errors",
    "plan",
    "preservation_policies",
    "retain",
    "save_decision_policies",
]
