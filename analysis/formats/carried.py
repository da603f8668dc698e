"""Contents of a PEFT folder beside the factors, for a changed adapter to keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from analysis.formats.base_updates import DoraAdapter
from analysis.formats.files import TensorFile, is_file, open_file, read_json
from analysis.formats.sources import Relabelled, Source, StoredAdapter
from analysis.formats.tensor_names import parse_name

OPTIONS = (
    *("base_model_name_or_path", "revision", "task_type", "bias", "modules_to_save", "trainable_token_indices"),
    *("auto_mapping", "megatron_config", "megatron_core", "lora_bias"),
)
"""Options of PEFT that stay when an adapter's factors change."""


@dataclass(frozen=True)
class Carried:
    """Options of a configuration and tensors that are no factors, such as heads and biases trained in full."""

    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def carried_over(source: Source) -> Carried:
    """The options and tensors of a PEFT folder that its update leaves out; of other formats the base's name only."""
    stored = source.original if isinstance(source, Relabelled) else source
    stored = stored.directions if isinstance(stored, DoraAdapter) else stored
    named = {} if source.base is None else {"base_model_name_or_path": source.base}
    if not isinstance(stored, StoredAdapter) or not is_file(path := stored.path.parent / "adapter_config.json"):
        return Carried(named, {})
    config = read_json(path)
    options = {key: config[key] for key in OPTIONS if config.get(key) is not None}
    file = open_file(stored.path)
    tensors = {name: file.stored(name) for name in _others(file, stored.names)}
    scalings = {f"{each.left.removesuffix('weight')}bias": each.scaling for each in stored.layers.values()}
    # PEFT scales the bias of a factor too, and changed factors are written with scaling 1
    return Carried(options, {name: tensor * scalings.get(name, 1.0) for name, tensor in tensors.items()})


def _others(file: TensorFile, read: set[str]) -> list[str]:
    """Names of tensors that belong to no method of adapters, so that the model holds them in full."""
    return [name for name in file.names if name not in read and parse_name(name) is None]
