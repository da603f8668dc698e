"""What the two-rank tests run on each rank: a small network of adapters on gloo, one spawn for all of them."""

import io
from pathlib import Path

import torch
import torch.distributed as dist
from old_versions import SHARDS_ON_CPU
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from manifold_cl import EBLoRALinear, RestrictedStiefel, RiemannianAdamW, RiemannianSGD, param_groups, riemannian
from manifold_cl.optim import (
    RiemannianAdam,
    RiemannianMuon,
    assert_ranks_equal,
    average_gradients,
    clip_riemannian_grad_norm_,
)

N, STEPS = 33, 8
"""Rows that two ranks cannot share evenly."""


class Net(nn.Module):
    def __init__(self, *, seed=0, retraction="polar"):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for k in (6, 11, 0, 27):  # the last protects more than three quarters: the dual form
            base = nn.Linear(N, N, bias=False)
            with torch.no_grad():
                base.weight.copy_(torch.randn(N, N, generator=draw) / N**0.5)
            basis = torch.linalg.qr(torch.randn(N, k, generator=draw))[0] if k else None
            self.layers.append(
                EBLoRALinear(base, 4, complement=basis, initial_scale=0.3, generator=draw, retraction=retraction)
            )
        self.spare = EBLoRALinear(nn.Linear(N, N, bias=False), 4, generator=draw, retraction=retraction)
        self.head = nn.Linear(N, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(3, N, generator=draw) / 6)
            self.head.bias.zero_()

    def forward(self, x, *, spare=False):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.spare(x) if spare else x)

    @property
    def scales(self):
        return [layer.scale for layer in (*self.layers, self.spare)]


def data():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(40, N, generator=draw), torch.randn(40, 3, generator=draw)


def share(rank):
    return slice(20 * rank, 20 * rank + 20)


def loss(model, part, **options):
    x, y = data()
    return ((model(x[part], **options) - y[part]) ** 2).mean()


def alone(make, steps=STEPS):
    """The same training in one process, on all the data."""
    net = Net()
    optimizer = make(param_groups(net, lr=1e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, slice(None)).backward()
        optimizer.step()
    return net


def sharded(net, ignored=()):
    net.spare.requires_grad_(False)
    fully_shard(net, ignored_params=set(ignored))
    return net


def advance(net, optimizer, rank, steps=STEPS, ignored=()):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, share(rank)).backward()
        average_gradients(ignored)
        optimizer.step()


def whole(net):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in net.named_parameters()
        if p.requires_grad
    }


def gap(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def adamw(groups, **options):
    return RiemannianAdamW(groups, lr=1e-2, **options)


def message(call):
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def ddp(rank):
    """DDP with owners: the distance to one process, and whether ranks end equal."""
    net = Net()
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = adamw(param_groups(model, lr=1e-2), process_group=dist.group.WORLD, moments="transport")
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, share(rank)).backward()
        norms.append(float(clip_riemannian_grad_norm_(optimizer, 1e6)))
        optimizer.step()
    assert_ranks_equal(model)
    before = whole(net)
    optimizer.zero_grad()
    loss(model, share(rank), spare=rank == 0).backward()  # rank 1 has no use for the spare adapter
    optimizer.step()
    assert_ranks_equal(model)
    return {
        "gap": gap(before, whole(alone(lambda groups: adamw(groups, moments="transport")))),
        "norm": norms[0],
        "spare moved": float((net.spare.left.detach() - before["spare.left"]).abs().max()),
        "error": max(optimizer.constraint_error()),
        "owned": [bucket.part.stop - bucket.part.start for _, bucket in optimizer._riemannian.plan.buckets],
        "pickled": message(lambda: __import__("copy").deepcopy(optimizer)),
    }


def owners_of_other_optimizers(rank):
    """Owners with a base optimizer that is not element-wise, and the matrix Adam."""
    gaps = {}
    for base in ("Adafactor", "matrix"):

        def make(groups, base=base, **options):
            if base == "matrix":
                return RiemannianAdam(groups, lr=1e-2, **options)
            return riemannian(torch.optim.Adafactor)(groups, lr=1e-2, **options)

        net = Net()
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        optimizer = make(param_groups(model, lr=1e-2), process_group=dist.group.WORLD)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, share(rank)).backward()
            optimizer.step()
        assert_ranks_equal(model)
        gaps[base] = gap(whole(net), whole(alone(make, steps=3)))
    return gaps


def rows(rank):
    """FSDP2: rows stay where they are; distances to one process for every kind of step."""

    def muon(direction, **options):
        return lambda groups: RiemannianMuon(groups, lr=1e-2, direction=direction, **options)

    makers = {
        "matrix": lambda groups: RiemannianAdam(groups, lr=1e-2),
        "exact": muon("exact"),
        "spel": muon("spel"),
        "intrinsic": muon("intrinsic", nesterov=True),
        "projected": muon("projected", adjust="original"),
        "adamw": adamw,
        "transport": lambda groups: adamw(groups, moments="transport", polish_every=3),
        "sgd": lambda groups: RiemannianSGD(groups, lr=1e-2, momentum=0.9, metric_pre="canonical"),
    }
    found = {}
    for name, make in makers.items():
        net = Net()
        ignored = net.scales[:-1] if name == "transport" else []  # the others have their magnitudes sharded too
        sharded(net, ignored)
        optimizer = make(param_groups(net, lr=1e-2))
        advance(net, optimizer, rank, ignored=ignored)
        found[name] = gap(whole(net), whole(alone(make)))
        found[f"{name} error"] = max(optimizer.constraint_error())
    state = optimizer.state[net.layers[0].left]["momentum_buffer"]
    found["rows"] = [tuple(net.layers[0].left.to_local().shape), tuple(state.to_local().shape), tuple(state.shape)]
    return found


def coherent(rank):
    """FSDP2, gradients that agree from step to step: the largest constraint error over long steps from drifted rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    draw = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(N, 11, generator=draw))[0]
    manifold = RestrictedStiefel(basis)
    x = manifold.random(N, 4, generator=draw).as_subclass(torch.Tensor)
    x = x + 1e-3 * basis @ torch.randn(11, 4, generator=draw)
    root = torch.randn(N, N, generator=draw)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, make in {"adamw": RiemannianAdamW, "sgd": RiemannianSGD}.items():
        point = nn.Parameter(distribute_tensor(x.clone(), mesh, [Shard(0)]))
        options = {"weight_decay": 0.0} if name == "adamw" else {"momentum": 0.9}
        optimizer = make([{"params": [point], "manifolds": [manifold], **options}], lr=1.0)
        errors = []
        for _ in range(60):
            gradient = -root @ root.T @ point.full_tensor().detach()
            point.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
            errors.append(max(optimizer.constraint_error()))
        found[name] = max(errors)
    return found


def resume(rank, folder):
    """FSDP2 on two ranks, saved after half the steps in files that one process can load, and loaded again here."""
    net = sharded(Net())
    optimizer = adamw(param_groups(net, lr=1e-2))
    advance(net, optimizer, rank, steps=4)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
    if rank == 0:
        torch.save({"model": model_state, "optimizer": optimizer_state}, Path(folder) / "half.pt")
    advance(net, optimizer, rank, steps=4)
    dist.barrier()
    saved = torch.load(Path(folder) / "half.pt", weights_only=True)
    later = sharded(Net(seed=3))
    second = adamw(param_groups(later, lr=1e-2))
    set_state_dict(
        later,
        second,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    for layer, origin in zip(later.layers, net.layers, strict=True):
        layer.base.weight.data = origin.base.weight.data
    advance(later, second, rank, steps=4)
    if rank == 0:
        torch.save(whole(net), Path(folder) / "end.pt")
    else:
        whole(net)
    return gap(whole(net), whole(later))


def refusals(rank):
    """Everything that two ranks must refuse, by message."""
    found = {}
    net = sharded(Net(retraction="qr"))
    optimizer = adamw(param_groups(net, lr=1e-2))
    found["qr"] = message(lambda: advance(net, optimizer, rank, steps=1))
    net = sharded(Net())
    optimizer = riemannian(torch.optim.Adafactor)(param_groups(net, lr=1e-2))
    found["adafactor"] = message(lambda: advance(net, optimizer, rank, steps=1))

    net = sharded(Net())
    optimizer = adamw(param_groups(net, lr=1e-2))
    advance(net, optimizer, rank, steps=1)
    loss(net, share(rank)).backward()
    if rank == 1:
        net.layers[0].left.grad.to_local()[0, 0] = float("nan")  # in the rows of one rank only
    before = whole(net)
    found["nan"] = message(optimizer.step)
    found["unchanged"] = gap(before, whole(net))

    net = Net()
    optimizer = adamw(param_groups(net, lr=1e-2), process_group=dist.group.WORLD)
    loss(net, share(rank)).backward()
    if rank == 1:
        net.layers[0].left.grad = None
    found["missing"] = message(optimizer.step)
    with torch.no_grad():
        net.head.weight += rank
    found["unequal"] = message(lambda: assert_ranks_equal(net))
    found["tensors"] = message(lambda: assert_ranks_equal([torch.full((2,), float(rank))]))

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    point = nn.Parameter(distribute_tensor(torch.eye(6)[:, :4].contiguous(), mesh, [Shard(1)]))
    manifold = net.layers[2].right_manifold
    split = RiemannianSGD([{"params": [point], "manifolds": [manifold]}], lr=1e-2)
    point.grad = torch.zeros_like(point)
    found["columns"] = message(split.step)
    return found


def flattened(rank):
    """FSDP1, whose flat parameters cannot be stepped on."""
    import warnings

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 says that it is deprecated, and slow without an accelerator
        early = Net()
        optimizer = adamw(param_groups(early, lr=1e-2))
        options = {"device_id": torch.device("cpu"), "ignored_states": early.scales}
        wrapped = FullyShardedDataParallel(early, use_orig_params=True, **options)
        found["at construction"] = message(
            lambda: param_groups(wrapped, lr=1e-2) and adamw(param_groups(wrapped, lr=1e-2))
        )
        found["at the first step"] = message(optimizer.step)
        late = Net().requires_grad_(False)
        late = FullyShardedDataParallel(late, device_id=torch.device("cpu"), ignored_states=late.scales)
        found["flat"] = message(lambda: param_groups(late, lr=1e-2))
    return found


def work(rank, world, store, folder):
    """Run everything and leave the findings of each rank in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {"ddp": ddp(rank), "owners": owners_of_other_optimizers(rank), "flattened": flattened(rank)}
    if SHARDS_ON_CPU:
        found |= {
            "rows": rows(rank),
            "coherent": coherent(rank),
            "resume": resume(rank, folder),
            "refusals": refusals(rank),
        }
    buffer = io.BytesIO()
    torch.save(found, buffer)
    (Path(folder) / f"rank{rank}.pt").write_bytes(buffer.getvalue())
    dist.destroy_process_group()
