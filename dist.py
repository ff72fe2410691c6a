"""
Expert parallelism and checkpoints: the only file that talks to other ranks. `torchrun train.py` equals one process.

    world = data parallel x expert parallel, for 8 ranks and ep = 4, two ranks a node:

                    node 0            node 1            node 2            node 3
        rank      0       1         2       3         4       5         6       7
        experts  0..3    4..7      8..11  12..15     0..3    4..7      8..11  12..15      (E = 16)
                 `------- an ep group --------'     `------- an ep group --------'
        ranks 0 and 4 hold the same experts: they are replicas, the "dp group" of those experts.

Decisions, each with what was measured (2 CPU cores, gloo) or what went wrong elsewhere:

* A rank's loss is its share of the global loss (local sum / global target count), so gradients are only
  summed, never divided. Means of per-rank means were 100% to 160% off with ragged target counts; experts
  that were divided once too often showed a loss curve that looked fine: Adam divides a gradient by its own
  size (m / sqrt(v)), so a constant factor cancels. Test gradients directly, or with SGD.
* Moving rows is a permutation, and the transpose of a permutation is its inverse: the backward of
  to_experts is to_tokens and the other way round. One autograd function; public all_to_all_single only.
* One exchange of counts a layer, never computed twice: with a wrong split gloo delivers garbage silently.
* Every rank takes part in every backward exchange, whatever the code between the exchanges returns (see
  AllToAll): a rank without rows that steps out of the graph hangs all others.
* Two-level exchange (Tutel's 2D hierarchical all-to-all, arXiv 2206.03382): the same bytes between nodes
  in fewer, larger messages. With 4 nodes of 8 ranks, a rank's 31 messages become 7 within its node and 3
  between nodes, at the price of moving most rows twice. No gain on one machine (5.6 against 5.75 ms).
* Gradients travel as one flat message per group: 217 ms a step against 326 per tensor and 238 with DDP.
  The message never depends on which gradients exist, because its layout decides the rounding.
* Detect NaN with a sum: gloo's MAX swallows a NaN, depending on the rank that has it.
* A module is marked by its attribute `sharded`, not its parameters: copy.deepcopy loses their attributes.
* Checkpoints hold all experts by global id in one file, so any number of ranks can load it. torch.load
  does not verify checksums (one flipped bit loads silently), zipfile.testzip does: 0.05 s per 100 MB.
* torchrun keeps one store over restarts and gloo then dials dead peers (13 of 19 restarts failed): a
  prefix per attempt cures it (0 failures in 48).

Letters: D model width, E experts, M rows (a token sent to k experts is k rows), W ranks.
"""

import os
import re
import zipfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from math import gcd
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows

import torch
import torch.distributed as td
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class EverybodysError(ValueError):
    """An error that every rank raises alike, so that nobody waits for one who has left; rank 0 prints it."""


class Back(NamedTuple):
    """What to_tokens needs to bring the rows back."""

    table: torch.Tensor  # (ep, E) int64 on the device: rows from each rank of the ep group
    sizes: torch.Tensor | None  # (ep source, ep target, E/ep) the same on the CPU; None when nothing travels
    link: torch.Tensor | None  # a zero that links the way back to the way there, see AllToAll


@dataclass(eq=False)
class Mesh:
    """Where this rank stands. Mesh() is the single process: every method works and changes nothing."""

    rank: int = 0
    world: int = 1
    ep: int = 1  # ranks that share one set of experts
    ranks_per_node: int = 1  # real nodes or played ones
    device: torch.device = torch.device("cpu")
    two_level: bool = False  # exchange within nodes first, then between nodes
    process_groups: dict = field(default_factory=dict)  # "ep", "dp"; "intra", "inter" if ep spans nodes

    def __post_init__(self):
        self.main = self.rank == 0
        self.ep_rank, self.dp = self.rank % self.ep, self.world // self.ep
        self.node, self.n_nodes = self.rank // self.ranks_per_node, self.world // self.ranks_per_node

    def __deepcopy__(self, memo):
        return self  # process groups cannot be copied, models that hold a mesh can

    # -- small collectives: every rank calls them, in the same order -----------------------------------------

    def all_reduce(self, t, group="world"):
        """Sum of a detached tensor (ints, float32, float64; bfloat16 would round) over a group."""
        t = t.detach().clone(memory_format=torch.contiguous_format)
        if self.process_groups:
            td.all_reduce(t, group=self.process_groups.get(group))
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
        """action() on every rank -> each rank's own value. A ValueError or OSError of any of them is everybody's."""
        value = error = None
        try:
            value = action()
        except (ValueError, OSError) as e:
            error = str(e)
        for rank, error in enumerate(self.from_all(error)):
            if error:
                raise EverybodysError(error if rank == 0 else f"{error} (process {rank})")
        return value

    def on_main(self, action):
        """action() on rank 0 only; all ranks get its value (small, picklable), or its error."""
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
        concatenated batch. Any M on any rank, also 0. Waits for the counts, the one host sync of a layer.
        """
        if self.ep == 1:
            return rows, counts, Back(counts[None], None, None)
        table = counts.new_empty(self.ep, len(counts))
        td.all_gather(list(table), counts.contiguous(), group=self.process_groups["ep"])
        sizes = table.view(self.ep, self.ep, -1)
        my_counts = sizes[:, self.ep_rank].sum(0)
        sizes = sizes.cpu()
        if torch.is_grad_enabled() and rows.is_floating_point() and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # frozen below: take part in backward all the same
        rows, link = AllToAll.apply(rows, None, sizes, self)
        return rows, my_counts, Back(table, sizes, link)

    def to_tokens(self, rows, back):
        """The inverse: rows in the order to_experts gave (any width) -> (M, ...) in the order it took."""
        return rows if back.sizes is None else AllToAll.apply(rows, back.link, back.sizes, self)[0]

    def traffic(self, table, row_bytes):
        """Rows this rank sends, by distance: 0-dim tensors tokens_rank, tokens_node, tokens_far and bytes_*.

        One way, by final target (the way back is the same again, so is backward). Sum over ranks to log.
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


# -- start ---------------------------------------------------------------------------------------------------


def layout(world, n_experts, ep=0, ranks_per_node=0, two_level=False):
    """Checked (ep, ranks per node). The defaults: the largest ep that fits, one node."""
    both = gcd(world, n_experts or 1)
    ep, local = ep or both, ranks_per_node or world
    for name, n, of, what in (
        ("ep", ep, both, f"{world} ranks and the {n_experts} experts"),
        ("ranks_per_node", local, world, f"{world} ranks"),
    ):
        if n < 1 or of % n:
            good = ", ".join(str(n) for n in range(1, of + 1) if of % n == 0)
            raise ValueError(f"{name}={n} must divide the {what}: choose from {good}")
    if two_level and ep % local and local % ep:
        raise ValueError(f"two_level needs ep={ep} to be a multiple or a divisor of ranks_per_node={local}")
    return ep, local


def make_mesh(rank, world, n_experts, ep=0, ranks_per_node=0, device="cpu", two_level=False, timeout=600):
    """The mesh on top of an existing process group: every rank builds all groups, in the same order."""
    ep, local = layout(world, n_experts, ep, ranks_per_node, two_level)
    mesh = Mesh(rank, world, ep, local, torch.device(device), two_level)
    lists = {"ep": [range(s, s + ep) for s in range(0, world, ep)], "dp": [range(s, world, ep) for s in range(ep)]}
    if ep > local and ep % local == 0:
        lists["intra"] = [range(s, s + local) for s in range(0, world, local)]
        lists["inter"] = [range(s + i, s + ep, local) for s in range(0, world, ep) for i in range(local)]
    for name, ranks in lists.items():
        ranks = [list(r) for r in ranks]
        mesh.process_groups[name], _ = td.new_subgroups_by_enumeration(ranks, timeout=timedelta(seconds=timeout))
    return mesh


def init(n_experts, ep=0, ranks_per_node=0, timeout=600, device=None, two_level=False):
    """Mesh from torchrun's environment; without it the single process.

    NCCL when there is a GPU for every local rank, else gloo (on the CPU unless device says "cuda"). A hanging
    collective ends after `timeout` seconds. ValueError, the same on every rank, when the numbers do not fit.
    """
    gpus = torch.cuda.device_count() if "cuda" in str(device or "cuda") else 0
    if "WORLD_SIZE" not in os.environ:
        layout(1, n_experts, ep, ranks_per_node, two_level)
        return Mesh(device=torch.device(device or ("cuda" if gpus else "cpu")))
    needs = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if missing := [name for name in needs if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is set but not {', '.join(missing)}: start with torchrun or unset it")
    for name in needs[:4]:
        if not os.environ[name].isdigit():
            raise ValueError(f"{name}={os.environ[name]} must be a number: start with torchrun or unset WORLD_SIZE")
    rank, world, slot, slots = (int(os.environ[name]) for name in needs[:4])
    ep, local = layout(world, n_experts, ep, ranks_per_node or slots, two_level)
    if gpus >= slots or (gpus and device):
        device = f"cuda:{slot % gpus}"  # two NCCL ranks cannot share a GPU, two gloo ranks can
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    store, rank, world = next(td.rendezvous("env://", timeout=limit))
    store = td.PrefixStore("try" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if gpus >= slots else "gloo"
    td.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return make_mesh(rank, world, n_experts, ep, local, device or "cpu", two_level, timeout)


def check_device(name):
    """ValueError for a --device that is not there."""
    if not re.fullmatch(r"(cpu|mps|cuda|cuda:\d+)?", name):
        raise ValueError(f"--device={name} is unknown; choose from cpu, cuda, cuda:0, cuda:1, ..., mps")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device={name}: {torch.cuda.device_count()} usable GPUs here; --device=cpu always works")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device=mps: there is no usable Apple GPU here; --device=cpu always works")


def one_line(error):
    """What to tell a user about an error, in one line; None if it is a bug and wants its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)):
        return text
    if "allocate memory" in text or "out of memory" in text:
        return f"{text[:200]}: lower --batch_size, raise --grad_accum, or take a smaller model"
    for sign, what in NETWORK_ERRORS.items():
        if sign in text.lower():
            return f"{what} ({text[:160]})"
    return None


ENDED = "another process of this run has ended: see its message; --init_from=resume continues"
SILENT = "another process did not answer within --timeout: see its message; --init_from=resume continues"
UNREACHED = "the first process cannot be reached: check MASTER_ADDR and MASTER_PORT, or use torchrun"
NETWORK_ERRORS = {  # what gloo, NCCL and the store write -> what happened and what to do
    "connection closed by peer": ENDED,
    "connection reset by peer": ENDED,
    "broken pipe": ENDED,
    "timed out waiting": SILENT,
    "wait timeout": SILENT,
    "socket timeout": SILENT,
    "client socket has timed out": UNREACHED,
    "client socket has failed": UNREACHED,
    "failed to connect": UNREACHED,
    "server socket has failed": "the port of the first process is taken: choose another MASTER_PORT, or use torchrun",
}


def speaks(error):
    """Should this rank print an error? Rank 0 prints what all raise alike, each rank what is its own."""
    return os.environ.get("RANK", "0") == "0" or td.is_initialized() and not isinstance(error, EverybodysError)


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
    """x: my rows by target rank, c (ep, ep): number of rows from each source to each target -> by source."""
    r, m = mesh.ep_rank, mesh.ranks_per_node
    if not mesh.two_level or "inter" not in mesh.process_groups:
        return send(x, c[r], c[:, r], mesh.process_groups["ep"])
    # A rank is (node, slot). First to the right slot on my own node, then to the right node:
    #   mine, by target        (node', slot')  -swap->  (slot', node')
    #   send within the node   (slot, node')   -swap->  (node', slot)     my node's rows for my slot
    #   send between nodes     (node, slot)    = in order of source rank, as in the flat exchange
    a, b = divmod(r, m)
    c = c.reshape(mesh.ep // m, m, mesh.ep // m, m)
    held = c[a, :, :, b]  # (slot, node')
    x = send(swap(x, c[a, b]), c[a, b].sum(0), held.sum(1), mesh.process_groups["intra"])
    return send(swap(x, held), held.sum(0), c[:, :, a, b].sum(1), mesh.process_groups["inter"])


def to_owners(x, sizes, mesh):
    """by (target rank, its expert) = by global expert -> by (source, my expert) -> by (my expert, source)."""
    return swap(exchange(x, sizes.sum(2), mesh), sizes[:, mesh.ep_rank])


def to_sources(x, sizes, mesh):
    """The inverse of to_owners, step by step."""
    return exchange(swap(x, sizes[:, mesh.ep_rank].T), sizes.sum(2).T, mesh)


class AllToAll(torch.autograd.Function):
    """`to_owners` when link is None, else `to_sources`; the backward of one is the other.

    The first returns a zero, the link, that the second takes in again. It costs nothing and puts both backward
    exchanges on every rank's tape, even where the experts in between return something unconnected (no rows, frozen).
    """

    @staticmethod
    def forward(ctx, x, link, sizes, mesh):
        ctx.forth, ctx.back = (to_owners, to_sources) if link is None else (to_sources, to_owners)
        ctx.sizes, ctx.mesh = sizes, mesh
        return ctx.forth(x, sizes, mesh), x.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        grad = ctx.back(grad, ctx.sizes, ctx.mesh)
        return grad, None if ctx.forth is to_owners else grad.new_zeros(()), None, None


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


def load_state(model, optimizer, state, mesh):
    """Fill model and optimizer in place from full_state's dict, whatever ranks wrote it. No communication.

    ValueError names every tensor that is missing, unknown or of another shape, before anything is changed.
    """
    experts, tensors, params = expert_ids(model), named_tensors(model), named_params(model, optimizer)
    moments = state["optimizer"] if optimizer else {}

    def shape(p):
        return (len(p) * mesh.ep, *p.shape[1:]) if id(p) in experts else tuple(p.shape)

    def mine(t, p):
        return mesh.part(t) if id(p) in experts and t.shape == shape(p) else t

    want = {name: shape(t) for name, t in tensors.items()}
    want |= {
        f"{key} of {name}": shape(p)
        for name, p in params.items()
        for key in moments.get(name, ["optimizer state"])
        if key != "step"
    }
    have = {name: tuple(t.shape) for name, t in state["model"].items()}
    have |= {
        f"{key} of {name}": tuple(t.shape) for name in moments for key, t in moments[name].items() if key != "step"
    }
    wrong = [
        f"{name} is {have.get(name, 'missing')}, here {want.get(name, 'unknown')}"
        for name in want | have
        if want.get(name) != have.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise ValueError(f"the checkpoint does not fit this model: {'; '.join(wrong[:12])}{more}")

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
        if os.name == "posix":
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
        raise OSError(f"cannot save {path}: {reason}. Earlier checkpoints are untouched") from None


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


def checkpoints(folder):
    """Paths of ckpt_NUMBER.pt in order of the number, oldest first."""
    paths = [path for path in Path(folder).glob("ckpt_*.pt") if path.stem[5:].isdigit()]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def usable(path):
    """`load` for a checkpoint that save_checkpoint has written and that is whole; ValueError or OSError for others."""
    state, kinds = load(path), dict(model=dict, optimizer=dict, config=dict, step=int, tensors=int)
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is not a checkpoint of train.py")
    if not state["config"] or len(state["model"]) != state["tensors"]:
        raise ValueError(
            f"{path} is damaged: {len(state['model'])} of {state['tensors']} tensors, {len(state['config'])} settings"
        )
    return state


def latest(folder):
    """Path of the newest usable ckpt_NUMBER.pt, None if there is none at all. ValueError if no one is usable."""
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            usable(path)
            return path
        except (OSError, ValueError) as error:
            print(f"warning: {error}; trying the one before it", flush=True)
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} is intact")


def newest(folder, mesh):
    """(path, state) of the newest usable checkpoint, the same on every rank. ValueError if there is none."""
    path = mesh.on_main(lambda: latest(folder))
    if path is None:
        raise EverybodysError(f"no checkpoint (ckpt_*.pt) in {folder}: train first, or name another folder")
    return path, mesh.on_all(lambda: usable(path))


def prune(folder, keep=2):
    """Delete what is older than the newest `keep` usable checkpoints. A damaged one counts for nothing: it must never
    push an intact one out."""
    intact = 0
    for path in reversed(checkpoints(folder)):
        if intact >= keep:
            path.unlink()
            continue
        try:
            usable(path)
            intact += 1
        except (OSError, ValueError) as error:
            print(f"warning: {error}; an older one is kept for it", flush=True)


def save_checkpoint(folder, step, model, optimizer, mesh, **more):
    """folder/ckpt_STEP.pt: full_state, the step and `more`; the last two are kept. Collective. ValueError, and nothing
    is written, if a weight or a moment is not finite: a resumed run could only end."""
    state = full_state(model, optimizer, mesh)
    finite = lambda tensors: all(t.isfinite().all() for t in tensors)
    if not finite(state["model"].values()):  # the same on every rank
        raise diverged("the weights are", step, folder)
    if not all(finite(moments.values()) for moments in state["optimizer"].values()):
        raise diverged("the optimizer's moments are", step, folder)
    state |= {"step": step, "tensors": len(state["model"]), "launch": launch(), **more}

    def write():
        save(os.path.join(folder, f"ckpt_{step:06d}.pt"), state)
        prune(folder)

    mesh.on_main(write)


def diverged(what, step, folder):
    """The error that ends a run whose numbers are no longer finite, alike on every rank."""
    saved = checkpoints(folder)
    last = (
        f"the last good checkpoint is step {int(saved[-1].stem[5:])} (--init_from=resume)"
        if saved
        else "there is no checkpoint yet"
    )
    return EverybodysError(f"{what} not finite at step {step}; {last}; try a lower --learning_rate")


def launch():
    """Which start of torchrun this is: its agent's pid and, where the system tells, when it began, since pids
    repeat."""
    try:
        with open(f"/proc/{os.getppid()}/stat") as file:
            return [os.getppid(), file.read().rpartition(")")[2].split()[19]]
    except OSError:
        return [os.getppid(), ""]


def restarted(folder):
    """When a worker dies torchrun starts all of them again, with the flags of the first start. True if this is such a
    restart and the checkpoints in `folder` are those of this launch, not of a run before it: then it is resumed."""
    path = latest(folder) if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else None
    return path is not None and load(path).get("launch") == launch()


def lock(folder):
    """Make a run's folder and lock it until the result is closed, or the process ends, however it does. ValueError if
    another run has it. Windows and some network file systems have no such locks; two runs are then not told apart."""
    os.makedirs(folder, exist_ok=True)
    held = ExitStack()
    if fcntl:
        file = os.open(folder, os.O_RDONLY)
        held.callback(os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise ValueError(f"another run is writing to {folder}: choose another --out_dir") from None
        except OSError:
            pass
    return held
