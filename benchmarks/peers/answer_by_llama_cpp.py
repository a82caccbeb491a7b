"""Times an answer by llama.cpp, in a Python that has llama-cpp-python and nothing of ours.

usage: PYTHON answer_by_llama_cpp.py MODEL.gguf --threads N --prompt N --decode N

Prints JSON: seconds of the prompt, and milliseconds of each token after it.
"""

import argparse
import json
import time

import numpy as np
from llama_cpp import Llama

WARMUP = 4  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name in ("--threads", "--prompt", "--decode"):
        parser.add_argument(name, type=int, required=True)
    asked = parser.parse_args()
    llama = Llama(
        asked.model,
        n_ctx=asked.prompt + asked.decode,
        n_batch=asked.prompt,
        n_ubatch=asked.prompt,
        n_threads=asked.threads,
        n_threads_batch=asked.threads,
        verbose=False,
    )
    llama.eval([0] * asked.prompt)
    for _ in range(WARMUP):
        llama.eval([0])
    llama.reset()
    start = time.perf_counter()
    llama.eval([index % 26 for index in range(asked.prompt)])
    token = _likeliest(llama)
    prompt_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(asked.decode):
        llama.eval([token])
        token = _likeliest(llama)
    decode_s = time.perf_counter() - start
    print(json.dumps({"prompt_s": prompt_s, "ms_per_token": decode_s * 1e3 / asked.decode}))


def _likeliest(llama: Llama) -> int:
    return int(np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),)).argmax())


if __name__ == "__main__":
    main()
