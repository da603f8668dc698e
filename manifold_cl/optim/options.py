"""The options of the step, as data: presets, choices, and what each one means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Group = dict[str, Any]

DEFAULTS: Mapping[str, Any] = {
    "metric_pre": "euclidean",
    "tangent_post": "orthogonal",
    "step_scale": "none",
    "reference_width": 4096,
    "moments": "ambient",
    "polish_every": 0,
    "nonfinite": "refuse",
}
"""Every option with its default; groups of old checkpoints are completed from here."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    "metric_pre": ("none", "euclidean", "canonical"),
    "tangent_post": ("orthogonal", "double"),
    "step_scale": ("none", "width", "official"),
    "moments": ("ambient", "transport"),
    "nonfinite": ("refuse", "skip"),
}


def corrected() -> Group:
    """The default step: Riemannian gradient into the moments, displacement projected orthogonally, no rescaling.

    Source: method.md 1.5.
    """
    return {"metric_pre": "euclidean", "tangent_post": "orthogonal", "step_scale": "none", "reference_width": 4096}


def official() -> Group:
    """The step of EBLoRA's released code, to the letter: for reproduction, not for use.

    The canonical-gradient map before *and after* the base step, where it doubles the rotation, and steps
    enlarged by sqrt(4096 / r). Source: gu2026eblora, released code, as analysed in method.md 1.3 and 6.1-6.2.
    """
    return {"metric_pre": "canonical", "tangent_post": "double", "step_scale": "official", "reference_width": 4096}


def check_options(group: Mapping[str, Any]) -> None:
    """Refuse an unknown choice, or a number that cannot be one.

    Raises:
        ValueError: naming the option, what it may be and what came.
    """
    for option, choices in CHOICES.items():
        if group[option] not in choices:
            raise ValueError(f"{option} is one of {', '.join(choices)}, got {group[option]!r}")
    every, width = group["polish_every"], group["reference_width"]
    if not isinstance(every, int) or every < 0:
        raise ValueError(f"polish_every is a number of steps, 0 for never, got {every!r}")
    if not width > 0:
        raise ValueError(f"reference_width is a positive width, got {width!r}")


def scale_of(group: Mapping[str, Any], n: int, p: int) -> float:
    """Factor on the displacement: 1, sqrt(c / n) as in li2025stella, or sqrt(c / p) as EBLoRA released it."""
    width = group["reference_width"]
    side: int = {"none": width, "width": n, "official": p}[group["step_scale"]]
    return math.sqrt(width / side)
