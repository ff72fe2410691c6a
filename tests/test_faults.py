"""The campaign of injected faults, a few cases of each kind: `python tests/faults.py` runs them all."""

import re


def test_every_injected_fault_is_survived_or_refused(capsys):
    import faults  # here: it makes a folder for its corpora, which main removes

    failed, said = faults.main(["--quick"]), capsys.readouterr().out
    parts = re.findall(r"^(\w+) +(\d+) of (\d+)  ", said, re.M)
    assert failed == 0 and len(parts) >= 10, said
    assert all(held == total for _, held, total in parts), said
