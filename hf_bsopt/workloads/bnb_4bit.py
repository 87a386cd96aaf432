"""Linear layers in 4 bits: bitsandbytes' own modules, in the state that they have once they are quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK_OF_WEIGHTS, BLOCK_OF_MAXIMA = 64, 256
"""bitsandbytes' block sizes: one maximum for 64 weights, itself held in 8 bits, 256 to a block (QLoRA's double
quantization, arXiv:2305.14314)."""


def quantized(model: Any, dtype: torch.dtype) -> nn.Module:
    """Every linear layer but the head as bitsandbytes' Linear4bit, in the state that it has after quantization."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.functional import QuantState
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    head = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is head] or ["classifier", "score", "qa_outputs"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = module.in_features * module.out_features
            maxima = -(-values // BLOCK_OF_WEIGHTS)
            nested = QuantState(
                absmax=torch.empty(-(-maxima // BLOCK_OF_MAXIMA)),
                code=torch.empty(256),
                blocksize=BLOCK_OF_MAXIMA,
                dtype=torch.float32,
            )
            state = QuantState(
                absmax=torch.empty(maxima, dtype=torch.uint8),
                shape=torch.Size((module.out_features, module.in_features)),
                code=torch.empty(16),
                blocksize=BLOCK_OF_WEIGHTS,
                quant_type="nf4",
                dtype=dtype,
                offset=torch.empty(()),
                state2=nested,
            )
            module.weight = bnb.nn.Params4bit(
                torch.empty((-(-values // 2), 1), dtype=torch.uint8),
                requires_grad=False,
                quant_state=state,
                quant_type="nf4",
                bnb_quantized=True,
                module=module,
            )
            module.quant_state = state
            module.requires_grad_(False)
    model.is_loaded_in_4bit = model.is_quantized = True  # what peft looks at to choose its layers
    return model
