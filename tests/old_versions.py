"""What the oldest versions that are allowed lack: tests of it skip there, and name the version that has it."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import safetensors.torch
import torch

HAS_MUON = hasattr(torch.optim, "Muon")
needs_muon = pytest.mark.skipif(not HAS_MUON, reason="torch.optim.Muon came with torch 2.9")

SHARDS_ON_CPU = torch.__version__ >= (2, 7)
needs_sharding = pytest.mark.skipif(
    not SHARDS_ON_CPU, reason="fully_shard on CPUs, with ignored_params, needs torch 2.7"
)


def _is_stored(dtype: torch.dtype) -> bool:
    try:
        return bool(safetensors.torch.save({"x": torch.zeros(1, dtype=dtype)}))
    except KeyError:
        return False


STORES_COMPLEX = _is_stored(torch.complex64)
needs_stored_complex = pytest.mark.skipif(not STORES_COMPLEX, reason="this safetensors writes no complex numbers")


def _is_before(package: str, *wanted: int) -> bool:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2]) < wanted
    except PackageNotFoundError:
        return True


LOADS_NATIVELY = not _is_before("transformers", 5, 18)
"""``load_adapter`` finds the weights of BERT and GPT-2, also of plain LoRA: with 5.18 it does, with 5.2 to 5.15 not."""
