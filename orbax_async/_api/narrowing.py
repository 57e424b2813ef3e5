"""Loading parts of several checkpointables: which leaves, and where to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from orbax_async.handlers import choose
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.handlers.read_plan import ShardingFunction
from orbax_async.tree.selection import Select

__all__ = ["Narrowing", "Selects", "Shardings"]

Selects = Select | Mapping[str, Select]
Shardings = jax.sharding.Sharding | ShardingFunction | Mapping[str, Any]


class Narrowing:
    """What is wanted of the pytrees among several checkpointables.

    Args:
      select: patterns or a function, as for a state, for all pytrees; or a mapping of names to
        such, which leaves the others whole.
      sharding: likewise.

    Raises:
      TypeError, ValueError: one of them is something else.
    """

    def __init__(self, select: Selects | None, sharding: Shardings | None) -> None:
        self._options = {"select": _kept(select), "sharding": _kept(sharding)}
        for what, given in self._options.items():
            for one in given.values() if isinstance(given, Mapping) else [given]:
                options: dict[str, Any] = {what: one}
                PyTreeHandler().read_abstract(None, **options)

    def of(
        self, parts: Mapping[str, choose.Part], abstracts: Mapping[str, Any]
    ) -> dict[str, choose.Part]:
        """Returns what is to be loaded, narrowed.

        Args:
          parts: what would be loaded, by name.
          abstracts: as what.

        Raises:
          ValueError: one that is named is not loaded, or is no pytree; or none of them is.
        """
        trees = [name for name, part in parts.items() if isinstance(part.handler, PyTreeHandler)]
        narrowed = dict(parts)
        for what, given in self._options.items():
            named = given if isinstance(given, Mapping) else dict.fromkeys(trees or parts, given)
            wrong = [name for name in named if name not in trees and given is not None]
            if wrong:
                raise ValueError(
                    f"{what}: {wrong} can't be loaded in part, as nothing but pytrees can; of what "
                    f"is to be loaded these are pytrees: {trees}"
                )
        for name in trees:
            options = {
                what: given.get(name) if isinstance(given, Mapping) else given
                for what, given in self._options.items()
            }
            if any(each is not None for each in options.values()):
                abstract = parts[name].handler.read_abstract(abstracts[name], **options)
                narrowed[name] = parts[name]._replace(value=abstract)
        return narrowed


def _kept(given: Any) -> Any:
    """Returns patterns that can be read several times, unlike those of a generator."""
    if isinstance(given, Mapping):
        return {name: _kept(each) for name, each in given.items()}
    return list(given) if isinstance(given, Iterator) else given
