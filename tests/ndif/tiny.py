"""A tiny random Llama with the word tokenizer of `fakes.py`: jobs on it take milliseconds, so faults can be many.

`python tests/ndif/tiny.py FOLDER` writes it, for `scripts/ndif/up FOLDER=tests/tiny-llama`. Seeded: every call writes
the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fakes import words_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REPO_ID = "tests/tiny-llama"
VOCAB = 64


def write(folder: Path) -> None:
    """Save model and tokenizer; weights are large enough for effects of the order of 1."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3, generator=generator)
        model.get_input_embeddings().weight.mul_(3)
    model.save_pretrained(folder)
    words_tokenizer(chat=True).save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
