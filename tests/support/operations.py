"""The operations that begin during a test, for tests of their budgets and of their end."""

from __future__ import annotations

import pytest

from orbax_async._operation import Operation, Verb


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """Returns a list that takes each operation as it begins."""
    begun: list[Operation] = []
    begin = Operation.__init__

    def note(self: Operation, verb: Verb) -> None:
        begin(self, verb)
        begun.append(self)

    monkeypatch.setattr(Operation, "__init__", note)
    return begun
