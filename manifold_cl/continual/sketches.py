"""What a task relies on, layer by layer, from streams: never a dense gradient, never a gradient of a weight.

Hooks on the target layers see the inputs X (tokens × n) and the output gradients D (tokens × m) of each batch. The
mean weight gradient is ``DᵀX`` summed over batches, linear in the samples, so a few random projections of it can be
summed instead; the input second moment ``XᵀX`` is summed exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manifold_cl.linalg import full_precision, project_out


class Statistic(ABC):
    """A running statistic of one layer."""

    @abstractmethod
    def add(self, x: Tensor, d: Tensor) -> None:
        """Take in one call of the layer: inputs x (tokens, n) and output gradients d (tokens, m), float32."""

    @abstractmethod
    def moment(self) -> Tensor:
        """The positive semi-definite matrix (n, n) on input space whose energy is to be protected."""


class SingularTriplets(NamedTuple):
    """Leading singular triplets: left (m, q), sigma (q,) descending, right (n, q)."""

    left: Tensor
    sigma: Tensor
    right: Tensor


class GradientSketch(Statistic):
    """Range, co-range and core sketches of the gradient ``G = Σ DᵀX`` (m, n): O((m + n)ℓ) memory.

    With ``complement`` the sketched matrix is ``G (I − F Fᵀ)``, the gradient that a restricted adapter can follow.

    Source: tropp2019streaming, algorithms 4.1-4.3 (without truncation), Gaussian test matrices.

    Args:
        m: outputs of the layer.
        n: inputs of the layer.
        size: ℓ, at least twice the rank that is wanted; the core sketch has 2ℓ + 1 rows.
        generator: draws the test matrices.
        complement: F (n, k).
        device: where the layer lives.
    """

    def __init__(
        self,
        m: int,
        n: int,
        *,
        size: int,
        generator: torch.Generator,
        complement: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        size = min(size, m, n)
        core = min(2 * size + 1, m, n)

        def gaussian(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=generator.device).to(device)

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, device=device)

        self._for_range, self._for_corange = gaussian(n, size), gaussian(m, size)
        self._core_in, self._core_out = gaussian(n, core), gaussian(m, core)
        self._range, self._corange, self._core = zeros(m, size), zeros(n, size), zeros(core, core)
        self._complement = complement

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add ``dᵀx`` to the sketches. O(tokens · (m + n) ℓ)."""
        if self._complement is not None and self._complement.shape[1]:
            x = project_out(x.mT, self._complement).mT
        self._range += d.mT @ (x @ self._for_range)
        self._corange += x.mT @ (d @ self._for_corange)
        self._core += (d @ self._core_out).mT @ (x @ self._core_in)

    def triplets(self) -> SingularTriplets:
        """Approximate singular triplets of G, as many as the sketch holds, in float64."""
        left, _ = torch.linalg.qr(self._range.double())
        right, _ = torch.linalg.qr(self._corange.double())
        outer = _solved(self._core_out.double().mT @ left, self._core.double())
        core = _solved(self._core_in.double().mT @ right, outer.mT).mT
        u, sigma, vt = torch.linalg.svd(core)
        return SingularTriplets(left @ u, sigma, right @ vt.mT)

    def energy(self) -> float:
        """Unbiased estimate of ``|G|_F²`` from the range sketch; relative deviation about sqrt(2 / ℓ) at worst."""
        return float(self._range.double().square().sum()) / self._range.shape[1]

    def moment(self) -> Tensor:
        """``GᵀG``, from the approximate triplets."""
        _, sigma, right = self.triplets()
        weighted = right * sigma
        return weighted @ weighted.mT


def _solved(a: Tensor, b: Tensor) -> Tensor:
    """The least-squares solution of ``a x = b`` for a tall matrix of full rank.

    By QR without pivoting: the CPU default, ``gelsy``, starts from pivots in memory that nobody set, so that equal
    inputs give results that differ by rounding from call to call (torch 2.13).
    """
    solution: Tensor = torch.linalg.lstsq(a, b, driver="gels").solution
    return solution


class InputMoment(Statistic):
    """The second moment ``Σ x xᵀ`` (n, n) of the inputs that matter: those whose output has a gradient.

    Tokens without a gradient (padding, masked positions) say nothing about the task and are left out. With
    ``weighted`` each token counts by its squared gradient norm, so that protection follows the loss.
    """

    def __init__(self, n: int, *, weighted: bool = False, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(n, n, device=device)
        self._weighted = weighted

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add the live tokens' ``xᵀx``. O(tokens · n²)."""
        size = d.norm(dim=1)
        live = size > 0
        x = x[live] * size[live].unsqueeze(1) if self._weighted else x[live]
        self._sum.addmm_(x.mT, x)

    def moment(self) -> Tensor:
        """The sum so far."""
        return self._sum


@contextmanager
def observing(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, every backward pass calls ``take(name, x, d)`` for every call of every layer.

    No weight needs a gradient: where nothing upstream has one, the layer's own output starts the graph. Several
    calls of a layer in one forward pass are told apart, because each output carries its own input.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def on_forward(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # a copy: what starts a graph cannot be changed in place, as by a ReLU
                output = output.requires_grad_(True).clone()
            x = inputs[0].detach()
            version = x._version

            def on_backward(d: Tensor) -> None:
                if x._version != version:
                    raise RuntimeError(
                        f"the input of {name} was changed in place after the call: it cannot be observed"
                    )
                take(name, x.reshape(-1, x.shape[-1]).float(), d.reshape(-1, d.shape[-1]).float())

            output.register_hook(on_backward)  # type: ignore[no-untyped-call]
            return output

        return on_forward

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gather(
    layers: Mapping[str, nn.Module], losses: Iterable[Callable[[], Tensor]], statistics: Mapping[str, Statistic]
) -> None:
    """Run every loss forward and backward and feed each layer's statistic.

    Args:
        layers: the modules to watch, by name.
        losses: thunks, one a batch, each returning a 0-d loss with a graph.
        statistics: one for each name in ``layers``.

    Raises:
        FloatingPointError: for a loss that is not finite.
    """

    def take(name: str, x: Tensor, d: Tensor) -> None:
        with torch.no_grad(), full_precision(x.device):
            statistics[name].add(x, d)

    with observing(layers, take), torch.enable_grad():
        for loss in losses:
            value = loss()
            if not bool(value.isfinite()):
                raise FloatingPointError(
                    f"a loss became {float(value.detach())} while statistics were gathered: lower the learning rate"
                )
            value.backward()  # type: ignore[no-untyped-call]
