"""Trains a text classifier whose batch size nobody has chosen: python train_classifier.py [memory, such as 700MiB]"""

import random
import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_bsopt import BatchSizeCallback

WORDS = {0: ["dull", "slow", "clumsy", "grey"], 1: ["bright", "quick", "graceful", "vivid"]}
draw = random.Random(0)
labels = [index % 2 for index in range(2048)]
texts = [" ".join(draw.choices(["the", "film", "is", *WORDS[label]], k=draw.randint(8, 96))) for label in labels]

words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
data = Dataset.from_dict({**tokenizer(texts), "labels": labels}).train_test_split(0.25, seed=0)

layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), hidden_size=64, **layers))
arguments = TrainingArguments(
    "classifier", per_device_train_batch_size=128, max_steps=15, learning_rate=3e-3, use_cpu=True
)
callbacks = [BatchSizeCallback(memory=sys.argv[1] if len(sys.argv) > 1 else None)]
trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), data["train"], callbacks=callbacks)
trainer.train()
print("right:", (trainer.predict(data["test"]).predictions.argmax(1) == data["test"]["labels"]).mean())
