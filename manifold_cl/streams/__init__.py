"""Streams of real tasks: embedded text streams, and benchmarks of visual instructions that the user downloads."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.streams.archives import ARCHIVES, Archive, FetchError, cache_dir
    from manifold_cl.streams.causal_lm import CausalLMTask, TextExample
    from manifold_cl.streams.causal_tasks import benchmark_tasks, causal_lm_tasks
    from manifold_cl.streams.folder_report import FileReport, TaskReport, verify_folder
    from manifold_cl.streams.folder_stream import FolderOptions, open_folder
    from manifold_cl.streams.instruction_task import InstructionTask
    from manifold_cl.streams.instructions import Instruction, read_instructions
    from manifold_cl.streams.language_model import load_causal_lm, load_tokenizer, validate_tokenizer
    from manifold_cl.streams.language_stream import LanguageOptions, open_language_stream, open_rows, verify_texts
    from manifold_cl.streams.layout import Layout, Preset, TaskFiles, published_layout, read_layout
    from manifold_cl.streams.registry import STREAMS, open_stream, register_stream
    from manifold_cl.streams.scorers import RULES, score
    from manifold_cl.streams.sentence_encoder import SentenceEncoder, load_encoder
    from manifold_cl.streams.templates import TEMPLATES, Template
    from manifold_cl.streams.text_task import TextBatch, TextTask
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "ARCHIVES",
    "RULES",
    "STREAMS",
    "TEMPLATES",
    "Archive",
    "CausalLMTask",
    "FetchError",
    "FileReport",
    "FolderOptions",
    "Instruction",
    "InstructionTask",
    "LanguageOptions",
    "Layout",
    "Preset",
    "SentenceEncoder",
    "TaskFiles",
    "TaskReport",
    "Template",
    "TextBatch",
    "TextExample",
    "TextTask",
    "benchmark_tasks",
    "cache_dir",
    "causal_lm_tasks",
    "load_causal_lm",
    "load_encoder",
    "load_tokenizer",
    "open_folder",
    "open_language_stream",
    "open_rows",
    "open_stream",
    "published_layout",
    "read_instructions",
    "read_layout",
    "register_stream",
    "score",
    "validate_tokenizer",
    "verify_folder",
    "verify_texts",
]
