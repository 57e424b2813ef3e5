"""Checkpoints without a seal, as other libraries write them and older versions did."""

from __future__ import annotations

from pathlib import Path


def unseal(inside: Path) -> None:
    """Takes the digests of a checkpoint away: what is edited counts as written by somebody else.

    `inside` is the checkpoint, or anything in it; one that has no digests stays as it is.
    """
    for checkpoint in (inside, *inside.parents):
        proof, metadata = checkpoint / "commit_success.txt", checkpoint / "_CHECKPOINT_METADATA"
        if proof.exists() and metadata.exists():
            proof.write_bytes(proof.read_bytes().split(b"\n")[0])
            metadata.write_bytes(metadata.read_bytes().rstrip())
            return
