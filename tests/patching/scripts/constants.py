# -*- coding: latin-1 -*-
# Modèle léger, réglé à la main
import torch

BATCH_SIZE, EPOCHS = 16, 3  # déjà trop grand ?
VALID_BATCH_SIZE = 64
LR = 1e-3
ACCUMULATE = 2
if torch.cuda.is_available():
	device, étiquette = "cuda", "carte"; workers = 2
else:
	device = "cpu"
train_loader = DataLoader(train_ds, batch_size=BATCH_SIZE, num_workers=2)
valid_loader = DataLoader(valid_ds, batch_size=VALID_BATCH_SIZE)
for epoch in range(EPOCHS):
	for i, batch in enumerate(train_loader):
		loss = model(batch) / ACCUMULATE
# fin