"""Reference captions in COCO's annotation format."""

from __future__ import annotations

import json
from pathlib import Path

from manifold_cl.files import FileError


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
