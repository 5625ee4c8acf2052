"""Build and register the backend `second`: two devices, second:0 and second:1, whose memory is the CPU's."""

from __future__ import annotations

import subprocess
import types
from pathlib import Path

import torch

NAME, DEVICES = "second", 2


def build(folder: Path) -> Path:
    """Compile the backend to a library in a folder, and return its path."""
    source, library = Path(__file__).with_name("second_device.cpp"), folder / "second_device.so"
    root = Path(torch.__file__).parent
    include = ["-isystem", str(root / "include")]
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = ["c++", "-shared", "-fPIC", "-std=c++20", abi, *include, str(source), "-o", str(library), *link]
    subprocess.run(command, check=True, capture_output=True)
    return library


def register(library: Path) -> None:
    """Load the library into this process, in which torch then has the two devices; it cannot be undone."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": torch.accelerator.current_device_index,
        "set_device": torch.accelerator.set_device_index,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
        "_is_in_bad_fork": lambda: False,
        # random numbers are those of the CPU's generator, to which the operators fall back
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    vars(module).update(functions)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
