"""Real streams of tasks: real texts and a real pre-trained model, fetched once, checked and cached."""

from manifold_cl.streams.catalogue import STREAMS, open_stream, register_stream
from manifold_cl.streams.check import FileReport, TaskReport, check_folder
from manifold_cl.streams.encoder import SentenceEncoder, load_encoder
from manifold_cl.streams.fetch import ARCHIVES, Archive, FetchError, cache_dir
from manifold_cl.streams.folder import Options, open_folder
from manifold_cl.streams.instructed import InstructionTask
from manifold_cl.streams.instructions import Instruction, read_instructions
from manifold_cl.streams.layout import Layout, Preset, TaskFiles, published_layout, read_layout
from manifold_cl.streams.mllm_dcl import open_mllm_dcl
from manifold_cl.streams.scorers import RULES, score
from manifold_cl.streams.templates import TEMPLATES, Template
from manifold_cl.streams.text import TextBatch, TextTask
from manifold_cl.streams.ucit import open_ucit

__all__ = [
    "ARCHIVES",
    "RULES",
    "STREAMS",
    "TEMPLATES",
    "Archive",
    "FetchError",
    "FileReport",
    "Instruction",
    "InstructionTask",
    "Layout",
    "Options",
    "Preset",
    "SentenceEncoder",
    "TaskFiles",
    "TaskReport",
    "Template",
    "TextBatch",
    "TextTask",
    "cache_dir",
    "check_folder",
    "load_encoder",
    "open_folder",
    "open_mllm_dcl",
    "open_stream",
    "open_ucit",
    "published_layout",
    "read_instructions",
    "read_layout",
    "register_stream",
    "score",
]
