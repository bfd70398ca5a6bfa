"""A Llama as a GGUF file, written as llama.cpp's own converter writes one: its names, its order of rotary rows."""

from gguf import GGUFWriter, TokenType

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
# A sentencepiece vocabulary: three special tokens, all bytes, pieces with their scores.
PIECES = {"▁": -1.0, "a": -2.0, "r": -3.0, "e": -4.0, "d": -5.0, "ed": -6.0, "red": -7.0, "▁red": -8.0, "▁a": -9.0}


def write_gguf(path, model, **fields):
    """The file of a `LlamaForCausalLM` with the vocabulary of `PIECES`; `fields` are bools of `tokenizer.ggml`."""
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, config.vocab_size)
    for name, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        layer, name = key.removesuffix(".weight"), ""
        if layer.startswith("model.layers."):
            _, _, number, layer = layer.split(".", 3)
            name = f"blk.{number}."
        if layer == "lm_head" and config.tie_word_embeddings:
            continue
        if count := heads.get(NAMES[layer]):
            # Pairs of rotary rows lie side by side there, half a head apart here.
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{name}{NAMES[layer]}.weight", tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer, size):
    pieces = [("<unk>", 0.0, TokenType.UNKNOWN), ("<s>", 0.0, TokenType.CONTROL), ("</s>", 0.0, TokenType.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    pieces += [(piece, score, TokenType.NORMAL) for piece, score in PIECES.items()]
    pieces += [(f"[unused{n}]", -99.0, TokenType.NORMAL) for n in range(size - len(pieces))]
    tokens, scores, kinds = zip(*pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
