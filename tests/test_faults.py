"""The campaign of injected faults, a few cases of each kind: `python tests/faults.py` runs them all."""

import re
import subprocess
import sys
from pathlib import Path


def test_every_injected_fault_is_survived_or_refused():
    campaign = [sys.executable, str(Path(__file__).with_name("faults.py")), "--quick"]
    done = subprocess.run(campaign, capture_output=True, text=True, timeout=600)
    parts = re.findall(r"^(\w+) +(\d+) of (\d+)  ", done.stdout, re.M)
    assert done.returncode == 0 and len(parts) >= 10, done.stdout + done.stderr
    assert all(held == total for _, held, total in parts), done.stdout


