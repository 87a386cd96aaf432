import os

from trl import SFTConfig, SFTTrainer

ds_config = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
}


def main(model_id: str = "meta-llama/Llama-3.2-1B"):
    config = SFTConfig(
        output_dir=os.path.join("out", model_id.split("/")[-1]),
        deepspeed=ds_config,
        max_length=1024,  # tokens
        per_device_train_batch_size=(
            2  # fits in 40 GiB
        ),
        gradient_accumulation_steps=16, warmup_steps=0,
        bf16=True,
    )
    SFTTrainer(model=model_id, args=config).train()


main()
