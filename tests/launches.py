"""Launches of several processes that are joined on the CPUs, sharded (FSDP2) or not."""

import os
import subprocess
import sys
from pathlib import Path

SERIES = """
import sys
from pyunlearn.cli import main as cli
for arguments in " ".join(sys.argv[1:]).split(" , "):
    sys.argv[1:] = arguments.split()
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code in (0, 1), ended.code
"""
"""Script that runs one command after the other, so that the processes start once."""

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` exports with examples/fsdp2.yaml."""


def launch(folder: Path, processes: int, *commands: str, script: str = SERIES, **environment: str) -> str:
    """Run a script with commands of pyunlearn in sharded processes; return its standard output."""
    (folder / "script.py").write_text(script)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "script.py"]
    done = subprocess.run(
        [sys.executable, *start, *" , ".join(commands).split()],
        cwd=folder,
        env=os.environ | FSDP2 | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
