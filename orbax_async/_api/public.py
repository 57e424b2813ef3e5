"""All public names but modules, in one place, from which the package takes them at first use."""

from __future__ import annotations

from orbax_async._api.delete import delete as delete
from orbax_async._api.delete import delete_async as delete_async
from orbax_async._api.deprecated import load_pytree as load_pytree
from orbax_async._api.deprecated import load_pytree_async as load_pytree_async
from orbax_async._api.deprecated import pytree_metadata as pytree_metadata
from orbax_async._api.deprecated import save_pytree as save_pytree
from orbax_async._api.deprecated import save_pytree_async as save_pytree_async
from orbax_async._api.load import load as load
from orbax_async._api.load import load_async as load_async
from orbax_async._api.load import load_checkpointables as load_checkpointables
from orbax_async._api.load import load_checkpointables_async as load_checkpointables_async
from orbax_async._api.metadata import CheckpointMetadata as CheckpointMetadata
from orbax_async._api.metadata import PyTreeMetadata as PyTreeMetadata
from orbax_async._api.metadata import checkpointables_metadata as checkpointables_metadata
from orbax_async._api.metadata import is_orbax_checkpoint as is_orbax_checkpoint
from orbax_async._api.metadata import metadata as metadata
from orbax_async._api.save import save as save
from orbax_async._api.save import save_async as save_async
from orbax_async._api.save import save_checkpointables as save_checkpointables
from orbax_async._api.save import save_checkpointables_async as save_checkpointables_async
from orbax_async._api.verify import Damage as Damage
from orbax_async._api.verify import VerificationReport as VerificationReport
from orbax_async._api.verify import verify as verify
from orbax_async._api.verify import verify_async as verify_async
from orbax_async._response import AsyncResponse as AsyncResponse
from orbax_async.context import Context as Context
from orbax_async.handlers import PLACEHOLDER as PLACEHOLDER
from orbax_async.handlers import AbstractCheckpointable as AbstractCheckpointable
from orbax_async.handlers import Checkpointable as Checkpointable
from orbax_async.handlers import CheckpointableHandler as CheckpointableHandler
from orbax_async.handlers import StatefulCheckpointable as StatefulCheckpointable
