"""An OCDBT database written byte by byte, without TensorStore: manifest, nodes, data files.

A database is a list of entries, `(key, value)` with the value as bytes (stored in the node) or as
`(file, offset, length)` (stored in a data file), sorted by key.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

Reference = tuple[str, int, int]
Entry = tuple[bytes, bytes | Reference]

_MANIFEST = 0x0CDB3A2A
_NODE = 0x0CDB20DE


def crc32c(data: bytes) -> int:
    """Returns the Castagnoli checksum of some bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


def _varint(*numbers: int) -> bytes:
    encoded = bytearray()
    for number in numbers:
        while number >= 0x80:
            encoded.append(number & 0x7F | 0x80)
            number >>= 7
        encoded.append(number)
    return bytes(encoded)


def _frame(magic: int, body: bytes) -> bytes:
    head = struct.pack(">I", magic)
    rest = _varint(0, 0) + body  # format version 0, not compressed
    content = head + struct.pack("<Q", len(head) + 8 + len(rest) + 4) + rest
    return content + struct.pack("<I", crc32c(content))


def _files_table(paths: Sequence[str]) -> bytes:
    """The table of data files, without shared prefixes; each path is relative to the manifest."""
    encoded = [path.encode() for path in paths]
    return (
        _varint(len(encoded), *[0 for _ in encoded[1:]])
        + _varint(*[len(path) for path in encoded])
        + _varint(*[0 for _ in encoded])
        + b"".join(encoded)
    )


def _keys(keys: Sequence[bytes]) -> bytes:
    return _varint(*[0 for _ in keys[1:]], *[len(key) for key in keys])


def leaf_node(entries: Sequence[Entry]) -> bytes:
    """Encodes a B-tree node of height 0."""
    references = [value for _, value in entries if isinstance(value, tuple)]
    files = sorted({file for file, _, _ in references})
    inline = [value for _, value in entries if isinstance(value, bytes)]
    keys = [key for key, _ in entries]
    lengths = [len(value) if isinstance(value, bytes) else value[2] for _, value in entries]
    return _frame(
        _NODE,
        bytes([0])
        + _files_table(files)
        + _varint(len(entries))
        + _keys(keys)
        + b"".join(keys)
        + _varint(*lengths)
        + bytes(int(isinstance(value, tuple)) for _, value in entries)
        + _varint(*[files.index(file) for file, _, _ in references])
        + _varint(*[offset for _, offset, _ in references])
        + b"".join(inline),
    )


def interior_node(children: Sequence[tuple[bytes, Reference, int]]) -> bytes:
    """Encodes a B-tree node of height 1 over leaves: `(first key, where, number of keys)`."""
    files = sorted({file for _, (file, _, _), _ in children})
    keys = [key for key, _, _ in children]
    return _frame(
        _NODE,
        bytes([1])
        + _files_table(files)
        + _varint(len(children))
        + _keys(keys)
        + _varint(*[0 for _ in children])
        + b"".join(keys)
        + _varint(*[files.index(file) for _, (file, _, _), _ in children])
        + _varint(*[offset for _, (_, offset, _), _ in children])
        + _varint(*[length for _, (_, _, length), _ in children])
        + _varint(*[count for _, _, count in children])
        + _varint(*[length for _, (_, _, length), _ in children])
        + _varint(*[0 for _ in children]),
    )


def manifest(root: Reference, *, height: int, key_count: int) -> bytes:
    """Encodes a manifest of one version."""
    file, offset, length = root
    return _frame(
        _MANIFEST,
        os.urandom(16)
        + _varint(0, 1024, 100_000_000)
        + bytes([4])
        + _varint(0)
        + _files_table([file])
        + _varint(1)  # versions
        + _varint(1)  # generation
        + bytes([height])
        + _varint(0, offset, length, key_count, length, 0)
        + struct.pack("<Q", 1_700_000_000_000_000_000)
        + _varint(0),
    )


def write(directory: Path, values: dict[str, bytes], *, files: int, leaves: int) -> None:
    """Writes a database of `values`: the larger ones in data files, aligned to 4 KiB.

    Args:
      directory: where the manifest goes.
      values: what it holds.
      files: how many data files to spread large values over, each in a directory of its own.
      leaves: how many leaf nodes to make; more than one are held by an interior node.
    """
    contents = {f"part{index}/data-{index}": bytearray() for index in range(files)}
    entries: list[Entry] = []
    for index, (key, value) in enumerate(sorted((k.encode(), v) for k, v in values.items())):
        if len(value) <= 64:
            entries.append((key, value))
            continue
        name = list(contents)[index % files]
        contents[name] += bytes(-len(contents[name]) % 4096)
        entries.append((key, (name, len(contents[name]), len(value))))
        contents[name] += value
    share = -(-len(entries) // leaves)
    nodes = bytearray()
    children = []
    for start in range(0, len(entries), share):
        part = entries[start : start + share]
        node = leaf_node(part)
        children.append((part[0][0], ("nodes", len(nodes), len(node)), len(part)))
        nodes += node
    root = children[0][1]
    if len(children) > 1:
        node = interior_node(children)
        root = ("nodes", len(nodes), len(node))
        nodes += node
    contents["nodes"] = nodes
    for name, content in contents.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    head = manifest(root, height=int(len(children) > 1), key_count=len(entries))
    (directory / "manifest.ocdbt").write_bytes(head)
