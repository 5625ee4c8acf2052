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


STOPS = """
import os, signal, sys
from pyunlearn.cli import main as cli
from pyunlearn.unlearning.sharded import ShardedProcesses
calls, clip = [], ShardedProcesses.clip_gradients

def stops(self, parameters, max_norm):
    calls.append(1)
    if len(calls) == 5 and self.rank == 1:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return clip(self, parameters, max_norm)

ShardedProcesses.clip_gradients = stops
cli.main()
"""
"""Script that runs one command, whose second process gets a signal in the fifth step."""

COUNTS = """
import json, torch
from pyunlearn.cli import main as cli
from pyunlearn.models import sharding
from pyunlearn.unlearning.optimizer import TrainedWeights
accept, synchronize, empty = TrainedWeights.accept, sharding._synchronize, []

def synchronized(tensor, *args):
    empty.append(tensor.is_meta)
    synchronize(tensor, *args)

def counts(self):
    accept(self)
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t
    weights = sum(local(p.detach()).numel() for p in self.parameters.values())
    accepted = sum(t.numel() for t in self._accepted["weights"].values())
    moments = sum(v.numel() for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    with open(f"counts{torch.distributed.get_rank()}.json", "w") as file:
        json.dump({"numbers": [weights, accepted, moments], "empty": empty}, file)

TrainedWeights.accept, sharding._synchronize = counts, synchronized
try:
    cli.main()
except SystemExit as ended:
    assert ended.code in (0, 1), ended.code
"""
"""Script that runs one command and writes how many numbers each process holds: weights, accepted weights, moments.

And, of each tensor of the model, whether the process had no values of it before the model was sharded.
"""

BFLOAT16 = """
from pyunlearn.cli import main as cli
from pyunlearn.unlearning import sharded
sharded.computes_in_bfloat16 = lambda module: True
try:
    cli.main()
except SystemExit as ended:
    assert ended.code in (0, 1), ended.code
"""
"""Script that runs one command as on a GPU, where float32 weights compute in bfloat16."""


def launch(
    folder: Path,
    processes: int,
    *commands: str,
    script: str = SERIES,
    fails: bool = False,
    timeout: float = 480,
    config: Path | None = None,
    **environment: str,
) -> str:
    """Run a script with commands of pyunlearn in sharded processes; return its output, that on standard error last.

    `fails`: the launch is to end with an error, within `timeout` seconds. `config`: of accelerate, whose launcher then
    starts the processes.
    """
    (folder / "script.py").write_text(script)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "script.py"]
    if config:
        start = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        start += ["--num_processes", str(processes), "--main_process_port", "0", "script.py"]
    done = subprocess.run(
        [sys.executable, *start, *" , ".join(commands).split()],
        cwd=folder,
        env=os.environ | ({} if config else FSDP2) | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr
