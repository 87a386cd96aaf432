import transformers
from peft import LoraConfig

# sized for a 24 GB card
MICRO_BATCH_SIZE = 4
BATCH_SIZE = 128
GRADIENT_ACCUMULATION_STEPS = 32
EPOCHS = 3
LEARNING_RATE = 3e-4
CUTOFF_LEN = 256
VAL_SET_SIZE = 2_000

trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(
        per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS,
        warmup_steps=100,
        learning_rate=LEARNING_RATE,
        run_name=f"bs{BATCH_SIZE:,}-{'x' * 3}",
    ),
)
