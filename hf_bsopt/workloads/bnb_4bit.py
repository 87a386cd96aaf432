"""Linear layers with 4-bit weights: bitsandbytes' own modules, in the state that they have after quantization."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS_PER_BLOCK, MAXIMA_PER_BLOCK = 64, 256
"""bitsandbytes' block sizes: 64 weights share a maximum, which is held in 8 bits, and 256 maxima share a block (QLoRA's
double quantization, arXiv:2305.14314)."""


def quantized(model: Any, dtype: torch.dtype, *, is_prepared: bool) -> nn.Module:
    """Return the model with each linear layer except the head as bitsandbytes' Linear4bit, as after quantization.

    ``dtype``: the dtype in which the layers compute. ``is_prepared``: the model then goes through peft's
    prepare_model_for_kbit_training, which casts all other parameters to float32. Experts that are one parameter for all
    of them (transformers 5) are no linear layers, and stay as they are.
    """
    import bitsandbytes as bnb
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
            _set_quantized_weight(module, dtype)
    model.is_loaded_in_4bit = model.is_quantized = True  # peft chooses its layers by these
    if is_prepared:
        from peft import prepare_model_for_kbit_training

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers 5.23 by deprecated names
            return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-any-return]
    return model  # type: ignore[no-any-return]


def _set_quantized_weight(layer: Any, dtype: torch.dtype) -> None:
    """Give a Linear4bit the packed weight (two values per byte) and the quantization state of its shape."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.functional import QuantState

    values = layer.in_features * layer.out_features
    maxima = -(-values // WEIGHTS_PER_BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-maxima // MAXIMA_PER_BLOCK)),
        code=torch.empty(256),
        blocksize=MAXIMA_PER_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(maxima, dtype=torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16),
        blocksize=WEIGHTS_PER_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    layer.weight = bnb.nn.Params4bit(
        torch.empty((-(-values // 2), 1), dtype=torch.uint8),
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    layer.requires_grad_(False)
