"""Write the data of the example in docs/lengths.md: the paragraphs of LICENSE, and a tokenizer trained on them.

python benchmarks/lengths_example.py FOLDER  # writes FOLDER/license.jsonl and FOLDER/wordpiece
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [" ".join(text.split()) for text in LICENSE.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    lines = [json.dumps({"text": text}) + "\n" for text in paragraphs]
    (folder / "license.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(paragraphs, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    made.save_pretrained(str(folder / "wordpiece"))


if __name__ == "__main__":
    main()
