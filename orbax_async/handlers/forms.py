"""The form of a state: everything about it but its values, made once for a structure.

A training loop saves the same structure again and again. What a save works out from structure
alone, names, plan, documents, is kept with the form and found again by the tree's definition and
each leaf's type, shape, dtype and sharding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._engine import transfer
from orbax_async.handlers import kinds, leaves
from orbax_async.handlers.leaves import Described, LeafForm
from orbax_async.tree import schema, structure
from orbax_async.tree.keypath import JaxKeyPath

__all__ = ["PreparedTree", "TreeForm", "prepare"]

_KEPT = 8  # forms; a program saves few structures


class TreeForm:
    """The leaves and empty nodes of a state, in order, and what is derived from them.

    Attributes:
      leaves: all of them.
      arrays: those that are stored as arrays.
      small: which of those are captured by `transfer.copy_small`.
      stored: how those are stored, by what that depends on.
      plans: what was planned for saving them, by what the plan depends on.
    """

    def __init__(self, forms: list[LeafForm]) -> None:
        self.leaves = forms
        self.arrays = [leaf for leaf in forms if leaf.shape is not None]
        self.small = transfer.small_ones(
            # Of another dtype than on disk are elements narrower than a byte.
            (
                leaf.shape or (),
                leaf.dtype,
                None if "logical_dtype" in leaf.private else leaf.sharding,
            )
            for leaf in self.arrays
        )
        self._are_views: dict[tuple[bool, bool | None], bool] = {}
        self.stored: dict[Hashable, Any] = {}
        self.plans: dict[Hashable, Any] = {}
        self._with_values = [leaf for leaf in forms if leaf.has_value]
        # Their arrays are stored as they are; of the others a stored value is made each time.
        self._are_as_stored = [
            leaf.sharding is not None and leaf.prng_impl is None for leaf in self._with_values
        ]

    def has_values_for(self, values: list[Any]) -> bool:
        """Says whether these are as many leaves as the form has."""
        return len(values) == len(self._with_values)

    def is_all_views(self, options: ambient.Context) -> bool:
        """Says whether each array is captured by a view of all of it."""
        copies = options.memory.deepcopy_host_arrays
        use_pinned_host = options.array.saving.enable_pinned_host_transfer
        found = self._are_views.get((copies, use_pinned_host))
        if found is None:
            found = self._are_views[copies, use_pinned_host] = all(
                transfer.capture_mode(
                    leaf.sharding,
                    is_mutable=leaf.is_mutable and copies,
                    use_pinned_host=use_pinned_host,
                )
                == "view"
                and (leaf.sharding is None or leaf.sharding.num_devices == 1)
                for leaf in self.arrays
            )
        return found

    def describe(self, values: list[Any]) -> list[Described]:
        """Pairs a state's leaves, found to be of this form, with their forms."""
        return [
            (leaf, value) if is_as_stored else leaves.describe(leaf.keys, value)
            for leaf, value, is_as_stored in zip(
                self._with_values, values, self._are_as_stored, strict=True
            )
        ]


class PreparedTree:
    """A state whose leaves are described: what tier 1 starts from.

    Attributes:
      form: its form.
      state: the state itself.
      arrays: the arrays to store, in the order of `form.arrays`.
      stored: how each of them is stored, once that is found.
      delays: by the index of an array how far behind the others it is captured.
      strings: the document of its strings, if it has any.
    """

    def __init__(self, form: TreeForm, described: list[Described], state: Any) -> None:
        self.form = form
        self.state = state
        self.stored: list[Any] = []
        self.delays: dict[int, int] = {}
        self.arrays = [value for leaf, value in described if leaf.shape is not None]
        texts = {leaf.name: value for leaf, value in described if leaf.kind == schema.STRING}
        try:
            self.strings = schema.dump_strings(texts) if texts else None
        except ValueError as error:
            raise errors.DuplicateLeafError(
                "", f"the string leaves can't be stored together: {error}; rename a key"
            ) from None

    def hold(self, options: ambient.Context, *, may_copy: bool = True) -> bool:
        """I3: copies small arrays, and takes views of all others if that is how each is captured.

        It needs no plan. A pipeline that finds NumPy arrays in their places takes them as they are.

        Args:
          options: those of the save.
          may_copy: whether copies may be made that no budget counts.

        Returns:
          Whether everything is captured, which is all that a save needs for the owner to go on.
        """
        with jax.transfer_guard("allow"), jax.enable_x64(True):
            if may_copy:
                transfer.copy_small(self.arrays, self.form.small)
            if not self.form.is_all_views(options):
                return False
            for index, array in enumerate(self.arrays):
                if isinstance(array, np.ndarray):
                    continue
                try:
                    self.arrays[index] = np.asarray(array)
                except Exception as error:
                    label = self.form.arrays[index].label
                    raise errors.StagingError(label, f"cannot be captured: {error}") from error
        return True

    def array_leaves(self) -> list[tuple[JaxKeyPath, Any]]:
        """Returns jax's key path and the user's own leaf for each array, for callbacks."""
        pairs, _ = structure.flatten_with_path(self.state)
        return [
            pair
            for pair, leaf in zip(pairs, self.form.leaves, strict=True)
            if leaf.shape is not None
        ]


_forms: dict[Hashable, TreeForm] = {}
_lock = threading.Lock()


def prepare(state: Any, *, as_files: bool, are_several: bool) -> PreparedTree:
    """Describes a state, and refuses what can't be stored; see `leaves.describe_all`."""
    values, treedef = jax.tree_util.tree_flatten(state)
    key, form = _find(values, treedef, as_files, are_several)
    if form is not None:
        return PreparedTree(form, form.describe(values), state)
    flat = structure.flatten(state)
    if not any(flat.keys) and (not flat.leaves or structure.empty_kind(flat.leaves[0]) is not None):
        raise errors.UnsupportedLeafError(
            "", f"Found empty item. There is nothing to save in {state!r}."
        )
    described = leaves.describe_all(flat.entries, as_files=as_files, are_several=are_several)
    form = TreeForm([leaf for leaf, _ in described])
    prepared = PreparedTree(form, described, state)
    if key is not None and form.has_values_for(values):
        with _lock:
            _forms[key] = form
            while len(_forms) > _KEPT:
                del _forms[next(iter(_forms))]
    return prepared


def _find(
    values: list[Any], treedef: Any, *settings: bool
) -> tuple[Hashable | None, TreeForm | None]:
    """Returns what the form of a state depends on, and the form if it is known.

    What it depends on is None where that can't be told quickly.
    """
    for cls in {type(value) for value in values} - _SIGNATURES.keys():
        _SIGNATURES[cls] = kinds.signature_of(cls)
    try:
        key = (treedef, settings, tuple([_SIGNATURES[type(value)](value) for value in values]))
        with _lock:
            return key, _forms.get(key)
    except (TypeError, ValueError, AttributeError):
        # A leaf that has no signature, or a definition that can't be hashed or compared.
        return None, None


_SIGNATURES: dict[type, Callable[[Any], Hashable]] = {}  # by the class of a leaf
