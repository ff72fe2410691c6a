"""
The checkpoint part of dist.py: what a run has saved survives what can happen to it.

In the order of the file: save and load at any number of processes, a kill or a full disk while saving, damaged and
foreign files, what is kept, numbers that are not finite, restarts, the lock.
"""

import os
import signal
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp

from ranks import run_ranks
from runs import same
from test_dist import D, E, LAYOUTS, V, default_dtype, largest, make, train_step  # noqa: F401
import data.files
import dist
from data.log import lock
from dist import Mesh, make_mesh


# -- save and load -------------------------------------------------------------------------------------------


def write_checkpoints(rank, world, folder):
    for step, (_, ep) in enumerate([x for x in LAYOUTS if x[0] == world]):
        mesh = make_mesh(rank, world, E, ep) if td.is_initialized() else Mesh()
        model, opt = make(mesh)
        for step in range(2):
            train_step(model, opt, mesh, step, micro=1)
        state = dist.full_state(model, opt, mesh)
        if mesh.main:
            dist.save(f"{folder}/{world}_{ep}.pt", state)


def read_checkpoints(rank, world, folder):
    """From every layout into each of this world: exact, and the next step is one process's next step."""
    meshes = {ep: make_mesh(rank, world, E, ep) if world > 1 else Mesh() for w, ep in LAYOUTS if w == world}
    for (ep, mesh), (w0, ep0) in product(meshes.items(), LAYOUTS):
        model, opt = make(mesh)
        for p in model.parameters():
            p.data.fill_(7)
        state = dist.load(f"{folder}/{w0}_{ep0}.pt")
        dist.load_state(model, opt, state, mesh)
        w1, n, r = "layers.1.experts.w1", E // ep, mesh.ep_rank
        assert torch.equal(model.layers[1].experts.w1, state["model"][w1][r * n : (r + 1) * n])
        assert torch.equal(
            opt.state[model.layers[1].experts.w1]["exp_avg_sq"],
            state["optimizer"][w1]["exp_avg_sq"][r * n : (r + 1) * n],
        )
        assert torch.equal(model.layers[0].experts.age, torch.arange(E)[r * n : (r + 1) * n].double())
        assert same(dist.full_state(model, opt, mesh), state)
        if (w0, ep0) in ((1, 1), (4, 2)):
            train_step(model, opt, mesh, 2, micro=1)
            after, want = dist.full_state(model, opt, mesh), torch.load(f"{folder}/after.pt")
            assert largest((after["model"][n], t) for n, t in want["model"].items()) < 1e-12
            assert same(dist.load(f"{folder}/{w0}_{ep0}.pt"), state)  # the step did not write into it


def test_reshard_every_ordered_pair_of_layouts(tmp_path):
    write_checkpoints(0, 1, tmp_path)
    model, opt = make(Mesh())
    for step in range(3):
        train_step(model, opt, Mesh(), step, micro=1)
    torch.save(dist.full_state(model, opt, Mesh()), tmp_path / "after.pt")
    for world in (2, 4):
        run_ranks(world, write_checkpoints, tmp_path)
    read_checkpoints(0, 1, tmp_path)
    for world in (2, 4):
        run_ranks(world, read_checkpoints, tmp_path)


def test_resume_is_bit_equal():
    (a, opt_a), (b, opt_b) = make(Mesh()), make(Mesh())
    for step in range(4):
        train_step(a, opt_a, Mesh(), step)
        if step == 1:
            dist.load_state(b, opt_b, dist.full_state(a, opt_a, Mesh()), Mesh())
        elif step > 1:
            train_step(b, opt_b, Mesh(), step)
    assert same(dist.full_state(a, opt_a, Mesh()), dist.full_state(b, opt_b, Mesh()))


def test_load_state_names_every_mismatch():
    model, opt = make(Mesh(), torch.float32)
    train_step(model, opt, Mesh(), 0, torch.float32)
    state = dist.full_state(model, opt, Mesh())
    before = dist.full_state(model, opt, Mesh())
    state["model"]["head.weight"] = torch.zeros(3, D)
    state["model"]["extra"] = state["model"].pop("idle")
    state["optimizer"]["extra"] = state["optimizer"].pop("rare")
    state["optimizer"]["inp.bias"]["exp_avg"] = torch.zeros(2)
    state["model"]["inp.bias"] = state["model"]["inp.bias"].int()
    del state["optimizer"]["inp.weight"]["exp_avg_sq"]
    with pytest.raises(ValueError) as error:
        dist.load_state(model, opt, state, Mesh())
    text = str(error.value)
    for part in (
        "idle is missing, here (3,)",
        "extra is (3,), here unknown",
        f"head.weight is (3, {D}), here ({V}, {D})",
        "optimizer state of rare is missing",
        f"exp_avg of extra is ({D},), here unknown",
        f"exp_avg of inp.bias is (2,), here ({D},)",
        "inp.bias real is False, here True",
        "exp_avg_sq of inp.weight is missing",
    ):
        assert part in text, text
    assert "\n" not in text and same(dist.full_state(model, opt, Mesh()), before)  # nothing was changed


def test_a_new_optimizer_and_frozen_parameters_round_trip():
    model, opt = make(Mesh(), torch.float32)
    fresh = dist.full_state(model, opt, Mesh())  # before the first step: no moments yet
    dist.load_state(model, opt, fresh, Mesh())
    model.head.weight.requires_grad = False
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train_step(model, opt, Mesh(), 0, torch.float32)
    state = dist.full_state(model, opt, Mesh())
    assert "head.weight" in state["model"] and "head.weight" not in state["optimizer"]
    dist.load_state(model, opt, state, Mesh())
    dist.load_state(model, None, dist.full_state(model, None, Mesh()), Mesh())
    assert same(dist.full_state(model, opt, Mesh()), state)


def test_a_state_is_a_copy():
    model, opt = trained()
    model.register_buffer("seen", torch.ones(3, dtype=torch.long))
    state, again = (dist.full_state(model, opt, Mesh()) for _ in range(2))
    for t in (*dist.named_tensors(model).values(), *(t for moments in opt.state.values() for t in moments.values())):
        t.detach().zero_()
    assert same(state, again) and state["model"]["seen"].all()


STATE = {"model": {"w": torch.arange(50_000.0)}, "optimizer": {}, "step": 1, "config": {"lr": 0.1, "name": "x"}}


class Dies:
    """A file that ends the process in the middle of the n-th write, and at named places in save."""

    def __init__(self, file, at):
        self.file, self.at, self.writes = file, at, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.writes += 1
        if self.writes == self.at:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            os._exit(9)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def die_in_save(path, point):
    die = lambda *_: os._exit(9)  # noqa: E731
    if point == "replace":
        os.replace = die
    elif point == "after replace":
        os.open = die
    elif point in ("fsync 1", "fsync 2"):
        calls, real = [], os.fsync
        os.fsync = lambda fd: (calls.append(fd), die() if len(calls) == int(point[-1]) else real(fd))
    else:
        dist.open = lambda *args: Dies(open(*args), point)
    dist.save(path, {**STATE, "step": 2})


@pytest.mark.parametrize("point", [*range(1, 11), "fsync 1", "replace", "after replace", "fsync 2"])
def test_killed_while_saving(tmp_path, point):
    """Wherever it dies, the newest intact checkpoint is whole: the old before the rename, then the new."""
    dist.save(tmp_path / "ckpt_1.pt", STATE)
    child = mp.get_context("fork").Process(target=die_in_save, args=(tmp_path / "ckpt_2.pt", point))
    child.start()
    child.join(20)
    assert child.exitcode == 9
    step = 2 if point in ("after replace", "fsync 2") else 1
    assert dist.find(tmp_path)[1]["step"] == step
    dist.save(tmp_path / "ckpt_2.pt", {**STATE, "step": 2})  # and the next save works
    assert sorted(os.listdir(tmp_path)) == ["ckpt_1.pt", "ckpt_2.pt"]


def test_save_failures_are_one_line_and_harmless(tmp_path):
    path = tmp_path / "ckpt_1.pt"
    dist.save(path, STATE)
    os.symlink("/dev/full", tmp_path / "saving.tmp")  # every write: no space left on device
    with pytest.raises(OSError, match="cannot save .*ckpt_1.pt: No space left on device.*untouched") as full:
        dist.save(path, {**STATE, "step": 2})
    assert "\n" not in str(full.value)
    with patch.object(os, "replace", side_effect=PermissionError(13, "Permission denied")):
        with pytest.raises(OSError, match="Permission denied"):
            dist.save(path, {**STATE, "step": 2})
    with pytest.raises(OSError, match="No such file"):
        dist.save(tmp_path / "missing" / "ckpt_1.pt", STATE)
    assert dist.load(path)["step"] == 1 and os.listdir(tmp_path) == ["ckpt_1.pt"]


def limited_save(path):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the disk is full half way
    try:
        dist.save(path, {**STATE, "step": 2})
    except OSError as error:
        os._exit(7 if "File too large" in str(error) and "\n" not in str(error) else 8)


def test_disk_full_half_way(tmp_path):
    dist.save(tmp_path / "ckpt_1.pt", STATE)
    child = mp.get_context("fork").Process(target=limited_save, args=(tmp_path / "ckpt_1.pt",))
    child.start()
    child.join(20)
    assert child.exitcode == 7 and dist.load(tmp_path / "ckpt_1.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["ckpt_1.pt"]


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "one bit", "zeroed page"])
def test_damage_is_found_and_an_older_one_used(tmp_path, kind, capsys):
    for step in (9, 10):  # 10 is newer than 9, not older
        dist.save(tmp_path / f"ckpt_{step}.pt", {**STATE, "step": step})
    dist.save(tmp_path / "ckpt_best.pt", STATE)  # not a numbered one: left alone
    path = tmp_path / "ckpt_10.pt"
    data = bytearray(path.read_bytes())
    if kind == "one bit":
        data[len(data) // 2] ^= 4
    elif kind == "zeroed page":
        data[40960:45056] = bytes(4096)
    path.write_bytes({"empty": b"", "garbage": b"x" * 5000, "truncated": data[:-100]}.get(kind, data))
    with pytest.raises(ValueError, match="ckpt_10.pt is damaged") as error:
        dist.load(path)
    assert "\n" not in str(error.value)
    assert dist.find(tmp_path)[0] == tmp_path / "ckpt_9.pt"
    assert "warning" in capsys.readouterr().out
    (tmp_path / "ckpt_9.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        dist.find(tmp_path)


def test_a_flipped_bit_is_never_silently_wrong(tmp_path):
    path = tmp_path / "ckpt_1.pt"
    state = {"w": torch.arange(40.0), "step": 1}
    dist.save(path, state)
    good, caught = path.read_bytes(), 0
    for i in range(0, len(good), 5):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        try:
            got = dist.load(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            caught += 1
        else:  # padding, dates
            assert torch.equal(got["w"], state["w"]) and got["step"] == 1, i
    assert caught > 40


def test_missing_latest_prune(tmp_path):
    with pytest.raises(OSError, match="cannot read .*nothing.pt: No such file"):
        dist.load(tmp_path / "nothing.pt")
    assert dist.find(tmp_path) is None and dist.find(tmp_path / "nowhere") is None
    for step in (8, 9, 10, 11):
        dist.save(tmp_path / f"ckpt_{step:02}.pt", STATE)
    dist.prune(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["ckpt_10.pt", "ckpt_11.pt"]


def test_prune_counts_intact_checkpoints_only(tmp_path, capsys):
    """Two damaged files of a higher number must not push out the good ones, least of all the one just written."""
    for step in (8, 10, 15):
        dist.save(tmp_path / f"ckpt_{step:02}.pt", STATE)
    for step in (25, 30):
        (tmp_path / f"ckpt_{step}.pt").write_bytes(b"no checkpoint")
    dist.prune(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["ckpt_10.pt", "ckpt_15.pt", "ckpt_25.pt", "ckpt_30.pt"]
    assert "ckpt_30.pt is damaged" in capsys.readouterr().out
    assert dist.find(tmp_path)[0].name == "ckpt_15.pt"


def foreign(kind):
    """States that torch.load reads without complaint and that are of no use."""
    moments = {"w": {"exp_avg": torch.zeros(50_000), "step": torch.tensor(1.0)}}
    good = STATE | {"step": 20, "optimizer": moments, "tensors": 3}
    return (
        good
        | {
            "a tensor": {},
            "no optimizer": {},
            "good": {},
            "no config": {"config": {}},
            "config of a wrong type": {"config": [1]},
            "step of a wrong type": {"step": "20"},
            "no weights": {"model": {}},
            "a weight of a wrong type": {"model": {"w": 3}},
            "a weight in whole numbers": {"model": {"w": STATE["model"]["w"].int()}},
            "moments in whole numbers": {"optimizer": {"w": moments["w"] | {"exp_avg": STATE["model"]["w"].int()}}},
            "a weight of eight bits": {
                "model": {"w": STATE["model"]["w"].to(torch.float8_e4m3fn)},
                "optimizer": {"w": {}},
            },
            "no domain": {"n_domains": 0},
            "a vocabulary of a wrong type": {"vocabulary": 3},
            "a teacher of a wrong type": {"teacher": 3},
            "a parameter missing": {"model": {"v": torch.zeros(3)}},
            "a tensor less": {"tensors": 4},
            "moments of another shape": {"optimizer": {"w": {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}},
            "moments of a wrong type": {"optimizer": {"w": 3}},
            "moments that are not finite": {"optimizer": {"w": moments["w"] | {"exp_avg": STATE["model"]["w"] / 0}}},
            "a negative step": {"step": -1},
        }[kind]
    )


UNUSABLE = [
    "a tensor",
    "no optimizer",
    "no config",
    "config of a wrong type",
    "step of a wrong type",
    "no weights",
    "a weight of a wrong type",
    "a weight in whole numbers",
    "moments in whole numbers",
    "a weight of eight bits",
    "no domain",
    "a teacher of a wrong type",
    "a vocabulary of a wrong type",
    "a parameter missing",
    "a tensor less",
    "moments of another shape",
    "moments of a wrong type",
    "moments that are not finite",
    "a negative step",
    "a folder",
]


def write_unusable(path, kind):
    if kind == "a folder":
        return path.mkdir()
    state = foreign(kind)
    if kind == "no optimizer":
        del state["optimizer"]
    torch.save(torch.zeros(3) if kind == "a tensor" else state, path)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_file_is_passed_over(tmp_path, kind, capsys):
    """Intact as a file, but not a checkpoint to go on from: the one before it is used, and is not pushed out by it."""
    dist.save(tmp_path / "ckpt_10.pt", STATE | {"step": 10})
    for step in (20, 30):
        write_unusable(tmp_path / f"ckpt_{step}.pt", kind)
    path, state = dist.newest(tmp_path, Mesh())
    assert path == tmp_path / "ckpt_10.pt" and state["step"] == 10
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 2 and all(line.startswith("warning: ") for line in warnings), warnings
    dist.prune(tmp_path, keep=1)
    assert (tmp_path / "ckpt_10.pt").exists()
    (tmp_path / "ckpt_10.pt").unlink()
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* is usable"):
        dist.newest(tmp_path, Mesh())


def test_the_same_file_without_the_fault_is_usable(tmp_path):
    torch.save(foreign("good"), tmp_path / "ckpt_20.pt")
    assert dist.newest(tmp_path, Mesh())[1]["step"] == 20
    with pytest.raises(ValueError, match="no checkpoint .* in .*nowhere"):
        dist.newest(tmp_path / "nowhere", Mesh())


def test_a_config_that_no_run_can_have_is_passed_over(tmp_path):
    for step in (10, 20):
        dist.save(tmp_path / f"ckpt_{step}.pt", STATE | {"step": step, "config": {"n_layer": step}})

    def check(config):
        if config["n_layer"] == 20:
            raise ValueError("20 layers")

    warned = []
    assert dist.find(tmp_path, warned.append, check)[1]["step"] == 10 and "ckpt_20.pt is not usable: 20" in warned[0]
    dist.prune(tmp_path, keep=1, check=check)
    assert sorted(os.listdir(tmp_path)) == ["ckpt_10.pt", "ckpt_20.pt"]
    (tmp_path / "ckpt_10.pt").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints in .* is usable: .*20 layers"):
        dist.newest(tmp_path, Mesh(), check)


def newest_on_ranks(rank, world, folder):
    mesh = make_mesh(rank, world, E)
    found = dist.newest(folder, mesh)
    with pytest.raises(ValueError, match="no checkpoint"):
        dist.newest(f"{folder}/nowhere", mesh)
    try:
        dist.newest(f"{folder}/bad", mesh)
    except ValueError as error:
        return str(found[0]), found[1]["step"], str(error)


def test_newest_is_the_same_on_every_rank(tmp_path):
    dist.save(tmp_path / "ckpt_10.pt", STATE | {"step": 10})
    (tmp_path / "ckpt_20.pt").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "ckpt_20.pt").write_bytes(b"x")
    a, b = run_ranks(2, newest_on_ranks, str(tmp_path))
    assert a == b and a[0].endswith("ckpt_10.pt") and a[1] == 10 and "none of the 1" in a[2]


def test_the_file_just_written_stays(tmp_path):
    """Also below files of higher numbers, as after a resume from an older one."""
    for step in (10, 20, 30):
        dist.save(tmp_path / f"ckpt_{step}.pt", STATE | {"step": step})
    dist.prune(tmp_path, keep=2, written=tmp_path / "ckpt_10.pt")
    assert sorted(os.listdir(tmp_path)) == ["ckpt_10.pt", "ckpt_20.pt", "ckpt_30.pt"]


# -- save_checkpoint ---------------------------------------------------------------------------------------


def trained(mesh=Mesh(), steps=1):
    model, opt = make(mesh, torch.float32)
    for step in range(steps):
        train_step(model, opt, mesh, step, torch.float32)
    return model, opt


def test_save_checkpoint_keeps_two_and_loads(tmp_path):
    model, opt = trained()
    for step in (1, 2, 3):
        dist.save_checkpoint(tmp_path, step, model, opt, Mesh(), config={"a": 1}, vocabulary="v")
    assert sorted(os.listdir(tmp_path)) == ["ckpt_000002.pt", "ckpt_000003.pt"]
    path, state = dist.newest(tmp_path, Mesh())
    assert (path.name, state["step"], state["vocabulary"]) == ("ckpt_000003.pt", 3, "v")
    assert state["launch"] == dist.launch() and state["tensors"] == dist.count(state)
    dist.load_state(model, opt, state, Mesh())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "exp_avg", "exp_avg_sq"])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, bad, where):
    model, opt = trained()
    spoil = model.head.weight.data if where == "weights" else opt.state[model.head.weight][where]
    keep = float(spoil[0, 0])
    spoil[0, 0] = bad
    what = "the weights are" if where == "weights" else "the optimizer's moments are"
    with pytest.raises(ValueError, match=f"^{what} not finite at step 8; there is no checkpoint yet; try a lower"):
        dist.save_checkpoint(tmp_path, 8, model, opt, Mesh(), config={"a": 1})
    assert os.listdir(tmp_path) == []
    spoil[0, 0] = keep
    dist.save_checkpoint(tmp_path, 6, model, opt, Mesh(), config={"a": 1})
    (tmp_path / "ckpt_000007.pt").write_bytes(b"damaged")
    spoil[0, 0] = bad
    with pytest.raises(ValueError, match=f"{what} not finite at step 8; the last good checkpoint is step 6 "):
        dist.save_checkpoint(tmp_path, 8, model, opt, Mesh(), config={"a": 1})


def test_moments_that_are_not_finite_are_not_saved(tmp_path):
    """Weights can still be finite when Adam's moments are not: such a checkpoint is no good one to resume from."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="moments are not finite at step 7; there is no checkpoint yet"):
        dist.save_checkpoint(tmp_path, 7, model, optimizer, dist.Mesh(), config={"a": 1})
    assert dist.find(tmp_path) is None
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = 1.0
    dist.save_checkpoint(tmp_path, 7, model, optimizer, dist.Mesh(), config={"a": 1})
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights are not finite at step 9; the last good checkpoint is step 7"):
        dist.save_checkpoint(tmp_path, 9, model, optimizer, dist.Mesh(), config={"a": 1})


def save_on_ranks(rank, world, folder):
    mesh, messages = make_mesh(rank, world, E), []
    model, opt = trained(mesh)
    for there in (folder, f"{folder}/missing"):
        try:
            dist.save_checkpoint(there, 1, model, opt, mesh, config={"a": 1})
        except ValueError as error:
            messages.append(str(error))
    if rank == 1:
        model.layers[1].experts.w1.data[0] = float("nan")
    with pytest.raises(ValueError) as error:
        dist.save_checkpoint(folder, 2, model, opt, mesh, config={"a": 1})
    return messages + [str(error.value)]


def test_an_error_in_saving_is_everybodys(tmp_path):
    """Also when only rank 0 cannot write, or one expert of rank 1 is not finite."""
    a, b = run_ranks(2, save_on_ranks, str(tmp_path))
    assert a == b and len(a) == 2 and "cannot save" in a[0] and os.listdir(tmp_path) == ["ckpt_000001.pt"]
    assert a[1].startswith("the weights are not finite at step 2; the last good checkpoint is step 1 ")


# -- restart, lock -----------------------------------------------------------------------------------------


def test_restarted_only_by_this_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not dist.restarted(tmp_path)  # no checkpoint yet
    dist.save(tmp_path / "ckpt_1.pt", STATE | {"launch": [1, "long ago"]})
    assert not dist.restarted(tmp_path)  # of a run before this launch
    dist.save(tmp_path / "ckpt_2.pt", STATE | {"launch": dist.launch()})
    assert dist.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not dist.restarted(tmp_path)  # the first start


def hold_lock(folder, ready):
    lock(folder)
    ready.set()
    signal.pause()


def test_one_run_per_folder(tmp_path):
    context = mp.get_context("fork")
    ready = context.Event()
    child = context.Process(target=hold_lock, args=(tmp_path / "run", ready))
    child.start()
    assert ready.wait(20)
    with pytest.raises(ValueError, match="another run is writing to .*run: choose another --out_dir"):
        lock(tmp_path / "run")
    child.kill()  # the lock goes with the process
    child.join(20)
    held = lock(tmp_path / "run")
    held.close()
    held.close()
    lock(tmp_path / "run").close()


def test_without_file_locks(tmp_path, capsys):
    with patch.object(data.files, "fcntl", None):
        lock(tmp_path).close()
    assert "would not notice each other" in capsys.readouterr().out
