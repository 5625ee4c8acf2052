"""The CUDA sources compile for the oldest and the middle card, and Hopper's own for Hopper, without register spills, wherever there is a compiler."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"


SOURCES = [
    (path.name, code) for path in sorted(CUDA.glob("*.cu")) if "<<<" in path.read_text() for code in ("80", "90")
]
SOURCES += [
    (f"hopper/{path.name}", "90a") for path in sorted((CUDA / "hopper").glob("*.cu")) if path.stem != "tensor_map"
]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
@pytest.mark.parametrize(("source", "architecture"), SOURCES)
def test_no_kernel_spills(source, architecture, tmp_path):
    """ptxas reports no stack frame and no spilled byte for any kernel."""
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", "-O3", "-I", str(CUDA.parent), "-Xptxas", "-v", "-gencode", code, "-c"]
    done = subprocess.run([*command, str(CUDA / source), "-o", str(tmp_path / "x.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) >= 2
    assert set(frames) == {("0", "0", "0")}
