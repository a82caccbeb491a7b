"""vLLM as an engine: its ranks send what a plan says, or with one codec (docs/vllm.md).

vLLM starts the ranks and loads the model, so nothing is attached by hand: `narrowcast.plugin` registers hooks.
"""

from narrowcast.engines.vllm.hooks import register
from narrowcast.engines.vllm.tools import Figures, Tools, Watched

__all__ = ["Figures", "Tools", "Watched", "register"]
