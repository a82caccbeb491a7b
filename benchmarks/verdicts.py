"""The KL divergence that people notice: figures and answers of a real model under fewer and fewer bits.

usage: python benchmarks/verdicts.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N]

TEXT: as frontier.py has it; the model must have a chat template (`make model` gets one). Beside KL, top-1 agreement and
perplexity on text: greedy answers to 16 questions, 48 tokens at most. `same`: how many are word for word those of the
uncompressed model. `before_change`: tokens until the first that is another, on average. `nll_of_answers`: nats a token
that the uncompressed model finds the coded one's answers unlikely by; its own are the first row.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import reporting
import torch
from scoring import Texts
from torch import Tensor, nn

import narrowcast
from narrowcast.calibration import observe
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.evaluation.continuations import continuations
from narrowcast.scores import log_probs

CODECS = "int8-group128", *(f"allocated(bits={bits})" for bits in (6, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.75, 1.5, 1.25, 1))
QUESTIONS = (
    "What is the capital of Italy?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
    "How do I make a cup of tea?",
    "Name three animals that live in the desert.",
    "What is 12 times 7?",
    "Who wrote Romeo and Juliet?",
    "Give me advice for a job interview.",
    "Summarize the water cycle.",
    "What is photosynthesis?",
    "Translate 'good morning' into French.",
    "Tell me a joke about a dog.",
    "How far away is the moon?",
    "What should I eat for breakfast?",
    "Describe a quiet village in winter.",
    "List the colors of the rainbow.",
)
SHOWN, LENGTH = (0, 2, 12), 48  # the answers that are kept as text
ALGORITHM = "two_shot"


def nll(model: nn.Module, prompts: Sequence[Tensor], answers: Sequence[list[int]]) -> float:
    """Nats a token of the answers, according to `model`."""
    total, number = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.cat([prompt, torch.tensor([answer], dtype=torch.long)], dim=1)
        at = log_probs(model, ids)[0, prompt.shape[1] - 1 : -1]
        total -= at.gather(1, torch.tensor(answer, dtype=torch.long)[:, None]).sum().item()
        number += len(answer)
    return total / max(number, 1)


def rows(texts: Texts, tp_size: int) -> Iterator[dict[str, Any]]:
    tokenizer, model = load_engine().load_tokenizer(texts.folder), texts.model
    chats = ([{"role": "user", "content": question}] for question in QUESTIONS)
    asked: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompts = [tokenizer.apply_chat_template(chat, **asked).input_ids for chat in chats]
    own = continuations(model, prompts, LENGTH)
    yield {"codec": "uncompressed", "nll_of_answers": nll(model, prompts, own)} | shown(tokenizer, own)
    seen = observe(model, texts.calibration, tp_size=tp_size, moments="diagonal")
    for codec in CODECS:
        plan = seen.plan(codec)
        score = evaluate(model, plan, texts.batches, reference=texts.reference, algorithm=ALGORITHM).score
        with narrowcast.attach(model, plan, simulate=True, algorithm=ALGORITHM):
            answers = continuations(model, prompts, LENGTH)
        until = [
            sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))
            for mine, theirs in zip(answers, own, strict=True)
        ]
        yield {
            "codec": codec,
            "kl_nats": score.kl_nats,
            "top1_agreement": score.top1_agreement,
            "perplexity_change": score.perplexity_change,
            "same": sum(mine == theirs for mine, theirs in zip(answers, own, strict=True)),
            "before_change": sum(until) / len(until),
            "nll_of_answers": nll(model, prompts, answers),
        } | shown(tokenizer, answers)


def shown(tokenizer: Any, answers: Sequence[list[int]]) -> dict[str, str]:
    return {QUESTIONS[place]: tokenizer.decode(answers[place], skip_special_tokens=True) for place in SHOWN}


def main() -> None:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    parser.add_argument("--tp", type=int, default=3)
    asked = parser.parse_args()
    texts, table = Texts.of(asked), []
    for row in rows(texts, asked.tp):
        table.append(row)
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), sep=" | ", flush=True)
    reporting.write(asked.json, **texts.setting, tp_size=asked.tp, algorithm=ALGORITHM, rows=table)


if __name__ == "__main__":
    main()
