"""Train the 7.5 M parameter Llama for a given number of seconds (cosine schedule over wall-clock time).

usage: python train.py SECONDS     (4200 on two CPU cores made the weights in this folder)
"""

import math
import sys
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BUDGET_S, BATCH, SEQ, VOCAB, LR = float(sys.argv[1]), 32, 256, 4096, 1.5e-3
torch.manual_seed(0)
torch.set_num_threads(2)
config = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)
model = LlamaForCausalLM(config)
train, val = np.load("train.npy"), np.load("val.npy")
matrices = [p for p in model.parameters() if p.ndim >= 2]
vectors = [p for p in model.parameters() if p.ndim < 2]
optimizer = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
    lr=LR,
    betas=(0.9, 0.95),
    fused=True,
)


def batch(ids, rng):
    starts = rng.integers(0, len(ids) - SEQ - 1, BATCH)
    return torch.from_numpy(np.stack([ids[i : i + SEQ + 1] for i in starts]).astype(np.int64))


def loss_of(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB).float(), x[:, 1:].reshape(-1))


@torch.no_grad()
def validate():
    model.eval()
    rng = np.random.default_rng(1)
    mean = sum(loss_of(batch(val, rng)).item() for _ in range(10)) / 10
    model.train()
    return mean


rng, start, step = np.random.default_rng(0), time.time(), 0
while (done := (time.time() - start) / BUDGET_S) < 1:
    lr = LR * min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = loss_of(batch(train, rng))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    step += 1
    if step % 50 == 0:
        print(f"step {step}  {time.time() - start:.0f} s  loss {loss.item():.3f}", flush=True)
print(f"validation loss {validate():.4f} nats a token after {step} steps")
model.to(torch.bfloat16).save_pretrained("gutenberg-7m")
PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", bos_token="<s>", eos_token="</s>").save_pretrained(
    "gutenberg-7m"
)
