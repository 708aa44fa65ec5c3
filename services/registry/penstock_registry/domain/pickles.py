"""Pickles, recognised and read without being executed."""

from __future__ import annotations

import io
import pickletools  # genops reads opcodes, it executes none
import re
from collections.abc import Collection

# Protocol 2 and later begin with PROTO; nothing that we take begins so.
_PROTOCOLS = tuple(bytes((0x80, version)) for version in range(2, 6))
# torch.save before 1.6: a pickled magic number first.
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_NUMPY_MAGIC = b"\x93NUMPY"
# 'descr': '|O' (or an 'O' inside a structured type): NumPy pickles such elements.
_NUMPY_OBJECTS = re.compile(rb"'[|<>=]?O[0-9]*'")
_TEXT_PICKLE_BYTES = 64 * 1024
MAX_PICKLE_BYTES = 16 * 1024 * 1024

# Opcodes that name or make anything but plain data. GLOBAL alone is looked at more closely.
_REFUSED = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"})


def looks_like_pickle(head: bytes) -> bool:
    """Return whether a file that begins with `head` would be unpickled by one of the usual loaders.

    Args:
        head: The first bytes of the file, 64 KiB if it has as many.
    """
    if _TORCH_LEGACY in head[:64]:
        return True
    if head.startswith(_PROTOCOLS):
        return not _is_safetensors(head)
    if head.startswith(_NUMPY_MAGIC):
        return bool(_NUMPY_OBJECTS.search(head[:4096]))
    return _is_text_pickle(head)


def foreign_globals(pickle: bytes, allowed: Collection[str]) -> list[str]:
    """Return what a pickle would import or make beyond what is allowed, without executing it.

    Args:
        pickle: A whole pickle.
        allowed: Importable names as "module name", such as "collections OrderedDict".

    Raises:
        ValueError: It is no well-formed pickle.
    """
    found: list[str] = []
    end = -1
    for opcode, argument, position in pickletools.genops(pickle):
        if opcode.name == "GLOBAL" and argument not in allowed:
            found.append(str(argument))
        elif opcode.name in _REFUSED:
            found.append(opcode.name)
        end = position or 0
    if end != len(pickle) - 1:
        raise ValueError("bytes follow the end of the pickle")
    return found


def _is_safetensors(head: bytes) -> bool:
    """Return whether a head that begins like a pickle is one of safetensors, which no unpickler could read.

    Such a file begins with the length of its header in eight bytes, the last of them 0, which is no opcode;
    and with a length of 640 or 896, say, it begins like a pickle of protocol 2 or 3. Six bytes after the
    protocol are too few to import and call anything before an unpickler stops at the 0.
    """
    if head[7:9] != b"\0{":
        return False
    try:
        for _, _, position in pickletools.genops(io.BytesIO(head)):
            if position is not None and position >= 8:
                return False
    except ValueError as error:
        return "unknown" in str(error)
    return False


def _is_text_pickle(head: bytes) -> bool:
    """Return whether `head` is a pickle of protocol 0 or 1 that imports something."""
    if b"." not in head or head[:1] not in b"(c}]lI0Sp":
        return False
    try:
        names = [opcode.name for opcode, _, _ in pickletools.genops(io.BytesIO(head[:_TEXT_PICKLE_BYTES]))]
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError):
        return False
    return names[-1] == "STOP" and any(name in {"GLOBAL", "INST", "OBJ"} for name in names)
