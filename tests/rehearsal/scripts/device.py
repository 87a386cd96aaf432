"""Print what PyTorch finds on the virtual device, as JSON. Run in its environment, not as a rehearsal."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

MIB = 1 << 20
PAGE = 20
"""MiB by which an expandable segment grows."""


def error(call: Callable[[], Any]) -> list[str]:
    """Return the type and the first line of the error that the call raises, or an empty list."""
    try:
        call()
    except Exception as raised:
        return [type(raised).__name__, str(raised).splitlines()[0]]
    return []


def in_mib(size: int) -> torch.Tensor:
    return torch.empty(size * MIB, dtype=torch.uint8, device="cuda")


def properties() -> dict[str, Any]:
    of_torch = torch.cuda.get_device_properties(0)
    return {
        "is_available": torch.cuda.is_available(),
        "count": torch.cuda.device_count(),
        "name": of_torch.name,
        "total": of_torch.total_memory,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": of_torch.multi_processor_count,
        "threads": of_torch.max_threads_per_multi_processor,
        "shared": getattr(of_torch, "shared_memory_per_block_optin", None),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "free_and_total": list(torch.cuda.mem_get_info()),
        "second_gpu": error(lambda: torch.zeros(1, device="cuda:1")),
    }


def memory() -> dict[str, Any]:
    free, _ = torch.cuda.mem_get_info()
    all_of_it = free // MIB // PAGE * PAGE
    whole = in_mib(all_of_it)
    facts: dict[str, Any] = {
        "whole_device": all_of_it * MIB,
        "left": torch.cuda.mem_get_info()[0],
        "one_page_more": error(lambda: in_mib(PAGE)),
    }
    del whole
    torch.cuda.empty_cache()
    facts["freed"] = torch.cuda.mem_get_info()[0] == free
    facts["too_much"] = error(lambda: in_mib(all_of_it + PAGE))
    facts["usable_after_oom"] = in_mib(64).numel() == 64 * MIB
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5)
    total = torch.cuda.get_device_properties(0).total_memory
    facts["under_the_fraction"] = error(lambda: in_mib(int(0.49 * total) // MIB))
    torch.cuda.empty_cache()
    facts["over_the_fraction"] = error(lambda: in_mib(int(0.51 * total) // MIB))
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    return facts


def segments() -> dict[str, Any]:
    torch.cuda.memory._record_memory_history(max_entries=1000)
    tensors = [in_mib(30), in_mib(30)]
    del tensors[0]
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    facts = {
        "expandable": [segment["is_expandable"] for segment in snapshot["segments"]],
        "bytes": [segment["total_size"] for segment in snapshot["segments"]],
        "events": [[event["action"], event["size"]] for event in snapshot["device_traces"][0]],
    }
    del tensors
    torch.cuda.empty_cache()
    facts["reserved_after"] = torch.cuda.memory_reserved()
    return facts


def values() -> dict[str, Any]:
    there = torch.arange(1, 5).cuda()
    pinned = torch.full((4,), 5).pin_memory()
    return {
        "back": there.tolist(),
        "item": there.sum().item(),
        "found": there.nonzero().shape[0],
        "on_the_host": torch.arange(1, 5).tolist(),
        "pinned": [pinned.is_pinned(), torch.empty(4, pin_memory=True).is_pinned(), torch.empty(4).is_pinned()],
        "pinned_values": pinned.tolist(),
        "pinned_on_the_device": pinned.to("cuda", non_blocking=True).device.type,
    }


def order() -> dict[str, Any]:
    stream, first, last = (
        torch.cuda.Stream(),
        torch.cuda.Event(enable_timing=True),
        torch.cuda.Event(enable_timing=True),
    )
    first.record()
    with torch.cuda.stream(stream):
        x = torch.zeros(4, device="cuda") + 1
        last.record()
    torch.cuda.current_stream().wait_stream(stream)
    x.record_stream(torch.cuda.current_stream())
    last.synchronize()
    torch.cuda.synchronize()
    different = stream.cuda_stream != torch.cuda.current_stream().cuda_stream
    return {"query": [stream.query(), first.query()], "elapsed": first.elapsed_time(last), "different": different}


def kernels() -> dict[str, Any]:
    convolution = nn.Conv2d(3, 8, 3).cuda()
    image = convolution(torch.zeros(2, 3, 16, 16, device="cuda"))
    image.sum().backward()
    lstm = nn.LSTM(8, 16, batch_first=True).cuda()
    hidden, _ = lstm(torch.zeros(2, 5, 8, device="cuda"))
    hidden.sum().backward()
    query = torch.zeros(1, 2, 64, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    mask = torch.zeros(1, 1, 64, 64, device="cuda", dtype=torch.float16)
    assert convolution.weight.grad is not None
    return {
        "cudnn": [torch.backends.cudnn.enabled, torch.backends.cuda.cudnn_sdp_enabled()],
        "convolution": [list(image.shape), list(convolution.weight.grad.shape)],
        "lstm": list(hidden.shape),
        "attention": node(scaled_dot_product_attention(query, query, query)),
        "attention_with_mask": node(scaled_dot_product_attention(query, query, query, attn_mask=mask)),
        "compiled_at_run_time": list(torch.special.bessel_j0(torch.zeros(3, device="cuda")).shape),
    }


def node(tensor: torch.Tensor) -> str:
    return str(tensor.grad_fn and tensor.grad_fn.name())


def workspace() -> int:
    """Return the workspace bytes of a matrix product: kept afterwards or, since torch 2.15, only while it runs."""
    a = torch.zeros(16, 16, device="cuda")
    out = torch.empty(16, 16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.mm(a, a, out=out)
    return torch.cuda.max_memory_allocated() - before


def scaler() -> dict[str, Any]:
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gradients = torch.amp.GradScaler("cuda")
    steps: list[None] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(None))
    for _ in range(3):
        with torch.autocast("cuda", torch.float16):
            loss = model(torch.zeros(8, 64, device="cuda")).sum()
        gradients.scale(loss).backward()
        gradients.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        gradients.step(optimizer)
        gradients.update()
        optimizer.zero_grad()
    return {"steps": len(steps), "states": len(optimizer.state)}


def capture() -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


def not_implemented() -> dict[str, list[str]]:
    eye = torch.zeros(4, 4, device="cuda")
    return {
        "eigh": error(lambda: torch.linalg.eigh(eye)),
        "fft": error(lambda: torch.fft.fft(eye)),
        "sparse": error(lambda: eye.to_sparse_csr() @ eye),
        "graph": error(capture),
        "after_refusals": error(lambda: eye + 1),
    }


def eight_and_four_bits() -> dict[str, Any] | None:
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    model = nn.Linear(128, 128).cuda()
    optimizer = bnb.optim.AdamW8bit(model.parameters())
    model(torch.zeros(4, 128, device="cuda")).sum().backward()
    optimizer.step()
    four = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float16).cuda()
    x = torch.zeros(4, 128, device="cuda", dtype=torch.float16, requires_grad=True)
    y = four(x)
    y.sum().backward()
    assert x.grad is not None
    return {
        "state": str(optimizer.state[model.weight]["state1"].dtype),
        "weight": [str(four.weight.dtype), four.weight.numel()],
        "output": list(y.shape),
        "gradient": list(x.grad.shape),
    }


warnings.simplefilter("ignore")
sections = [
    properties,
    memory,
    segments,
    values,
    order,
    workspace,
    kernels,
    scaler,
    not_implemented,
    eight_and_four_bits,
]
wanted = sys.argv[1:] or [section.__name__ for section in sections]
print(json.dumps({section.__name__: section() for section in sections if section.__name__ in wanted}))
