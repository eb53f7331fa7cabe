"""A byte-level BPE with M3's markers, learned from the conversations themselves."""

import random
import sys
from pathlib import Path
from typing import Any

import conversations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE

sys.path.append(str(Path(__file__).parents[2]))
from tests.checkpoints.random_model import add_markers, m3_tokenizer, write_processing

PIECES = 1280
TEXTS = 3000
LONGEST_CONTEXT = 4096


def train(seed: int) -> Tokenizer:
    """Digits stand alone, so that sums are worked out by columns."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(random.Random(seed)), trainer)
    add_markers(tokenizer)
    return tokenizer


def _texts(rng: random.Random) -> list[str]:
    # The template needs a tokenizer to be rendered by; any will do for that.
    encoder = conversations.Encoder(with_template(m3_tokenizer()))
    texts = []
    for _ in range(TEXTS):
        cases = conversations.draw(rng, 0.5, lambda text: len(text.split()))
        texts.append(encoder.text(cases) if rng.random() < 0.3 else "\n".join(_said(case) for case in cases))
    return texts


def _said(case: Any) -> str:
    return " ".join(str(value) for message in (*case.messages, case.reply) for value in message.values())


def with_template(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="]~!b[", eos_token="[e~[")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save(tokenizer: Tokenizer, directory: Path) -> None:
    write_processing(directory, tokenizer, LONGEST_CONTEXT)
