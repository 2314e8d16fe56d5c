"""Silence for the libraries below the command line."""

from __future__ import annotations

import logging
import warnings


def be_quiet() -> None:
    """Let the libraries below say nothing that the user cannot act on."""
    try:
        import datasets
        import huggingface_hub
        import transformers
    except ImportError:
        # Whoever needs one of them says so.
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
