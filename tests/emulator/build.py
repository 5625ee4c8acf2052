"""Build the CUDA kernels for the emulator: csrc/cuda, with launches and inline assembly rewritten."""

import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
REWRITES = [
    (r"([A-Za-z_]\w*(?:<[^<>;]*>)?)\s*<<<((?:.|\n)+?)>>>\(", r"emulator::Configuration(\2).launch(\1, "),
    (r"extern __shared__ uint8_t memory\[\];", "const uint32_t memory = emulator::dynamic_shared();"),
    (r'asm\("ex2\.approx\.ftz\.f32 %0, %1;" : "=f"\((\w+)\) : "f"\((.+?)\)\);', r"\1 = emulated_ex2(\2);"),
]


def rewritten(text: str) -> str:
    """CUDA C++ as a C++ compiler takes it."""
    for pattern, by in REWRITES:
        text = re.sub(pattern, by, text)
    return text


def build(folder: Path) -> Path:
    """Build the extension in an empty folder, half a minute on two cores. A compiler error is a CalledProcessError."""
    for path in CSRC.rglob("*"):
        if path.suffix in {".h", ".cu", ".cuh"} and "cpu" not in path.parts:
            to = folder / "csrc" / path.relative_to(CSRC)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(rewritten(path.read_text()))
    (folder / "csrc" / "cuda" / "hopper" / "ptx.cuh").write_text((HERE / "ptx.cuh").read_text())
    sources = [
        *sorted(folder.rglob("*.cu")),
        HERE / "emulator.cpp",
        HERE / "module.cpp",
        CSRC / "bindings.cpp",
        CSRC / "cpu" / "bf16_products.cpp",
    ]
    include = [HERE, folder / "csrc", Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O1", "-ftree-vectorize", "-mfma", "-mavx2", "-w", "-fPIC", "-fvisibility=hidden"]
    flags += ["-DPYUNLEARN_CUDA", "-DPYUNLEARN_HOPPER", '-DPYUNLEARN_CUDA_ARCHITECTURES="90"']
    flags += [f"-I{i}" for i in include]

    def compile(source: Path) -> Path:
        to = folder / f"{source.stem}_{source.suffix[1:]}.o"
        subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(to)], check=True, capture_output=True)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    module = folder / "_C.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(module)], check=True, capture_output=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
