"""One run of vLLM on two ranks: `serving.py ASKED OUT` answers prompts as the JSON file says, and records sums."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def record(worker: Any) -> None:
    """Keep every sum of a rank from now on: its site, what the rank puts in, and what comes out."""
    wires, seen = worker.narrowcast_wires, []
    summed = wires.sum

    def recorded(partials: Any, site: str, residue: Any = None) -> Any:
        given = partials[0].clone()
        total = summed(partials, site, residue)
        seen.append((site, given, total.clone()))
        return total

    wires.sites.forget()
    wires.sum, worker.seen = recorded, seen


def save(worker: Any, path: str) -> None:
    """Write what was recorded."""
    torch.save(worker.seen, f"{path}.{worker.rank}")


def main(asked: dict[str, Any], out: Path) -> None:
    """Answers: tokens, log-probabilities of prompt and answer, reports of the ranks.

    `rounds`: prompts that are asked for at once. Scores of prompts, which vLLM caches nothing of, may be left out.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    defaults = {
        "tensor_parallel_size": asked.get("tp_size", 2),
        "enforce_eager": asked["eager"],
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_batched_tokens": 32,  # less than a prompt, which is read in chunks then
        "max_num_seqs": 8,
        "additional_config": asked.get("additional_config", {}),
    }
    llm = LLM(asked["model"], **defaults | asked.get("options", {}))
    if asked.get("record"):
        llm.collective_rpc(record)
    of_prompts = {} if asked.get("answers_alone") else {"prompt_logprobs": 0}
    options = {"temperature": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False, **of_prompts}
    adapter = {"lora_request": LoRARequest("adapter", 1, asked["adapter"])} if "adapter" in asked else {}
    answers = []
    for prompts in asked["rounds"]:
        lengths = asked.get("num_tokens") or [9 - 2 * place for place in range(len(prompts))]
        sampling = [SamplingParams(max_tokens=length, **options) for length in lengths[: len(prompts)]]
        answers += llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, **adapter)
    deadline = time.monotonic() + asked.get("awaits_s", 0)
    while time.monotonic() < deadline and not Path(asked["awaits"]).exists():  # a plan that the first rank writes
        time.sleep(0.1)
    reports = llm.collective_rpc("narrowcast_report") if asked["served"] else []
    if asked.get("record"):
        llm.collective_rpc(save, args=(str(out),))
    found = {
        "prompts": [list(answer.prompt_token_ids) for answer in answers],
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "scores": [
            [
                next(iter(each.values())).logprob
                for each in (*(answer.prompt_logprobs or ())[1:], *answer.outputs[0].logprobs)
            ]
            for answer in answers
        ],
        "cached": [answer.num_cached_tokens for answer in answers],
        "reports": reports,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
