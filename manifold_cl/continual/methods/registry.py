"""The registry of methods: their names, and the class of a name, which is imported when it is first used."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from manifold_cl.plugins import Registry, unknown

if TYPE_CHECKING:
    from manifold_cl.continual.method import Method


OWN = {
    "balanced": "eblora:Balanced",
    "best": "eblora:Best",
    "e2lora": "e2lora:E2LoRA",
    "eblora": "eblora:EBLoRA",
    "ella": "ella:ELLA",
    "ewc_lora": "ewc_lora:EWCLoRA",
    "factorial": "factorial:Factorial",
    "gpm": "gpm:GPM",
    "inflora": "inflora:InfLoRA",
    "joint": "joint:Joint",
    "keeplora": "keeplora:KeepLoRA",
    "lora_muon": "lora_muon:LoRAMuon",
    "lora_muon_ogd": "lora_muon:LoRAMuonOGD",
    "olora": "olora:OLoRA",
    "osft_lora": "osft_lora:OSFTLoRA",
    "restricted": "eblora:Restricted",
    "sequential": "sequential:Sequential",
    "sequential_merge": "sequential:SequentialMerge",
    "slao": "slao:SLAO",
    "splitlora": "splitlora:SplitLoRA",
    "stella_merge": "stella_merge:StellaMerge",
    "svd_eq": "svd_eq:SVDEq",
    "zero_shot": "joint:ZeroShot",
}
"""Name of a method → its file in this folder and its class."""


def _prepare(candidate: Any) -> tuple[str, type[Method]]:
    from manifold_cl.continual.method import Method

    if not (isinstance(candidate, type) and issubclass(candidate, Method)):
        raise TypeError(f"a method is a subclass of Method, got {candidate!r}")
    return candidate.name, candidate


PLAIN_LORA = ("lora", "plain_lora", "plain lora", "seqlora")


def _advice(name: str) -> str | None:
    """What to give for several names in one text, and for plain LoRA, which has no name of its own here."""
    if "," in name:
        return f"give one name at a time, on the command line as --method {' --method '.join(name.split(','))}"
    if name.casefold().replace("-", "_") in PLAIN_LORA:
        return "plain LoRA is sequential_merge (one adapter per task) or sequential (one for all tasks)"
    return None


METHODS: Registry[type[Method]] = Registry(
    "method",
    _prepare,
    {name: f"manifold_cl.continual.methods.{path}" for name, path in OWN.items()},
    advice=_advice,
)
"""Method classes by name, those of installed packages too (read-only; see `register_method`)."""

_M = TypeVar("_M", bound="type[Method]")


def register_method(cls: _M) -> _M:
    """Class decorator: put a method into `METHODS` under its ``name``.

    An installed package offers its class as an entry point of the group ``manifold_cl.methods`` instead.

    Raises:
        ValueError: when the name is taken.
        TypeError: when the class is no `Method`.
    """
    METHODS.register(cls)
    return cls


def make_method(name: str, **options: Any) -> Method:
    """A method by name with options.

    Raises:
        ValueError: for an unknown name or option, with the nearest ones, or a value out of range.
        TypeError: for an option whose value is of the wrong kind. Messages about values begin with the method's name.
    """
    names = option_names(name)
    if others := [option for option in options if option not in names]:
        raise ValueError(unknown(f"option of {name}", others[0], names))
    try:
        return METHODS[name](**options)
    except (TypeError, ValueError) as error:
        error.args = (f"{name}: {error}",)
        raise


def option_names(name: str) -> list[str]:
    """The names of a method's options."""
    return [field.name for field in fields(METHODS[name]) if field.init]  # type: ignore[arg-type]
