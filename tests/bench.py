"""
The price of sparsity: time and memory of the MoE layer next to what it could be.

    python tests/bench.py                              all parts, several minutes on two cores
    python tests/bench.py --quick                      the same at small sizes, half a minute
    python tests/bench.py layer gates                  some parts only: layer, step, gates, ranks
    python tests/bench.py --device=cuda                on a GPU, in bf16
    torchrun --nproc_per_node=2 tests/bench.py ranks --device=cuda        the ranks part on several GPUs

Every number is forward and backward in training mode. The contestants of a table take turns, each round gives one ratio
to the dense FFN of the same round, and the median of the rounds is printed: a machine that is busy with other things
slows all contestants down alike. Times in ms are the fastest round. Memory is the peak of tensor memory above what was
there before, weights' gradients included (on a GPU torch's own count; on a CPU added up from the profiler's
allocations).

    layer   the MoE layer of this repository (moe), a dense FFN of equal active FLOPs (dense: hidden k * H, same
            activation), a plain loop over experts (loop), the one-hot form of Mesh-TensorFlow with an (N, E, C) mask,
            quadratic in N (onehot), and transformers' Mixtral block, if that package is installed (mixtral)
    step    a training step, optimizer included, of the default MoE GPT and of the dense GPT with its active parameters
    gates   each gate alone, as a share of its layer's time
    ranks   the step of a small MoE GPT on 1, 2, 4 processes: time relative to one process, bytes sent
"""

import argparse
import contextlib
import inspect
import math
import os
import statistics
import sys
import time
from functools import partial

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py has it

import torch
import torch.nn.functional as F
from torch import nn

from ranks import run_ranks
import dist
import train
from experts import Experts, MoE, feed_forward
from model import GPT
from router import Place, gates, make_gate

V = 4096


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(fn, device):
    """Wall time of fn()."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    fn()
    sync()
    return time.perf_counter() - start


def race(contestants, base, rounds, device):
    """{name: fn} -> {name: (fastest ms, median over rounds of the ratio to `base`)}; all run in turn in every round."""
    for fn in contestants.values():
        fn()  # warm up
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, fn in contestants.items():
            times[name].append(seconds(fn, device))
    return {name: (1e3 * min(t), statistics.median(a / b for a, b in zip(t, times[base]))) for name, t in times.items()}


@contextlib.contextmanager
def quiet():
    """The profiler's library writes to stderr whatever one asks for."""
    old, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(old, 2)
        os.close(old)
        os.close(null)


def peak_memory(fn, device):
    """Bytes of tensors that fn() holds at its peak, beyond what was there before; None where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        with (
            quiet(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        ):
            fn()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for e in sorted(events, key=lambda e: e.start_ns()):
            now += e.nbytes()
            peak = max(peak, now)
        return peak or None
    except AttributeError:  # the profiler's raw events are not a public interface
        return None


def forward_backward(layer, x, autocast):
    """A function that runs layer(x).sum-of-random backward, gradients fresh each time as after zero_grad."""
    target = torch.randn_like(x)
    params = [p for p in layer.parameters() if p.requires_grad]

    def run():
        with autocast():
            y = layer(x)
        torch.autograd.grad((y.float() * target).sum(), [x, *params], allow_unused=True)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The contestants: all compute sum_e G[n, e] FFN_e(x_n) with the same gate


class Ours(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x):
        return self.moe(x, torch.zeros(len(x), dtype=torch.long, device=x.device))[0]


class Loop(Ours):
    """For each expert: which tokens want it, gather, compute, add."""

    def forward(self, x):
        G, w = self.moe.gate(x, None).G, self.moe.experts
        y = torch.zeros_like(G[:, :1]).expand(-1, x.shape[1]).clone()
        for e, (w1, w2) in enumerate(zip(w.w1.unbind(), w.w2.unbind())):
            (rows,) = G[:, e].nonzero(as_tuple=True)
            y = y.index_add(0, rows, (F.gelu(x[rows] @ w1.t()) @ w2).to(y.dtype) * G[rows, e, None])
        return y


class OneHot(Ours):
    """Dispatch and combine as matrix products with an (N, E, C) mask; C as large as the fullest expert needs."""

    def forward(self, x):
        G, w = self.moe.gate(x, None).G, self.moe.experts
        sent = G != 0
        place = sent.cumsum(0) - 1  # (N, E) place in the expert's queue
        C = int(sent.sum(0).max())
        mask = (F.one_hot(place.clamp(0, C - 1), C) * sent[..., None]).to(x.dtype)  # (N, E, C)
        rows = torch.einsum("nec,nd->ecd", mask, x)
        rows = torch.bmm(F.gelu(torch.bmm(rows, w.w1.transpose(1, 2))), w.w2)
        return torch.einsum("nec,ecd->nd", mask * G[..., None].to(x.dtype), rows)


def mixtral(D, H, E, k):
    """The block of the transformers package, if it is installed and still looks as we know it; else a reason."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return None, "mixtral: the package transformers is not installed"
    try:  # its experts have a gate matrix: 3 D H instead of 2 D H, so two thirds of the width for equal FLOPs
        config = MixtralConfig(
            hidden_size=D,
            intermediate_size=2 * H // 3 // 8 * 8,
            num_local_experts=E,
            num_experts_per_tok=k,
            hidden_act="gelu",
        )
        block = MixtralSparseMoeBlock(config)
        for p in block.parameters():
            nn.init.normal_(p, std=0.02)
        return block, ""
    except Exception as error:
        return None, f"mixtral: {type(error).__name__}: {error}"


class Peer(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        y = self.block(x[None])
        return (y[0] if isinstance(y, tuple) else y)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def moe_layer(gate, D, H, E, k, device):
    torch.manual_seed(0)
    takes_k = "k" in inspect.signature(gates()[gate]).parameters
    gate = make_gate(
        gate,
        k=k if takes_k else 0,
        D=D,
        E=E,
        V=V,
        layer=0,
        seed=0,
        counts=torch.arange(V, 0, -1),
        n_domains=2,
        steps=100,
    )
    experts = Experts(E, D, H)
    experts.init(0, 0, 0.02, 0.02)
    return MoE(gate, experts).to(device)


LAYERS = [  # N, D, H, E, k
    *[(N, 256, 1024, E, k) for N, E, k in [(8192, 8, 1), (8192, 8, 2), (8192, 64, 1), (8192, 64, 2), (8192, 64, 8),
                                           (2048, 8, 2), (32768, 8, 2)]],
    (4096, 512, 2048, 8, 2), (8192, 64, 256, 8, 2),
]  # fmt: skip
CONTESTANTS = "dense", "moe", "loop", "onehot", "mixtral"


def contestants(N, D, H, E, k, device):
    """-> {name: layer} for N tokens, and why some are missing."""
    moe, dense = moe_layer("topk", D, H, E, k, device), Experts(1, D, k * H).to(device)
    dense.init(0, 0, 0.02, 0.02)
    layers, notes = {"dense": dense, "moe": Ours(moe), "loop": Loop(moe)}, set()
    limit = torch.cuda.get_device_properties(device).total_memory / 4 if device.type == "cuda" else 4e9
    mask = 4 * 4 * N * E * math.ceil(1.3 * k * N / E)  # bytes: the mask, its gradient and two products of it
    if mask < limit:
        layers["onehot"] = OneHot(moe)
    else:
        notes.add(f"onehot: not run where its mask and gradients need over {limit / 1e9:.0f} GB; at N={N}, E={E}, "
                  f"k={k} {mask / 1e9:.0f} GB")  # fmt: skip
    block, reason = mixtral(D, H, E, k)
    if block is not None:
        layers["mixtral"] = Peer(block.to(device))
    return layers, notes | {reason} - {""}


def cell(run, result, device):
    """One contestant's column: ratio, fastest ms, peak MB."""
    if result is None:
        return "-"
    memory, (ms, ratio) = peak_memory(run, device), result
    return f"{ratio:6.2f}x ({ms:6.1f}, {'?' if memory is None else round(memory / 1e6):>5})"


def layer_part(a, device, autocast):
    print(
        "\nlayer: forward and backward of one feed-forward layer; ratio to the dense FFN of equal active FLOPs "
        "(fastest ms, peak MB)\n"
    )
    print(f"{'N':>6} {'D':>4} {'H':>5} {'E':>3} {'k':>2}   " + "".join(f"{name:>24}" for name in CONTESTANTS))
    notes = set()
    for N, D, H, E, k in [(1024, 64, 256, 8, 2), (1024, 64, 256, 32, 1)] if a.quick else LAYERS:
        layers, more = contestants(N, D, H, E, k, device)
        notes |= more
        x = torch.randn(N, D, device=device, requires_grad=True)
        runs = {name: forward_backward(layer, x, autocast) for name, layer in layers.items()}
        slow = {name: runs[name] for name in ("dense", "onehot")} if "onehot" in runs else {}
        results = race({name: run for name, run in runs.items() if name != "onehot"}, "dense", a.rounds, device)
        if slow:  # fewer rounds must do
            results["onehot"] = race(slow, "dense", max(1, a.rounds // 10), device)["onehot"]
        cells = [cell(runs.get(name), results.get(name), device) for name in CONTESTANTS]
        print(f"{N:6} {D:4} {H:5} {E:3} {k:2}   " + "".join(f"{text:>24}" for text in cells), flush=True)
    for note in sorted(notes):
        print(f"  {note}")


def step_part(a, device, autocast):
    more = dict(n_embd=64, block_size=32, batch_size=4) if a.quick else {}
    print("\nstep: a training step of the default GPT against the dense one of its active size; dts: hard phase\n")
    runs, sizes, mesh = {}, {}, dist.Mesh()
    for name, E in (("dense", 1), ("dts", 8), ("hash", 8), ("switch", 8), ("switch of 32", 32)):
        cfg = train.Config(n_experts=E, gate="switch" if E in (1, 32) else name, **more)
        model = GPT(cfg, V).to(device)
        for gate in model.gates():
            gate.set_step(cfg.max_steps)
        optimizer = train.make_optimizer(model, cfg)
        x = torch.randint(0, V, (cfg.batch_size, cfg.block_size), device=device)
        batch = {"x": x, "y": x.roll(-1, 1)}

        def run(model=model, optimizer=optimizer, batch=batch):
            with autocast():
                out = train.task_loss(model, batch)
            weights = model.loss_weights()
            (out.nll.mean() + sum(weights.get(key, 0) * value for key, value in out.aux.items())).backward()
            mesh.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        runs[name], sizes[name] = run, model.n_params()
    for name, (ms, ratio) in race(runs, "dense", a.rounds, device).items():
        memory = peak_memory(runs[name], device)
        print(
            f"  {name:12} {sizes[name][0] / 1e6:6.2f} M parameters, {sizes[name][1] / 1e6:5.2f} M active   "
            f"{ms:7.1f} ms   {ratio:.2f}x"
            f"   peak {'?' if memory is None else round(memory / 1e6)} MB"
        )


def gates_part(a, device, autocast):
    N, D, H, E = (1024, 64, 256, 8) if a.quick else (4096, 256, 1024, 8)
    print(f"\ngates: N {N}, D {D}, H {H}, E {E}, k 2 where it applies; training mode\n")
    print(f"  {'gate':16}{'gate ms':>9}{'layer ms':>10}{'share':>8}{'experts/token':>15}")
    for name in sorted(gates()):
        layer = moe_layer(name, D, H, E, 2, device)
        x = torch.randn(N, D, device=device, requires_grad=True)
        ids, domain = torch.randint(0, V, (N,), device=device), torch.randint(0, 2, (N,), device=device)
        params = [p for p in layer.gate.parameters() if p.requires_grad]

        def total(G, aux):
            terms = [aux[key].sum() for key in aux if key in layer.gate.loss_weights or key == "log_prob"]
            return G.float().sum() + sum(terms)

        def gate_alone(layer=layer):
            with autocast():
                G, aux, *_ = layer.gate(x, ids, Place(N, domain=domain))
            if (loss := total(G, aux)).requires_grad:
                torch.autograd.grad(loss, [x, *params], allow_unused=True)

        def whole(layer=layer):
            with autocast():
                y, aux = layer(x, ids, domain=domain)
            torch.autograd.grad(
                total(y, aux), [x, *(p for p in layer.parameters() if p.requires_grad)], allow_unused=True
            )

        result = race({"gate": gate_alone, "layer": whole}, "layer", a.rounds, device)
        rows = int(layer.stats["kept"].sum()) / N
        print(
            f"  {name:16}{result['gate'][0]:9.2f}{result['layer'][0]:10.1f}{result['gate'][1]:8.1%}{rows:15.2f}",
            flush=True,
        )


def rank_steps(rank, world, quick, rounds, mesh=None, device="cpu", autocast=contextlib.nullcontext):
    """Seconds of the fastest and the median step of a small MoE GPT on this rank, and the rows' bytes it sent."""
    mesh = mesh or dist.make_mesh(rank, world, 8)
    cfg = train.Config(
        n_layer=2, n_embd=64 if quick else 128, block_size=64, batch_size=16, n_experts=8, gate="topk", k=2
    )
    model = GPT(cfg, V, partial(feed_forward, cfg, mesh=mesh, V=V)).to(device)
    optimizer = train.make_optimizer(model, cfg)
    x = torch.randint(0, V, (cfg.batch_size, cfg.block_size), generator=torch.Generator().manual_seed(0))
    mine = x.chunk(world)[rank].to(device)
    times, weights = [], model.loss_weights()
    for _ in range(rounds + 2):
        mesh.barrier()
        start = time.perf_counter()
        with autocast():
            out = train.task_loss(model, {"x": mine, "y": mine.roll(-1, 1)})
        (out.nll.sum() / x.numel() + sum(weights.get(key, 0) * value for key, value in out.aux.items())).backward()
        mesh.sync_grads(model)
        mesh.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if str(device) != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    width = 2 if autocast is not contextlib.nullcontext else 4
    sent = [mesh.traffic(m.stats["table"], width * cfg.n_embd) for m in model.moes()]
    moved = 4 * sum(float(mesh.all_reduce(t["bytes_node"] + t["bytes_far"])) for t in sent)  # there and back, twice
    experts = dist.expert_ids(model)
    dense = 4 * sum(p.numel() for p in model.parameters() if id(p) not in experts)
    return statistics.median(times[2:]), min(times[2:]), moved, dense


def ranks_part(a, device, autocast):
    print("\nranks: a training step of a small MoE GPT, global batch 1024 tokens, 8 experts, k 2\n")
    if "WORLD_SIZE" in os.environ:  # started by torchrun: this many ranks
        mesh = dist.spread_experts(dist.init(device=str(device)), 8)
        result = rank_steps(mesh.rank, mesh.world, a.quick, a.rounds, mesh, mesh.device, autocast)
        if mesh.main:
            print(
                f"  W {mesh.world}   {1e3 * result[0]:.1f} ms a step   rows {result[2] / 1e6:.2f} MB   gradients "
                f"{result[3] / 1e6:.2f} MB a rank"
            )
        return mesh.close()
    if device.type != "cpu":
        print("  on GPUs start with torchrun --nproc_per_node=N tests/bench.py ranks --device=cuda, once for each N")
        return
    one = None
    for W in (1, 2, 4):
        median, fastest, moved, dense = run_ranks(W, rank_steps, a.quick, a.rounds, timeout=600)[0]
        one = one or median
        print(
            f"  W {W}   step {median / one:5.2f}x of one process ({1e3 * fastest:6.1f} ms)   rows between ranks "
            f"{moved / 1e6:6.2f} MB a step"
            f"   gradients {dense * (W > 1) / 1e6:5.2f} MB a rank",
            flush=True,
        )
    print(
        f"  One thread a rank, and all ranks share this machine's {os.cpu_count()} cores: below that number a "
        f"ratio can fall to 1 / W,\n"
        "  above it the ranks only take turns. The bytes are what a network would have to carry."
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = {"layer": layer_part, "step": step_part, "gates": gates_part, "ranks": ranks_part}
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help="layer, step, gates, ranks; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--rounds", type=int, default=0, help="default: 15")
    parser.add_argument("--quick", action="store_true", help="small sizes, 5 rounds")
    a = parser.parse_args()
    if unknown := set(a.parts) - parts.keys():
        sys.exit(f"bench.py: unknown part {', '.join(sorted(unknown))}; there are: {', '.join(parts)}")
    if a.rounds < 0:
        sys.exit(f"bench.py: --rounds={a.rounds} must be at least 1")
    try:
        dist.check_device(a.device)
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
    device = torch.device(a.device)
    a.rounds = a.rounds or (5 if a.quick else 15)
    dist.keep_memory()  # as train.py does
    dtype = a.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if dtype == "bfloat16" else contextlib.nullcontext
    if os.environ.get("RANK", "0") == "0":
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
        print(f"torch {torch.__version__}, {device.type}: {name}, {dtype}, {a.rounds} rounds")
    for name in a.parts or parts:
        parts[name](a, device, autocast)


if __name__ == "__main__":
    main()
