"""Make tokenizer.json, train.npy and val.npy (uint16 token ids) from train.txt and val.txt.

train.txt: the first 120,000,000 bytes of data/text/gutenberg/train.txt; val.txt: all of val.txt.
"""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
sample = open("train.txt", encoding="utf8", errors="ignore").read(20_000_000).split("\n")
tokenizer.train_from_iterator(
    sample,
    trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ),
)
tokenizer.save("tokenizer.json")
for name in ("train", "val"):
    text = open(f"{name}.txt", encoding="utf8", errors="ignore").read()
    paragraphs, ids = [p + "\n\n" for p in text.split("\n\n")], []
    for i in range(0, len(paragraphs), 20_000):
        for encoding in tokenizer.encode_batch(paragraphs[i : i + 20_000]):
            ids.extend(encoding.ids)
    np.save(f"{name}.npy", np.array(ids, dtype=np.uint16))
