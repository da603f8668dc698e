"""Every public function that reads a file is among the kinds of files of the suite, or listed here with its reason."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_kinds import FILE_KINDS

ROOT = Path(__file__).parents[2]
READS = re.compile(r"(read|load|open|parse|fetch|from_hub)(_|$)")
OTHERS = {
    "reads no file: text, tensors, or objects in memory": """parse_bytes parse_alpha parse_renames parse_steps
        parse_step parse_dtype parse_sources parse_name parse_json Gate.parse read_largest load_plugin load_object
        RiemannianStep.load_state_dict open_memory AnswerBook.open""",
    "reads a pinned archive, whose digest is verified before it is opened": """fetch load_encoder load_decoder
        load_tower load_weights load_small_llava read_onnx read_newsgroups read_reuters read_authors read_nouns
        read_verbs read_kinds read_books read_topics read_tweets read_synsets read_emoji read_categories read_colours
        read_digits read_gguf""",
    "opens a stream by its name; other functions read its files": """open_stream open_named open_order open_rows
        open_folder open_language_stream StudyPlan.open_stream StudyPlan.open_anew""",
    "reads through another reader, whose kinds of files are damaged": """read_searches read_subjects read_adapters
        read_model_data read_batches read_projector AdapterCollection.load StudyFile.read_cells
        AdditionalParameters.load read_files read_header read_json read_text read_toml read_object open_file
        read_lycoris read_peft read_single AdapterSet.read HeldAdapter.read""",
    "reads tensors of an opened file": """CheckpointDifference.read DoraAdapter.read LayerTensors.read OsfAdapter.read
        Relabelled.read Source.read Split.read StoredAdapter.read StructuredAdapter.read TensorFile.read""",
    "downloads files, which other readers read": "from_hub",
    "reads a folder of transformers for a vision-language model, as load_causal_lm": "load_llava load_processor",
}
"""Why a function that is called like a reader has no kind of file of its own."""


def public_readers() -> Iterator[str]:
    """Names of public functions, and of public methods with their class, that begin like those of readers."""
    for package in ("manifold_cl", "analysis"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and READS.match(node.name):
                    yield node.name
                elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    for part in node.body:
                        if isinstance(part, ast.FunctionDef) and READS.match(part.name):
                            yield f"{node.name}.{part.name}"


@pytest.mark.reliability
def test_every_public_reader_has_a_kind_of_file_or_a_reason() -> None:
    """A new reader fails here: add its file to ``file_kinds.py``, or its name to `OTHERS`."""
    tested = {reader for kind in FILE_KINDS.values() for reader in kind.readers}
    explained = {name for names in OTHERS.values() for name in names.split()}
    found = set(public_readers())
    short = {name: name.rpartition(".")[2] for name in found}
    assert not {name for name in found if not {name, short[name]} & (tested | explained)}
    assert not explained - found - set(short.values())  # no reason for a function that is gone
    assert tested <= found | set(short.values()) | {"export_lora", "find_layout", "list_elements"}
