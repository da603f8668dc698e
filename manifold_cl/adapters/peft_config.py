"""PEFT's configuration of balanced adapters, and the versions of PEFT that it is tested with."""

from __future__ import annotations

import enum
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version

from manifold_cl.adapters.cards import EBLORA_CARD
from manifold_cl.adapters.options import validate_core, validate_start
from manifold_cl.geometry import RestrictedStiefel

try:
    import peft
except ImportError as error:
    raise ImportError("manifold_cl.adapters.peft needs PEFT: pip install 'manifold-cl[peft]'") from error

TESTED = ("0.21.0", "0.22")
"""PEFT from the first version up to, but without, the second."""


def validate_version(found: str) -> None:
    """Raise for a PEFT that this file was not tested with: its internals, which we build on, move.

    Raises:
        ImportError: with the range and the command that installs one of it.
    """
    if not Version(TESTED[0]) <= Version(found) < Version(TESTED[1]):
        raise ImportError(
            f"manifold_cl.adapters.peft is tested with peft >= {TESTED[0]}, < {TESTED[1]}, found {found}: "
            f"pip install 'peft>={TESTED[0]},<{TESTED[1]}'. Layers, training and export_lora work without peft"
        )


validate_version(peft.__version__)

MERGED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class EBLoraType(enum.StrEnum):
    """The method's key in PEFT's tables; an enum, because transformers asks for its ``value``."""

    EBLORA = "EBLORA"


@dataclass
class EBLoraConfig(peft.PeftConfig):  # type: ignore[misc]
    """What ``get_peft_model`` is given for balanced adapters; options as in `EBLoRALinear`.

    Args:
        r: rank; at most the smaller side of a weight and what its protected subspaces leave.
        alpha: numerator of the scaling alpha / r; each layer's rank if not given.
        target_modules: suffixes of names, one regular expression, or ``"all-linear"``.
        exclude_modules: the same, for what to leave out.
        core: ``"scalar"``, ``"diagonal"`` or ``"full"``.
        initial_scale: s at the start.
        start: of the frames, ``"random"`` or ``"pretrained"``.
        compensate: subtract the start, so that a new adapter changes nothing.
        dropout: share of the adapter's inputs that are zeroed in training.
        retraction: by name; the metric's own if not given.
        metric: ``"euclidean"`` or ``"canonical"``.
        seed: of the random start; each layer draws from its own stream.
        rank_pattern: name pattern → rank.
        alpha_pattern: name pattern → alpha.
        modules_to_save: modules trained and saved whole.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the list of blocks.
        protected: written when saving: layer → widths of its input and output complement.
        merged_dtype: precision of weights that the adapter is merged into, such as ``"float32"``; the base's own by
            default, in which a bfloat16 base loses about half of an update (a merge warns with the share).
        base_fingerprint: written when saving: layer → entries of the base weight, to know it again; None: no check.
        lora_alpha: PEFT's spelling of ``alpha``.
        lora_dropout: PEFT's spelling of ``dropout``.
    """

    r: int = 8
    alpha: float | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    core: str = "scalar"
    initial_scale: float = -0.005
    start: str = "random"
    compensate: bool = False
    dropout: float = 0.0
    retraction: str | None = None
    metric: Literal["euclidean", "canonical"] = "euclidean"
    seed: int = 0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    protected: dict[str, list[int]] = field(default_factory=dict)
    merged_dtype: str | None = None
    base_fingerprint: dict[str, str] | None = None
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None

    def __post_init__(self, lora_alpha: float | None, lora_dropout: float | None) -> None:
        super().__post_init__()
        if lora_alpha is not None:
            if self.alpha not in (None, lora_alpha):
                raise ValueError(f"alpha={self.alpha:g} and lora_alpha={lora_alpha:g} are one option: give one of them")
            self.alpha = lora_alpha
        if lora_dropout is not None:
            if self.dropout not in (0.0, lora_dropout):
                raise ValueError(
                    f"dropout={self.dropout:g} and lora_dropout={lora_dropout:g} are one option: give one of them"
                )
            self.dropout = lora_dropout
        if self.merged_dtype not in (None, *MERGED):
            raise ValueError(f"merged_dtype is {', '.join(MERGED)} or None, got {self.merged_dtype!r}")
        self.peft_type = EBLoraType.EBLORA
        self._expected = self.base_fingerprint  # what a file says; what we write ourselves is not compared
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        validate_core(self.core)
        validate_start(self.start)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share in [0, 1), got {self.dropout}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list that layers_to_transform counts in: give both")
        RestrictedStiefel(retraction=self.retraction, metric=self.metric)  # raises for unknown names

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and into the folder's model card how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else "# EBLoRA adapter\n"
        if EBLORA_CARD not in text:
            card.write_text(text + EBLORA_CARD, encoding="utf-8")
