"""Tiny masked language models of transformers, with random weights and a tokenizer of words, as folders."""

import torch

WORDS = [f"w{i}" for i in range(16)]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LONGEST = 16
"""Tokens of a text, in all of them."""
PADS_FIRST = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]


def bert(transformers):
    config = transformers.BertConfig(vocab_size=21, pad_token_id=0, max_position_embeddings=18, **SHAPE)
    return transformers.BertForMaskedLM(config), PADS_FIRST


def roberta(transformers):
    """Positions begin behind the padding id; and there are three ids without a token."""
    config = transformers.RobertaConfig(vocab_size=24, pad_token_id=1, max_position_embeddings=20, **SHAPE)
    return transformers.RobertaForMaskedLM(config), ROBERTA


def modernbert(transformers):
    special = {f"{name}_token_id": 2 for name in ("bos", "cls")} | {f"{name}_token_id": 3 for name in ("eos", "sep")}
    config = transformers.ModernBertConfig(
        vocab_size=21,
        pad_token_id=0,
        max_position_embeddings=18,
        global_attn_every_n_layers=2,
        local_attention=4,
        **special,
        **SHAPE,
    )
    return transformers.ModernBertForMaskedLM(config), PADS_FIRST


def esm(transformers):
    """Masked embeddings are left out, and the rest scaled by how many there are."""
    config = transformers.EsmConfig(
        vocab_size=21,
        pad_token_id=1,
        mask_token_id=4,
        max_position_embeddings=18,
        position_embedding_type="rotary",
        token_dropout=True,
        **SHAPE,
    )
    return transformers.EsmForMaskedLM(config), ROBERTA


ARCHITECTURES = {make.__name__: make for make in (bert, roberta, modernbert, esm)}


def write(kind, folder):
    """Write a model with the weights of a seed, and its tokenizer; return the model."""
    import transformers

    torch.manual_seed(0)
    model, special = ARCHITECTURES[kind](transformers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that positions matter
    model.eval().save_pretrained(folder)
    tokenizer_of(special).save_pretrained(folder)
    return model


def tokenizer_of(special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: id for id, token in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)
