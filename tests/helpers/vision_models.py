"""Small vision-language models, made from configurations, each with a batch of one sequence and one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

IMAGE, VISION_START, VISION_END = 500, 501, 502
"""Token ids."""
Example = dict[str, Any]
TEXT = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Text model: the sizes that all of these have in common."""


def tokens(image_tokens: int, length: int = 256) -> Example:
    """Return a sequence that begins with text, continues with the image and ends with text."""
    ids = torch.randint(3, 400, (1, length), generator=torch.Generator().manual_seed(0), device="cpu")
    ids[:, 8 : 8 + image_tokens] = IMAGE
    ids[:, 7], ids[:, 8 + image_tokens] = VISION_START, VISION_END
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def qwen(version: str) -> tuple[nn.Module, Example]:
    """Qwen2-VL or Qwen2.5-VL: patches of all images in one tensor, and the grid of each image."""
    import transformers

    grid = torch.tensor([[1, 16, 24]])
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
    common = {"image_token_id": IMAGE, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    text = {**TEXT, "rope_parameters": rope, "rope_scaling": rope, "max_position_embeddings": 1024}
    if version == "2":
        vision = {"depth": 2, "embed_dim": 128, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **common)
        model: nn.Module = transformers.Qwen2VLForConditionalGeneration(config)
    else:
        vision = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256}
        vision |= {"fullatt_block_indexes": [1]}
        config25 = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **common)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config25)
    patches = int(grid.prod())
    example = tokens(patches // 4)
    example |= {"pixel_values": torch.randn(patches, 3 * 2 * 14 * 14), "image_grid_thw": grid}
    example["mm_token_type_ids"] = (example["input_ids"] == IMAGE).int()
    return model, example


def idefics(name: str) -> tuple[nn.Module, Example]:
    """Idefics3 or SmolVLM: a fixed number of images per sequence, and a mask of their pixels."""
    import transformers

    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 112, "patch_size": 14}
    text = {"model_type": "llama", **TEXT, "max_position_embeddings": 1024, "pad_token_id": 0}
    kind = getattr(transformers, f"{name}Config")
    config = kind(
        text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=0, use_cache=False
    )
    model: nn.Module = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    example = tokens((112 // 14) ** 2 // 4)
    example["pixel_values"] = torch.randn(1, 1, 3, 112, 112)
    example["pixel_attention_mask"] = torch.ones(1, 1, 112, 112, dtype=torch.int64)
    return model, example


def llava() -> tuple[nn.Module, Example]:
    """LLaVA: one image of a fixed size per sequence."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    text = transformers.LlamaConfig(**TEXT, max_position_embeddings=1024)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    model = transformers.LlavaForConditionalGeneration(config)
    example = tokens((112 // 14) ** 2)
    example["pixel_values"] = torch.randn(1, 3, 112, 112)
    return model, example


MODELS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "Qwen2-VL": lambda: qwen("2"),
    "Qwen2.5-VL": lambda: qwen("2.5"),
    "Idefics3": lambda: idefics("Idefics3"),
    "SmolVLM": lambda: idefics("SmolVLM"),
    "LLaVA": llava,
}
