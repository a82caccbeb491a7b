"""Parameters of Transformers' models in GGUF files: their names, and what llama.cpp has changed in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
ATTENTION = {name: module for name, module in PROJECTIONS.items() if name.startswith("attn")}
ROUTER = {"ffn_gate_inp": "mlp.gate"}
EXPERT = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}  # behind which its number stands
FREQUENCIES = "rope_freqs.weight"  # by which Llama 3.1 and later divide those of their positions
NO_PARAMETERS = {FREQUENCIES}
FACTORS = "rope_factors_"  # other ones for long contexts than for short ones


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """`inner`: the modules of a layer by their names in the file.

    `interleaved`: of queries' and keys' heads the file has the two halves in turns, row by row.
    `norms_plus_one`: the file has norms as factors, the model what is added to one. `expert`: as `inner`, of an
    expert.
    """

    inner: Mapping[str, str]
    interleaved: bool = False
    norms_plus_one: bool = False
    expert: Mapping[str, str] = field(default_factory=dict)

    def parameter(self, name: str) -> str | None:
        """The model's name of a tensor; None for what is no parameter of it."""
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if module in OUTSIDE:
            return f"{OUTSIDE[module]}.{kind}"
        match module.split("."):
            case ["blk", layer, inner] if layer.isdecimal() and inner in self.inner:
                return f"model.layers.{int(layer)}.{self.inner[inner]}.{kind}"
            case ["blk", layer, inner, number] if layer.isdecimal() and number.isdecimal() and inner in self.expert:
                return f"model.layers.{int(layer)}.mlp.experts.{int(number)}.{self.expert[inner]}.{kind}"
        return None


ARCHITECTURES = {
    "llama": Architecture(inner=PROJECTIONS | TWO_NORMS | ROUTER, expert=EXPERT, interleaved=True),
    "qwen2": Architecture(inner=PROJECTIONS | TWO_NORMS),
    "qwen3": Architecture(inner=PROJECTIONS | TWO_NORMS | HEAD_NORMS),
    "qwen3moe": Architecture(inner=ATTENTION | TWO_NORMS | HEAD_NORMS | ROUTER, expert=EXPERT),
    "gemma2": Architecture(inner=PROJECTIONS | FOUR_NORMS, norms_plus_one=True),
    "gemma3": Architecture(inner=PROJECTIONS | FOUR_NORMS | HEAD_NORMS, norms_plus_one=True),
    "phi3": Architecture(inner=PROJECTIONS | TWO_NORMS | FUSED),
}
