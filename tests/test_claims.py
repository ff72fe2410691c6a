"""claims.py and toys.py do what their heads say, at sizes where the numbers mean nothing."""

import dataclasses
import functools
import json
import re
import sys
import xml.dom.minidom
from pathlib import Path
from types import SimpleNamespace

import pytest

import claims
import evomoe
import router
import toys
import train
from data import files
from model import RoBERTa
from runs import run


@pytest.fixture
def options(tmp_path, monkeypatch):
    """What the command line gives, for runs of four steps in this process."""

    def in_process(argv, contestant, patch, ranks, threads):
        monkeypatch.setenv("CONTESTANT", contestant)
        with monkeypatch.context() as m:
            m.setattr(train, "evaluate", train.evaluate)  # put back what a patch changes
            m.setattr(train.evomoe, "importance", train.evomoe.importance)
            m.setattr(RoBERTa, "look_around", RoBERTa.look_around)
            if patch:
                getattr(claims, patch)(train)
            train.main(argv)

    monkeypatch.setattr(claims, "launch", in_process)
    few = functools.partial(evomoe.sample_losses, n=6)
    monkeypatch.setattr(evomoe, "sample_losses", few)
    monkeypatch.setattr(train.dist, "stop_on_signals", lambda: [])  # runs are in a thread, which may not ask
    flags = "--max_steps=4 --warmup=1 --eval_batches=1 --device=cpu --n_embd=16 --n_head=2 --grad_clip=1"
    return SimpleNamespace(
        out=str(tmp_path), quick=True, seeds=2, first=1, methods="", flags=flags, workers=1, threads=1
    )


SOME = {  # contestants that are enough to see a claim work
    "evomoe": "dense|switch|evomoe|evomoe, dense's time",
    "evomoe_roberta": "switch|evomoe",
    "evomoe_translation": "switch|evomoe",
    "heads": "switch|evomoe",
    "crossover": "dense|dense on 10 %|copies 100 %|switch 100 %|evomoe 10 %",
    "switch": "dense|E 2|E 32",
    "map": "switch E 32, 300 steps|switch after the spawn E 32, 300 steps",
    "pays": "dense|switch|switch, dense's time",
    "gates": "switch|hash",
    "parts": "dts from the start|evomoe",
    "capacity": "dropless|factor 1.25",
    "locmoeplus": "floor 1 .never fewer.|floor 0.25",
    "pretraining": "roberta|tuned, 200 labels|scratch, 200 labels",
}


@pytest.mark.parametrize("name", [name for name, claim in claims.CLAIMS.items() if claim.ranks == 1])
def test_quick_form(name, options, corpora, monkeypatch, capsys):
    """Runs, table with a deviation, verdict, CSV, picture; a second call runs nothing."""
    claim = claims.CLAIMS[name]
    kind = "translation" if "translation" in claim.common else "gpt"
    monkeypatch.setattr(files, "corpus_folder", lambda name: str(corpora["gpt"]))
    monkeypatch.setattr(files, "prepare_missing", lambda name: None)
    options.methods = SOME.get(name, "")
    options.flags += f" --dataset={corpora[kind]}" * (claim.setup is None)
    if claim.setup:  # each contestant names a corpus of its own
        first = {"roberta": claim.contestants["roberta"] + f" --dataset={corpora['gpt']}"}
        claim = dataclasses.replace(claim, contestants=claim.contestants | first)
    logs = claims.run_claim(name, claim, options)
    claims.tell(name, claim, logs, options.out)
    said = capsys.readouterr().out
    assert " ± " in said and "paired by seed" in said and claim.headline in said
    xml.dom.minidom.parse(f"{options.out}/{name}.svg")
    assert len(open(f"{options.out}/{name}.csv").readlines()) == 1 + 2 * len(logs)
    monkeypatch.setattr(claims, "launch", lambda *more: pytest.fail("a finished run ran again"))
    assert claims.run_claim(name, claim, options) == logs


def test_locmoe_sends_rows_between_its_nodes(options, corpora, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(claims, "launch", lambda argv, _, patch, ranks, threads: run(argv, options.out, world=ranks))
    options.methods, options.seeds, options.flags = "locmoe 1", 1, options.flags + f" --dataset={corpora['gpt']}"
    ((log,),) = claims.run_claim("locmoe", claims.CLAIMS["locmoe"], options).values()
    assert 0 < claims.between_nodes(log) < 1


def test_a_run_on_two_processes_is_torchruns(monkeypatch):
    started = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(claims.subprocess, "run", lambda argv, **more: started.append((argv, more["env"])) or done)
    claims.launch(["--k=2"], "a", "", 2, 3)
    (((python, *argv), env),) = started
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert python == sys.executable and argv == [*torchrun, f"{claims.ROOT}/train.py", "--k=2"]
    assert env["OMP_NUM_THREADS"] == "3" and env["CONTESTANT"] == "a"


def test_a_stopped_run_is_not_taken_for_a_whole_one(options, corpora, monkeypatch):
    """Ctrl-C reaches train.py too, which saves, says how to go on and exits with 0."""
    options.flags += f" --dataset={corpora['gpt']}"
    options.methods = "dropless"
    capacity = lambda: claims.run_claim("capacity", claims.CLAIMS["capacity"], options)["dropless"]
    with monkeypatch.context() as m:
        m.setattr(train.dist, "stop_on_signals", lambda: ["SIGINT"])
        with pytest.raises(SystemExit, match="was stopped at step 1; the same command begins it again"):
            capacity()
    assert [log[-1]["step"] for log in capacity()] == [4, 4]


def test_every_causal_gate_takes_part():
    assert ["dense", *(name for name in router.gates() if name != "expertchoice")] == [
        *claims.CLAIMS["gates"].contestants
    ]


def test_verdicts():
    claim = claims.Claim("", {}, says=("a", "b"), measures={"loss": None})
    tell = lambda a, b, **more: claims.verdict(dataclasses.replace(claim, **more), {"a": {"loss": a}, "b": {"loss": b}})
    assert tell([1.0, 1.1, 0.9], [2.0, 2.1, 2.0]).startswith(
        "reproduced: loss, a - b, paired by seed: -1.0333 ± 0.0333"
    )
    assert tell([1.0, 1.1, 0.9], [2.0, 2.1, 2.0], higher=True).startswith("the other way round")
    nothing = "no significant difference"
    assert tell([1.0, 3.0], [2.0, 2.0]).startswith(nothing) and tell([1.0], [2.0]).startswith(nothing)
    few = [0.0, -0.5, 0.8]  # 2.4 standard errors from 1: of three runs that says nothing, of nine it does
    assert tell(few, [1.0] * 3).startswith(nothing) and "95 %: -2.5280 to +0.7280" in tell(few, [1.0] * 3)
    assert tell(few * 3, [1.0] * 9).startswith("reproduced")
    assert "missing" in tell([1.0], [2.0], says=("a", "c"))


def test_the_toys(options, capsys):
    toys.unbiased(options)
    said = capsys.readouterr().out
    assert "skipping is unbiased, exactly" in said and "| skipping, weighted | none | 0.000 |" in said
    toys.comet(options)
    assert "comet+" in capsys.readouterr().out


def test_the_picture_shows_three_curves_and_the_phases(tmp_path):
    log = [dict(step=1, loss=5.0)]
    log += [
        dict(step=1 + i, loss=5.0 - i, phase=p, bar=t, experts_per_token=k)
        for i, (p, t, k) in enumerate([("dense", 2.0, 8.0), ("tighten", 0.3, 4.0), ("hard", 0.3, 1.0)], 1)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    claims.phases(tmp_path / "log.jsonl", tmp_path / "phases.svg")
    svg = xml.dom.minidom.parse(str(tmp_path / "phases.svg"))
    said = {t.firstChild.data for t in svg.getElementsByTagName("text")}
    assert len(svg.getElementsByTagName("polyline")) == 3
    assert {"loss", "bar", "experts per token", "diversify", "dense", "tighten", "hard"} <= said
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(step=1, loss=5.0)) + "\n")
    with pytest.raises(SystemExit, match="not the log of a run with --gate=dts"):
        claims.phases(tmp_path / "log.jsonl", tmp_path / "phases.svg")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lo')
    for name in ("log.jsonl", "nothing"):
        with pytest.raises(SystemExit, match=f"--log=.*{name} cannot be read"):
            claims.phases(tmp_path / name, tmp_path / "phases.svg")


@pytest.mark.parametrize(
    "argv, words",
    [
        ("nothing", "nothing is unknown; there are: evomoe"),
        (
            "pays --methods=dents",
            "--methods=dents names no contestant of pays; there are: dense; switch; hash; evomoe; ",
        ),
        ("pays --methods=dense;.*time", "pays's \"switch, dense's time\" needs 'switch': add it to --methods"),
        ("pays --methods=(", "--methods=( is no regular expression"),
        ("crossover --methods=copies.*", "crossover's 'copies 10 %' needs 'dense': add it to --methods"),
    ],
)
def test_what_cannot_run_is_one_line(argv, words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["claims.py", *argv.split(), f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match=re.escape(words)):
        claims.main()
    assert not any(tmp_path.iterdir())


def test_runs_of_other_flags_are_not_taken_for_ones_own(options, monkeypatch):
    one = dataclasses.replace(claims.CLAIMS["switch"], contestants={"dense": "--n_experts=1"})
    seed = lambda: claims.one_seed("switch", one, 1, options, {})
    log = seed()["dense"]
    monkeypatch.setattr(claims, "launch", lambda *args: pytest.fail("it is there already"))
    assert seed()["dense"] == log
    options.flags += " --learning_rate=1e-3"
    with pytest.raises(SystemExit, match="switch-dense-1 was made with other flags .*name another --out"):
        seed()
    (Path(options.out) / "switch-dense-1" / "done").unlink()
    with files.at_work(str(Path(options.out) / "switch-dense-1")):
        with pytest.raises(SystemExit, match="another run is writing to"):
            seed()
    assert claims.read_log(Path(options.out) / "switch-dense-1" / "log.jsonl") == log


def test_rows_are_counted_at_every_step_and_curves_have_one_in_ten():
    log = [dict(step=n, experts_per_token=8.0 if n == 7 else 1.0, loss=0.0) for n in range(1, 25)] + [dict(step=24)]
    assert claims.rows(log) == pytest.approx(1 + 7 / 24) and claims.steps(log) == 24
    assert [e["step"] for e in claims.training(log)] == [1, 10, 20]
