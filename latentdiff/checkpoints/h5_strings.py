"""Strings of an HDF5 attribute, read from the file's bytes, each no longer than a name may be.

The library reads an attribute of variable-length strings at once, and each of them may be as large as the file: a
small file can name one large string thousands of times. So the strings are read here, one by one: the attribute is a
message in its object's header, whose data say for each string how long it is and where in which global heap it lies.

Reference:
    "HDF5 File Format Specification Version 3.0", sections III.E (global heap), IV.A.1.a (object header, version 1) and
    IV.A.2.m (attribute message).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

LONGEST = 4096  # bytes of a name
LARGEST_HEAP = 2**20  # bytes; the library's own are 64 kB at most
_CONTINUATION, _ATTRIBUTE = 0x10, 0x0C


def variable_strings(content: memoryview, address: int, attribute: str, count: int) -> list[str]:
    """The strings of an attribute.

    Args:
        content: The file's bytes.
        address: Where the header of the attribute's object begins.
        attribute: The attribute's name.
        count: How many strings it has.

    Raises:
        ValueError, struct.error: If the bytes break the format, or a string is too long.
    """
    for kind, begin, end in _messages(content, address):
        if kind == _ATTRIBUTE:
            name, data = _attribute(content, begin, end)
            if name == attribute.encode():
                if data + 16 * count > end:
                    raise ValueError(f"the attribute `{attribute}` passes the end of its message")
                return [_string(content, *struct.unpack_from("<IQI", content, data + 16 * i)) for i in range(count)]
    raise ValueError(f"the attribute `{attribute}` has no message in its object's header")


def _messages(content: memoryview, address: int) -> Iterator[tuple[int, int, int]]:
    """(type, begin, end) of the messages of an object's header, in all of its blocks."""
    version, _, _, _, size = struct.unpack_from("<BBHII", content, address)
    if version != 1:
        raise ValueError(f"an object's header must be of version 1, and is of {version}")
    blocks = [(address + 16, size)]
    for place, length in blocks:  # which grows as blocks are found
        if place + length > len(content) or len(blocks) > 64:
            raise ValueError("an object's header passes the end of the file, or is in too many pieces")
        end = place + length
        while place + 8 <= end:
            kind, size = struct.unpack_from("<HH", content, place)
            place += 8 + size
            if place > end:
                raise ValueError("a message passes the end of its header")
            if kind == _CONTINUATION:
                blocks.append(struct.unpack_from("<QQ", content, place - size))
            yield kind, place - size, place


def _attribute(content: memoryview, begin: int, end: int) -> tuple[bytes, int]:
    """An attribute message's name, and where its data begin."""
    version, _, *sizes = struct.unpack_from("<BBHHH", content, begin)
    if version not in (1, 2, 3):
        raise ValueError(f"an attribute must be of version 1 to 3, and is of {version}")
    name = begin + (9 if version == 3 else 8)
    if version == 1:
        data = name + sum(-(-size // 8) * 8 for size in sizes)  # each part is padded
    else:
        data = name + sum(sizes)
    if data > end:
        raise ValueError("an attribute passes the end of its message")
    return bytes(content[name : name + sizes[0]]).partition(b"\0")[0], data


def _string(content: memoryview, length: int, heap: int, index: int) -> str:
    """A string of a global heap."""
    if length > LONGEST:
        raise ValueError(f"a name must have at most {LONGEST} bytes, and has {length}")
    signature, size = struct.unpack_from("<4s4xQ", content, heap)
    if signature != b"GCOL" or size > LARGEST_HEAP or heap + size > len(content):
        raise ValueError(f"there is no global heap of at most {LARGEST_HEAP} bytes at {heap}")
    place, end = heap + 16, heap + size
    while place + 16 <= end:
        number, size = struct.unpack_from("<H6xQ", content, place)
        if number == index and index:
            if not length <= size <= end - place - 16:
                raise ValueError(f"a name passes the end of its heap, at {place}")
            return bytes(content[place + 16 : place + 16 + length]).partition(b"\0")[0].decode("utf-8")
        place += 16 + -(-size // 8) * 8
    raise ValueError(f"there is no string {index} in the global heap at {heap}")
