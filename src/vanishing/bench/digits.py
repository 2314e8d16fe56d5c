"""scikit-learn's handwritten digits as a task: 1,797 gray images of 8 by 8 pixels that come with the package."""

from __future__ import annotations

import torch

from vanishing.bench.tasks import Examples, SmallViT, Task

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise ImportError("the digits need scikit-learn: pip install 'vanishing[demo]'") from error


def digits_task(seed: int, *, batch_size: int = 32) -> Task:
    """Return the digits with a small vision transformer.

    Args:
        seed: decides the stratified split (70 % to train on, 30 % to test on), the first weights and the batches.
        batch_size: examples a step.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    train, test = train_test_split(torch.arange(len(targets)), test_size=0.3, stratify=labels, random_state=seed)
    return Task(
        name="handwritten digits",
        seed=seed,
        make_model=SmallViT,
        layers="blocks.*",
        train=Examples(images[train], targets[train]),
        test=Examples(images[test], targets[test]),
        batch_size=batch_size,
    )
