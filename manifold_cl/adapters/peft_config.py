"""The configuration of EBLoRA adapters for PEFT, and the versions of PEFT that it is tested with."""

from __future__ import annotations

import enum
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version

from manifold_cl.adapters.options import Core, EBLoRAOptions, Start

try:
    import peft
except ImportError as error:
    raise ImportError(
        "manifold_cl.adapters.peft needs PEFT: pip install 'peft>=0.21,<0.22' 'transformers>=5.2'"
    ) from error

TESTED = ("0.21.0", "0.22")
"""PEFT from the first version up to, but without, the second."""

MERGED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

CARD_TITLE = "## How to load this adapter"
CARD = f"""
{CARD_TITLE}

This is an EBLoRA adapter: orthonormal frames and one magnitude per layer. PEFT learns the method from
the package manifold_cl when that is imported; without the import it stops with `KeyError: 'EBLORA'`.

```python
# manifold_cl is installed from a clone of its repository, peft by: pip install 'peft>=0.21,<0.22'
import manifold_cl.adapters.peft  # registers EBLORA
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

To use it where only plain LoRA is understood, convert it exactly: `manifold-cl export path/to/this/folder --out lora`.
"""


def validate_version(version: str) -> None:
    """Raise ImportError for a PEFT that this package was not tested with: it builds on internals, which move."""
    if not Version(TESTED[0]) <= Version(version) < Version(TESTED[1]):
        raise ImportError(
            f"manifold_cl.adapters.peft is tested with peft >= {TESTED[0]}, < {TESTED[1]}, found {version}: "
            f"pip install 'peft>={TESTED[0]},<{TESTED[1]}'. Layers, training and export_lora work without peft"
        )


validate_version(peft.__version__)


class EBLoraType(enum.StrEnum):
    """The method's key in PEFT's tables; an enum, because transformers reads its ``value``."""

    EBLORA = "EBLORA"


@dataclass
class EBLoraConfig(peft.PeftConfig):  # type: ignore[misc]
    """The configuration for ``get_peft_model``. Options and defaults are those of `EBLoRAOptions`.

    Args:
        r: rank; at most the smaller side of a weight, and what its protected subspaces leave.
        alpha, core, initial_scale, start, compensate, dropout, metric: as in `EBLoRAOptions`.
        retraction: by name; the metric's own if None.
        target_modules: suffixes of names, one regular expression, or ``"all-linear"``.
        exclude_modules: the same, for layers to leave out.
        seed: of the random start; each layer draws from its own stream.
        rank_pattern, alpha_pattern: name pattern → rank or alpha of the layers that it matches.
        modules_to_save: modules trained and saved whole.
        layers_to_transform, layers_pattern: indices of the blocks to adapt, and the name of their list.
        protected: written when saving: layer → widths of its input and output complement.
        merged_dtype: precision of weights that the adapter is merged into, such as ``"float32"``; the base's own by
            default, in which a bfloat16 base loses a quarter to a half of an update (a merge warns with the share).
        base_fingerprint: written when saving: layer → entries of the base weight, to recognise it; None: no check.
        lora_alpha, lora_dropout: PEFT's spellings of ``alpha`` and ``dropout``.

    >>> EBLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).alpha
    8
    """

    r: int = 8
    alpha: float | None = EBLoRAOptions.alpha
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    core: Core = EBLoRAOptions.core
    initial_scale: float = EBLoRAOptions.initial_scale
    start: Start = EBLoRAOptions.start
    compensate: bool = EBLoRAOptions.compensate
    dropout: float = EBLoRAOptions.dropout
    retraction: str | None = None
    metric: Literal["euclidean", "canonical"] = EBLoRAOptions.metric
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
        for name, other, unset in (("alpha", lora_alpha, None), ("dropout", lora_dropout, 0.0)):
            if other is None:
                continue
            if (value := getattr(self, name)) not in (unset, other):
                raise ValueError(f"{name}={value:g} and lora_{name}={other:g} are one option: give one of them")
            setattr(self, name, other)
        if self.merged_dtype not in (None, *MERGED):
            raise ValueError(f"merged_dtype is {', '.join(MERGED)} or None, got {self.merged_dtype!r}")
        self.peft_type = EBLoraType.EBLORA
        self._expected = self.base_fingerprint  # a file's; saving overwrites the field
        self._saved_protected = frozenset(name for name, pair in self.protected.items() if any(pair))  # likewise
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list that layers_to_transform counts in: give both")
        self.options(self.alpha)  # raises for values out of range

    @classmethod
    def recipe(cls, r: int = 16, **options: Any) -> EBLoraConfig:
        """The configuration of the method `EBLoRA`: alpha = 2 r, magnitude −0.05, start along the task's gradient.

        Call `start_from_task` before the optimizer is made. ``options`` replace any of these.

        >>> EBLoraConfig.recipe(target_modules=["q_proj"]).alpha
        32.0
        """
        return cls(**{"r": r, "alpha": 2.0 * r, "initial_scale": -0.05, "start": "task", **options})

    def options(self, alpha: float | None) -> EBLoRAOptions:
        """The options of a layer's adapter, whose ``alpha`` may come from ``alpha_pattern``."""
        names = {field.name for field in fields(EBLoRAOptions)} - {"alpha"}
        return EBLoRAOptions(alpha=alpha, **{name: getattr(self, name) for name in names})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and into the folder's model card how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else "# EBLoRA adapter\n"
        if CARD_TITLE not in text:
            card.write_text(text + CARD, encoding="utf-8")
