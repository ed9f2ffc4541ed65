"""Text: corpora, and tokenizers for training from scratch."""
