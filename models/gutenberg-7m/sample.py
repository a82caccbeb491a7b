"""Sample calibration.txt and scoring.txt from the model itself (temperature 1, documents split by form feeds).

usage: python sample.py        in this folder; what it wrote is committed beside it
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
LENGTH = 256

model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None  # it saw no end-of-text token either
tokenizer = AutoTokenizer.from_pretrained(HERE)
paragraph = tokenizer("\n\n", return_tensors="pt").input_ids  # the model saw no beginning-of-text token

for name, seed, documents in (("calibration", 0, 128), ("scoring", 1, 32)):
    torch.manual_seed(seed)
    ids = model.generate(
        paragraph.expand(documents, -1),
        max_new_tokens=LENGTH,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    texts = tokenizer.batch_decode(ids[:, paragraph.shape[1] :], skip_special_tokens=True)
    (HERE / f"{name}.txt").write_text("\f".join(text.strip() for text in texts), encoding="utf8")
