"""Names of layers and tasks: display, sorting, and matching between versions of a model."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Wrapper modules of torch (compile, FSDP, activation checkpointing) and of Lightning Fabric."""
_AROUND = ("module.", "base_model.model.")
"""Prefixes of names that come from DataParallel and from PEFT."""
_TOWERS = {"visual", "vit", "vision_model"}
"""Names of a vision tower in versions of models where others have ``vision_tower``."""
_FLATTENED = re.compile(r"(lora|lycoris)_((unet|te\d?|text_encoder(_\d)?|transformer|prior|dit)_)?")
"""Prefixes of flattened names: the script, and the component of the model."""
_CONTAINERS = {"language_model", "llm", "vlm", "thinker", "base_model"}


def listed(names: Sequence[str], shown: int = 3, separator: str = ", ") -> str:
    """The first names of a list, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{separator.join(names[:shown])}{more}"


def visible(text: object) -> str:
    r"""The text on one line, with escapes for what is not printable: control characters, marks of direction.

    Names come from files of others. Such characters have no glyph in a figure, and could reverse the text of a page.

    >>> visible("a\x1bb\n")
    'a\\x1bb\\n'
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else repr(letter)[1:-1]
        for letter in line
    )


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts the layer ``h.2`` before ``h.10``, and the folder ``task-2`` before ``task-10``.

    >>> sorted(["h.10.q", "h.2.q"], key=natural_key), sorted(["task-10", "task-2"], key=natural_key)
    (['h.2.q', 'h.10.q'], ['task-2', 'task-10'])
    """
    parts = (part for part in re.split(r"[./]|(\d+)", name) if part)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def module_of(layer: str) -> str:
    """The last component of a layer's name.

    >>> module_of("encoder.layer.0.attention.self.query")
    'query'
    """
    return layer.rpartition(".")[2]


def block_of(layer: str) -> int | None:
    """The first component that is a number, the index of the block, or None.

    >>> block_of("encoder.layer.11.output.dense"), block_of("classifier")
    (11, None)
    """
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def short_names(layers: Sequence[str]) -> list[str]:
    """The names without the leading components that all of them share; the last component always stays.

    >>> short_names(["model.h.0.q", "model.h.1.q"])
    ['0.q', '1.q']
    """
    parts = [layer.split(".") for layer in layers]
    shared = len(os.path.commonprefix([part[:-1] for part in parts]))  # noqa: RUF071 (lists of components)
    return [".".join(part[shared:]) for part in parts]


def place_of(layer: str) -> tuple[str, str]:
    """Row and column of a layer in a map of the model: its name up to the block's number, and the rest.

    >>> place_of("encoder.layer.0.attention.query"), place_of("head")
    (('encoder.layer.0', 'attention.query'), ('–', 'head'))
    """
    parts = layer.split(".")
    number = next((position for position, part in enumerate(parts) if part.isdigit()), None)
    if number is None or number + 1 == len(parts):
        return "–", layer
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def unwrapped(name: str) -> str:
    """The name that a layer has in the model itself, without the wrappers of compile, FSDP, DDP and PEFT.

    >>> unwrapped("module.base_model.model._orig_mod.h.0.q"), unwrapped("h.0._fsdp_wrapped_module.q")
    ('h.0.q', 'h.0.q')
    """
    if "_" in name:
        name = ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name
    while name.startswith(_AROUND):
        for start in _AROUND:
            name = name.removeprefix(start)
    return name


def renamed(name: str, renames: Mapping[str, str]) -> str:
    """The name with components replaced: for each pair, the first place where the old components stand.

    >>> renamed("model.decoder.layers.0.q", {"model.decoder": "language_model", "q": "q_proj"})
    'language_model.layers.0.q_proj'
    """
    for old, new in renames.items():
        dotted = f".{name}."
        if f".{old}." in dotted:
            name = dotted.replace(f".{old}.", f".{new}." if new else ".", 1).strip(".")
    return name


def is_flattened(name: str, module: str) -> bool:
    """Whether a name is that of a module with underscores in place of dots, after a prefix of Kohya's or LyCORIS.

    >>> is_flattened("lora_unet_mid_block_to_q", "mid_block.to_q"), is_flattened("lycoris_to_q", "mid_block.to_q")
    (True, False)
    """
    prefix = name.removesuffix(module.replace(".", "_"))
    return prefix != name and _FLATTENED.fullmatch(prefix) is not None


def common_name(name: str) -> str:
    """A name without the components that differ between a vision-language model's modules and its files.

    Versions of transformers, and their files, put the language model at ``model.language_model``,
    ``language_model.model``, ``language_model`` or ``model``, and vision towers at ``visual``, ``vit`` or
    ``vision_tower``.

    >>> [common_name(f"{start}.layers.0.q") for start in ("model.language_model", "language_model.model", "model")]
    ['layers.0.q', 'layers.0.q', 'layers.0.q']
    >>> common_name("model.vision_tower.vision_model.encoder.0.q"), common_name("model.visual.blocks.0.q")
    ('vision_tower.encoder.0.q', 'vision_tower.blocks.0.q')
    """
    parts = [part for part in unwrapped(name).split(".") if part != "model"]
    while len(parts) > 1 and parts[0] in _CONTAINERS:
        del parts[0]
    if parts and parts[0] in _TOWERS:
        parts[0] = "vision_tower"
    return ".".join(parts[:1] + [part for part in parts[1:] if part != "vision_model"]) or name


def matched_names(wanted: Iterable[str], present: Iterable[str]) -> Mapping[str, str]:
    """Each wanted name to the one that means the same layer: itself, or the only one of the same `common_name`.

    >>> matched_names(["model.language_model.h.0", "head"], ["language_model.model.h.0", "other"])
    {'model.language_model.h.0': 'language_model.model.h.0'}
    """
    wanted, present = list(wanted), dict.fromkeys(present)
    matches = {name: name for name in wanted if name in present}
    others: dict[str, list[str]] = {}
    free: dict[str, list[str]] = {}
    for groups, names in ((others, wanted), (free, present)):
        for name in names:
            if name not in matches:
                groups.setdefault(common_name(name), []).append(name)
    pairs = [(names, free.get(key, [])) for key, names in others.items()]
    matches |= {names[0]: same[0] for names, same in pairs if len(names) == len(same) == 1}
    return matches | _flattened_matches(wanted, present, matches)


def _flattened_matches(wanted: Sequence[str], present: Iterable[str], matches: Mapping[str, str]) -> dict[str, str]:
    """Pairs of a name of Kohya's scripts, with underscores in place of dots, and the only dotted one that it fits."""
    used = set(matches.values())
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for side, names in enumerate((wanted, present)):
        for name in names:
            if name not in (matches, used)[side]:
                groups.setdefault(_flat(name), ([], []))[side].append(name)
    return {a[0]: b[0] for a, b in groups.values() if len(a) == len(b) == 1 and ("." in a[0]) != ("." in b[0])}


def _flat(name: str) -> str:
    """A name without dots, with diffusers' word for the component in place of Kohya's.

    >>> _flat("lora_te2_text_model_encoder_layers_0_mlp_fc1"), _flat("unet.mid_block.attentions.0.to_q")
    ('text_encoder_2_text_model_encoder_layers_0_mlp_fc1', 'unet_mid_block_attentions_0_to_q')
    """
    component = re.match(r"(?:lora|lycoris)_(unet|te1|te2|te|transformer)_", name)
    if component is None:
        return name.replace(".", "_")
    words = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
    return f"{words.get(component[1], component[1])}_{name[component.end() :]}"
