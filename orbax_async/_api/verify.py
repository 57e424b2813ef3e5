"""Verifying a checkpoint: reading all of it, and reporting what is damaged."""

from __future__ import annotations

import dataclasses

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._api import layout
from orbax_async._operation import starting
from orbax_async._response import AsyncResponse
from orbax_async.handlers import builtin
from orbax_async.handlers.documents import JsonHandler, MetricsHandler
from orbax_async.handlers.inspection import Damage, Findings, inspect_tree
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.path import Path, PathLike, pathlike

__all__ = ["Damage", "VerificationReport", "verify", "verify_async"]

_SHOWN = 20
_DOCUMENTS = {builtin.TYPESTRS[kind]: kind for kind in (JsonHandler, MetricsHandler)}
_TREES = (builtin.TYPESTRS[PyTreeHandler],)


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """What was found when a checkpoint was read as a whole.

    `str` gives it as text.

    Attributes:
      path: the checkpoint.
      damage: all that is wrong, by checkpointable, documents first.
      leaves: how many leaves were looked at.
      nbytes: how many bytes of arrays were read, decoded.
      elapsed_secs: how long it took.
      unproven: leaves that could be read, but whose values have no checksum that proves them, as
        `name['key']`. Orbax itself writes none.
      unchecked: checkpointables of which only their own handler could tell.
    """

    path: str
    damage: tuple[Damage, ...]
    leaves: int
    nbytes: int
    elapsed_secs: float
    unproven: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def is_intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    @property
    def intact(self) -> tuple[str, ...]:
        """Patterns that leave out the damaged leaves, for `load(..., select=)`; `**` for none."""
        return tuple(f"!{each.pattern}" for each in self.damage if each.pattern) or ("**",)

    def __str__(self) -> str:
        verdict = "intact" if self.is_intact else f"damaged, {len(self.damage)} findings"
        lines = [
            f"{self.path}: {verdict} ({self.leaves} leaves, {self.nbytes / 1e6:.1f} MB read in "
            f"{self.elapsed_secs:.2f} s)"
        ]
        lines += [f"  {each}\n    {each.hint}" for each in self.damage[:_SHOWN]]
        if len(self.damage) > _SHOWN:
            lines.append(f"  and {len(self.damage) - _SHOWN} more")
        if self.unproven:
            lines.append(f"  without checksums: {_listed(self.unproven)}")
        if self.unchecked:
            lines.append(f"  not looked into: {_listed(self.unchecked)}")
        return "\n".join(lines)


def _listed(items: tuple[str, ...]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def verify(path: PathLike) -> VerificationReport:
    """Reads all of a checkpoint, and returns a report of what is damaged.

    Takes and raises what `verify_async` does.

    Example:
      ::

        report = ocp.verify("/checkpoints/7")
        if not report.is_intact:
            print(report)
            state = ocp.load("/checkpoints/7", select=report.intact)
    """
    return verify_async(path).result()


def verify_async(path: PathLike) -> AsyncResponse[VerificationReport]:
    """Reads all of a checkpoint in the background, and reports what is damaged.

    Every document is parsed, every chunk of every array is read and decoded, and every checksum is
    checked, under `memory.read_concurrent_bytes`. Nothing is kept, and nothing is put on devices.
    Safetensors files have no checksums: their headers are checked, their sizes, and that every byte
    can be read; all of their tensors are `unproven`.

    Example:
      ::

        assert (await ocp.verify_async("/checkpoints/7")).is_intact

    Args:
      path: the checkpoint; under another `context.checkpoint_layout`, safetensors files.

    Returns:
      A response whose result is the report. Damage raises nothing.

    Raises:
      InvalidLayoutError: (when awaited) there is no checkpoint, not even a damaged one.
    """
    with starting("load") as doing:
        where = pathlike.absolute(path, doing.context.file.path_class)

        async def read() -> VerificationReport:
            survey = await layout.when_settled(where, layout.survey)
            damage = [
                Damage("", "", found.path, found.problem, found.hint) for found in survey.problems
            ]
            total = Findings(damage)
            unchecked = []
            for name, typestr in survey.typestrs.items():
                directory = survey.directory(name)
                if name in survey.pytrees or typestr in _TREES:
                    findings = await inspect_tree(name, directory, doing.context, doing)
                elif typestr in _DOCUMENTS or name == names.METRICS:
                    kind = _DOCUMENTS.get(typestr or "", MetricsHandler)
                    findings = await _inspect_document(name, directory, kind())
                else:
                    unchecked.append(name)
                    continue
                total.damage += findings.damage
                total.leaves += findings.leaves
                total.nbytes += findings.nbytes
                total.unproven += findings.unproven
            return VerificationReport(
                where,
                tuple(total.damage),
                total.leaves,
                total.nbytes,
                doing.recorder.progress().elapsed_secs,
                tuple(total.unproven),
                tuple(unchecked),
            )

        return doing.start(f"verification of {where}", lambda: layout.read_whole(where, read))


async def _inspect_document(name: str, directory: str, handler: JsonHandler) -> Findings:
    try:
        await (await handler.load(Path(directory)))
    except (errors.InvalidLayoutError, OSError) as error:
        hint = "Copy the file again from where the checkpoint came from."
        path, _, problem = str(error).partition(" is ")
        return Findings([Damage(name, "", path, f"it is {problem}" if problem else path, hint)])
    return Findings()
