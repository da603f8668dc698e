"""Readers of adapters in many formats, checkpoints and records of runs, without the libraries that wrote them.

Each reader of adapters returns a `Source`, which reads factors on demand. Nothing here computes with them.
"""

from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import value_of
from analysis.formats.locate import Located, Reader
from analysis.formats.own import ProtectedBases, read_bases, read_format
from analysis.formats.records import BOUNDS, Record, label_records
from analysis.formats.saving import save_lora
from analysis.formats.sources import BareParameter, LeftOut, Shape, Source, held_adapter

__all__ = [
    "BOUNDS",
    "BareParameter",
    "Checkpoint",
    "LeftOut",
    "Located",
    "ProtectedBases",
    "Reader",
    "Record",
    "Shape",
    "Source",
    "held_adapter",
    "label_records",
    "read_bases",
    "read_format",
    "save_lora",
    "value_of",
]
