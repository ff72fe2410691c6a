"""bench.py and claims.py do what their heads say, at sizes where the numbers mean nothing."""

import json
import sys
import xml.dom.minidom

import pytest

import bench
import claims


@pytest.mark.parametrize("part", ["layer", "step", "gates"])
def test_bench_prints_a_table_of_every_part(part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", part, "--quick", "--rounds=1", "--device=cpu"])
    bench.main()
    out = capsys.readouterr().out
    assert {"layer": "1.00x", "step": "moe of 32", "gates": "topk"}[part] in out and "nan" not in out


def test_the_picture_shows_three_curves_and_the_phases(tmp_path):
    log = [dict(step=1, loss=5.0, phase="diversify", tau=1.0)]
    log += [dict(step=1 + i, loss=5.0 - i, phase=p, tau=t, experts_per_token=k) for i, (p, t, k) in
            enumerate([("anneal", 2.0, 8.0), ("tighten", 0.3, 4.0), ("hard", 0.3, 1.0)], 1)]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    claims.picture(tmp_path / "log.jsonl", tmp_path / "phases.svg")
    svg = xml.dom.minidom.parse(str(tmp_path / "phases.svg"))
    said = [t.firstChild.data for t in svg.getElementsByTagName("text")]
    assert len(svg.getElementsByTagName("polyline")) == 3 and {
        "loss",
        "temperature",
        "experts per token",
        "hard",
    } <= set(said)
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(step=1, loss=5.0)) + "\n")
    with pytest.raises(SystemExit, match="not the log of a run with --gate=dts"):
        claims.picture(tmp_path / "log.jsonl", tmp_path / "phases.svg")


def test_the_table_pairs_seeds(tmp_path, capsys):
    """Means, sample deviations and paired differences by hand: (1, 3) and (2, 6) differ by 1 and 3."""
    run = lambda loss: dict(
        loss=loss, bleu=None, steps=10, seconds=1.0, rows=20.0, curve=[(1, 5.0, 0.0, 1.0), (10, loss, 1.0, 1.0)]
    )
    results = {"switch": {"steps": [run(1.0), run(3.0)]}, "hash": {"steps": [run(2.0), run(6.0)]}}
    claims.table("gpt", results)
    out = capsys.readouterr().out
    assert "| switch | 2.000 ± 1.414 | - | - | 100 | 2.00 |" in out
    assert "hash - switch, paired by seed: steps 2.000 ± 1.414" in out
    claims.curves("gpt", results, tmp_path / "curves.svg")
    assert len(xml.dom.minidom.parse(str(tmp_path / "curves.svg")).getElementsByTagName("polyline")) == 4
