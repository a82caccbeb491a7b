"""A Llama as a GGUF file, which llama.cpp answers with: no tokenizer in it, its prompts are numbers."""

from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, quants
from peers.weights import read_config, read_weights

FORMATS = "Q4_0", "Q8_0", "BF16"


def write_gguf(folder: Path, path: Path, weights: str) -> None:
    """Write the model of `folder` with all its matrices in one of FORMATS, and its norms in FP32."""
    config, kind = read_config(folder), GGMLQuantizationType[weights]
    called = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, weight in read_weights(folder):
        stored = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(
            called.get_name(name, try_suffixes=(".weight",)), quants.quantize(weight, stored), raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
