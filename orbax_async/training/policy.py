"""What all policies share: what they see of a step, and how they are checked, asked and explained.

A policy is an object with one method, or a plain function of the same arguments. Those of this
package are both.

One policy may be made of several (`Several`). Which of them decided is told by name.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

from orbax_async.options._group import anything, flag, optional

__all__ = ["CheckpointInfo", "Opinion", "Policy", "Several", "check", "decided", "judge", "named"]

T = TypeVar("T")


@runtime_checkable
class CheckpointInfo(Protocol):
    """A step as policies see it: its number, its time, its metrics."""

    @property
    def step(self) -> int:
        """The step's number."""
        ...

    @property
    def time(self) -> datetime.datetime:
        """When the step was saved; for one still to be saved, the time now. With a time zone."""
        ...

    @property
    def metrics(self) -> Any:
        """The metrics it was saved with; None if it has none."""
        ...


class Opinion(NamedTuple):
    """What a policy says of one step, and the names of the policies that made it say so."""

    is_for: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """The base of policies, whose fields are checked when one is made.

    A field declares its check as an option does. Where its default is None, None is taken as well,
    and a bool stands for a bool.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = field.metadata.get("check", anything)
            if isinstance(field.default, bool):
                check = flag
            elif field.default is None:
                check = optional(check)
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))


@dataclasses.dataclass(frozen=True)
class Several(Policy):
    """A policy made of others, each a policy or a plain function."""

    policies: Sequence[Any]
    _method: ClassVar[str]
    _fate: ClassVar[str]  # what the policies say of a step, in one word
    _is_decisive: ClassVar[bool]  # the answer of one policy that is the answer of all
    _stops_early: ClassVar[bool]  # whether no policy is asked after a decisive answer
    _may_be_empty: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.policies, Iterable):
            raise TypeError(f"policies must be a sequence of policies, not {self.policies!r}")
        object.__setattr__(self, "policies", tuple(self.policies))
        for each in self.policies:
            check("each of policies", each, self._method)
        if not self.policies and not self._may_be_empty:
            raise ValueError(
                f"policies is empty: {type(self).__name__} needs at least one to say what is "
                f"{self._fate}"
            )


def check(name: str, value: Any, method: str) -> None:
    """Raises TypeError if `value` has no such method and is no function either."""
    if isinstance(value, type) or not (callable(value) or hasattr(value, method)):
        raise TypeError(f"{name} must have a method {method}, or be a function, not {value!r}")


def judge(policy: Any, method: str, ask: Callable[[Any], Sequence[Any]]) -> list[Opinion]:
    """Asks a policy, or all that it is made of, and joins what they say.

    Args:
      policy: the policy, or a plain function.
      method: the method that a policy answers with.
      ask: asks a single one, and returns one answer for each step that it is asked about.

    Raises:
      TypeError: it is no policy.
    """
    if not isinstance(policy, Several):
        check("policy", policy, method)
        return [Opinion(bool(answer), named(policy)) for answer in ask(policy)]
    if not policy.policies:  # one that may be empty is asked about one step
        return [Opinion(not policy._is_decisive, "no policies")]
    heard: list[list[Opinion]] = []
    for each in policy.policies:
        heard.append(judge(each, method, ask))
        if policy._stops_early and all(one.is_for is policy._is_decisive for one in heard[-1]):
            break
    return [_joined(opinions, policy._is_decisive) for opinions in zip(*heard, strict=True)]


def _joined(opinions: Sequence[Opinion], decisive: bool) -> Opinion:
    deciding = [one for one in opinions if one.is_for is decisive]
    why = ", ".join(one.why for one in deciding or opinions)
    return Opinion(decisive if deciding else not decisive, why)


def decided(policy: Any, answer: T) -> T:
    """Returns an answer; refuses one that must be awaited, for every coroutine is true."""
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError(f"{named(policy)} is asynchronous; a policy must decide without waiting")
    return answer


def named(policy: object) -> str:
    """Returns how reasons call a policy: by what makes it, or else by the name of what it is."""
    if isinstance(name := getattr(policy, "__qualname__", None), str):
        return name
    kind = type(policy)
    if kind.__repr__ is object.__repr__:
        return kind.__qualname__
    if not dataclasses.is_dataclass(policy):
        return repr(policy)
    told = [
        f"{field.name}={getattr(policy, field.name)!r}"
        for field in dataclasses.fields(policy)
        if field.repr and getattr(policy, field.name) != field.default
    ]
    return f"{kind.__name__}({', '.join(told)})"
