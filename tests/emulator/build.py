"""Build the CUDA kernels for the emulator: csrc/cuda, with launches and inline assembly rewritten."""

import re
import shutil
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
FLAGS = ["-std=c++17", "-O1", "-ftree-vectorize", "-mfma", "-mavx2", "-w", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-DPYUNLEARN_CUDA", "-DPYUNLEARN_HOPPER", '-DPYUNLEARN_CUDA_ARCHITECTURES="90"']


def rewritten(text: str) -> str:
    """CUDA C++ as a C++ compiler takes it."""
    for pattern, by in REWRITES:
        text = re.sub(pattern, by, text)
    return text


def write_sources(folder: Path) -> None:
    """Write csrc, rewritten, into a folder."""
    for path in CSRC.rglob("*"):
        if path.suffix in {".h", ".cu", ".cuh"} and "cpu" not in path.parts:
            to = folder / "csrc" / path.relative_to(CSRC)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(rewritten(path.read_text()))
    (folder / "csrc" / "cuda" / "hopper" / "ptx.cuh").write_text((HERE / "ptx.cuh").read_text())


def compile_source(source: Path, folder: Path, more: tuple[str, ...] = (), to: Path | None = None) -> Path:
    """Compile one source against the rewritten csrc of a folder, into that folder or into the file `to`."""
    include = [HERE, folder / "csrc", Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    to = to or folder / f"{source.stem}_{source.suffix[1:]}.o"
    flags = [*FLAGS, *more, *(f"-I{i}" for i in include)]
    subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(to)], check=True, capture_output=True)
    return to


def link(objects: list[Path], to: Path) -> Path:
    """Link objects into an extension."""
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(to)], check=True, capture_output=True)
    return to


def build(folder: Path) -> Path:
    """Build the extension in an empty folder, half a minute on two cores. A compiler error is a CalledProcessError."""
    write_sources(folder)
    sources = [
        *sorted(folder.rglob("*.cu")),
        HERE / "emulator.cpp",
        HERE / "module.cpp",
        CSRC / "bindings.cpp",
        CSRC / "cpu" / "bf16_products.cpp",
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_source(source, folder), sources))
    return link(objects, folder / "_C.so")


def changed(built: Path, folder: Path, file: str, before: str, after: str, source: str) -> Path:
    """Build the extension again in an empty folder, with one change in a copy of csrc, of which one source is compiled.

    built: the folder of the extension as it is. Raises ValueError unless `before` occurs once in the file.
    """
    shutil.copytree(built / "csrc", folder / "csrc")
    path = folder / "csrc" / "cuda" / "hopper" / file
    text = path.read_text()
    if text.count(before) != 1:
        raise ValueError(f"{file} contains {before!r} {text.count(before)} times: change the test with the source")
    path.write_text(text.replace(before, after))
    mine = compile_source(folder / "csrc" / "cuda" / "hopper" / source, folder)
    others = [path for path in sorted(built.glob("*.o")) if path.name != mine.name]
    return link([*others, mine], folder / "_C.so")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
