"""The CUDA sources compile for the oldest and the middle card, and Hopper's own for Hopper, without register spills, wherever there is a compiler."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")]

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
SOURCES = [(path.name, ("80", "90")) for path in sorted(CUDA.glob("*.cu")) if "<<<" in path.read_text()]
SOURCES += [
    (f"hopper/{path.name}", ("90a",)) for path in sorted((CUDA / "hopper").glob("*.cu")) if path.stem != "tensor_map"
]


@pytest.mark.parametrize(("source", "architectures"), SOURCES)
def test_no_kernel_spills(source, architectures, tmp_path):
    """ptxas reports no stack frame and no spilled byte for any kernel."""
    codes = ",".join(f"sm_{a}" for a in architectures)  # as the build does: one PTX, of the oldest card, for all
    generated = f"arch=compute_{architectures[0]},code=[{codes}]"
    command = ["nvcc", "-std=c++17", "-O3", "-I", str(CUDA.parent), "-Xptxas", "-v", "-gencode", generated, "-c"]
    done = subprocess.run([*command, str(CUDA / source), "-o", str(tmp_path / "x.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) >= 2 * len(architectures)
    assert set(frames) == {("0", "0", "0")}
