"""Train BERT-base on made-up sequences of 512 tokens: batch size 16, 4 accumulation steps, fp16."""

import transformers

model = transformers.BertForTokenClassification(transformers.BertConfig(num_labels=3))
tokens = [1] * 512
example = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens}

arguments = transformers.TrainingArguments(
    "out",
    per_device_train_batch_size=16,
    gradient_accumulation_steps=4,
    num_train_epochs=1,
    fp16=True,
)
trainer = transformers.Trainer(model, arguments, train_dataset=[example] * 6400)
trainer.train()
trainer.save_model()
