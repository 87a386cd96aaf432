"""Functions that take options, called with keyword arguments as a user would give them."""

from __future__ import annotations

from hf_bsopt.options import Options
from hf_bsopt.records import GpuSpec
from hf_bsopt.search import device_choice
from hf_bsopt.search.device_choice import DeviceChoice


def choose_device(device: str, gpu: str | GpuSpec | None, memory: str | None) -> DeviceChoice:
    return device_choice.choose_device(Options.of({"device": device, "gpu": gpu, "memory": memory}, "name").device)
