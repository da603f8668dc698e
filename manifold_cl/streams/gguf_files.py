"""GGUF files: their numbers and words, and their tensors in float32. Lists of words are passed over, unread.

The readers of transformers and of gguf make Python objects of a whole vocabulary, twice, to load weights.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_cl.files import FileError, file_errors, library_errors

MAGIC = b"GGUF"
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type in the metadata → its letter in `struct`."""
WORD, LIST = 8, 9
"""Numbers of the types of other lengths."""


@dataclass(frozen=True)
class GgufFile:
    """The content of a GGUF file of version 2 or 3, little-endian.

    Args:
        metadata: key → number, word, or list of numbers. Lists of words, such as a vocabulary, are left out.
        tensors: name → float32 tensor, in the layout of torch.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> GgufFile:
    """The numbers, words and dequantised tensors of a file.

    Raises:
        FileError: for a file that is missing, of another format or version, or shorter than it claims.
        ImportError: gguf is not installed.
    """
    with file_errors(path), library_errors(path, "gguf"):
        return _read(memoryview(path.read_bytes()), path)


def _read(content: memoryview, path: Path) -> GgufFile:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if content[:4] != MAGIC:
        raise FileError(f"{path} is no GGUF file: it begins with {bytes(content[:4])!r}")
    cursor = _Cursor(content, 4)
    version, tensor_count, key_count = cursor.take("IQQ")
    if version not in (2, 3):
        raise FileError(f"{path} is a GGUF file of version {version}: versions 2 and 3 are read")
    metadata = {}
    for _ in range(key_count):
        key, (kind,) = cursor.word(), cursor.take("I")
        if (value := cursor.value(kind)) is not None:
            metadata[key] = value
    table = []
    for _ in range(tensor_count):
        name, (dimensions,) = cursor.word(), cursor.take("I")
        table.append((name, cursor.take(f"{dimensions}Q")[::-1], *cursor.take("IQ")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in table:
        kind = GGMLQuantizationType(number)
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        row = shape[-1] // per_block * block_bytes
        count = row * math.prod(shape[:-1])
        stored = np.frombuffer(content, np.uint8, count, start + offset).reshape(*shape[:-1], row)
        data = stored.view(np.float32) if kind is GGMLQuantizationType.F32 else stored
        tensors[name] = torch.from_numpy(np.array(dequantize(data, kind), np.float32))
    return GgufFile(metadata, tensors)


class _Cursor:
    """A place in the file's bytes, which moves past what is read."""

    def __init__(self, content: memoryview, at: int) -> None:
        self.content, self.at = content, at

    def take(self, letters: str) -> tuple[Any, ...]:
        """The next numbers, by letters of `struct`."""
        values = struct.unpack_from(f"<{letters}", self.content, self.at)
        self.at += struct.calcsize(f"<{letters}")
        return values

    def word(self) -> str:
        """The next text: its length in bytes, and its bytes in UTF-8."""
        begin, end = self._span()
        return bytes(self.content[begin:end]).decode()

    def value(self, kind: int) -> Any:
        """The next value of the metadata; None for a list of words, which is passed over."""
        if kind == WORD:
            return self.word()
        if kind != LIST:
            return self.take(FORMATS[kind])[0]
        inner, count = self.take("IQ")
        if inner != WORD:
            return list(self.take(f"{count}{FORMATS[inner]}"))
        for _ in range(count):
            self._span()
        return None

    def _span(self) -> tuple[int, int]:
        (length,) = self.take("Q")
        begin = self.at
        self.at += length
        if self.at > len(self.content):
            raise ValueError(f"a text ends at byte {self.at} of {len(self.content)}")
        return begin, self.at
