"""Build the CPU kernels, or the emulated CUDA kernels, with a sanitizer, as programs that call each of them."""

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CPU = HERE.parent.parent / "csrc" / "cpu"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512")
INSTRUCTIONS = {  # as CMakeLists.txt sets them
    "rows_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "rows_avx512": AVX512,
    "bf16_products_avx512bf16": (*AVX512, "-mavx512bf16"),
    "bf16_products_amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "bf16_gradient_amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
X86 = ("-DPYUNLEARN_X86", "-DPYUNLEARN_AVX512_BF16", "-DPYUNLEARN_AMX_BF16")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def works(compiler: list[str], flags: tuple[str, ...], folder: Path) -> bool:
    """Return whether a compiler makes a program with these flags."""
    (folder / "empty.cpp").write_text("int main() {}\n")
    try:
        _run([*compiler, *flags, str(folder / "empty.cpp"), "-o", str(folder / "empty")])
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def cpu_program(
    folder: Path,
    flags: tuple[str, ...],
    compiler: tuple[str, ...] = ("g++",),
    x86: bool = True,
    objects: Path | None = None,
) -> Path:
    """Build the program of cpu.cpp in a folder. A compiler error is a CalledProcessError.

    objects: the folder of a program with the same kernels, of which only cpu.cpp is compiled again.
    """
    common = ["-std=c++17", "-O1", "-g1", "-pthread", f"-I{CPU.parent}", *flags, *(X86 if x86 else ())]
    sources = [p for p in sorted(CPU.glob("*.cpp")) if x86 or not p.stem.endswith(("avx2", "avx512"))]

    def compile_source(source: Path) -> str:
        to = str(folder / f"{source.stem}.o")
        own = INSTRUCTIONS.get(source.stem, ()) if x86 else ()
        _run([*compiler, *common, *own, "-c", str(source), "-o", to])
        return to

    with ThreadPoolExecutor(2) as pool:
        if objects is None:
            kernels = list(pool.map(compile_source, sources))
        else:
            kernels = [str(objects / f"{source.stem}.o") for source in sources]
    _run([*compiler, *common, *kernels, compile_source(HERE / "cpu.cpp"), "-ldl", "-o", str(folder / "cpu")])
    return folder / "cpu"


def emulator_program(folder: Path, flags: tuple[str, ...]) -> Path:
    """Build the program of emulator.cpp in a folder: the kernels of csrc/cuda on the emulator."""
    emulator = HERE.parent / "emulator"
    sys.path.insert(0, str(emulator))
    try:
        emulated: Any = importlib.import_module("build")
    finally:
        sys.path.remove(str(emulator))
    emulated.write_sources(folder)
    sources = [*sorted(folder.rglob("*.cu")), emulator / "emulator.cpp", emulator / "module.cpp", HERE / "emulator.cpp"]
    objects = [folder / f"{at}.o" for at in range(len(sources))]  # two sources have the same name

    def compile_source(at: int) -> None:
        emulated.compile_source(sources[at], folder, ("-g1", *flags), objects[at])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_source, range(len(sources))))
    _run(["g++", *flags, *map(str, objects), "-o", str(folder / "emulated")])
    return folder / "emulated"
