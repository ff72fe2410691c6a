"""
Expert parallelism: the only file that talks to other ranks (a gate is told through router.Place what it may know
about them). `torchrun train.py` on W ranks equals one process with --groups=W, up to the order of additions, to
dropout, which each rank draws for itself, and to what depends on nodes.

    world = data parallel x expert parallel, for 8 ranks and ep = 4, two ranks a node:

                    node 0            node 1            node 2            node 3
        rank      0       1         2       3         4       5         6       7
        experts  0..3    4..7      8..11  12..15     0..3    4..7      8..11  12..15      (E = 16)
                 `------- an ep group --------'     `------- an ep group --------'
        ranks 0 and 4 hold the same experts: they are replicas, the "dp group" of those experts.

Decisions, each with what was measured (2 CPU cores, gloo) or what went wrong elsewhere:

* A rank's loss is its share of the global loss (local sum / global target count), so gradients are only
  summed, never divided. Means of per-rank means were 100% to 160% off with ragged target counts; experts
  that were divided once too often showed a loss curve that looked fine.
* Moving rows is a permutation, and the transpose of a permutation is its inverse: the backward of
  to_experts is to_tokens and the other way round. One autograd function; public all_to_all_single only.
* One exchange of counts a layer, never computed twice: with a wrong split gloo delivers garbage silently.
* Every rank takes part in every backward exchange, whatever the code between the exchanges returns (see
  AllToAll's link): a rank without rows that steps out of the graph hangs all others.
* Two-level exchange (Tutel's 2D hierarchical all-to-all, arXiv:2206.03382): fewer, larger messages, see `exchange`.
  No gain on one machine (5.6 against 5.75 ms); it is for slow networks.
* Gradients are summed as one flat message per group: 217 ms a step against 326 per tensor and 238 with DDP.
  The message never depends on which gradients exist, because its layout decides the rounding.
* Detect NaN with a sum: gloo's MAX swallows a NaN, depending on the rank that has it.
* A module is marked by its attribute `sharded`, not its parameters: copy.deepcopy loses their attributes.
* An error that one rank meets is told to all (`on_all`), or the others would wait for it until the timeout.
* Checkpoints hold all experts by global id in one file, so any number of ranks can load it. torch.load
  does not verify checksums (one flipped bit loads silently), zipfile.testzip does: 0.05 s per 100 MB.
* torchrun keeps one store over restarts and gloo then dials dead peers (13 of 19 restarts failed): a
  prefix per attempt cures it (0 failures in 48).

Letters: D model width, E experts, M rows (a token sent to k experts is k rows), W ranks.
"""

import ctypes
import functools
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from math import gcd
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import torch
import torch.distributed as td
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class Back(NamedTuple):
    """What to_experts leaves behind: sizes and link for to_tokens, the table for the log (Mesh.traffic)."""

    table: torch.Tensor  # (ep, E) int64 on the device: rows from each rank of the ep group
    sizes: torch.Tensor | None  # (ep source, ep target, E/ep) the same on the CPU; None when nothing is sent
    link: torch.Tensor | None  # a zero that links the second exchange to the first, see AllToAll


@dataclass(eq=False)
class Mesh:
    """Where this rank stands. Mesh() is the single process: every method works and changes nothing."""

    rank: int = 0
    world: int = 1
    ep: int = 1  # ranks that share one set of experts
    ranks_per_node: int = 1  # nodes are real or simulated
    device: torch.device = torch.device("cpu")
    two_level: bool = False  # exchange within nodes first, then between nodes
    process_groups: dict = field(default_factory=dict)  # "world" (init); "ep", "dp", "intra" and "inter" (make_mesh)

    def __post_init__(self):
        self.main = self.rank == 0
        self.ep_rank, self.dp = self.rank % self.ep, self.world // self.ep
        self.node, self.n_nodes = self.rank // self.ranks_per_node, self.world // self.ranks_per_node

    def __deepcopy__(self, memo):
        return self  # process groups cannot be copied, models that hold a mesh can

    # -- small collectives: every rank calls them, in the same order -----------------------------------------

    def all_reduce(self, t):
        """Sum of a detached tensor (ints, float32, float64; bfloat16 would round) over all ranks."""
        t = t.detach().clone(memory_format=torch.contiguous_format)
        if self.process_groups:
            td.all_reduce(t, group=self.process_groups.get("world"))
        return t

    def sum(self, t):
        """Global sum, the same bits everywhere, with a local gradient: gradients are summed later anyway."""
        return self.all_reduce(t) + (t - t.detach()) if self.process_groups else t

    def any(self, flag):
        """True on every rank if the flag (bool or tensor) is true on one."""
        return bool(self.all_reduce(torch.as_tensor(flag, device=self.device).any().long()))

    def from_main(self, value):
        """Rank 0's value (any small picklable) on every rank."""
        box = [value]
        if self.process_groups:
            td.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def from_all(self, value):
        """Every rank's value (small, picklable), in rank order, on every rank."""
        box = [value] * self.world
        if self.process_groups:
            td.all_gather_object(box, value)
        return box

    def on_all(self, action):
        """action() on every rank -> its value. A ValueError or OSError of one rank is raised on all of them, so
        that nobody waits for a rank that has left; the message names the process unless it is the first."""
        value = error = None
        try:
            value = action()
        except (ValueError, OSError) as e:
            error = one_line(e) or type(e).__name__
        for rank, error in enumerate(self.from_all(error)):
            if error:
                raise EverybodysError(error if rank == 0 else f"{error} (process {rank})")
        return value

    def on_main(self, action):
        """action() on rank 0 only -> its value (small, picklable), or its error, on every rank."""
        return self.from_main(self.on_all(lambda: action() if self.main else None))

    def barrier(self):
        self.any(False)

    def close(self):
        """End of a good run. The barrier keeps a quick rank from hanging up on the others."""
        if self.process_groups:
            self.barrier()
            td.destroy_process_group()

    # -- rows to experts and back ----------------------------------------------------------------------------

    def to_experts(self, rows, counts):
        """rows (M, ...) sorted by global expert id, counts (E,) int64 -> (my rows, my counts (E/ep,), back).

        My rows come expert by expert, each expert's in order of source rank: the order one process has on the
        concatenated batch. Any M on any rank, also 0. Waits for the counts: a host sync besides dispatch's nonzero().
        """
        if self.ep == 1:
            return rows, counts, Back(counts[None], None, None)
        table = counts.new_empty(self.ep, len(counts))  # (ep, E): row r is rank r's counts
        td.all_gather(list(table), counts.contiguous(), group=self.process_groups["ep"])
        sizes = table.view(self.ep, self.ep, -1)  # (source rank, target rank, E / ep)
        my_counts = sizes[:, self.ep_rank].sum(0)  # (E / ep,)
        sizes = sizes.cpu()  # the sync: how many rows go where must be known here
        if torch.is_grad_enabled() and rows.is_floating_point() and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # frozen below: take part in backward all the same
        rows, link = AllToAll.apply(rows, None, sizes, self)
        return rows, my_counts, Back(table, sizes, link)

    def to_tokens(self, rows, back):
        """The inverse: rows in the order to_experts gave (any width) -> (M, ...) in the order it took."""
        return rows if back.sizes is None else AllToAll.apply(rows, back.link, back.sizes, self)[0]

    def traffic(self, table, row_bytes):
        """Rows this rank sends, by distance: 0-dim tensors tokens_rank, tokens_node, tokens_far and bytes_*.

        One exchange, by final target; a layer makes four of this size (to experts, to tokens, and backward). Sum over
        ranks to log.
        """
        sent = table[self.ep_rank].view(self.ep, -1).sum(1)
        peer = torch.arange(self.ep, device=table.device) + self.rank - self.ep_rank
        rank, node = peer == self.rank, peer // self.ranks_per_node == self.node
        where = {"rank": rank, "node": node & ~rank, "far": ~node}
        tokens = {name: (sent * mask).sum() for name, mask in where.items()}
        return {f"tokens_{name}": n for name, n in tokens.items()} | {
            f"bytes_{name}": n * row_bytes for name, n in tokens.items()
        }

    # -- gradients -------------------------------------------------------------------------------------------

    def sync_grads(self, model):
        """Sum gradients: dense over the world, experts over their replicas (the exchange summed the rest).

        A missing gradient counts as zero and becomes zero: AdamW then does the same on any number of ranks.

        Why tests compare gradients (or train with SGD): Adam steps by m / sqrt(v), a mean of gradients over the root of
        a mean of their squares. A constant factor c makes it c m / sqrt(c^2 v), the same step: experts summed twice
        would train as if nothing were wrong.
        """
        experts = expert_ids(model)
        params = [p for p in model.parameters() if p.requires_grad]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for group, inside in (("world", False), ("dp", True)):
            part = [p for p in params if (id(p) in experts) == inside]
            if part and self.process_groups:
                wide = torch.float64 if any(p.dtype == torch.float64 for p in part) else torch.float32
                flat = torch.cat([p.grad.flatten().to(wide) for p in part])
                td.all_reduce(flat, group=self.process_groups.get(group))
                for p, g in zip(part, flat.split([p.numel() for p in part])):
                    p.grad.copy_(g.view_as(p))

    def clip_grad_norm(self, model, max_norm):
        """Scale gradients to the global norm max_norm (0: only measure). Returns the norm before, 0-dim.

        Call after sync_grads. Each expert counts once and every rank gets the same bits (a gather, a sum in
        fixed order): `if not norm.isfinite(): skip` is taken by all ranks or by none.
        """
        experts = expert_ids(model)
        params = [p for p in model.parameters() if p.grad is not None]
        dense = get_total_norm([p.grad for p in params if id(p) not in experts]).to(self.device)
        mine = get_total_norm([p.grad for p in params if id(p) in experts]).to(self.device)
        norm = (dense**2 + self.whole(mine.view(1) ** 2).sum()).sqrt()
        if max_norm:
            clip_grads_with_norm_(params, max_norm, norm)
        return norm

    # -- experts by global id --------------------------------------------------------------------------------

    def whole(self, t):
        """This rank's (E/ep, ...) slice -> (E, ...), on every rank."""
        if self.ep == 1:
            return t
        mine = t.detach().to(self.device).contiguous()
        full = mine.new_empty(self.ep * len(mine), *mine.shape[1:])
        td.all_gather(list(full.chunk(self.ep)), mine, group=self.process_groups["ep"])
        return full.to(t.device)

    def part(self, t):
        """(E, ...) -> a copy of this rank's (E/ep, ...) slice."""
        return t if self.ep == 1 else t.unflatten(0, (self.ep, -1))[self.ep_rank].clone()


# -- all-to-all ----------------------------------------------------------------------------------------------


def swap(x, sizes):
    """Block transpose: x holds A x B blocks of rows, sizes (A, B), b fastest -> the same blocks, a fastest.

    sizes [[2, 1], [1, 3]]:   a0b0 a0b0 a0b1 a1b0 a1b1 a1b1 a1b1  ->  a0b0 a0b0 a1b0 a0b1 a1b1 a1b1 a1b1
    """
    blocks, n = x.split(sizes.flatten().tolist()), sizes.shape[1]
    return torch.cat([block for b in range(n) for block in blocks[b::n]])


def send(x, to, frm, group):
    """One all_to_all_single: `to[r]` rows to each rank of the group, `frm[r]` rows from each."""
    out = x.new_empty(int(frm.sum()), *x.shape[1:])
    td.all_to_all_single(out, x.contiguous(), frm.tolist(), to.tolist(), group=group)
    return out


def exchange(x, c, mesh):
    """x: my rows by target rank, c (ep, ep): number of rows from each source to each target -> by source.

    Two-level: first to the right slot on my own node, then to the right node (a rank is a node and a slot in it).

        mine, by target        (node', slot')  -swap->  (slot', node')
        send within the node   (slot, node')   -swap->  (node', slot)     my node's rows for my slot
        send between nodes     (node, slot)    = in order of source rank, as in the flat exchange

    What it saves is messages: with 4 nodes of 8 ranks a rank sends 7 within its node and 24 to other nodes; in two
    levels 7 and 3, the 3 eight times as large. The bytes between nodes stay the same, those within a node grow: a row
    for another slot goes there first. Rows that stay on the node pass through the second call as well, as what a rank
    sends to itself. That is a copy in memory, no message (gloo, 8 MB: 2.7 ms to itself, 7.2 ms to another process).
    """
    rank, slots = mesh.ep_rank, mesh.ranks_per_node
    if not mesh.two_level or "inter" not in mesh.process_groups:
        return send(x, c[rank], c[:, rank], mesh.process_groups["ep"])
    node, slot = divmod(rank, slots)
    c = c.reshape(mesh.ep // slots, slots, mesh.ep // slots, slots)  # rows from (node, slot) to (node', slot')
    mine, held = c[node, slot], c[node, :, :, slot]  # (node', slot'); (slot, node'): what my node has for my slot
    x = send(swap(x, mine), mine.sum(0), held.sum(1), mesh.process_groups["intra"])
    return send(swap(x, held), held.sum(0), c[:, :, node, slot].sum(1), mesh.process_groups["inter"])


def to_owner(x, sizes, mesh):
    """Rows to the ranks that own their experts, the field's "dispatch": by (target rank, its expert) = by global expert
    -> by (source, my expert) -> by (my expert, source)."""
    return swap(exchange(x, sizes.sum(2), mesh), sizes[:, mesh.ep_rank])


def to_source(x, sizes, mesh):
    """The inverse of to_owner, step by step."""
    return exchange(swap(x, sizes[:, mesh.ep_rank].T), sizes.sum(2).T, mesh)


class AllToAll(torch.autograd.Function):
    """`to_owner` when link is None, else `to_source`; the backward of each is the other.

    to_owner also returns a zero, the link, which to_source takes as an input. So the first exchange comes before the
    second in every rank's graph, and both run backward on every rank, even where the experts in between return
    something unconnected (they got no rows, or are frozen).
    """

    @staticmethod
    def forward(ctx, x, link, sizes, mesh):
        ctx.move, ctx.inverse = (to_owner, to_source) if link is None else (to_source, to_owner)
        ctx.sizes, ctx.mesh = sizes, mesh
        return ctx.move(x, sizes, mesh), x.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        grad = ctx.inverse(grad, ctx.sizes, ctx.mesh)
        return grad, None if ctx.move is to_owner else grad.new_zeros(()), None, None


# -- start ---------------------------------------------------------------------------------------------------


def check_layout(world, n_experts, ep=0, ranks_per_node=0, two_level=False):
    """Checked (ep, ranks per node). The defaults: the largest ep that fits, one node."""
    both = gcd(world, n_experts or 1)
    ep, ranks_per_node = ep or both, ranks_per_node or world
    for name, n, of, what in (
        ("ep", ep, both, f"{world} processes and the {n_experts} experts"),
        ("ranks_per_node", ranks_per_node, world, f"{world} processes that torchrun started"),
    ):
        if n < 1 or of % n:
            good = ", ".join(str(n) for n in range(1, of + 1) if of % n == 0)
            raise ValueError(f"--{name}={n} must divide the {what}: choose from {good}")
    if two_level and ep % ranks_per_node and ranks_per_node % ep:
        raise ValueError(f"--two_level needs ep={ep} to be a multiple or a divisor of ranks_per_node={ranks_per_node}")
    return ep, ranks_per_node


def make_mesh(rank, world, n_experts, ep=0, ranks_per_node=0, device="cpu", two_level=False, timeout=600):
    """The mesh on top of an existing process group: every rank builds all groups, in the same order."""
    ep, m = check_layout(world, n_experts, ep, ranks_per_node, two_level)
    mesh = Mesh(rank, world, ep, m, torch.device(device), two_level)
    lists = {"ep": [range(s, s + ep) for s in range(0, world, ep)], "dp": [range(s, world, ep) for s in range(ep)]}
    if ep > m and ep % m == 0:
        lists["intra"] = [range(s, s + m) for s in range(0, world, m)]
        lists["inter"] = [range(s + i, s + ep, m) for s in range(0, world, ep) for i in range(m)]
    for name, ranks in lists.items():
        ranks = [list(r) for r in ranks]
        mesh.process_groups[name], _ = td.new_subgroups_by_enumeration(ranks, timeout=timedelta(seconds=timeout))
    return mesh


def check_device(name):
    """ValueError for a device that is not there; "" (choose for me) is fine."""
    if not re.fullmatch(r"(cpu|mps|cuda|cuda:\d+)?", name):
        raise ValueError(f"--device={name} is unknown; choose from cpu, cuda, cuda:0, cuda:1, ..., mps")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device={name}: there are {torch.cuda.device_count()} usable GPUs here; --device=cpu always works"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device=mps: there is no usable Apple GPU here; --device=cpu always works")


def keep_memory():
    """Let malloc keep what a step frees for the next one: giving large blocks back to the kernel and taking them anew
    is 4 % of a step's time. Does nothing where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is trimmed below 2 GiB


def environment():
    """(rank, world, rank on this node, ranks on this node) as torchrun sets them; None without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return None
    needs = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"
    if missing := [name for name in needs if name not in os.environ]:
        raise OwnError(f"WORLD_SIZE is set but not {', '.join(missing)}: start with torchrun or unset it")
    for name in needs[:5]:
        if not re.fullmatch(r"\d{1,9}", os.environ[name]):
            raise OwnError(f"{name}={os.environ[name]} is not a number: start with torchrun or unset WORLD_SIZE")
    rank, world, slot, slots = (int(os.environ[name]) for name in needs[:4])
    if rank >= world or slot >= slots:
        raise OwnError(
            f"RANK={rank} must be below WORLD_SIZE={world}, LOCAL_RANK={slot} below "
            f"LOCAL_WORLD_SIZE={slots}: start with torchrun"
        )
    return rank, world, slot, slots


def init(ranks_per_node=0, timeout=600, device=None):
    """Join the other ranks that torchrun's environment names; without it the single process. -> Mesh of that many
    ranks that share nothing yet: spread_experts places the experts.

    NCCL when there is a GPU for every local rank, else gloo (on the CPU unless device says "cuda"). A hanging
    collective ends after `timeout` seconds. ValueError, the same on every rank, when the numbers do not fit; OwnError
    on a rank that cannot join the others.
    """
    gpus = torch.cuda.device_count() if "cuda" in str(device or "cuda") else 0
    here = environment()
    if here is None:
        check_layout(1, 1, 0, ranks_per_node)
        return Mesh(device=torch.device(device or ("cuda" if gpus else "cpu")))
    rank, world, slot, slots = here
    _, ranks_per_node = check_layout(world, 1, 0, ranks_per_node or slots)
    if device == "mps" and world > 1:
        raise ValueError("--device=mps works on one process only: gloo cannot send its tensors")
    one_gpu = str(device).startswith("cuda:")
    if one_gpu and world > 1:
        raise ValueError(f"--device={device} is one GPU for {world} processes: with --device=cuda each takes its own")
    if gpus >= slots or (gpus and device):  # two NCCL ranks cannot share a GPU, two gloo ranks can
        device = device if one_gpu else f"cuda:{slot % gpus}"
        torch.cuda.set_device(device)
    join(rank, world, "nccl" if gpus >= slots else "gloo", timedelta(seconds=timeout))
    return Mesh(rank, world, 1, ranks_per_node, torch.device(device or "cpu"), process_groups={"world": None})


def spread_experts(mesh, n_experts, ep=0, two_level=False, timeout=600, ranks_per_node=0):
    """The mesh that init gave, with the experts spread over its ranks. ranks_per_node: if it is not what init was told.
    ValueError, the same on every rank, when the numbers do not fit."""
    ranks_per_node = ranks_per_node or mesh.ranks_per_node
    if mesh.world == 1:
        check_layout(1, n_experts, ep, ranks_per_node, two_level)
        return mesh
    return make_mesh(mesh.rank, mesh.world, n_experts, ep, ranks_per_node, mesh.device, two_level, timeout)


def join(rank, world, backend, limit):
    """Meet the other ranks and start the process group. OwnError, one line, if they cannot be reached."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    failed = f"process {rank} cannot join the other {world - 1} through MASTER_ADDR:MASTER_PORT={where}"

    def give_up():  # torch waits for ever for one who accepts and then says nothing
        print(f"train.py: {failed}: whoever listens there says nothing", file=sys.stderr, flush=True)
        os._exit(1)

    watchdog = Timer(limit.total_seconds() + 10, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        shared, rank, world = next(td.rendezvous("env://", timeout=limit))
        store = td.PrefixStore("try" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), shared)
        td.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (RuntimeError, ValueError, OSError) as error:
        raise OwnError(f"{failed}: {str(error).splitlines()[0][:200]}") from None
    finally:
        watchdog.cancel()


# -- errors --------------------------------------------------------------------------------------------------


class EverybodysError(ValueError):
    """An error that every rank raises alike, so that nobody waits for one who has left; rank 0 prints it."""


class OwnError(ValueError):
    """An error that this process may be the only one to have, before it can tell the others."""


def speaks_for(error):
    """Should this process print an error? Rank 0 prints what all have alike, each rank what is its own. Before they
    have met, what torchrun gave a node's processes alike (flags, GPUs) may be wrong on that node only: its first one
    prints. Processes that somebody started one by one may each have flags of their own: all print."""
    met = td.is_initialized()
    own = isinstance(error, OwnError) or met and not isinstance(error, EverybodysError)
    alone = not met and not {"WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"} <= os.environ.keys()
    return own or alone or os.environ.get("RANK" if met else "LOCAL_RANK", "0") == "0"


def alike(action):
    """action() -> its value; its error is one that every rank meets: the same fault in the same flags and files."""
    try:
        return action()
    except OwnError:
        raise
    except (ValueError, OSError) as error:
        raise EverybodysError(one_line(error)) from None


def program(main, argv):
    """main(argv), the whole of this process: an error is one line on stderr, from the rank that it concerns, and exit
    status 1; what is a bug keeps its traceback."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed: >&-
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if not (line := one_line(error)):
            raise
        if speaks_for(error):
            with suppress(OSError):  # a closed terminal
                print(f"train.py: {line}", file=sys.stderr)
        with suppress(RuntimeError):
            if td.is_initialized():  # else, now and then, its threads abort the process (SIGABRT) instead of status 1
                td.destroy_process_group()
        sys.exit(1)
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            silence(sys.stdout)


def silence(stream):
    """Let a stream that can no longer be written to lead nowhere: Python flushes it once more at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def one_line(error):
    """What to tell a user about an error, in one line; None if it is a bug and wants its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # nobody has said more about it than the system
        where = error.filename or "a file, or stdout"
        return f"cannot use {where} ({error.strerror}): mend that, or name another file or folder"
    if isinstance(error, (ValueError, OSError)):
        return text
    if isinstance(error, MemoryError) or re.search("allocate memory|out of memory|bad_alloc", text):
        reason = re.sub(r"^\[enforce fail .*?\] err == 0\. ", "", text)[:200] or "MemoryError"
        return f"not enough memory ({reason}): lower --batch_size, raise --grad_accum, or take a smaller model"
    if "C++ compiler" in text:
        return "--compile needs a C++ compiler, like g++: install one, or leave the flag out"
    if not (isinstance(error, td.DistError) or re.search(r"(?i)gloo|nccl|process ?group|by peer|tcpstore", text)):
        return None
    again = "continue with --init_from=resume"
    if re.search(r"(?i)closed by peer|reset by peer|broken pipe|connection refused|remote process exited", text):
        return f"another process has ended, its own message says why; {again}"
    if re.search(r"(?i)timed? ?out", text):
        return f"another process did not answer in time: it hangs, or --timeout is too short; {again}"
    return f"the processes lost each other ({text[:200]}); {again}"


# -- checkpoints ---------------------------------------------------------------------------------------------


def expert_ids(model):
    """id() of every tensor of shape (E/ep, ...): parameters and buffers of modules with sharded = True."""
    modules = [m for m in model.modules() if getattr(m, "sharded", False)]
    return {id(t) for m in modules for t in chain(m.parameters(), m.buffers()) if t.dim()}


def named_tensors(model):
    """{name: parameter or saved buffer}, a shared one once, under its first name."""
    saved = model.state_dict()
    return {name: t for name, t in chain(model.named_parameters(), model.named_buffers()) if name in saved}


def named_params(model, optimizer):
    """{name: parameter}, in the optimizer's order."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups if optimizer else []
    return {names[id(p)]: p for group in groups for p in group["params"]}


def full_state(model, optimizer, mesh):
    """{"model": {name: tensor}, "optimizer": {parameter: {exp_avg, exp_avg_sq, step}}}, copies on the CPU.

    Experts whole, by global id. Collective, the same result on every rank. The optimizer may be None; its
    settings (learning rate, ...) are left out: they are functions of the step.
    """
    experts = expert_ids(model)

    def full(t, p):
        t = mesh.whole(t) if id(p) in experts and t.shape == p.shape else t
        return t.detach().to("cpu", copy=True)

    return {
        "model": {name: full(t, t) for name, t in named_tensors(model).items()},
        "optimizer": {
            name: {k: full(t, p) for k, t in optimizer.state[p].items() if torch.is_tensor(t)}
            for name, p in named_params(model, optimizer).items()
        },
    }


def refuse_unless_equal(have, want):
    """ValueError names what differs between the {name: shape} of a checkpoint and of this model."""
    wrong = [
        f"{name} is {have.get(name, 'missing')}, here {want.get(name, 'unknown')}"
        for name in want | have
        if want.get(name) != have.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise ValueError(f"the checkpoint does not fit this model: {'; '.join(wrong[:12])}{more}")


def load_state(model, optimizer, state, mesh):
    """Fill model and optimizer in place from full_state's dict, whatever ranks wrote it. No communication.

    ValueError names every tensor that is missing, unknown, of another shape or no longer of real numbers, before
    anything is changed.
    """
    experts, tensors, params = expert_ids(model), named_tensors(model), named_params(model, optimizer)
    moments = state["optimizer"] if optimizer else {}

    def shape(p):
        return (len(p) * mesh.ep, *p.shape[1:]) if id(p) in experts else tuple(p.shape)

    def mine(t, p):
        return mesh.part(t) if id(p) in experts and t.shape == shape(p) else t

    want = {name: shape(t) for name, t in tensors.items()}
    have = {name: tuple(t.shape) for name, t in state["model"].items()}
    for name in want.keys() & have.keys():  # a real number of another precision is converted, anything else is not
        want[f"{name} real"], have[f"{name} real"] = (
            t.is_floating_point() for t in (tensors[name], state["model"][name])
        )
    for name, p in params.items():  # AdamW has both moments, or none where there never was a gradient
        keys = ["exp_avg", "exp_avg_sq"] if moments.get(name) else [] if name in moments else ["optimizer state"]
        want |= {f"{key} of {name}": shape(p) for key in keys}
    have |= {
        f"{key} of {name}": tuple(t.shape) for name in moments for key, t in moments[name].items() if key != "step"
    }
    refuse_unless_equal(have, want)
    with torch.no_grad():
        for name, t in tensors.items():
            t.copy_(mine(state["model"][name], t))
    if optimizer:
        packed = optimizer.state_dict()
        packed["state"] = {
            i: {k: mine(t, p).clone() for k, t in moments[name].items()}
            for i, (name, p) in enumerate(params.items())
            if moments[name]
        }
        optimizer.load_state_dict(packed)


def save(path, state):
    """Write a checkpoint or leave everything as it was: whole file under another name, fsync, rename, fsync.

    OSError, one line, when that fails (disk full, folder not writable). Call on rank 0 only.
    """
    path = Path(path)
    tmp = path.with_name("saving.tmp")  # always the same name: leftovers of killed runs do not pile up
    try:
        with open(tmp, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        if os.name == "posix":  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the rename itself must survive a power cut
            os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)  # a full disk needs the space back
        cause = error  # torch's zip writer hides a failed write behind a RuntimeError
        while cause.__context__ and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(cause).split("\n")[0]
        raise OSError(
            f"cannot save {path}: {reason}. Earlier checkpoints, if there are any, are untouched; mend it and "
            "continue with --init_from=resume"
        ) from None


def load(path):
    """Verified checkpoint, on the CPU. OSError: cannot be read. ValueError: damaged. One line each."""
    try:
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():
                raise ValueError(f"checksum of {bad} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file can make its reader raise anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}") from None


def checksum(tensors):
    """A number that tells whether tensors hold what others hold, or what they held, on any device."""
    return functools.reduce(lambda crc, t: zlib.crc32(t.detach().cpu().contiguous().numpy(), crc), tensors, 0)


def checkpoints(folder):
    """Paths of ckpt_NUMBER.pt in order of the number, oldest first."""
    paths = [path for path in Path(folder).glob("ckpt_*.pt") if path.stem[5:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def count(state):
    """Number of tensors in a checkpoint, weights and moments."""
    return len(state["model"]) + sum(len(values) for values in state["optimizer"].values())


def fault(state):
    """Why this cannot be a checkpoint that save_checkpoint wrote, None if it can."""
    kinds = {"model": dict, "optimizer": dict, "config": dict, "step": int}
    if not isinstance(state, dict) or not kinds.keys() <= state.keys():
        return "it is not a checkpoint of train.py"
    for name, kind in kinds.items():
        if type(state[name]) is not kind or not state[name] and name in ("model", "config"):
            return f"its {name} is empty or of a wrong type"
    if state["step"] < 0 or type(state.get("n_domains", 1)) is not int or state.get("n_domains", 1) < 1:
        return "its step or its number of domains is wrong"
    if not isinstance(state.get("vocabulary") or "", str) or not isinstance(state.get("teacher", {}), dict):
        return "its vocabulary or its teacher is of a wrong type"
    parts = state.get("parts", [])
    if not isinstance(parts, list) or not all(isinstance(name, str) for name in parts):
        return "its domains are of a wrong type"
    model = state["model"]
    dense = lambda t: torch.is_tensor(t) and t.layout == torch.strided and t.device.type == "cpu"
    if not all(map(dense, model.values())):
        return "its model is of a wrong type"
    for name, moments in state["optimizer"].items():
        if name not in model:
            return f"it lacks the parameter {name}"
        if not model[name].is_floating_point():
            return f"{name} is of a wrong type"
        real = lambda t: dense(t) and t.is_floating_point()
        fits = lambda key, t: real(t) and t.shape == (() if key == "step" else model[name].shape)
        known = isinstance(moments, dict) and ("step" in moments or not moments)
        if not known or not all(fits(key, t) for key, t in moments.items()):
            return f"its optimizer state of {name} does not fit the parameter"
    if state.get("tensors", count(state)) != count(state):
        return f"it has {count(state)} tensors of {state['tensors']}"
    for name, t in chain(model.items(), *(moments.items() for moments in state["optimizer"].values())):
        if not t.isfinite().all():
            return f"{name} is not finite"


def load_usable(path, check=lambda config: None):
    """load, and ValueError also for an intact file that is no checkpoint of ours, or whose config `check` refuses."""
    state = load(path)
    try:
        if reason := fault(state):
            raise ValueError(reason)
        check(state["config"])
    except MemoryError:
        raise
    except Exception as error:  # of what a file may hold nobody knows all
        raise ValueError(f"{path} is not usable: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    return state


def warn(text):
    print(f"warning: {text}", flush=True)


def find(folder, warn=warn, check=lambda config: None):
    """(path, state) of the newest usable checkpoint, None if there is none at all. ValueError if none is usable. check:
    raises ValueError for a config that no run can have."""
    paths, reasons = checkpoints(folder), []
    for path in reversed(paths):
        try:
            return path, load_usable(path, check)
        except (OSError, ValueError) as error:
            reasons.append(str(error))
            warn(f"{error}; trying the one before it")
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} is usable: {reasons[0]}")


def newest(folder, mesh, check=lambda config: None):
    """(path, state) of the newest usable checkpoint, on every rank; check: see find. ValueError, on every rank, if
    there is none.

    Unusable ones (damaged, foreign, incomplete, a folder) are passed over with a warning. Rank 0 chooses, so that all
    load the same one.
    """
    found = mesh.on_all(lambda: find(folder, check=check) if mesh.main else None)
    path = mesh.from_main(found and found[0])
    if path is None:
        raise EverybodysError(f"no checkpoint (ckpt_*.pt) in {folder}: train first, or name another folder")
    return path, mesh.on_all(lambda: found[1] if mesh.main else load_usable(path))


def prune(folder, keep=2, written=None, check=lambda config: None):
    """Delete what is older than the newest `keep` usable checkpoints, but never the one just written. One that is not
    usable counts for nothing: it must not push a good one out. check: see find."""
    paths, good = checkpoints(folder), 0
    if len(paths) <= keep:  # none can go: do not read them
        return
    for path in reversed(paths):
        if good >= keep:
            if path != written and not path.is_dir():
                path.unlink()
            continue
        try:
            if path != written:  # that one was whole a moment ago
                load_usable(path, check)
            good += 1
        except (OSError, ValueError) as error:
            warn(f"{error}; an older one is kept for it")


def diverged(what, step, folder, check=lambda config: None):
    """The error that ends a run whose numbers are no longer finite: diverged("the weights are", step, folder). check:
    see find."""
    last = "there is no checkpoint yet"
    with suppress(ValueError):
        if found := find(folder, lambda text: None, check):
            last = f"the last good checkpoint is step {found[1]['step']} (--init_from=resume --out_dir={folder})"
    return EverybodysError(f"{what} not finite at step {step}; {last}; try a lower --learning_rate")


def save_checkpoint(folder, step, model, optimizer, mesh, check=lambda config: None, **more):
    """folder/ckpt_STEP.pt: full_state, step, launch and `more` (train.py's config), the last two are kept (check: see
    find). Collective.

    This is all the state there is: weights, gates' buffers, AdamW's moments and counts. Batches, dropout and noise
    follow from (seed, step), schedules from the step, and what a gate adds up between two updates is zero after the
    second.

    ValueError on every rank for weights or moments that are not finite, and for whatever keeps rank 0 from writing.
    """
    state = full_state(model, optimizer, mesh)  # the same on every rank
    moments = [t for values in state["optimizer"].values() for t in values.values()]
    for what, tensors in (("the weights are", state["model"].values()), ("the optimizer's moments are", moments)):
        if not all(t.isfinite().all() for t in tensors):
            raise mesh.from_main(mesh.main and diverged(what, step, folder, check))
    state |= {"step": step, "launch": launch(), "tensors": count(state)} | more
    path = Path(folder) / f"ckpt_{step:06d}.pt"

    def write():
        save(path, state)
        prune(folder, keep=2, written=path, check=check)

    mesh.on_main(write)


# -- a run's folder ------------------------------------------------------------------------------------------


def launch():
    """Which start of torchrun this is: its agent's pid and, where the system tells, when it began: pids repeat."""
    try:
        with open(f"/proc/{os.getppid()}/stat") as file:
            return [os.getppid(), file.read().rpartition(")")[2].split()[19]]
    except OSError:
        return [os.getppid(), ""]


def restarted(folder, check=lambda config: None):
    """True if torchrun has restarted its workers and the newest checkpoint in folder is of this same launch.

    When a worker dies torchrun starts all of them again, with the flags of the first start: the run is then to be
    resumed. A checkpoint of a run before this launch is no reason for that. check: see find. For rank 0: use with
    mesh.on_main.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    found = find(folder, check=check)
    return found is not None and found[1].get("launch") == launch()


def stop_on_signals():
    """Ctrl-C, SIGTERM and (but under nohup) SIGHUP end the run after the step at hand, with a checkpoint: -> a list
    that is then not empty. Sent again after two seconds it ends at once; before that it is torchrun forwarding what the
    worker got itself."""
    asked = []

    def handle(number, frame):
        if asked and time.monotonic() - asked[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.append(time.monotonic())

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # that is nohup's wish
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, handle)
    return asked
