"""EBLoRA as a PEFT method, for ``get_peft_model``, ``save_pretrained`` and ``PeftModel.from_pretrained``.

Importing this module registers the method with PEFT, which has no public way to do so from outside. It works with the
versions in `TESTED`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter_geometry import eblora_layers, validate_on_manifolds
from manifold_cl.adapters.base_layers import (
    is_conv1d,
    shared_tensors,
    tied_message,
    validate_base,
    validate_parent,
    validate_untied,
)
from manifold_cl.adapters.frames import validate_frames
from manifold_cl.adapters.identity import weight_difference
from manifold_cl.adapters.layers import plain_name
from manifold_cl.adapters.merging import losses_together
from manifold_cl.adapters.named_adapters import FRAMES, PREFIX, NamedAdapters, adapter_names_passed
from manifold_cl.adapters.peft_config import MERGED, TESTED, EBLoraConfig, EBLoraType
from manifold_cl.adapters.stored_complements import COMPLEMENT, PACKED, expanded, stored_once, stored_per_layer

__all__ = ["TESTED", "EBLoraConfig", "EBLoraLayer", "EBLoraModel"]

# PEFT's internals come last: `peft_config` has checked the version by now.
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key


class EBLoraLayer(NamedAdapters, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with EBLoRA adapters by name, which PEFT switches, merges and deletes."""

    # From BaseTunerLayer, which has no types.
    set_adapter: Callable[..., None]
    delete_adapter: Callable[[str], None]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    adapter_layer_names = ("eblora_left", "eblora_right", "eblora_scale")
    other_param_names = (
        "eblora_input",
        "eblora_output",
        "eblora_start",
        "eblora_dropout",
        "eblora_scaling",
        "eblora_base",
        "r",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer)
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: EBLoraConfig, *, layer: str, r: int, alpha: float | None) -> None:
        """Add an adapter of rank r to this layer, whose name in the model is ``layer``."""
        self.name = layer
        self.add(adapter_name, r, config.options(alpha), seed=config.seed, widths=config.protected.get(layer, (0, 0)))
        if layer in config._saved_protected:
            self.protection_due |= {adapter_name}
        self.merged_dtypes[adapter_name] = MERGED[config.merged_dtype] if config.merged_dtype else None
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active(self) -> list[str]:
        """The active adapters of PEFT that this layer has."""
        return [name for name in self.active_adapters if name in self.eblora_left]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the shape of the base weight."""
        delta = self.factors(adapter).delta_weight()
        return delta.T if is_conv1d(self.get_base_layer()) else delta

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output and the active adapters' updates, for inputs as rows.

        ``adapter_names`` are one adapter per member of the batch instead of the active ones, ``"__base__"`` for none.
        ValueError for another number of names than of members, and for names while adapters are merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged and adapter_names is None:
            dtype = cast(Tensor, self.get_base_layer().weight).dtype  # merged_dtype may be another than the input's
            if dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
                return cast(Tensor, self.base_layer(x, *args, **kwargs))
            return cast(Tensor, self.base_layer(x.to(dtype), *args, **kwargs)).to(x.dtype)
        out = cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters:
            return out
        self.validate_forward()
        if adapter_names is not None:
            return self.update_mixed(x, out, adapter_names)
        for name in self.active():
            out = out + self.update(name, x).to(out.dtype)
        return out

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; a copy is kept on the CPU for `unmerge`. Errors as `Adapter.merge`.

        A result that is not finite is an error with or without ``safe_merge``.
        """
        if names := [name for name in check_adapters_to_merge(self, adapter_names) if name in self.eblora_left]:
            self.merge_named(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight, to the last bit."""
        if self._backup is None:
            warnings.warn("nothing is merged, so there is nothing to undo", UserWarning, stacklevel=2)
            return
        self.restore_base()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is additive and of low rank; `export_lora` converts it exactly."""
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base's device only: PEFT's method would also round the frames to its precision."""
        target = device or cast(Tensor, self.get_base_layer().weight).device
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            parts = getattr(self, attribute)
            if isinstance(parts, nn.ParameterDict | nn.ModuleDict) and adapter_name in parts:
                item = parts[adapter_name]
                state = item if isinstance(item, Tensor) else next(iter(item.state_dict().values()), None)
                if state is not None and "meta" not in (state.device.type, target.type) and state.device != target:
                    parts[adapter_name] = item.to(target)


class EBLoraModel(BaseTuner):  # type: ignore[misc]
    """The wrapper of PEFT that replaces every target by an `EBLoraLayer`."""

    prefix = PREFIX
    tuner_layer_cls = EBLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As every tuner; an error at one layer restores the layers before it."""
        self._shared = shared_tensors(model)
        self._undo: list[Callable[[], None]] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for undo in reversed(self._undo):
                undo()
            raise
        finally:
            self._undo.clear()

    @staticmethod
    def _check_target_module_exists(peft_config: EBLoraConfig, key: str) -> Any:
        """As every tuner, without the modules that compute a parametrized bias: their names end with a number too."""
        return "parametrizations" not in key.split(".") and BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self, config: EBLoraConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, *,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        name = plain_name(current_key)
        key = f"{current_key}.base_layer.weight" if isinstance(target, BaseTunerLayer) else f"{current_key}.weight"
        if key in self._shared:
            raise ValueError(tied_message(current_key, self._shared[key]))
        try:
            validate_base(base)
            validate_parent(parent, target_name)
            expected = (config._expected or {}).get(name)
            differs = weight_difference(expected, base) if expected else None
            if differs and config.base_fingerprint is not None:
                hint = "config.base_fingerprint = None loads it nevertheless"
                raise ValueError(f"the adapter was trained on another model, {differs} ({hint})")
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), current_key), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), current_key), config.alpha)
            layer = target if isinstance(target, EBLoraLayer) else EBLoraLayer(target, adapter_name)
            layer.update_layer(adapter_name, config, layer=name, r=rank, alpha=alpha)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{current_key}: {error}") from None
        if layer is target:
            self._undo.append(lambda: layer.delete_adapter(adapter_name))
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        self._undo.append(lambda: setattr(parent, target_name, target))

    def _check_merge_allowed(self) -> None:
        """Validate all layers before any is merged: no shared weights, no frames off their manifolds."""
        super()._check_merge_allowed()
        validate_on_manifolds(self.model, to="merge")
        names = {key for key, module in self.model.named_modules() if isinstance(module, EBLoraLayer)}
        validate_untied(self.model, ((name, f"{name}.base_layer.weight") for name in names))

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As every tuner, with one warning about the loss by rounding."""
        with losses_together():
            super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        with losses_together():
            return cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs))

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, layers receive the ``adapter_names`` of a forward or generate call, as in PEFT's LoRA."""
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams") or 1
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets belong to activated LoRA: EBLoRA adapters act on every token")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names are for inference: call model.eval() first, or set_adapter to train one")
        receivers = [m for m in self.model.modules() if isinstance(m, EBLoraLayer | AuxiliaryTrainingWrapper)]
        with adapter_names_passed(self.model, receivers, names, beams=beams):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: EBLoraConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The adapter's tensors. The configuration gets what a reader must know before it allocates them."""
        given: dict[str, Tensor] = args[0] if args else kwargs["state_dict"]  # gathered, where frames are sharded
        validate_frames(
            (
                (f"{name}.{key}", given.get(f"{name}.{key}", frame), manifold)
                for name, layer in _layers_with(model, adapter_name)
                for key, frame, manifold in layer.points(adapter_name)
            ),
            to="save",
        )
        layers = {name: layer for name, layer in eblora_layers(model).items() if adapter_name in layer.adapter_names()}
        for layer in layers.values():
            layer.validate_protection(adapter_name)
        widths = {
            name: [x.width if x.k else 0 for _, _, x in layer.points(adapter_name)][::-1]
            for name, layer in layers.items()
        }
        config.protected = {name: pair for name, pair in widths.items() if any(pair)}
        bases = {name: cast(EBLoraLayer, layer).eblora_base[adapter_name] for name, layer in layers.items()}
        config.base_fingerprint = {name: text for name, text in bases.items() if text is not None}
        state: dict[str, Tensor] = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        manifolds = {
            f"{name}.{PREFIX}{side}.{adapter_name}.complement": manifold
            for name, layer in _layers_with(model, adapter_name)
            for (_, side), (_, _, manifold) in zip(FRAMES, layer.points(adapter_name), strict=True)
        }
        if getattr(model, "_hf_peft_config_loaded", False) and not isinstance(model, PeftModel):
            return stored_per_layer(state, manifolds)  # the model's own add_adapter and load_adapter
        return stored_once(state, manifolds, adapter=adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key for a file: without the adapter's name, and without names that wrappers such as torch.compile add."""
        return plain_name(cast(str, super()._remove_adapter_name_from_key(key, adapter_name)))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: EBLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, after making room for protected subspaces, whose keys PEFT would drop."""
        state_dict = {plain_name(key) if PREFIX in key else key: value for key, value in state_dict.items()}
        state_dict = expanded(state_dict)
        for name, layer in _layers_with(model, adapter_name):
            stems = [f"{start}{plain_name(name)}.{PREFIX}" for start in ("", "base_model.model.")]
            if not any(f"{stem}left" in state_dict for stem in stems):
                raise ValueError(f"the file holds no adapter for {layer.name}, which would keep its random start")
            for (_, side), (_, frame, manifold) in zip(FRAMES, layer.points(adapter_name), strict=True):
                saved, columns = (
                    next((state_dict[key] for stem in stems if (key := f"{stem}{side}.{end}") in state_dict), None)
                    for end in (COMPLEMENT, PACKED)
                )
                manifold.packed = columns  # where it was read: the frame may be on the meta device
                if saved is not None and manifold.complement is None:
                    manifold.complement = torch.zeros(saved.shape, dtype=saved.dtype, device=frame.device)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return cast(dict[str, Tensor], remapped)


def _layers_with(model: nn.Module, adapter: str) -> list[tuple[str, EBLoraLayer]]:
    """The layers that have this adapter, by their names in the model, wrappers included."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, EBLoraLayer) and adapter in m.r]


PEFT_TYPE_TO_CONFIG_MAPPING[EBLoraType.EBLORA] = EBLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[EBLoraType.EBLORA] = EBLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[EBLoraType.EBLORA] = EBLoraModel.prefix
