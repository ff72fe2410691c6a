"""bench.py does what its head says, at sizes where the numbers mean nothing."""

import sys

import pytest

import bench


@pytest.mark.parametrize("part", ["layer", "step", "gates"])
def test_bench_prints_a_table_of_every_part(part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", part, "--quick", "--rounds=1", "--device=cpu"])
    bench.main()
    out = capsys.readouterr().out
    assert {"layer": "1.00x", "step": "switch of 32", "gates": "topk"}[part] in out and "nan" not in out
