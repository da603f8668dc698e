"""Draw the three pictures of the documentation: python docs/pictures/draw.py [folder]."""

import sys
from pathlib import Path

import input_space
import step
import task
from style import STATIC, save

PICTURES = {"picture-input-space": input_space.draw, "picture-step": step.draw, "picture-task": task.draw}


def main(folder: Path = STATIC) -> list[Path]:
    """Draw all pictures into `folder`; their paths."""
    paths = []
    for name, draw in PICTURES.items():
        paths.append(folder / f"{name}.svg")
        save(draw(), paths[-1])
    return paths


if __name__ == "__main__":
    print(*main(*map(Path, sys.argv[1:2])), sep="\n")
