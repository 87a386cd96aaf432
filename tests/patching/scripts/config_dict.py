# NER on clinical notes -- baseline v7 (LB 0.881)
import os
import torch
from transformers import (AutoTokenizer, AutoModelForTokenClassification,
                          TrainingArguments, Trainer)

CONFIG = {
    'model_name' : 'dmis-lab/biobert-v1.1',
    'max_length' : 512,
    'batch_size' : 16,       # 32 goes OOM on the T4 :(
    "eval_batch_size": 64,
    'gradient_accumulation_steps' : 4,   # => effective batch_size = 64
    'learning_rate' : 2e-5, 'weight_decay': 0.01,
    'epochs' : 3,
    'seed' : 42,
}

print(f"effective batch: {CONFIG['batch_size'] * CONFIG['gradient_accumulation_steps']}")
tokenizer = AutoTokenizer.from_pretrained(CONFIG['model_name'])


def make_args(fold):
    return TrainingArguments(
        output_dir=f"out/fold_{fold}_bs{CONFIG['batch_size']}",
        per_device_train_batch_size=CONFIG['batch_size'],
        per_device_eval_batch_size=CONFIG["eval_batch_size"],
        gradient_accumulation_steps=CONFIG['gradient_accumulation_steps'],
        learning_rate=CONFIG['learning_rate'],
        fp16=True, report_to='none')


for fold in range(5):
    args = make_args(fold)
