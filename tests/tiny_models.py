"""Folders with tiny models of transformers, their tokenizers and processors, and data that they can learn."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = {
    "food": ["bread", "apple", "soup", "cheese", "rice"],
    "sport": ["goal", "race", "team", "ball", "match"],
    "music": ["song", "piano", "drum", "choir", "tune"],
}
_FILLERS = ["the", "a", "was", "very", "and", "of", "in"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = [*_SPECIAL, *_FILLERS, *(word for words in WORDS.values() for word in words), "."]


def write_tokenizer(folder: Path, *, end: str = "[SEP]", padding: bool = True, framed: bool = True) -> None:
    """Write a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"unk_token": "[UNK]", "eos_token": end} | ({"pad_token": "[PAD]"} if padding else {})
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names)
    fast.save_pretrained(folder)


def bert_config(**settings: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    lengths = {"max_position_embeddings": 32, "vocab_size": len(VOCABULARY)}
    return transformers.BertConfig(**sizes, **lengths, **settings)


def write_bert(folder: Path, labels: list[str] | None = None, kind: str = "ForSequenceClassification") -> Path:
    """Write a BERT, with a head for these labels or without any, and its tokenizer."""
    torch.manual_seed(0)
    if labels is None:
        model = transformers.BertModel(bert_config())
    else:
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        model = getattr(transformers, f"Bert{kind}")(bert_config(**names))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_llama(folder: Path) -> Path:
    """Write a Llama, whose tokenizer has no padding, as is usual."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, vocab_size=len(VOCABULARY), eos_token_id=3, max_position_embeddings=32)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, padding=False, framed=False)
    return folder


def write_vit(folder: Path) -> Path:
    """Write a ViT without a head for images of 16 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of a topic's words and fillers, with their topics."""
    draw = random.Random(seed)
    topics = [draw.choice(list(WORDS)) for _ in range(count)]
    return [(" ".join([*draw.choices(_FILLERS, k=3), *draw.choices(WORDS[t], k=4)]), t) for t in topics]


def write_csv(file: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("text", "label")) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return file


def write_tagged(file: Path, count: int) -> Path:
    """JSON lines of words with the topic of each as its tag."""
    tags = {word: topic for topic, words in WORDS.items() for word in words}
    with file.open("w") as stream:
        for text, _ in sentences(count):
            words = text.split()
            stream.write(json.dumps({"tokens": words, "tags": [tags.get(word, "O") for word in words]}) + "\n")
    return file


def write_images(folder: Path, count: int) -> Path:
    """One folder a class: dark and light images, in two sizes."""
    draw = random.Random(0)
    for name, base in (("dark", 0), ("light", 170)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            color = tuple(base + draw.randrange(80) for _ in range(3))
            Image.new("RGB", (20, 16 + i % 2), color).save(folder / name / f"{i}.png")
    return folder
