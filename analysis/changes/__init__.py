"""Changed adapters: suggested ranks, interventions, tables of before and after, and folders that PEFT loads."""

from analysis.changes.comparison import change_table
from analysis.changes.compression import compressed
from analysis.changes.intruders import intruders_shrunk
from analysis.changes.rank_suggestion import RankSuggestion, suggest_ranks
from analysis.changes.reweighting import effect_table, reweighted
from analysis.changes.writing import for_layers, write_changed

__all__ = [
    "RankSuggestion",
    "change_table",
    "compressed",
    "effect_table",
    "for_layers",
    "intruders_shrunk",
    "reweighted",
    "suggest_ranks",
    "write_changed",
]
