"""A simulated device without float64, such as Apple's MPS: its tensors compute on the CPU and refuse what MPS refuses.

Refused are float64, operands on two devices, the resizing of storages, copies from the CPU that do not wait (MPS makes
them wrong: https://github.com/pytorch/pytorch/issues/189690), and operators without a kernel for MPS by torch's own
table, or that torch 2.6 had none for. The process crashes where a compiled kernel reads memory of the device, and where
a hook of a backward pass is refused something, since torch then unwinds through a guard written in Python.
"""

import functools
import importlib.resources
import re
import types
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAME = "simulated"
WIDE = (torch.float64, torch.complex128)
ACROSS = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")
FALLBACKS = {"embedding_renorm_", "linalg_svd", "linalg_svd.U", "col2im", "upsample_nearest3d.vec"}  # torch's own
OLD = {"index_copy", "index_copy_", "index_copy.out"}  # torch 2.6 and 2.7
FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "linspace", "eye.m")
COMPOSITE = torch._C.DispatchKey.CompositeExplicitAutograd


def supported():
    """Return whether this torch can have a device that is written in Python; 2.9 cannot."""
    return hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")


class OnDevice(Tensor):
    """A tensor on the simulated device; `data_` is its tensor on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data):
        if data.dtype in WIDE:
            raise TypeError(
                f"Cannot convert a MPS Tensor to {data.dtype} dtype as the MPS framework doesn't support it"
            )
        x = Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        x.data_ = data
        return x

    def __repr__(self, *, tensor_contents=None):
        return f"OnDevice({self.data_!r})"

    def tolist(self):
        """Return nested lists; torch refuses that for subclasses."""
        return self.data_.tolist()

    def data_ptr(self):
        """Return an address that is the tensor's own, and at which the CPU may not read."""
        return self.data_.data_ptr() + (1 << 60)

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = OnDevice(self.data_.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return copied

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return call(op, args, kwargs or {})


def call(op, args, kwargs):
    """Run an operator on the CPU tensors, and return its results on the device where they belong there."""
    if op.namespace != "aten":
        return op._op_dk(COMPOSITE, *args, **kwargs)  # ours: composed of operators that come back here
    require_implemented(op)
    require_blocking(op, args)
    flat, form = pytree.tree_flatten((args, kwargs))
    inside = {id(x.data_): x for x in flat if isinstance(x, OnDevice)}
    if inside and op.name() not in ACROSS:
        strangers = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.dim()]
        if strangers:
            raise RuntimeError(f"{op}: expected all tensors to be on the same device, found {NAME} and cpu")
    target = kwargs.get("device")
    on_device = torch.device(target).type == NAME if target is not None else None
    if on_device is None:
        on_device = isinstance(flat[0], OnDevice) if op.name() in ACROSS else bool(inside)
    plain = [x.data_ if isinstance(x, OnDevice) else x for x in flat]
    args, kwargs = pytree.tree_unflatten(plain, form)
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    result = op(*args, **kwargs)

    def wrap(x):
        if not isinstance(x, Tensor) or id(x) not in inside:
            return OnDevice(x) if isinstance(x, Tensor) else x
        own = inside[id(x)]
        assert own.shape == x.shape, f"{op} resizes its output, which the simulation cannot follow"
        return own

    return pytree.tree_map(wrap, result) if on_device else result


def require_blocking(op, args):
    """Raise RuntimeError for a copy from the CPU that does not wait: MPS would read memory that is free by then."""
    if op.name() == "aten::copy_" and args[2:] == (True,) and not isinstance(args[1], OnDevice):
        raise RuntimeError("a copy to MPS that does not wait reads memory that may be free")


@functools.cache
def table():
    """Return operator -> set of the keys that implement it, of torch's own table."""
    text = importlib.resources.files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    keys, delegates, name, inside = {}, {}, "", False
    for line in text.splitlines():
        if line.startswith("- func: "):
            name = line[8:].partition("(")[0]
            keys[name], inside = set(), False
        elif re.match(r"  \w", line):
            inside = line.startswith("  dispatch:")
            if line.startswith("  structured_delegate: "):
                delegates[name] = line.split()[1]
        elif inside and re.match(r"    \w", line):
            keys[name] |= {key.strip() for key in line.partition(":")[0].split(",")}
    return {name: keys[delegates.get(name, name)] for name in keys}


@functools.cache
def require_implemented(op):
    """Raise NotImplementedError where torch has no kernel of the operator for MPS."""
    name = op.name().removeprefix("aten::")
    keys = table()[name]
    served = not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys) or name in FALLBACKS
    if name in OLD or not served:
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device.")


class Hooks(torch._C._acc.PrivateUse1Hooks if supported() else object):  # type: ignore[misc]
    """What torch.accelerator asks."""

    present = False

    def is_available(self):
        return Hooks.present

    def has_primary_context(self, index):
        return Hooks.present

    def is_built(self):
        return True


NOISE = torch.zeros(1, dtype=torch.uint8)  # the state of the device's random generator
MODULE = types.SimpleNamespace(  # torch.simulated
    is_available=lambda: Hooks.present,
    is_initialized=lambda: True,
    device_count=lambda: int(Hooks.present),
    current_device=lambda: 0,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: NOISE.fill_(seed % 256),
    get_rng_state=lambda device=None: NOISE.clone(),
    set_rng_state=lambda state, device=None: NOISE.copy_(state),
)


@functools.cache
def register():
    """Make the device known to torch, once in a process; it is absent until `present`."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup

    setup(rename=NAME, backend_module=MODULE, hook=Hooks())
    library = torch.library.Library("aten", "IMPL")

    def maker(op):
        def make(*args, device=None, pin_memory=None, **kwargs):
            return OnDevice(op(*args, **kwargs, device="cpu"))

        return make

    def copy_from(source, target, non_blocking=False):
        plain = [x.data_ if isinstance(x, OnDevice) else x for x in (source, target)]
        plain[1].copy_(plain[0])
        return target

    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, maker(op), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")  # torch.tensor(..., device=) comes here
    return library


@contextmanager
def present(monkeypatch):
    """The machine has the device: torch.accelerator and accelerate choose it."""
    from accelerate.state import PartialState

    register()
    monkeypatch.setattr(Hooks, "present", True)
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: torch.device(NAME)))
    forget_the_choice()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay tied
    try:
        with torch.autograd.set_multithreading_enabled(False):  # the engine has no thread for the device
            yield torch.device(NAME, 0)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        forget_the_choice()


def forget_the_choice():
    """Make accelerate choose its device again."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
