from omegaconf import OmegaConf
from addict import Dict as adict

cfg = OmegaConf.create({
    "exp": "exp_012",
    "train": {
        "batch_size": 32, "epochs": 5,
        "optimizer": {"name": "adamw", "lr": 3e-5},
    },
    "valid": {"batch_size": 128},
    "inference": dict(batch_size=256, tta=True),
})
cfg.train.batch_size = 4   # the A100 is gone, this is a P100 now

train_loader = DataLoader(
    NotesDataset(train_df),
    batch_size=cfg.train.batch_size,
    shuffle=True,
)
valid_loader = DataLoader(NotesDataset(valid_df), batch_size=cfg.valid.batch_size)
accelerator = Accelerator(gradient_accumulation_steps=8, mixed_precision="fp16")
