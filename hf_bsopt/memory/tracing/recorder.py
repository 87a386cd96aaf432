"""The dispatch mode that traces a step: what each operation allocates, and when it is freed."""

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

from ..._utils.known_values import KnownValues
from ...records import GpuSpec
from ...workloads.meta_device import META
from ..replay.recording import Formula, Recording
from ..rules.host_reads import HOST_READS
from ..rules.kernel_workspace import KernelRule
from ..rules.kernels import CUBLASLT_WORKSPACE_BYTES, OUTPUT_ORDER, is_matrix_product, rule_of
from .host_weights import check_on_device
from .in_place import IN_PLACE_VARIANT, LinearCalls, is_in_place_gradient_sum, sole_owner_use_counts
from .step_phases import PhaseTracker

aten = torch.ops.aten

WORKSPACE_IS_SHARED, WORKSPACE_IS_RETURNED = TorchVersion("2.12"), TorchVersion("2.15")
"""The torch releases that changed cuBLAS workspaces; 2.8, 2.11, 2.12, 2.14 and 2.15 were checked on the virtual GPU."""


class Recorder(TorchDispatchMode):
    """Records the allocation and free of every ``meta`` storage, in order, with the operation that allocated it."""

    def __init__(self, device: GpuSpec, torch_version: str | None = None) -> None:
        """Start an empty recording. ``torch_version`` is the release whose workspaces are counted (None: the installed
        one).
        """
        super().__init__()
        release = TorchVersion(torch_version or torch.__version__)
        # cached: comparing versions at every product is slow
        self._workspace_is_shared = release >= WORKSPACE_IS_SHARED
        self._workspace_is_returned = release >= WORKSPACE_IS_RETURNED
        self.recording = Recording()
        self.phase_tracker = PhaseTracker(self.recording)
        self._device = device
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._layouts: dict[Any, tuple[Any, ...] | None] = {}
        self._workspaces: set[tuple[str, bool]] = set()
        self._is_finished = False
        self._sole_owner_counts = sole_owner_use_counts()
        self.linear_calls = LinearCalls()
        self.values = KnownValues(META.type)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and skipping dynamo costs as much as the dispatch itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = _OPERATIONS.get(id(func)) or _operation(func)
        if operation.host_read is not None:
            answer = operation.host_read(self.values, func, args, kwargs)
            if answer is not NotImplemented:
                self._record_outputs(operation, answer)
                self.values.observe(func, args, kwargs, answer)
                return answer
        if operation.takes_masks:
            args = self._with_positions(args)
        elif func is aten.masked_select.default and args[1] in self.values:
            tensor, mask = torch.broadcast_tensors(*args)
            return self.__torch_dispatch__(aten.index.Tensor, (), (tensor, [mask]))  # as CUDA's kernel does
        if func is aten.add.Tensor and (
            self.linear_calls.active or is_in_place_gradient_sum(args, self._sole_owner_counts)
        ):
            return aten.add_.Tensor(*args)
        if operation.in_place_variant is not None and self._fills_fresh_zeros(args):
            operation.in_place_variant(*args, **kwargs)
            return args[0]
        if operation.rule is None or self._device.kind != "cuda" or not _on_device(args):
            return self._run(operation, args, kwargs)
        workspace = functools.partial(self._hold_workspace, operation.name)
        output = operation.rule(workspace, lambda: self._run(operation, args, kwargs), *args, **kwargs)
        if isinstance(output, torch.Tensor):
            self.record(output, operation.name)  # it may have another storage than what was run
        return output

    def _fills_fresh_zeros(self, args: Any) -> bool:
        """Return whether a backward pass writes a gradient into the zeros that were just allocated for it."""
        if torch._C._current_autograd_node() is None:
            return False
        known = self._alive.get(args[0].untyped_storage()._cdata)
        return known is not None and known[0] == len(self.recording.origins)

    def _run(self, operation: _Operation, args: Any, kwargs: Any) -> Any:
        self.phase_tracker.observe(args)
        check_on_device(operation.name, args)
        output = self._shapes_of(operation, args, kwargs)
        self._record_outputs(operation, output)
        self.values.observe(operation.func, args, kwargs, output)
        if operation.is_matrix_product and self._device.kind == "cuda" and _on_device(args):
            self._record_workspaces(operation.func)
        return output

    def _record_outputs(self, operation: _Operation, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.record(output, operation.name)
        elif isinstance(output, (tuple, list)):
            order = operation.output_order
            for part in output if order is None else [output[i] for i in order]:
                if isinstance(part, torch.Tensor):
                    self.record(part, operation.name)

    def _with_positions(self, args: Any) -> Any:
        """Replace known masks by the positions of their elements, as CUDA's kernels do (expandTensors)."""
        tensor, indices, *others = args
        positions: list[torch.Tensor | None] = []
        for index in indices:
            mask = index if index is not None and index.dtype in (torch.bool, torch.uint8) else None
            if mask is None or mask not in self.values:
                positions.append(index)
            else:
                positions += self.__torch_dispatch__(aten.nonzero.default, (), (mask,)).unbind(1)
        return tensor, positions, *others

    def _shapes_of(self, operation: _Operation, args: Any, kwargs: Any) -> Any:
        """Run the operation, or build its output from a cached layout if it ran before with arguments of these shapes.

        PyTorch's own shape functions take up to milliseconds per operation, and a model repeats the same few hundred
        calls in each layer. Only operations that return new tensors can be cached.
        """
        func = operation.func
        if not operation.returns_new_tensors:
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
            self._layouts[key] = _output_layouts(output, args)
        return output

    def record(self, tensor: torch.Tensor, origin: str, category: str = "activations") -> None:
        """Record an allocation if the tensor's storage is new."""
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity not in self._alive:
            block = self.recording.allocate(storage.nbytes(), origin, category)
            on_freed = functools.partial(self._on_storage_freed, identity, block)
            self._alive[identity] = block, weakref.ref(storage, on_freed)

    def _on_storage_freed(self, identity: int, block: int, _: object) -> None:
        del self._alive[identity]
        if not self._is_finished:
            self.recording.free(block)

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """Set the category of this tensor's storage, if it was recorded."""
        known = self._alive.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None
        if known is not None:
            self.recording.categories[known[0] - 1] = category

    @contextlib.contextmanager
    def labels(self, model: nn.Module) -> Iterator[None]:
        """Label gradients and optimizer state while the context is open; then stop recording frees."""

        def label_gradient(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.label(parameter.grad, "gradients")

        def label_state(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            host_contexts.pop().__exit__(None, None, None)
            for values in optimizer.state.values():
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        self.label(value, "optimizer")

        def use_host_for_counters(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            # optimizers create their step counters on the host, whatever the default device
            host_contexts.append(torch.device("cpu"))
            host_contexts[-1].__enter__()

        host_contexts: list[torch.device] = []
        hooks = [p.register_post_accumulate_grad_hook(label_gradient) for p in model.parameters() if p.requires_grad]
        hooks.append(register_optimizer_step_pre_hook(use_host_for_counters))
        hooks.append(register_optimizer_step_post_hook(label_state))
        try:
            yield
        finally:
            self._is_finished = True
            while host_contexts:  # the optimizer's step raised
                host_contexts.pop().__exit__(None, None, None)
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _hold_workspace(self, origin: str, *sizes: int | Formula, freed_in_order: bool = False) -> Iterator[None]:
        blocks = [self.recording.allocate(size, origin, "workspace") for size in sizes if size]
        try:
            yield
        finally:
            for block in blocks if freed_in_order else reversed(blocks):
                self.recording.free(block)

    def _record_workspaces(self, func: Any) -> None:
        """Record the workspaces of a matrix product.

        cuBLAS allocates one at the first product in each thread and keeps it: the main thread and autograd's
        (CublasHandlePool.cpp). cuBLASLt, for a product with a bias, has its own up to torch 2.11 and shares that of
        cuBLAS since (pytorch/pytorch#168175). Since torch 2.15 each product allocates and frees one (#194311).
        """
        sizes: dict[str, int | Formula] = {"cublas": Formula(cublas_workspace_bytes, ())}
        if func is aten.addmm.default:
            if not self._workspace_is_shared:
                sizes["cublaslt"] = CUBLASLT_WORKSPACE_BYTES
            elif self._workspace_is_returned:
                sizes = {"cublaslt": CUBLASLT_WORKSPACE_BYTES}
        in_backward = torch._C._current_autograd_node() is not None
        for library, size in sizes.items():
            if self._workspace_is_returned:
                self.recording.free(self.recording.allocate(size, library, "workspace"))
            elif (library, in_backward) not in self._workspaces:
                self._workspaces.add((library, in_backward))
                self.recording.allocate(size, library, "workspace")


def cublas_workspace_bytes(device: GpuSpec) -> int:
    """Return the size of cuBLAS's workspace on ``device``."""
    return device.cublas_workspace_bytes


def _on_device(args: Any) -> bool:
    """Return whether any argument is on the traced device rather than on the host."""
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
    """Everything known about an operator, in one lookup per call: hashing an OpOverload is slow."""

    func: Any
    name: str
    host_read: Callable[..., Any] | None
    rule: KernelRule | None
    output_order: tuple[int, ...] | None
    is_matrix_product: bool
    in_place_variant: Any
    returns_new_tensors: bool
    takes_masks: bool


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
        in_place_variant=IN_PLACE_VARIANT.get(func),
        returns_new_tensors=bool(schema.returns) and all(value.alias_info is None for value in values),
        takes_masks=func is aten.index.Tensor,
    )
    return operation


def _signature(value: Any) -> Any:
    value_type = type(value)
    if value_type is torch.Tensor or value_type is nn.Parameter:
        if not value.is_meta:
            raise TypeError("the output may depend on the values of a host tensor")
        return value.shape, value.stride(), value.dtype
    if value_type is tuple or value_type is list:
        return tuple([_signature(v) for v in value])
    return value_type, value


def _output_layouts(output: Any, args: Any) -> tuple[Any, ...] | None:
    """Return the layouts to rebuild this output from, or None if it is not made of new meta tensors."""
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
