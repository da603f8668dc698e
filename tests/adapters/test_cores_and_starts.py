"""Cores, starts, compensation and restriction: each against its formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manifold_cl import (
    EBLoRALinear,
    ProtectedSubspace,
    RiemannianAdamW,
    adapters_of,
    eblora_adapters,
    inject_adapters,
    load_adapters,
    param_groups,
    save_adapters,
)
from manifold_cl.adapters import geometry_metrics, read_adapters
from manifold_cl.adapters.frames import leading_vectors
from manifold_cl.adapters.low_rank import spectral_entropy, spectrum
from manifold_cl.geometry import RestrictedStiefel

EPS = 2.0**-23
M, N, R = 12, 20, 4
CORES = ["scalar", "diagonal", "full"]


def base(generator: torch.Generator, m: int = M, n: int = N) -> nn.Linear:
    linear = nn.Linear(n, m)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(m, n, generator=generator) / n**0.5)
        linear.bias.copy_(torch.randn(m, generator=generator))
    return linear


def stir(adapter: EBLoRALinear, generator: torch.Generator) -> None:
    """As in the middle of training: another point, another core."""
    with torch.no_grad():
        for _, frame, manifold in adapter.manifold_parameters():
            frame.copy_(manifold.random(*frame.shape, generator=generator))
        adapter.scale.copy_(torch.randn(adapter.scale.shape, generator=generator))


def dense(adapter: EBLoRALinear) -> Tensor:
    """The update of the class's docstring in float64: alpha/r · left · S · rightᵀ, less the start if compensated."""

    def product(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
        core = scale.double()
        core = core if core.ndim == 2 else torch.diag(core.expand(adapter.rank))
        return adapter.alpha / adapter.rank * left.double() @ core @ right.double().T

    total = product(adapter.left.detach(), adapter.right.detach(), adapter.scale.detach())
    if adapter.compensated:
        total = total - product(adapter.start_left, adapter.start_right, adapter.start_scale)
    return total


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("core", CORES)
def test_update_forward_and_file_are_the_dense_formula(
    core: str, compensate: bool, generator: torch.Generator, tmp_path
) -> None:
    model = nn.Sequential(base(generator))
    make = eblora_adapters(rank=R, alpha=6.0, core=core, compensate=compensate, generator=generator)
    inject_adapters(model, ["0"], make)
    (adapter,) = adapters_of(model).values()
    assert isinstance(adapter, EBLoRALinear)
    stir(adapter, generator)
    expected = dense(adapter)
    found = adapter.factors().delta_weight()
    # Sums of at most 2r float32 products, of terms no larger than the two parts.
    assert (found - expected).abs().max() <= 4 * R * EPS * 3 * float(adapter.scale.detach().abs().max()) + EPS
    x = torch.randn(5, 7, N, generator=generator)
    linear = adapter.base
    want = x.double() @ (linear.weight.detach().double() + expected).T + linear.bias.detach().double()
    assert (model(x) - want).norm() <= 2e-6 * want.norm()  # float32: about ten roundings
    save_adapters(model, tmp_path)
    assert torch.equal(read_adapters(tmp_path)["0"].delta_weight(), found)
    other = nn.Sequential(nn.Linear(N, M))
    other.load_state_dict({"0.weight": linear.weight, "0.bias": linear.bias})
    inject_adapters(other, ["0"], eblora_adapters(rank=R, alpha=6.0, core=core, compensate=compensate))
    load_adapters(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_the_default_layer_computes_what_it_always_did_to_the_last_bit(generator: torch.Generator) -> None:
    """Published accuracies depend on the order of these operations."""
    linear = base(generator)
    adapter = EBLoRALinear(linear, R, alpha=6.0, initial_scale=-0.3, generator=generator)
    x = torch.randn(9, N, generator=generator, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    left, right, scale = (p.detach().clone().requires_grad_() for p in (adapter.left, adapter.right, adapter.scale))
    magnitude = scale * (6.0 / R)
    expected = linear(twin) + ((twin @ right) * magnitude) @ left.mT
    assert torch.equal(adapter(x), expected)
    adapter(x).square().sum().backward()
    expected.square().sum().backward()
    pairs = [(adapter.left, left), (adapter.right, right), (adapter.scale, scale), (x, twin)]
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("core", CORES)
def test_every_core_starts_balanced_and_only_the_scalar_stays_so(core: str, generator: torch.Generator) -> None:
    adapter = EBLoRALinear(base(generator), R, core=core, initial_scale=-0.25, alpha=8.0, generator=generator)
    sigma = torch.linalg.svdvals(adapter.factors().delta_weight().double())
    torch.testing.assert_close(sigma[:R], torch.full((R,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)  # float32
    with torch.no_grad():
        adapter.scale.copy_(torch.randn(adapter.scale.shape, generator=generator))
    sigma = torch.linalg.svdvals(adapter.factors().delta_weight().double())
    flat = float(sigma[0] / sigma[R - 1]) < 1 + 1e-5  # float32
    assert flat == (core == "scalar")
    expected = spectrum(adapter.scale, R) * adapter.scaling
    torch.testing.assert_close(sigma[:R], expected, rtol=1e-5, atol=1e-6)  # float32 frames


def test_spectral_entropy_is_that_of_the_energies() -> None:
    assert spectral_entropy(torch.tensor(-0.3), 8) == 1.0
    assert spectral_entropy(torch.ones(5), 5) == pytest.approx(1.0, abs=1e-15)  # rounding of float64
    assert spectral_entropy(torch.tensor([3.0, 0.0]), 2) == 0.0
    p = torch.tensor([9.0, 16.0], dtype=torch.float64) / 25
    by_hand = float(-(p * p.log()).sum() / torch.tensor(2.0).log())
    assert spectral_entropy(torch.tensor([3.0, -4.0]), 2) == pytest.approx(by_hand, abs=1e-7)  # float32 logarithm of 2
    turned = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    full = turned @ torch.diag(torch.tensor([3.0, 4.0])) @ turned.T
    assert spectral_entropy(full, 2) == pytest.approx(by_hand, abs=1e-6)  # float32 products
    assert spectral_entropy(torch.tensor(5.0), 1) == 1.0
    assert str(spectral_entropy(torch.zeros(3), 3)) == "nan"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("core", CORES)
def test_a_compensated_adapter_starts_by_changing_nothing_at_all(
    core: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    linear = base(generator).to(dtype)
    weight = linear.weight.clone()
    adapter = EBLoRALinear(
        linear, R, core=core, start="pretrained", initial_scale=-0.7, compensate=True, generator=generator
    )
    x = torch.randn(6, N, generator=generator).to(dtype)
    assert torch.equal(adapter(x), linear(x))
    adapter.point_along(torch.randn(M, R, generator=generator), torch.randn(N, R, generator=generator))
    assert torch.equal(adapter(x), linear(x))  # another start, compensated anew
    assert torch.equal(linear.weight, weight)  # the base itself is never touched
    assert adapter.factors().rank == 2 * R
    adapter(x).float().square().sum().backward()
    assert adapter.scale.grad is not None
    assert float(adapter.scale.grad.abs().max()) > 0  # zero update, not zero gradient
    assert {name for name, p in adapter.named_parameters() if p.requires_grad} == {"left", "right", "scale"}


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 0), (5, 0), (0, 3), (5, 3)])
def test_training_keeps_each_side_off_what_it_protects(inputs: int, outputs: int, generator: torch.Generator) -> None:
    protected = ProtectedSubspace.from_directions(torch.randn(N, inputs, generator=generator)) if inputs else None
    answers = torch.randn(M, outputs, generator=generator) if outputs else None
    adapter = EBLoRALinear(
        base(generator),
        R,
        complement=protected,
        output_complement=answers,
        core="full",
        initial_scale=0.3,
        generator=generator,
    )
    optimizer = RiemannianAdamW(param_groups(adapter, lr=0.05), weight_decay=0.0)
    x = torch.randn(40, N, generator=generator)
    start = adapter.right.detach().clone()
    for _ in range(10):
        optimizer.zero_grad()
        adapter(x).square().mean().backward()
        optimizer.step()
    assert float((adapter.right.detach() - start).abs().max()) > 0.01  # it moved
    delta = adapter.factors().delta_weight().double()
    if protected is not None:
        assert float((delta @ protected.basis.double()).abs().max()) < 3e-6  # float32, times a core of about 0.3 · r
    if answers is not None:
        free = torch.linalg.qr(answers.double())[0]
        assert float((free.T @ delta).abs().max()) < 3e-6  # float32, times a core
    for _, frame, manifold in adapter.manifold_parameters():
        assert max(manifold.constraint_error(frame)) <= 2e-6  # float32


@pytest.mark.parametrize("size", [(30, 24), (700, 600)], ids=["whole SVD", "sketch"])
def test_the_pretrained_start_is_the_leading_singular_vectors_of_what_is_free(
    size: tuple[int, int], generator: torch.Generator
) -> None:
    m, n = size
    u = torch.linalg.qr(torch.randn(m, m, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    weight = (u[:, :n] * 1 / torch.arange(1, n + 1)) @ v.T
    protected = v[:, :1]  # the leading input direction is taken
    found = leading_vectors(
        weight,
        2,
        left_manifold=RestrictedStiefel(),
        right_manifold=RestrictedStiefel(protected),
        generator=generator,
    )
    for vectors, true in zip(found, (u[:, 1:3], v[:, 1:3]), strict=True):
        cosines = torch.linalg.svdvals(vectors.T @ true)
        assert float(cosines.min()) > 1 - 1e-5  # a spectrum 1/k, four passes: the sketch is exact to float32
    linear = nn.Linear(n, m, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    adapter = EBLoRALinear(linear, 2, complement=protected, start="pretrained", generator=generator)
    assert float((adapter.left.T @ weight @ adapter.right).detach().diagonal().min()) > 0.3  # ⟨uᵢ, W vᵢ⟩ = 1/2, 1/3
    assert max(adapter.right_manifold.constraint_error(adapter.right)) <= 2e-6  # float32


@pytest.mark.filterwarnings("ignore:rounding to the base weight")  # bfloat16 is among the precisions
@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), data=st.data())
def test_merging_and_unmerging_comes_back_to_the_last_bit(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    draw = torch.Generator().manual_seed(m * 10 + n)
    linear = base(draw, m, n).to(dtype)
    adapter = EBLoRALinear(linear, rank, core="full", initial_scale=0.5, generator=draw)
    stir(adapter, draw)
    before = linear.weight.clone()
    x = torch.randn(4, n, generator=draw).to(dtype)
    unmerged = adapter(x).detach().double()
    adapter.merge()
    adapter.merge()  # once is enough
    assert adapter.merged
    # One rounding of the weight, and those of both forward passes; 1e-6 relative in float32.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4 * 2.0**-8, torch.float64: 1e-6}[dtype]
    scale = float(x.double().norm(dim=-1).max()) * (1 + float(adapter.scale.detach().abs().sum()))
    assert float((adapter(x).detach().double() - unmerged).abs().max()) <= tolerance * max(scale, 1.0)
    adapter.unmerge()
    adapter.unmerge()
    assert not adapter.merged
    assert torch.equal(linear.weight, before)


def test_a_merged_adapter_is_not_saved_with_a_base_that_holds_it(generator: torch.Generator, tmp_path) -> None:
    model = nn.Sequential(base(generator))
    inject_adapters(model, ["0"], eblora_adapters(rank=2, generator=generator))
    model[0].merge()
    with pytest.raises(ValueError, match=r"0 is merged into its base weight at present: unmerge\(\) before saving"):
        save_adapters(model, tmp_path)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_new_adapter_is_in_the_mode_of_its_layer(evaluates: bool, generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(N, M)).train(not evaluates)
    inject_adapters(model, ["0"], eblora_adapters(rank=R, dropout=0.5, initial_scale=1.0, generator=generator))
    assert {module.training for module in model.modules()} == {not evaluates}
    x = torch.randn(64, N, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(model(x), model(x)) == evaluates


def test_dropout_touches_the_adapters_input_only_and_only_in_training(generator: torch.Generator) -> None:
    linear = base(generator)
    adapter = EBLoRALinear(linear, R, dropout=0.5, initial_scale=1.0, generator=generator)
    still = EBLoRALinear(linear, R, initial_scale=1.0, generator=generator)
    still.left.data, still.right.data = adapter.left.data, adapter.right.data
    x = torch.randn(2000, N, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = adapter(x).detach()
    exact = still(x).detach()
    assert torch.equal(adapter.eval()(x), exact)
    assert float((noisy - exact).abs().max()) > 0.1
    # Kept inputs are doubled, so the mean is right: 2000 rows, standard error of about 0.7 / √2000 = 0.016.
    assert float((noisy - exact).mean(0).abs().max()) < 0.08
    adapter.train()
    with torch.no_grad():
        adapter.scale.zero_()
    assert torch.equal(adapter(x), linear(x))  # what the base sees is whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "dense"}, r"core is one of scalar, diagonal, full, got 'dense'"),
        ({"start": "zero"}, r"start is one of random, pretrained, task, got 'zero'"),
        ({"alpha": float("nan")}, r"alpha .*got nan"),
        ({"alpha": float("inf")}, r"alpha .*got inf"),
        ({"initial_scale": float("nan")}, r"initial_scale .*got nan"),
        ({"dropout": float("nan")}, r"dropout .*got nan"),
        ({"dropout": 1.5}, r"dropout .*got 1\.5"),
        (
            {"output_complement": torch.eye(M)[:, :10]},
            r"complement leaves 2 free directions in R\^12, too few for rank 4",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(
    options: dict[str, object], message: str, generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        EBLoRALinear(base(generator), R, **options)  # type: ignore[arg-type]


def test_the_metric_reaches_both_manifolds_and_brings_its_retraction(generator: torch.Generator) -> None:
    adapter = EBLoRALinear(base(generator), R, metric="canonical", generator=generator)
    for _, _, manifold in adapter.manifold_parameters():
        assert (manifold.metric, manifold.retraction.name) == ("canonical", "cayley")
    assert repr(EBLoRALinear(base(generator), R, core="full", compensate=True)).startswith(
        "EBLoRALinear(\n  rank=4, alpha=4, compensated, core='full'\n"
    )


def test_a_layer_without_room_is_named(generator: torch.Generator) -> None:
    model = nn.Sequential(base(generator), base(generator, 6, M))
    memory = {"0": None, "1": ProtectedSubspace.from_directions(torch.randn(M, 10, generator=generator))}
    with pytest.raises(ValueError, match=r"^1: complement leaves 2 free directions in R\^12, too few for rank 4"):
        inject_adapters(model, ["0", "1"], eblora_adapters(rank=4, memory=memory))
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_metrics_tell_error_entropy_capacity_and_magnitude(generator: torch.Generator) -> None:
    model = nn.Sequential(base(generator), base(generator, 6, M))
    memory = {"0": torch.randn(N, 8, generator=generator), "1": None}
    make = eblora_adapters(rank=R, memory=memory, core="diagonal", initial_scale=-0.5, generator=generator)
    inject_adapters(model, ["0", "1"], make)
    found = geometry_metrics(model)
    assert set(found) == {
        f"geometry/{n}" for n in ("orthonormality", "protection", "spectral_entropy", "capacity", "scale")
    }
    assert 0 < found["geometry/orthonormality"] < 1e-6  # float32 frames
    assert 0 < found["geometry/protection"] < 1e-6
    assert found["geometry/spectral_entropy"] == pytest.approx(1.0, abs=1e-12)
    assert found["geometry/capacity"] == pytest.approx(0.5)  # (20 − 8 − 4) / (20 − 4), the tightest frame
    assert found["geometry/scale"] == pytest.approx(0.5)
    with torch.no_grad():
        model[0].scale.copy_(torch.tensor([1.0, 0, 0, 0]))
        model[0].left.mul_(1.1)
    worse = geometry_metrics(model, prefix="")
    assert worse["spectral_entropy"] == pytest.approx(0.5)
    assert worse["orthonormality"] == pytest.approx(0.21, abs=1e-5)  # 1.1² − 1
    with pytest.raises(ValueError, match="the model has no balanced adapters: inject EBLoRALinear"):
        geometry_metrics(nn.Linear(2, 2))


def test_the_magnitude_is_a_vector_of_one_and_older_states_load(generator: torch.Generator) -> None:
    adapter = EBLoRALinear(base(generator), R, compensate=True, initial_scale=-0.5, generator=generator)
    assert adapter.scale.shape == adapter.start_scale.shape == (1,)  # FSDP2 shards no 0-d parameter
    assert adapter.magnitude().shape == ()
    assert {name: t.shape for name, t in adapter.own_tensors() if "scale" in name} == {"scale": (), "start_scale": ()}
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    older = {**state, "scale": torch.tensor(0.25), "start_scale": torch.tensor(0.75)}
    adapter.load_state_dict(older)
    assert (adapter.scale.tolist(), adapter.start_scale.tolist()) == ([0.25], [0.75])
    assert older["scale"].shape == ()
