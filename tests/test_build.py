"""Compilation of the CUDA sources without register spills or serialised products, for sm_80, sm_90 and Hopper."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
SOURCES: list[tuple[str, tuple[str, ...]]] = [
    (path.name, ("80", "90")) for path in sorted(CUDA.glob("*.cu")) if "<<<" in path.read_text()
]
SOURCES += [
    (f"hopper/{path.name}", ("90a",)) for path in sorted((CUDA / "hopper").glob("*.cu")) if path.stem != "tensor_map"
]


def complaints(report: str) -> list[str]:
    """Return the costly lines of ptxas: spilled registers, arrays in memory, serialised asynchronous products."""
    frames = r"\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads"
    spills = [frame for frame in re.findall(frames, report) if re.search(r"[1-9]\d* bytes", frame)]
    return spills + re.findall(r".*(?:Performance Loss|serialized).*", report)


@pytest.mark.nvcc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
@pytest.mark.parametrize(("source", "architectures"), SOURCES)
def test_no_kernel_spills(source, architectures, tmp_path):
    """ptxas reports no stack frame, no spilled byte and no serialised product for any kernel."""
    codes = ",".join(f"sm_{a}" for a in architectures)  # as the build does: one PTX, of the oldest, for all
    generated = f"arch=compute_{architectures[0]},code=[{codes}]"
    command = ["nvcc", "-std=c++17", "-O3", "-I", str(CUDA.parent), "-Xptxas", "-v", "-gencode", generated, "-c"]
    done = subprocess.run([*command, str(CUDA / source), "-o", str(tmp_path / "x.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = 1 if source == "hopper/kept_backward.cu" else 2  # at least
    assert done.stderr.count("bytes stack frame") >= kernels * len(architectures)
    assert not complaints(done.stderr)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", 0),
        ("ptxas info    : Used 168 registers, used 4 barriers", 0),
        ("    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", 1),
        ("    0 bytes stack frame, 0 bytes spill stores, 104 bytes spill loads", 1),
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
            "non wgmma instructions "
            "defining accumulator registers of a wgmma between start and end of the pipeline stage",
            1,
        ),
    ],
)
def test_what_ptxas_complains_of(line, count):
    """A stack frame, a spill and serialised products are complaints, a clean kernel is none."""
    assert len(complaints(line)) == count
    assert (
        len(complaints(f"ptxas info    : Compiling entry function 'k' for 'sm_90a'\n{line}\nUsed 40 registers"))
        == count
    )
