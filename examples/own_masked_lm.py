"""Fit a head for a masked language model of Hugging Face, in forty lines.

python examples/own_masked_lm.py --model answerdotai/ModernBERT-base --text my.txt --to my-head
python examples/own_masked_lm.py      # a tiny model with random weights, so that this runs anywhere, in seconds

It needs transformers: pip install -c constraints.txt -e '.[hf]'
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch

import circuits as ct
import diffusion as df

SENTENCES = ["the cat sat on the mat .", "the dog lay on the rug .", "the cat sat in the sun ."]


def fit_head(
    model: str, text: str, to: Path, *, block_length: int = 16, num_states: int = 64, steps: int = 200
) -> None:
    denoiser, tokenizer = df.load_denoiser(model), df.load_tokenizer(model)

    # 1. Blocks of text; the last tenth is held out. The circuit has a category for every token that occurs.
    tokens = torch.tensor(tokenizer.encode(text))
    blocks = tokens[: len(tokens) // block_length * block_length].view(-1, block_length)
    train, held_out = blocks.split([len(blocks) * 9 // 10, len(blocks) - len(blocks) * 9 // 10])
    vocabulary, categories = tokens.unique(return_inverse=True)
    categories = categories[: blocks.numel()].view_as(blocks)[: len(train)]

    # 2. A hidden Markov model of these blocks, by maximum likelihood.
    pc = ct.compile(ct.structures.hmm(block_length, num_states, len(vocabulary)), seed=0)
    ct.learning.fit(pc, categories, optimizer="minibatch_em", num_epochs=5, progress=False)

    # 3. What the model says about noised blocks, written once: predictions, and the hidden states behind them.
    options = {"block_length": block_length, "features": True, "progress": False}
    cache = df.cache_logits(denoiser, train, to / "train", masks_per_window=2, **options)
    validation = df.cache_logits(denoiser, held_out, to / "validation", **options)

    # 4. The head: circuit, calibration by noise, and potentials on its states read from the hidden states.
    conditioners = [
        df.NoiseCalibration(len(vocabulary)),
        df.LatentPotentials.for_hmm(pc, cache.features.shape[-1]),
    ]
    head = df.CoupledHead(
        pc, conditioners=conditioners, vocabulary=vocabulary, tokenizer_fingerprint=denoiser.tokenizer_fingerprint
    )
    config = df.CircuitTraining(steps=steps, batch_size=32, validate_every=50, patience=3)
    df.fit_coupled(head, cache, held_out=validation, config=config, progress=False)
    print(df.evaluation.misspecification_gap(denoiser, head, held_out, mask_ratios=(0.25, 0.5, 0.75)))

    # 5. Save it, and fill eight masks in one call of the model. (unfactor generate --model ... --head ... does it too.)
    head.save(to / "head")
    canvas = held_out[:2].clone()
    canvas[:, 4:12] = denoiser.spec.mask_id
    out = df.infill(denoiser, canvas, num_steps=1, head=df.CoupledHead.load(to / "head"), temperature=1.0, seeds=[0, 1])
    print(*(repr(tokenizer.decode(row)) for row in out.tokens.tolist()), sep="\n")


def tiny_model(folder: Path, text: str) -> str:
    """Write a BERT over words with random weights, which stands for a model of the hub."""
    import transformers

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(text.split()))]
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokens), pad_token_id=0, max_position_embeddings=64, **shape)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    transformers.BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name on the hub, or a folder")
    parser.add_argument("--text", type=Path, help="a file of text")
    parser.add_argument("--to", type=Path, help="a folder for caches and the head")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.to or Path(temporary)
        text = chosen.text.read_text("utf-8") if chosen.text else " ".join(random.Random(0).choices(SENTENCES, k=600))
        fit_head(chosen.model or tiny_model(Path(temporary) / "model", text), text, folder)
