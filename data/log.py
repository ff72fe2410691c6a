"""
What a run tells: log.jsonl, one JSON object a line; the line on the screen; the time it takes.
"""

import json
import os
import tempfile
import time
from contextlib import ExitStack, suppress

from data import files
from dist import checkpoints, load_usable
from experts import log_stats


def describe(run, done, batch, task, logged):
    """What the log says about a step, from what train_step gave. -> (dict for log.jsonl, line for the screen).
    Collective."""
    cfg, mesh, moes, gates = run.cfg, run.mesh, run.model.moes(), run.model.gates()
    stats, state = log_stats(moes, mesh), gates[0].report() if gates else {}
    values = {"loss": float(mesh.all_reduce(task))}
    for name, value in logged.items():  # per layer; the distillation terms are shares of ranks
        values[name] = float(mesh.all_reduce(value)) if name in ("mse", "kl") else float(value) / max(1, len(moes))
    targets = int((batch["y"] >= 0).sum()) / batch["x"].numel()
    flops = run.model.flops_per_token(stats.get("experts_per_token", 1), batch["x"].shape[1], targets)
    weights = run.model.loss_weights()
    parts = [f"step {done:5d}/{cfg.max_steps}", f"loss {values['loss']:.4f}"]
    parts += [f"{name} {values[name]:.3f}" for name in logged if weights.get(name) or name in ("mse", "kl")]
    parts += [" ".join(v if isinstance(v, str) else f"{k} {v:.2f}" for k, v in state.items())] if state else []
    if stats:
        parts += [f"experts/token {stats['experts_per_token']:.2f}", f"dropped {stats['dropped']:.1%}",
                  f"load {bars(stats['load'])} {stats['load_min']:.2f}-{stats['load_max']:.2f}"]  # fmt: skip
    if mesh.n_nodes > 1 and "tokens_far" in stats:
        sent = max(1, sum(stats[f"tokens_{where}"] for where in ("rank", "node", "far")))
        parts += [f"between nodes {stats['tokens_far'] / sent:.0%}"]
    parts += [f"{flops / 1e6:.2f} MFLOP/token"]
    return values | stats | state | {"flops_per_token": flops}, " | ".join(parts)


def bars(load):
    """A small picture of the experts' loads; the fair share is half height, a dot is (next to) nothing."""
    return "".join("·▁▂▃▄▅▆▇█"[min(8, round(4 * v))] for v in load)


class Clock:
    """The time of the loop since this start. tokens: trained on since the last reading; evaluations and checkpoints do
    not count in their time."""

    def __init__(self, first, last):
        self.began, self.tick, self.first, self.last, self.tokens = time.time(), time.time(), first, last, 0

    def seconds(self):
        return time.time() - self.began

    def read(self, done):
        """-> (dict for the log, text for the screen)."""
        speed = self.tokens / (time.time() - self.tick)
        left = self.seconds() / (done - self.first) * (self.last - done)
        self.start_lap()
        entry = {"tokens_per_s": speed, "seconds": self.seconds(), "cpu_seconds": time.process_time()}
        return entry, f"{speed / 1e3:.1f}k tok/s | {minutes(left)} left"

    def start_lap(self):
        self.tick, self.tokens = time.time(), 0


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Log:
    """folder/log.jsonl, written by rank 0: one JSON object a line. The folder is locked while it is open, and a run
    resumed at `step` (None: a fresh one) cuts off what its checkpoint does not know of. check: see dist.find.
    ValueError if the folder is another run's, OSError if it cannot be written to."""

    def __init__(self, folder, mesh, step, check=lambda config: None):
        self.folder, self.main, self.step, self.check = folder, mesh.main, step, check
        self.path = os.path.join(folder, "log.jsonl")
        self.lock = mesh.on_all(lambda: lock(folder) if mesh.main else None)
        self.identity = mesh.main and identity(folder)
        mesh.on_main(self.begin)

    def begin(self):
        lines, old = [], checkpoints(self.folder)
        for path in old:
            if self.step is not None and int(path.stem[5:]) > self.step and step_of(path, self.check) > self.step:
                raise ValueError(f"another run has just written {path}: start again to continue from there")
        if self.step is None and old:
            raise ValueError(
                f"{self.folder} holds checkpoints of an earlier run ({old[-1].name}): continue it "
                "with --init_from=resume, choose another --out_dir, or delete them"
            )
        try:
            if self.step is not None and os.path.exists(self.path):
                with open(self.path, errors="replace") as f:
                    lines = [line for line in f if self.known(line)]
            elif os.path.exists(self.path) and os.path.getsize(self.path):
                os.replace(self.path, self.path + ".old")  # of a run that ended before its first checkpoint
            with open(self.path + ".tmp", "w") as f:
                f.writelines(lines)
            os.replace(self.path + ".tmp", self.path)
        except OSError as e:
            raise OSError(f"cannot write {self.path} ({e.strerror}): move it away or name another --out_dir") from None

    def known(self, line):
        """Is it whole, not later than the checkpoint, and nothing that the end of the run writes again?"""
        try:
            entry = json.loads(line)
            return line.endswith("\n") and entry["step"] <= self.step and "final" not in entry
        except (ValueError, KeyError, TypeError, RecursionError):
            return False  # a crash or a full disk tore it

    def __call__(self, entry):
        if self.main:
            if identity(self.folder) != self.identity:
                raise OSError(
                    f"{self.folder} was moved or replaced while this run wrote to it: go on "
                    "with --init_from=resume and the --out_dir where it is now"
                )
            whole = None
            try:
                with open(self.path, "a") as f:
                    whole = f.tell()
                    f.write(json.dumps(entry) + "\n")
            except OSError as e:
                if whole is not None:  # a full disk took a part of the line
                    with suppress(OSError):
                        os.truncate(self.path, whole)
                raise OSError(
                    f"cannot write {self.path}: {e.strerror}. Mend it and start again, with "
                    "--init_from=resume if there is a checkpoint"
                ) from None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.lock:
            self.lock.close()


def identity(folder):
    """What stays when a folder is renamed, and changes when another takes its place; None if there is none."""
    try:
        status = os.stat(folder)
        return status.st_dev, status.st_ino
    except OSError:
        return None


def step_of(path, check):
    """The step of a checkpoint, -1 if it is not usable."""
    try:
        return load_usable(path, check)["step"]
    except (OSError, ValueError):
        return -1


def lock(folder):
    """Lock a run's folder (made if missing) until .close() of what is returned, or until the process ends, however it
    ends. ValueError if another run has it, OSError if it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to --out_dir={folder} ({error.strerror}): name another folder") from None
    file, mine = files.try_lock(folder)
    if mine is False:
        raise ValueError(f"another run is writing to {folder}: choose another --out_dir")
    if files.fcntl is None:
        print("note: this system has no file locks: two runs in one folder would not notice each other", flush=True)
    held = ExitStack()
    if mine:
        held.callback(os.close, file)
    return held
