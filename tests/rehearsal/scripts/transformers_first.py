"""A script that imports transformers before torch, and whose memory depends on values."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel  # isort: split

import torch

config = GPT2Config(
    vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
)
model = GPT2LMHeadModel(config).cuda()
prompt = torch.ones(2, 8, dtype=torch.long, device="cuda")
print("generated", tuple(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24).shape))

scores = torch.zeros(4, 16, device="cuda")
print("selected", tuple(scores[scores > 0].shape), "of", scores.numel())

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(10):
    model(prompt, labels=prompt).loss.backward()
    optimizer.step()
    print("step", step)
print("after the loop")
