"""The CPU kernels and the emulated CUDA kernels under compilers' sanitizers, and the portable ones on another CPU."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZE = Path(__file__).parent / "sanitize"
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREAD = ("-fsanitize=thread",)
VARIANTS = ["portable", "avx2", "avx512", ""]  # "": with AMX where it is

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux",
        reason="the sanitizers' programs are built for x86-64 and Linux",
    ),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def build():
    """The module tests/sanitize/build.py."""
    spec = importlib.util.spec_from_file_location("sanitize_build", SANITIZE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need(build, folder, *flags, compiler=("g++",)):
    """Skip the test where the compiler lacks the flags."""
    if not build.works([*compiler], flags, folder):
        pytest.skip(f"{compiler[0]} is not here, or lacks {' '.join(flags)}")


def run(command, **environment):
    """Run a program; (exit code, standard output, standard error)."""
    settings = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=settings | environment)
    if "unexpected memory mapping" in done.stderr:  # an older TSan, and addresses that are too random for it
        if shutil.which("setarch") is None or command[0] == "setarch":
            pytest.skip("ThreadSanitizer cannot map its memory here")
        return run(["setarch", "-R", *command], **environment)
    return done.returncode, done.stdout, done.stderr


def supported(build, folder):
    """Skip the test where the compiler lacks the instruction sets."""
    for flags in set(build.INSTRUCTIONS.values()):
        need(build, folder, *flags)


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD], ids=["address and undefined", "thread"])
def test_cpu_kernels(sanitizer, build, tmp_path):
    """Every CPU kernel of each instruction set runs clean, and a broken program is reported."""
    need(build, tmp_path, *sanitizer)
    supported(build, tmp_path)
    program = build.cpu_program(tmp_path, sanitizer)
    lines = set()
    for variant in VARIANTS:
        code, shown, error = run([program], PYUNLEARN_CPU=variant)
        assert code == 0, error
        lines.add(shown)
    assert any(line.startswith("portable, none: ") for line in lines)
    assert all(int(line.split(": ")[1].split()[0]) >= 1280 for line in lines)
    (tmp_path / "broken").mkdir()
    broken = build.cpu_program(tmp_path / "broken", (*sanitizer, "-DBROKEN"), objects=tmp_path)
    code, _, error = run([broken])
    assert code != 0
    assert ("AddressSanitizer: heap-buffer-overflow" if sanitizer == ADDRESS else "data race") in error


def test_emulated_cuda_kernels(build, tmp_path):
    """Every CUDA kernel runs clean on the emulator under AddressSanitizer and UndefinedBehaviorSanitizer."""
    need(build, tmp_path, *ADDRESS, "-mavx2", "-mfma")
    code, shown, error = run([build.emulator_program(tmp_path, ADDRESS)])
    assert code == 0, error
    assert shown == "42 calls\n"


def test_portable_kernels_on_aarch64(build, tmp_path):
    """The portable kernels, which ARM runs, give right sums on an emulated ARM processor."""
    compiler = ("aarch64-linux-gnu-g++",)
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not here (Debian: qemu-user)")
    need(build, tmp_path, "-static", compiler=compiler)
    program = build.cpu_program(tmp_path, ("-static",), compiler, x86=False)
    code, shown, error = run([emulator, program])
    assert code == 0, error
    assert shown == "portable, none: 1280 calls\n"
