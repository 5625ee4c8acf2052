"""Run a module whose CUDA kernels run on the emulator: python tests/emulator/run.py FOLDER MODULE ARGUMENTS.

The emulated extension is built in the folder if it is not there. As in the tests, tensors are on the CPU, and the
emulator's kernels run in place of the CPU's. MODULE `selftest`: the self-test of the Hopper kernels, on a smaller
shape.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def use_emulator(folder: Path) -> None:
    """Build the extension if it is missing, and make the ops call it."""
    sys.path.insert(0, str(HERE))
    from build import build
    from pyunlearn.ops import _backend
    from pyunlearn.ops.hopper import dispatch

    path = folder / "_C.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        build(folder)
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _backend._C = module
    dispatch.run_on = lambda device: True
    sys.path.remove(str(HERE))


if __name__ == "__main__":
    # in place of this script's folder, which has its own `build`: the repository's, where `benchmarks` is
    sys.path[0] = str(HERE.parent.parent)
    use_emulator(Path(sys.argv[1]))
    if sys.argv[2] == "selftest":
        import torch

        from pyunlearn.ops.hopper import selftest

        sys.exit(selftest.compare(torch.device("cpu"), ((140, 72, 515),)))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
