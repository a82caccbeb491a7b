"""vLLM as an engine: a plug-in by which its ranks send what a plan says, or with one codec (docs/vllm.md).

vLLM starts the ranks and loads the model, so nothing is attached by hand: `register` is the entry point of
`vllm.general_plugins`, which vLLM calls in each of its processes.
"""

from narrowcast.engines.vllm.ending import exit_with_status
from narrowcast.engines.vllm.hooks import METHODS
from narrowcast.engines.vllm.settings import Settings


def register() -> None:
    """Have each worker serve what the environment or vLLM's `additional_config` names; without either, nothing changes.

    Called again it does nothing more. A plan or a codec that cannot be used at all is refused here, before anything is
    started: PlanFormatError or InvalidInputError.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    Settings.of({})
    # Wrappers hand on to their workers whatever they do not define, of all kinds of executors and devices.
    for method in METHODS:
        setattr(WorkerWrapperBase, method.__name__, method)
    exit_with_status()


__all__ = ["register"]
