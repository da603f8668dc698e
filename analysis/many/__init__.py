"""Collections of many adapters: members of a folder, common directions, clusters, and outliers."""

from analysis.many.collection import MEMORY_BUDGET, AdapterCollection, usable_processes
from analysis.many.collection_tables import CollectionTables
from analysis.many.members import Member, Omission

__all__ = ["MEMORY_BUDGET", "AdapterCollection", "CollectionTables", "Member", "Omission", "usable_processes"]
