"""The dispatch mode under which a step is traced: what each operation allocates, and when it is freed."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from ...records import GpuSpec
from ...workloads.meta_device import META
from ..replay.timeline import Formula, Recording
from ..rules.cuda_dispatch import HOST_READS
from ..rules.kernel_workspace import KernelRule
from ..rules.kernels import CUBLASLT_WORKSPACE_BYTES, OUTPUT_ORDER, is_matrix_product, rule_of
from .in_place import INTO_ZEROS, Linears, engine_adds_in_place, engine_use_counts
from .step_phases import Passes

aten = torch.ops.aten


WORKSPACE_IS_SHARED, WORKSPACE_IS_GIVEN_BACK = TorchVersion("2.12"), TorchVersion("2.15")
"""Releases of torch; 2.8, 2.11, 2.12, 2.14 and 2.15 were looked at on the virtual card."""


class Recorder(TorchDispatchMode):
    """Notes the birth and death of every ``meta`` storage, in order, with the operation that made it."""

    def __init__(self, device: GpuSpec, torch_version: str | None = None) -> None:
        """``torch_version``: the release whose workspaces are counted; None is the one that is installed."""
        super().__init__()
        release = TorchVersion(torch_version or torch.__version__)
        self._workspace_is_shared = release >= WORKSPACE_IS_SHARED  # looked up at every product: comparing takes long
        self._workspace_is_given_back = release >= WORKSPACE_IS_GIVEN_BACK
        self.recording = Recording()
        self.passes = Passes(self.recording)
        self._device = device
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._layouts: dict[Any, tuple[Any, ...] | None] = {}
        self._workspaces: set[tuple[str, bool]] = set()
        self._recording_is_over = False
        self._engine_counts = engine_use_counts()
        self.linears = Linears()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping dynamo out costs as much as the dispatch itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = _OPERATIONS.get(id(func)) or _operation(func)
        if operation.host_read is not None:
            answer = operation.host_read(func, args, kwargs)
            if answer is not NotImplemented:
                if isinstance(answer, torch.Tensor):
                    self.note(answer, operation.name)
                return answer
        if func is aten.add.Tensor and (self.linears.under_way or engine_adds_in_place(args, self._engine_counts)):
            return aten.add_.Tensor(*args)
        if operation.into_zeros is not None and self._fills_zeros(args):
            operation.into_zeros(*args, **kwargs)
            return args[0]
        if operation.rule is None or self._device.kind != "cuda" or not _on_device(args):
            return self._run(operation, args, kwargs)
        scratch = functools.partial(self._scratch, operation.name)
        return operation.rule(scratch, lambda: self._run(operation, args, kwargs), *args, **kwargs)

    def _fills_zeros(self, args: Any) -> bool:
        """Is this a gradient that is written into the zeros that were made for it just now?"""
        if torch._C._current_autograd_node() is None:
            return False
        known = self._alive.get(args[0].untyped_storage()._cdata)
        return known is not None and known[0] == len(self.recording.origins)

    def _run(self, operation: _Operation, args: Any, kwargs: Any) -> Any:
        self.passes.follow(args)
        output = self._shapes_of(operation, args, kwargs)
        if isinstance(output, torch.Tensor):
            self.note(output, operation.name)
        elif isinstance(output, (tuple, list)):
            order = operation.output_order
            for part in output if order is None else [output[i] for i in order]:
                if isinstance(part, torch.Tensor):
                    self.note(part, operation.name)
        if operation.is_matrix_product and self._device.kind == "cuda" and _on_device(args):
            self._note_workspaces(operation.func)
        return output

    def _shapes_of(self, operation: _Operation, args: Any, kwargs: Any) -> Any:
        """The operation; its output from memory where it was seen before with arguments of the same shapes.

        PyTorch's own shape functions take up to milliseconds an operation, and a model repeats the same few hundred
        calls once a layer. Only operations that make fresh tensors can be remembered.
        """
        func = operation.func
        if not operation.makes_fresh_tensors:
            return func(*args, **kwargs)
        try:
            key = operation.name, _signature(args), _signature(tuple(kwargs.items())) if kwargs else None
            known = self._layouts.get(key)
        except TypeError:
            return func(*args, **kwargs)
        if known:
            made = [None if layout is None else _empty(*layout) for layout in known[1:]]
            return made[0] if known[0] is torch.Tensor else known[0](made)
        output = func(*args, **kwargs)
        if key not in self._layouts:
            self._layouts[key] = _layouts(output, args)
        return output

    def note(self, tensor: torch.Tensor, origin: str, category: str = "activations") -> None:
        """A birth, if this storage is new."""
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity not in self._alive:
            block = self.recording.birth(storage.nbytes(), origin, category)
            self._alive[identity] = block, weakref.ref(storage, functools.partial(self._died, identity, block))

    def _died(self, identity: int, block: int, _: object) -> None:
        del self._alive[identity]
        if not self._recording_is_over:
            self.recording.death(block)

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """What the storage of this tensor is for, where it is alive."""
        known = self._alive.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None
        if known is not None:
            self.recording.categories[known[0] - 1] = category

    @contextlib.contextmanager
    def labels(self, model: nn.Module) -> Iterator[None]:
        """Within it, gradients and the optimizer's state are labelled as what they are."""

        def gradient(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.label(parameter.grad, "gradients")

        def state(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            host_contexts.pop().__exit__(None, None, None)
            for values in optimizer.state.values():
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        self.label(value, "optimizer")

        def host_for_counters(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            # an optimizer's own counters are made on the host, whatever the default device of the step is
            host_contexts.append(torch.device("cpu"))
            host_contexts[-1].__enter__()

        host_contexts: list[torch.device] = []
        hooks = [p.register_post_accumulate_grad_hook(gradient) for p in model.parameters() if p.requires_grad]
        hooks.append(register_optimizer_step_pre_hook(host_for_counters))
        hooks.append(register_optimizer_step_post_hook(state))
        try:
            yield
        finally:
            self._recording_is_over = True
            while host_contexts:  # the optimizer's step raised
                host_contexts.pop().__exit__(None, None, None)
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _scratch(self, origin: str, *sizes: int | Formula, freed_in_order: bool = False) -> Iterator[None]:
        blocks = [self.recording.birth(size, origin, "workspace") for size in sizes if size]
        try:
            yield
        finally:
            for block in blocks if freed_in_order else reversed(blocks):
                self.recording.death(block)

    def _note_workspaces(self, func: Any) -> None:
        """CuBLAS takes a workspace with the first product in each thread, and keeps it: the program's own thread and
        autograd's (CublasHandlePool.cpp). cuBLASLt, for a product with a bias, has one of its own up to torch 2.11 and
        shares that of cuBLAS afterwards (pytorch/pytorch#168175). Since torch 2.15 each product takes one and gives it
        back (#194311).
        """
        sizes: dict[str, int | Formula] = {"cublas": Formula(cublas_workspace_bytes, ())}
        if func is aten.addmm.default:
            if not self._workspace_is_shared:
                sizes["cublaslt"] = CUBLASLT_WORKSPACE_BYTES
            elif self._workspace_is_given_back:
                sizes = {"cublaslt": CUBLASLT_WORKSPACE_BYTES}
        in_backward = torch._C._current_autograd_node() is not None
        for library, size in sizes.items():
            if self._workspace_is_given_back:
                self.recording.death(self.recording.birth(size, library, "workspace"))
            elif (library, in_backward) not in self._workspaces:
                self._workspaces.add((library, in_backward))
                self.recording.birth(size, library, "workspace")


def cublas_workspace_bytes(device: GpuSpec) -> int:
    return device.cublas_workspace_bytes


def _on_device(args: Any) -> bool:
    """Is any argument on the traced device, rather than on the host?"""
    for value in args:
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                return True
        elif isinstance(value, (tuple, list)) and _on_device(value):
            return True
    return False


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=META)


@dataclass(frozen=True)
class _Operation:
    """All that is known of an operator, looked up once a call: hashing an OpOverload is a call of its own."""

    func: Any
    name: str
    host_read: Callable[..., Any] | None
    rule: KernelRule | None
    output_order: tuple[int, ...] | None
    is_matrix_product: bool
    into_zeros: Any
    makes_fresh_tensors: bool


_OPERATIONS: dict[int, _Operation] = {}


def _operation(func: Any) -> _Operation:
    schema = func._schema
    values = (*schema.returns, *schema.arguments)
    operation = _OPERATIONS[id(func)] = _Operation(
        func=func,
        name=str(func),
        host_read=HOST_READS.get(func),
        rule=rule_of(func),
        output_order=OUTPUT_ORDER.get(func),
        is_matrix_product=is_matrix_product(func),
        into_zeros=INTO_ZEROS.get(func),
        makes_fresh_tensors=bool(schema.returns) and all(value.alias_info is None for value in values),
    )
    return operation


def _signature(value: Any) -> Any:
    kind = type(value)
    if kind is torch.Tensor or kind is nn.Parameter:
        if not value.is_meta:
            raise TypeError("what a tensor on the host holds is not in its shape")
        return value.shape, value.stride(), value.dtype
    if kind is tuple or kind is list:
        return tuple([_signature(v) for v in value])
    return kind, value


def _layouts(output: Any, args: Any) -> tuple[Any, ...] | None:
    """How to make this output again, or None where it is not made of fresh meta tensors."""
    parts = [output] if isinstance(output, torch.Tensor) else output
    if not isinstance(parts, (list, tuple)):
        return None
    inputs = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
    layouts: list[Any] = []
    for part in parts:
        if part is None:
            layouts.append(None)
        elif type(part) is torch.Tensor and part.is_meta and part.untyped_storage()._cdata not in inputs:
            layouts.append((part.shape, part.stride(), part.dtype))
        else:
            return None
    return (torch.Tensor if isinstance(output, torch.Tensor) else type(output), *layouts)
