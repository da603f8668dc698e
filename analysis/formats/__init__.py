"""What lies on disk, read without the library that wrote it: adapters of many formats, checkpoints, records of runs.

Every reader ends in a `Source`, which hands out factors when asked. Nothing here computes with them.
"""

from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import read_json
from analysis.formats.locate import Located, Reader
from analysis.formats.own import StoredBases, check_format, read_bases
from analysis.formats.records import BOUNDS, Record, label_records
from analysis.formats.saving import save_lora
from analysis.formats.sources import HeldAdapter, PickedAdapter, RelabelledAdapter, RenamedAdapter, Shape, Source

__all__ = [
    "BOUNDS",
    "Checkpoint",
    "HeldAdapter",
    "Located",
    "PickedAdapter",
    "Reader",
    "Record",
    "RelabelledAdapter",
    "RenamedAdapter",
    "Shape",
    "Source",
    "StoredBases",
    "check_format",
    "label_records",
    "read_bases",
    "read_json",
    "save_lora",
]
