"""The memory: what it keeps, how it grows, where it stops."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from manifold_cl import EBLoRALinear, ProtectedSubspace, SubspaceMemory
from manifold_cl.files import FileError
from manifold_cl.tensor_files import read_tensors, write_tensors

SPECTRUM = torch.tensor([3.0, 2.0, 1.0, 0.5])  # energies 9, 4, 1, 0.25 of 14.25: 63, 91, 98, 100 %


def moment_of(directions: Tensor) -> Tensor:
    return directions @ directions.T


def directions(generator: torch.Generator, n: int = 10) -> Tensor:
    frame, _ = torch.linalg.qr(torch.randn(n, 4, generator=generator))
    return frame * SPECTRUM


@pytest.mark.parametrize(("energy", "columns"), [(0.97, 3), (0.6, 1), (0.64, 2), (0.91, 2), (0.99, 4)])
def test_the_fewest_columns_that_reach_the_energy_are_kept(
    energy: float, columns: int, generator: torch.Generator
) -> None:
    a = directions(generator)
    memory = SubspaceMemory.empty({"q": 10}).extended({"q": moment_of(a)}, energy=energy, rank=2)
    assert memory["q"].k == columns  # the column that crosses the threshold is among them
    assert memory["q"].energy_fraction(a) >= energy - 1e-6  # float32
    fewer = ProtectedSubspace(memory["q"].basis[:, :-1])
    assert fewer.energy_fraction(a) < energy
    leading = a[:, :columns] / a[:, :columns].norm(dim=0)
    cosines = (memory["q"].basis * leading).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(columns), rtol=1e-5, atol=0)  # the largest first, float32
    assert memory.full == ()


def test_old_columns_come_first_and_are_not_touched(generator: torch.Generator) -> None:
    first = SubspaceMemory.empty({"q": 10}).extended({"q": moment_of(directions(generator))}, energy=0.97, rank=2)
    second = first.extended({"q": moment_of(directions(generator))}, energy=0.97, rank=2)
    assert first["q"].k == 3
    assert second["q"].k > 3
    assert torch.equal(second["q"].basis[:, :3], first["q"].basis)
    again = first.extended({"q": moment_of(first["q"].basis)}, energy=0.97, rank=2)
    assert torch.equal(again["q"].basis, first["q"].basis)  # what is held already adds nothing


def test_layers_without_news_are_left_alone(generator: torch.Generator) -> None:
    memory = SubspaceMemory.empty({"a": 10, "b": 6})
    grown = memory.extended({"a": moment_of(directions(generator))}, energy=0.9, rank=2)
    assert (grown["a"].k, grown["b"].k) == (2, 0)
    assert (memory["a"].k, memory["b"].k) == (0, 0)  # a value: the old memory is what it was
    assert list(grown) == ["a", "b"]
    assert len(grown) == 2
    assert grown.fractions() == {"a": 0.2, "b": 0.0}


def test_fifty_growths_stay_orthonormal_and_within_capacity(generator: torch.Generator) -> None:
    n, rank = 96, 8
    memory = SubspaceMemory.empty({"q": n})
    sizes = []
    for _ in range(50):
        scales = torch.logspace(0, -1, 5)
        memory = memory.extended(
            {"q": moment_of(torch.randn(n, 5, generator=generator) * scales)}, energy=0.95, rank=rank
        )
        sizes.append(memory["q"].k)
        assert memory["q"].k <= n - rank  # the documented bound
    assert sizes == sorted(sizes)
    assert sizes[10] < n - rank
    assert sizes[-1] == n - rank
    assert memory.full == ("q",)
    assert memory.max_error() < 1e-6  # float64 orthonormalisation, rounded once to float32
    EBLoRALinear(torch.nn.Linear(n, 12), rank, complement=memory["q"])  # there is room for one more adapter


def test_a_layer_that_is_cut_short_is_reported_and_keeps_the_strongest(generator: torch.Generator) -> None:
    a = directions(generator)
    memory = SubspaceMemory.empty({"q": 10, "v": 10})
    grown = memory.extended({"q": moment_of(a), "v": moment_of(a)}, energy=0.97, rank=8)
    assert grown.full == ("q", "v")
    assert grown["q"].k == 2
    assert grown["q"].energy_fraction(a) == pytest.approx(13 / 14.25, rel=1e-5)  # float32
    relaxed = grown.extended({"q": moment_of(a[:, :2])}, energy=0.97, rank=8)
    assert relaxed.full == ()  # nothing was wanted that did not fit


def test_the_memory_comes_back_bit_for_bit(tmp_path: Path, generator: torch.Generator) -> None:
    memory = SubspaceMemory.empty({"a.q": 10, "b.q": 5, "c": 10}).extended(
        {"a.q": moment_of(directions(generator)), "c": moment_of(directions(generator))}, energy=0.97, rank=8
    )
    memory.save(tmp_path, task="nouns", energy=0.97, source="activation")
    loaded = SubspaceMemory.load(tmp_path)
    assert list(loaded) == ["a.q", "b.q", "c"]
    assert all(torch.equal(loaded[name].basis, memory[name].basis) for name in memory)
    assert loaded["b.q"].k == 0
    assert loaded.full == memory.full == ("a.q", "c")
    _, manifest = read_tensors(tmp_path / "memory.safetensors")
    assert (manifest["format"], manifest["version"]) == ("manifold_cl.memory", 2)
    assert (manifest["task"], manifest["energy"], manifest["source"]) == ("nouns", 0.97, "activation")
    assert loaded.shapes() == {"a.q": (10, 2), "b.q": (5, 0), "c": (10, 2)}


def test_a_damaged_memory_is_refused_by_name(tmp_path: Path, generator: torch.Generator) -> None:
    SubspaceMemory.empty({"q": 10}).extended({"q": moment_of(directions(generator))}, energy=0.9, rank=2).save(tmp_path)
    path = tmp_path / "memory.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(FileError, match=rf"memory\.safetensors has {len(content) - 1} bytes"):
        SubspaceMemory.load(tmp_path)
    with pytest.raises(FileError, match=r"nowhere/memory\.safetensors does not exist"):
        SubspaceMemory.load(tmp_path / "nowhere")


def test_statistics_that_are_not_finite_are_refused() -> None:
    memory = SubspaceMemory.empty({"q": 4})
    with pytest.raises(ValueError, match="directions hold NaN or infinite values"):
        memory.extended({"q": torch.full((4, 4), float("nan"))}, energy=0.9, rank=1)


def test_a_memory_on_the_device_is_itself(generator: torch.Generator) -> None:
    memory = SubspaceMemory.empty({"q": 10}).extended({"q": moment_of(directions(generator))}, energy=0.9, rank=2)
    assert memory.to("cpu") is memory  # nothing is checked again


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_memory_moves_and_grows_on_a_device(generator: torch.Generator) -> None:
    moment = moment_of(directions(generator))
    memory = SubspaceMemory.empty({"q": 10}).to("cuda")
    assert memory.to("cuda") is memory
    grown = memory.extended({"q": moment.cuda()}, energy=0.97, rank=2)
    assert grown["q"].basis.device.type == "cuda"
    assert grown.columns["q"].energies.device.type == "cpu"
    expected = SubspaceMemory.empty({"q": 10}).extended({"q": moment}, energy=0.97, rank=2)
    assert grown.to("cpu")["q"].energy_fraction(expected["q"].basis) == pytest.approx(1.0, abs=1e-5)  # float32


class Pair(torch.nn.Module):
    def __init__(self, n: int = 10, m: int = 6, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.q, self.v = (torch.nn.utils.skip_init(torch.nn.Linear, n, m, bias=False) for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))


def with_model(tmp_path: Path) -> SubspaceMemory:
    model = Pair()
    memory = SubspaceMemory.empty({"q": 10, "v": 10}).with_model(model, {"q": model.q, "v": model.v})
    memory.save(tmp_path)
    return memory


def test_a_memory_knows_its_model_through_half_precision_and_small_updates(tmp_path: Path) -> None:
    memory = with_model(tmp_path)
    model = Pair()
    assert memory.differences(model) == []
    assert SubspaceMemory.load(tmp_path, model=model.to(torch.bfloat16)).model == memory.model
    updated = Pair()
    with torch.no_grad():
        updated.q.weight += 0.01 * torch.randn(6, 10, generator=torch.Generator().manual_seed(5))
    assert memory.differences(updated) == []


def test_a_fingerprint_that_is_no_list_of_numbers_is_of_another_model(tmp_path: Path) -> None:
    memory = with_model(tmp_path)
    tensors, manifest = read_tensors(tmp_path / "memory.safetensors")
    manifest["model"]["weights"]["v"] = "nan " * 16 + "1e-7"
    write_tensors(tmp_path / "memory.safetensors", tensors, manifest)
    assert memory.differences(Pair()) == []
    assert [line[:2] for line in SubspaceMemory.load(tmp_path).differences(Pair())] == ["v:"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Pair(seed=1), r"2 differences\): q: its base weight differs by up to .*; v: its base weight differs"),
        (Pair(n=12), "q: protects 10 inputs, the model's has 12; v: protects"),
        (Pair(m=7), "q: its base weight differs"),
        (torch.nn.Sequential(torch.nn.Linear(10, 6)), "q: no linear module of the model; v: no linear module"),
    ],
)
def test_a_memory_of_another_model_is_refused_with_the_differences(
    model: torch.nn.Module, message: str, tmp_path: Path
) -> None:
    with_model(tmp_path)
    with pytest.raises(FileError, match=rf"the memory does not fit the model .*{message}"):
        SubspaceMemory.load(tmp_path, model=model)
    SubspaceMemory.load(tmp_path)  # nobody asked for a model


def test_the_error_of_a_memory_is_measured(generator: torch.Generator) -> None:
    assert SubspaceMemory.empty({"q": 10}).max_error() == 0.0
    exact = torch.linalg.qr(torch.randn(10, 3, generator=generator, dtype=torch.float64))[0]
    skewed = exact.clone()
    skewed[:, 1] += 1e-5 * exact[:, 0]
    assert SubspaceMemory({"q": ProtectedSubspace(skewed)}).max_error() == pytest.approx(1e-5, rel=1e-6)  # float64


def test_a_memory_without_layers_is_empty() -> None:
    assert SubspaceMemory({}).occupancy() == {"mean_fraction": 0.0, "max_fraction": 0.0, "full_layers": 0.0}
