"""The model card: what the model is, how it was made, and what it is worth."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
import yaml

import vanishing
from vanishing.workflow.figures import figures, original_in_words
from vanishing.workflow.job import Result
from vanishing.workflow.models import shown_name
from vanishing.workflow.tasks import TaskName


def model_card(result: Result) -> str:
    """Return the card as Markdown, with the fields that the Hugging Face hub reads."""
    settings = result.job.settings
    facts = result.to_dict()
    name = shown_name(settings.model)
    head: dict[str, Any] = {"library_name": "vanishing", "tags": ["vanishing", "compressed"]}
    is_language = result.job.task.name is TaskName.CAUSAL_LM
    head["pipeline_tag"] = "text-generation" if is_language else result.job.task.name.value
    if not os.path.isdir(settings.model):
        head["base_model"] = settings.model
    rows = figures(result, "{:,} bytes".format)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    recipe = result.recipe.to_yaml()
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {name}, compressed

{name} was made small while it was trained for {result.steps:,} optimizer steps: the original form of every compressed
layer faded out until step {result.fade:,} (Vanishing Contributions, arXiv 2510.09696).

| | original | this model |
|---|---|---|
{table}

Measured on {facts["held_out_examples"]:,} examples that neither was trained on: {facts["held_out"]}. The model was
saved and loaded again first. {original_in_words(result)}

```python
{_usage(result)}
```

## How it was made

- vanishing {vanishing.__version__}, torch {torch.__version__}, transformers {transformers.__version__}
- learning rate {settings.learning_rate:g}, epochs: {settings.epochs:g}, seed {settings.seed}
- examples in an optimizer step: {settings.batch_size * settings.accumulate * settings.processes}

```yaml
{recipe.strip()}
```
"""


def _usage(result: Result) -> str:
    if result.job.source.config.model_type == "timm_wrapper":
        return (
            "import vanishing\nfrom transformers import TimmWrapperConfig, TimmWrapperForImageClassification\n\n"
            'config = TimmWrapperConfig.from_pretrained("path/to/this/folder")\n'
            'model = vanishing.load("path/to/this/folder", TimmWrapperForImageClassification(config))'
        )
    return 'import vanishing\n\nmodel = vanishing.load("path/to/this/folder")'
