"""The shell scripts in benchmarks/studies, with a stand-in for Python: they call what exists, and stop at a failure."""

import os
import re
import subprocess

import pytest
from conftest import ROOT

STUDIES = re.findall(r"^([a-z-]+)\)", (ROOT / "benchmarks/studies/results.sh").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "script, part",
    [
        *[("results.sh", study) for study in STUDIES],
        *[("minatar.sh", part) for part in ("data", "tuning", "study", "weight", "long")],
        *[("choosing.sh", part) for part in ("verdicts", "calibration", "alphas", "fqe", "support", "remedies")],
    ],
)
def test_studies_call_programs_and_files_that_exist(script, part, tmp_path):
    """With a stand-in for Python, which notes its arguments and writes the metrics of a run."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
while [ $# -gt 0 ]; do [ "$1" = --run_id ] && mkdir -p "runs/$2" && touch "runs/$2/metrics.csv"; shift; done
"""
    )
    python.chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "benchmarks/results/diagnose/alphas").mkdir(parents=True)
    command = ["bash", ROOT / "benchmarks/studies" / script, part]
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    calls = (tmp_path / "calls").read_text()
    named = set(re.findall(r"(?:algorithms|benchmarks(?!/results)|configs)/\S+\.\w+", calls))
    assert named and {name for name in named if not (ROOT / name).exists()} == set()
    python.write_text("#!/bin/sh\nexit 7\n")
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 7
    command[-1] = "nothing"
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 2
