"""Tiny models with random weights in the layouts in which the real ones are published, and their logits by hand."""

import json
import math

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

WIDTH, HIDDEN, NUM_LAYERS, NUM_HEADS, HEAD_WIDTH = 16, 24, 2, 4, 4
VOCABULARY = 20
MASK, END, TURN, PAD = 17, 15, 16, 15


def random_weights(shapes, *, scale=0.4):
    generator = torch.Generator().manual_seed(0)
    weights = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: w + 1 if "norm" in name and w.ndim == 1 else w for name, w in weights.items()}


def llama_weights(*, num_key_value_heads=2, bias=False, query_norm=False, tied=False):
    """Weights with the names of Llama, Qwen2 (``bias``) and Qwen3 (``query_norm``)."""
    narrow = num_key_value_heads * HEAD_WIDTH
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        outputs = {"q_proj": WIDTH, "k_proj": narrow, "v_proj": narrow}
        for name, size in outputs.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = (size, WIDTH)
            if bias:
                shapes[f"{prefix}.self_attn.{name}.bias"] = (size,)
        if query_norm:
            shapes |= {f"{prefix}.self_attn.{name}.weight": (HEAD_WIDTH,) for name in ("q_norm", "k_norm")}
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes |= {f"{prefix}.mlp.{name}.weight": (HIDDEN, WIDTH) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"{prefix}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    return random_weights(shapes)


def llama_config(**more):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000.0,
        "max_position_embeddings": 32,
        "eos_token_id": END,
        **more,
    }


def rotated(x, positions, theta):
    """Pairs (i, i + half) of features turned by position times theta ** (-i / half), x: (heads, L, width)."""
    half = x.shape[-1] // 2
    turn = positions[:, None] * torch.tensor([theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([z.real, z.imag], -1)


def llama_by_hand(weights, tokens, sees, *, theta=1000.0, eps=1e-6, num_key_value_heads=2):
    """Logits (L, V) of one text (L,) with ``sees(i, j)``: whether i attends to j; in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    length = len(tokens)
    allowed = torch.tensor([[sees(i, j) for j in range(length)] for i in range(length)])
    positions = torch.arange(length).double()

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name]

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(NUM_LAYERS):
        p = f"model.layers.{layer}"
        h = norm(x, f"{p}.input_layernorm.weight")
        parts = []
        for name in ("q_proj", "k_proj", "v_proj"):
            y = h @ w[f"{p}.self_attn.{name}.weight"].T + w.get(f"{p}.self_attn.{name}.bias", 0)
            y = y.reshape(length, -1, HEAD_WIDTH).transpose(0, 1)
            key = f"{p}.self_attn.{name[0]}_norm.weight"
            y = norm(y, key) if key in w else y
            y = rotated(y, positions, theta) if name != "v_proj" else y
            parts.append(y if name == "q_proj" else y.repeat_interleave(NUM_HEADS // num_key_value_heads, 0))
        q, k, v = parts
        scores = (q @ k.transpose(1, 2) / math.sqrt(HEAD_WIDTH)).masked_fill(~allowed, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, WIDTH)
        x = x + mixed @ w[f"{p}.self_attn.o_proj.weight"].T
        h = norm(x, f"{p}.post_attention_layernorm.weight")
        gate, up = h @ w[f"{p}.mlp.gate_proj.weight"].T, h @ w[f"{p}.mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"{p}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def dit_weights(*, noise=8):
    shapes = {
        "backbone.vocab_embed.embedding": (VOCABULARY, WIDTH),
        "backbone.sigma_map.mlp.0.weight": (noise, 256),
        "backbone.sigma_map.mlp.0.bias": (noise,),
        "backbone.sigma_map.mlp.2.weight": (noise, noise),
        "backbone.sigma_map.mlp.2.bias": (noise,),
        "backbone.rotary_emb.inv_freq": (HEAD_WIDTH // 2,),
        "backbone.output_layer.norm_final.weight": (WIDTH,),
        "backbone.output_layer.linear.weight": (VOCABULARY, WIDTH),
        "backbone.output_layer.linear.bias": (VOCABULARY,),
        "backbone.output_layer.adaLN_modulation.weight": (2 * WIDTH, noise),
        "backbone.output_layer.adaLN_modulation.bias": (2 * WIDTH,),
    }
    for layer in range(NUM_LAYERS):
        p = f"backbone.blocks.{layer}"
        shapes |= {
            f"{p}.norm1.weight": (WIDTH,),
            f"{p}.attn_qkv.weight": (3 * WIDTH, WIDTH),
            f"{p}.attn_out.weight": (WIDTH, WIDTH),
            f"{p}.norm2.weight": (WIDTH,),
            f"{p}.mlp.0.weight": (4 * WIDTH, WIDTH),
            f"{p}.mlp.0.bias": (4 * WIDTH,),
            f"{p}.mlp.2.weight": (WIDTH, 4 * WIDTH),
            f"{p}.mlp.2.bias": (WIDTH,),
            f"{p}.adaLN_modulation.weight": (6 * WIDTH, noise),
            f"{p}.adaLN_modulation.bias": (6 * WIDTH,),
        }
    return random_weights(shapes, scale=0.2)


def dit_config(**more):
    return {
        "vocab_size": VOCABULARY,
        "model_length": 32,
        "hidden_dim": WIDTH,
        "cond_dim": 8,
        "n_blocks": NUM_LAYERS,
        "n_heads": NUM_HEADS,
        "dropout": 0.1,
        "time_conditioning": False,
        **more,
    }


def dit_by_hand(weights, tokens, sees, *, sigma=0.0):
    """Logits (L, V) of one text before substitution, in float64."""
    w = {name.removeprefix("backbone."): tensor.double() for name, tensor in weights.items()}
    length = len(tokens)
    allowed = torch.tensor([[sees(i, j) for j in range(length)] for i in range(length)])
    positions = torch.arange(length).double()
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)]).double()
    wave = torch.cat([(sigma * frequencies).cos(), (sigma * frequencies).sin()])
    hidden = F.silu(wave @ w["sigma_map.mlp.0.weight"].T + w["sigma_map.mlp.0.bias"])
    c = F.silu(hidden @ w["sigma_map.mlp.2.weight"].T + w["sigma_map.mlp.2.bias"])

    def modulation(p):
        return c @ w[f"{p}.adaLN_modulation.weight"].T + w[f"{p}.adaLN_modulation.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    x = w["vocab_embed.embedding"][tokens]
    for layer in range(NUM_LAYERS):
        p = f"blocks.{layer}"
        shift, scale, gate, shift2, scale2, gate2 = modulation(p).reshape(6, WIDTH)
        h = norm(x, f"{p}.norm1.weight") * (1 + scale) + shift
        q, k, v = (h @ w[f"{p}.attn_qkv.weight"].T).reshape(length, 3, NUM_HEADS, HEAD_WIDTH).permute(1, 2, 0, 3)
        q, k = rotated(q, positions, 10_000.0), rotated(k, positions, 10_000.0)
        scores = (q @ k.transpose(1, 2) / math.sqrt(HEAD_WIDTH)).masked_fill(~allowed, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, WIDTH)
        x = x + gate * (mixed @ w[f"{p}.attn_out.weight"].T)
        h = norm(x, f"{p}.norm2.weight") * (1 + scale2) + shift2
        h = F.gelu(h @ w[f"{p}.mlp.0.weight"].T + w[f"{p}.mlp.0.bias"], approximate="tanh")
        x = x + gate2 * (h @ w[f"{p}.mlp.2.weight"].T + w[f"{p}.mlp.2.bias"])
    shift, scale = modulation("output_layer").reshape(2, WIDTH)
    h = norm(x, "output_layer.norm_final.weight") * (1 + scale) + shift
    return h @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def publish(folder, config, weights, *, num_shards=1, files=()):
    """Write a model as the hub has it: config, weights in one file or several with an index, and other JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in dict(files).items():
        (folder / name).write_text(json.dumps(content))
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(weights.items())[shard::num_shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def in_the_layout_of_llada(weights):
    """The same weights under the names that LLaDA's files have."""
    renamed = {}
    for name, tensor in weights.items():
        for mine, theirs in (
            ("model.layers.", "model.transformer.blocks."),
            ("model.embed_tokens.", "model.transformer.wte."),
            ("model.norm.", "model.transformer.ln_f."),
            ("lm_head.", "model.transformer.ff_out."),
            ("self_attn.o_proj.", "attn_out."),
            ("self_attn.", ""),
            ("mlp.gate_proj.", "ff_proj."),
            ("mlp.up_proj.", "up_proj."),
            ("mlp.down_proj.", "ff_out."),
            ("post_attention_layernorm.", "ff_norm."),
            ("input_layernorm.", "attn_norm."),
        ):
            name = name.replace(mine, theirs)
        renamed[name] = tensor
    return renamed


def llada_config(**more):
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": WIDTH,
        "n_heads": NUM_HEADS,
        "n_kv_heads": NUM_HEADS,
        "n_layers": NUM_LAYERS,
        "mlp_hidden_size": HIDDEN,
        "vocab_size": VOCABULARY - 2,
        "embedding_size": VOCABULARY,
        "max_sequence_length": 32,
        "block_type": "llama",
        "block_group_size": 1,
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "rope_theta": 1000.0,
        "rms_norm_eps": 1e-6,
        "weight_tying": False,
        "mask_token_id": MASK,
        "eos_token_id": END,
        "pad_token_id": PAD,
        **more,
    }


def tokenizer_json(special=None):
    """A tokenizer of letters and special tokens by name (those of LLaDA), with all ids up to the largest of these."""
    special = special or {"<|endoftext|>": END, "<|eot_id|>": TURN, "<|mdm_mask|>": MASK}
    letters = {chr(ord("a") + id): id for id in range(max(special.values()) + 1) if id not in special.values()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": id, "content": token, "special": True, **flags} for token, id in special.items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": letters | special, "merges": [], "unk_token": None, "fuse_unk": False},
    }


def everything(i, j):
    return True


def blocks_of(size):
    return lambda i, j: i // size >= j // size


def a_text(length=9, seed=0):
    tokens = torch.randint(0, END, (length,), generator=torch.Generator().manual_seed(seed))
    tokens[[place for place in (2, 5, 6) if place < length]] = MASK
    return tokens


LLADA = "GSAI-ML/LLaDA-8B-Instruct"
ILLADA = "GSAI-ML/iLLaDA-8B-Instruct"
DREAM = "Dream-org/Dream-v0-Instruct-7B"
MDLM = "kuleshov-group/mdlm-owt"
BD3LM = "kuleshov-group/bd3lm-owt-block_size4"
SDAR = "JetLM/SDAR-1.7B-Chat"


def published(name, folder):
    """Write a tiny model like the real one of this name, with a tokenizer of letters; return the folder."""
    ids = {"mask_token_id": MASK, "pad_token_id": PAD, "eos_token_id": END}
    special = {"<|endoftext|>": END, "<|im_end|>": TURN, "<|mask|>": MASK}
    files = {"tokenizer.json": tokenizer_json(special), "tokenizer_config.json": {"eos_token": "<|endoftext|>"}}
    files["tokenizer_config.json"]["chat_template"] = (
        "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    if name in (MDLM, BD3LM):
        last = VOCABULARY - 2
        files["tokenizer.json"] = tokenizer_json({"<|endoftext|>": END, "<|other|>": last})
        more = {"model_type": "mdlm"} if name == MDLM else {"model_type": "bd3lm", "block_size": 4, "cross_attn": True}
        return publish(folder, dit_config(eos_token_id=END, **more), dit_weights(), files=files)
    if name == LLADA:
        weights = in_the_layout_of_llada(llama_weights(num_key_value_heads=NUM_HEADS))
        return publish(folder, llada_config(), weights, num_shards=2, files=files)
    if name == ILLADA:
        config = llama_config(model_type="illada", tie_word_embeddings=True, **ids)
        return publish(folder, config, llama_weights(tied=True), num_shards=2, files=files)
    if name == DREAM:
        return publish(folder, llama_config(model_type="Dream", **ids), llama_weights(bias=True), files=files)
    config = llama_config(model_type="sdar", block_size=4, head_dim=HEAD_WIDTH, **ids)
    return publish(folder, config, llama_weights(query_norm=True), num_shards=2, files=files)
