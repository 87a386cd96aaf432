"""Train a text classifier whose batch size is found automatically: python train_classifier.py [memory, e.g. 700MiB]"""

import random
import sys

import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_bsopt import BatchSizeCallback

WORDS = ["[PAD]", "the", "film", "is", "dull", "slow", "grey", "bright", "quick", "vivid"]
draw = random.Random(0)
labels = [index % 2 for index in range(2048)]
texts = [" ".join(draw.choices(WORDS[1:4] + WORDS[4 + 3 * label :][:3], k=draw.randint(8, 96))) for label in labels]

words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
data = Dataset.from_dict({**tokenizer(texts), "labels": labels}).train_test_split(0.25, seed=0)

layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 256}
model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=len(tokenizer), **layers))
settings = {"per_device_train_batch_size": 128, "max_steps": 15, "learning_rate": 3e-3}
arguments = transformers.TrainingArguments("classifier", use_cpu=True, **settings)
collator = transformers.DataCollatorWithPadding(tokenizer)
callbacks = [BatchSizeCallback(memory=sys.argv[1] if len(sys.argv) > 1 else None)]
trainer = transformers.Trainer(model, arguments, collator, data["train"], callbacks=callbacks)
trainer.train()
print("right:", (trainer.predict(data["test"]).predictions.argmax(1) == data["test"]["labels"]).mean())
