"""Readers of adapters in many formats, checkpoints and records of runs, without the libraries that wrote them.

Each reader of adapters returns a `Source`, which reads factors on demand. Nothing here computes with them.
"""

from analysis.formats.carried import Carried, carried_over
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import is_of_kind, value_of
from analysis.formats.hub import reachable_model
from analysis.formats.locate import Located, Reader
from analysis.formats.own import ProtectedBases, read_bases, read_format
from analysis.formats.patterns import matching_names
from analysis.formats.records import BOUNDS, Record, label_records
from analysis.formats.saving import save_lora, write_lora, write_manifest
from analysis.formats.sources import BareParameter, LeftOut, Shape, Source, held_adapter

__all__ = [
    "BOUNDS",
    "BareParameter",
    "Carried",
    "Checkpoint",
    "LeftOut",
    "Located",
    "ProtectedBases",
    "Reader",
    "Record",
    "Shape",
    "Source",
    "carried_over",
    "held_adapter",
    "is_of_kind",
    "label_records",
    "matching_names",
    "reachable_model",
    "read_bases",
    "read_format",
    "save_lora",
    "value_of",
    "write_lora",
    "write_manifest",
]
