"""Bases in six bits per entry: exact by construction, in memories, PEFT folders, and readers of `analysis`."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_shared_inputs import SHARED, Attention, layers_of, losses_of

from analysis.formats.own import read_bases
from analysis.formats.packed_bases import unpacked
from manifold_cl import ProtectedSubspace, RestrictedStiefel, SubspaceMemory, protect
from manifold_cl.continual import grow_memory, make_method
from manifold_cl.files import FileError
from manifold_cl.geometry.compact_bases import BYTES, pack, unpack


def basis_of(n: int, k: int, *, seed: int = 0, heavy: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(n, k, generator=draw, dtype=torch.float64)
    if heavy:  # a few rows hold most of the energy, as in the residual stream of a language model
        a = a * (1.5 * torch.randn(n, 1, generator=draw, dtype=torch.float64)).exp()
    return torch.linalg.qr(a)[0].float()


def by_hand(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The slow twin: bit by bit, and Gram–Schmidt column by column."""
    columns: list[torch.Tensor] = []
    for row in packed.tolist():
        column: list[float] = []
        for start in range(0, len(row), BYTES):
            bits = sum(byte << (8 * i) for i, byte in enumerate(row[start : start + BYTES - 1]))
            scale = 2 ** ((row[start + BYTES - 1] - 128) / 4)
            column += [((bits >> (6 * i) & 63) - 32) * scale for i in range(64)]
        v = torch.tensor(column[:n], dtype=torch.float64)
        for _ in range(2):
            for other in columns:
                v = v - other * (other @ v)
        columns.append(v / v.norm())
    return torch.stack(columns, dim=-1)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 150), share=st.floats(0, 1), seed=st.integers(0, 99), heavy=st.booleans())
def test_packed_columns_define_an_orthonormal_basis_near_the_given_one(
    n: int, share: float, seed: int, heavy: bool
) -> None:
    k = max(1, round(share * n))
    basis = basis_of(n, k, seed=seed, heavy=heavy)
    packed = pack(basis)
    found = unpack(packed, n)
    assert packed.shape == (k, -(-n // 64) * BYTES)
    assert float((found.double().mT @ found.double() - torch.eye(k)).abs().max()) < 5e-7  # rounding of float32
    torch.testing.assert_close(found.double(), by_hand(packed, n), rtol=0, atol=2e-7)
    assert torch.equal(unpacked(packed, n), found)
    lost = 1 - float((basis.double().mT @ found.double()).square().sum()) / k
    assert lost < 0.024  # 64 (2^(1/4) / 62)², half a step at every entry of a block whose peak has all the energy
    assert (
        heavy or n < 64 or lost < 2e-3
    )  # Gaussian columns; the worst single column of these sizes and seeds has 1.7e-3


@pytest.mark.parametrize(("n", "k", "added"), [(10, 2, 1), (200, 20, 30), (300, 40, 90), (384, 70, 33)])
def test_columns_that_are_added_leave_the_old_ones_to_the_bit(n: int, k: int, added: int) -> None:
    old = ProtectedSubspace(basis_of(n, k)).compacted()
    more = old.extended(torch.randn(n, added, generator=torch.Generator().manual_seed(3)))
    new = more.compacted(old)
    assert new.packed is not None
    assert old.packed is not None
    assert torch.equal(new.packed[:k], old.packed)
    assert torch.equal(new.basis[:, :k], old.basis)
    assert new.k == k + added


def test_a_compact_memory_grows_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = Attention()
    layers = layers_of(model)
    exact, memory = SubspaceMemory.empty(layers), SubspaceMemory.empty(layers, compact=True)
    for task in ("first", "second"):
        options = {"energy": 0.7 if task == "first" else 0.9, "rank": 2, "task": task, "passes": SHARED}
        exact = grow_memory(exact, layers, losses_of(model), **options)  # type: ignore[arg-type]
        memory = grow_memory(memory, layers, losses_of(model), **options)  # type: ignore[arg-type]
    memory.save(tmp_path)
    assert {name.rsplit(".")[1] for name in load_file(tmp_path / "memory.safetensors")} == {"packed"}
    for lazy in (False, True):
        loaded = SubspaceMemory.load(tmp_path, lazy=lazy)
        assert loaded.compact
        assert loaded.shapes() == dict(sorted(memory.shapes().items()))
        assert all(torch.equal(loaded[name].basis, memory[name].basis) for name in memory)
    bases = read_bases(tmp_path)
    assert bases is not None
    assert all(torch.equal(bases.basis(name), memory[name].basis) for name in memory)  # type: ignore[arg-type]
    assert loaded.to("cpu")["query"] is not None
    grown = grow_memory(loaded, layers, losses_of(model), energy=1.0, rank=2, task="third", passes=SHARED)
    assert grown["query"].packed is not None
    for name, growth in memory.growth.items():
        assert abs(growth.explained - exact.growth[name].explained) < 0.03  # 12 rows: few columns, coarse shares
        frame = RestrictedStiefel(memory[name]).random(memory[name].n, 2, dtype=torch.float32)
        assert float((memory[name].basis.mT @ frame).abs().max()) <= 2e-6  # the documented bound


def test_eviction_keeps_the_packed_columns_that_stay() -> None:
    memory = SubspaceMemory.empty({"a": 24}, compact=True)
    for task in range(4):
        a = torch.randn(24, 9, generator=torch.Generator().manual_seed(task))
        memory = memory.extended({"a": a @ a.T}, energy=0.95, rank=4, policy="evict", task=str(task))
    assert memory.full == ("a",)
    assert memory["a"].packed is not None
    assert torch.equal(unpack(memory["a"].packed, 24), memory["a"].basis)
    assert memory["a"].k == len(memory.columns["a"].energies) == 20


def test_columns_in_float32_cannot_become_compact() -> None:
    memory = SubspaceMemory({"a": ProtectedSubspace(torch.eye(8)[:, :2])}, compact=True)
    with pytest.raises(ValueError, match="2 columns of a in float32"):
        memory.extended({"a": torch.eye(8)}, energy=0.9, rank=1)
    assert "compact_memory" not in make_method("eblora").options()


def test_damaged_columns_are_refused(tmp_path: Path) -> None:
    packed = pack(basis_of(70, 3))
    with pytest.raises(
        ValueError, match=r"packed columns of 70 rows are uint8 of shape \(k, 98\), got torch.uint8 \(3, 49\)"
    ):
        unpack(packed[:, :49], 70)
    packed[1] = packed[0]
    with pytest.raises(ValueError, match="packed columns are dependent"):
        unpack(packed, 70)
    memory = SubspaceMemory.empty({"a": 70}, compact=True).extended({"a": torch.eye(70)}, energy=0.1, rank=4)
    memory.save(tmp_path)
    content = (tmp_path / "memory.safetensors").read_bytes()
    (tmp_path / "memory.safetensors").write_bytes(content[:-3] + b"\x00\x01\x02")
    with pytest.raises(FileError, match="damaged"):
        SubspaceMemory.load(tmp_path)


def test_a_peft_folder_holds_each_basis_once_and_reloads_to_the_bit(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from manifold_cl.adapters.peft import EBLoraConfig

    names = ["query", "key", "value", "out", "other"]

    def fresh() -> torch.nn.Module:
        config = EBLoraConfig(r=2, target_modules=names)
        return peft.get_peft_model(Attention(), config)  # type: ignore[no-any-return]

    source = Attention()
    layers = layers_of(source)
    options = {"energy": 0.8, "rank": 2, "passes": SHARED}
    for compact, end in ((False, "complement"), (True, "packed")):
        memory = SubspaceMemory.empty(layers, compact=compact)
        memory = grow_memory(memory, layers, losses_of(source), **options)  # type: ignore[arg-type]
        model = fresh()
        protect(model, memory)
        folder = tmp_path / end
        model.save_pretrained(folder)
        stored = load_file(folder / "adapter_model.safetensors")
        parts = [key.removeprefix("base_model.model.").split(".eblora_input.") for key in stored if "_input" in key]
        ends = dict(parts)
        assert ends == {"query": end, "key": "shared", "value": "shared", "out": end, "other": end}
        again = peft.PeftModel.from_pretrained(Attention(), folder)
        for name in names:
            module = again.base_model.model.get_submodule(name)
            manifold = module.eblora_input["default"]
            assert torch.equal(manifold.complement, memory[name].basis)
            assert max(manifold.constraint_error(module.eblora_right["default"])) <= 2e-6  # the documented bound
        x = torch.randn(2, 5, 12)
        assert torch.equal(again(x), model(x))
        again.save_pretrained(tmp_path / f"{end} again")
        restored = load_file(tmp_path / f"{end} again" / "adapter_model.safetensors")
        assert {key: t.shape for key, t in restored.items()} == {key: t.shape for key, t in stored.items()}
        third = fresh()
        third.load_adapter(folder, "second")
        assert torch.equal(third.base_model.model.key.eblora_input["second"].complement, memory["key"].basis)
    del stored[next(key for key in stored if key.endswith("query.eblora_input.packed"))]
    save_file(stored, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"shares the protected basis of .*query\.eblora_input, which the file lacks"):
        peft.PeftModel.from_pretrained(Attention(), folder)


def test_a_replaced_complement_is_stored_as_it_is(tmp_path: Path) -> None:
    manifold = RestrictedStiefel(ProtectedSubspace(basis_of(20, 3)).compacted())
    assert manifold.packed_complement() is not None
    manifold.complement = basis_of(20, 3, seed=1)
    assert manifold.packed_complement() is None
