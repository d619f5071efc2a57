"""Small trained tokenizers of every kind that checkpoints come with."""

from __future__ import annotations

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from onnxpress.compiler.sample_text import default_text

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = default_text()[:30_000] + "\nnaïve café — “quotes” 日本語 日本 ☃ 👩‍👩‍👧\n" * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _lines() -> list[str]:
    return TEXT.splitlines()


def byte_level(*, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """As GPT-2, SmolLM2 and Qwen have it; `ignore_merges` as Llama 3."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(_lines(), trainer)
    made.add_tokens(["<tool>", "    "])  # beyond the table
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma have it: merges by characters, bytes for those that are unknown."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        _lines(), trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    learned = [word for word in model["vocab"] if word not in SPECIAL]
    vocab = {word: index for index, word in enumerate([*SPECIAL, *BYTES, *learned])}
    merges = [tuple(one) for one in model["merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    return made


def suffixed() -> tokenizers.Tokenizer:
    """As CLIP and the first GPT have it: the last part of a word is marked."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(_lines(), trainer)
    return made


def unigram(*, byte_fallback: bool = False) -> tokenizers.Tokenizer:
    """As T5 and XLM-R have it; with `byte_fallback` as newer ones."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(_lines(), trainer)
    vocab = [tuple(one) for one in json.loads(trained.to_str())["model"]["vocab"]]
    if byte_fallback:
        vocab[3:3] = [(word, 0.0) for word in BYTES]
    made = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback(), decoders.Metaspace()] if byte_fallback else [decoders.Metaspace()]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    return made


def wordpiece() -> tokenizers.Tokenizer:
    """As BERT has it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    made.train_from_iterator(_lines(), trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_padding(pad_id=0, pad_token="[PAD]")
    return made


KINDS = {
    "byte_level": byte_level,
    "ignore_merges": functools.partial(byte_level, ignore_merges=True),
    "sentencepiece": sentencepiece,
    "suffixed": suffixed,
    "unigram": unigram,
    "unigram_bytes": functools.partial(unigram, byte_fallback=True),
    "wordpiece": wordpiece,
}


@functools.cache
def content(kind: str) -> str:
    """`tokenizer.json` of a kind; training is done once."""
    return str(KINDS[kind]().to_str())
