"""Operations that PyTorch decomposes differently under a dispatch mode than on a GPU.

The prediction equals what the virtual GPU uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.probing import ProbeClient, VirtualCudaDevice
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]

T4 = catalog.gpu("T4")
WIDTH = 256


def backwards(h: torch.Tensor) -> torch.Tensor:
    return torch.arange(WIDTH - 1, -1, -1, device=h.device)


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sort": lambda h: h.sort(-1)[0],
    "maximum": lambda h: h * h.max(-1, keepdim=True)[0],
    "index": lambda h: h[:, backwards(h)],
    "index_select": lambda h: h.index_select(1, backwards(h)),
    "gather": lambda h: h.gather(1, backwards(h).expand(len(h), WIDTH)),
    "cummax": lambda h: h.cummax(-1)[0],
}


class Between(nn.Module):
    """A model with one of the operations between two layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(OPERATIONS[self.name](self.first(x))).float().pow(2).mean()


class Attention(nn.Module):
    """A model whose projections are matrix products with a bias over transposed inputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.needs_weights = name == "weights"
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, dropout=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(len(x), -1, 64)
        return self.attention(x, x, x, need_weights=self.needs_weights)[0].float().mean()


class Transposed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH // 4, 512, bias=name == "bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.layer(x.view(len(x), 4, -1).transpose(0, 1))).float().mean()


CASES = [
    *((Between, name) for name in OPERATIONS),
    *((Attention, name) for name in ("weights", "none")),
    *((Transposed, name) for name in ("bias", "none")),
]


@pytest.fixture(scope="module")
def client() -> Iterator[ProbeClient]:
    with ProbeClient(VirtualCudaDevice(T4)) as one:
        yield one


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_the_prediction_equals_what_the_virtual_gpu_uses(
    client: ProbeClient, kind: Callable[[str], nn.Module], name: str
) -> None:
    workload = ModuleWorkload(kind(name), {"x": torch.zeros(2, WIDTH)}, StepSettings("fp16"))
    rehearsed, predicted = client(workload, 32768), Predictor(workload, T4)(32768)
    assert rehearsed.outcome == "fits", rehearsed.detail
    assert rehearsed.peak is not None
    assert predicted.peak is not None
    assert predicted.peak.allocated_bytes == pytest.approx(rehearsed.peak.allocated_bytes, rel=1e-3)
    assert predicted.peak.reserved_bytes == pytest.approx(rehearsed.peak.reserved_bytes, rel=1e-3)
