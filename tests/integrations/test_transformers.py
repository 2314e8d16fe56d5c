"""The Trainer's callback against a plain loop, its own checkpoints and evaluation by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import vanishing
from vanishing import (
    Adaptive,
    LinearSchedule,
    LocalLoss,
    LowRank,
    MagnitudePruning,
    Recipe,
    Staggered,
    Teacher,
    Transition,
    TransitionError,
)
from vanishing.integrations.transformers import TransitionCallback, last_complete_checkpoint

EXAMPLES, BATCH, EPOCHS = 48, 4, 2
STEPS = EPOCHS * EXAMPLES // BATCH
Example = dict[str, Tensor]


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (EXAMPLES, 12), generator=generator)
    # Whether the first word is from the first half of the vocabulary: something that can be learned.
    return [{"input_ids": row, "attention_mask": torch.ones(12).long(), "labels": (row[0] < 32).long()} for row in ids]


def bert(dropout: float = 0.1) -> Any:
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,
        )
    )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


class BetaAtEachStep(TrainerCallback):  # type: ignore[misc]
    """Notes beta as the model has it, after every optimizer step."""

    def __init__(self, transition: Transition) -> None:
        self.transition = transition
        self.betas: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.betas.append(self.transition.beta)


class WeightsAtStep(TrainerCallback):  # type: ignore[misc]
    """Copies the weights after one optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            self.weights = {name: value.clone() for name, value in keywords["model"].state_dict().items()}


def trainer_for(
    folder: Path, model: nn.Module, transition: Transition, callbacks: tuple[Any, ...] = (), **changes: Any
) -> Any:
    data = examples()
    callback = TransitionCallback(transition)
    return Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data[:16],
        callbacks=[callback, *callbacks],
    )


def prepared(dropout: float = 0.1, steps: int | str = "40%", technique: Any = None) -> tuple[Any, Transition]:
    model = bert(dropout)
    return model, vanishing.prepare(model, technique or MagnitudePruning(0.5), steps=steps, ignore=["classifier"])


def test_the_trainer_and_a_plain_loop_train_the_same_model(tmp_path: Path) -> None:
    model, transition = prepared(dropout=0.0)
    watch = BetaAtEachStep(transition)
    run = trainer_for(
        tmp_path,
        model,
        transition,
        (watch,),
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
    )
    run.train()

    plain, by_hand = prepared(dropout=0.0, steps=round(0.4 * STEPS))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    data, betas = examples(), []
    plain.train()
    for step in range(STEPS):
        start = step * BATCH % EXAMPLES
        rows = data[start : start + BATCH]
        plain(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        by_hand.step()
        betas.append(by_hand.beta)

    assert watch.betas == betas
    assert betas[9] == 0.0 < betas[8]
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_beta_follows_optimizer_steps_whatever_is_accumulated(accumulation: int, tmp_path: Path) -> None:
    model, transition = prepared(steps=5)
    watch = BetaAtEachStep(transition)
    trainer_for(tmp_path, model, transition, (watch,), gradient_accumulation_steps=accumulation).train()
    assert len(watch.betas) == STEPS // accumulation
    assert watch.betas[:6] == [0.8, 0.6, 0.4, 0.19999999999999996, 0.0, 0.0]
    transition.finish()


@pytest.mark.parametrize("stop", [4, 10, 19, 21])
@pytest.mark.parametrize("technique", [MagnitudePruning(0.5), LowRank(rank=4)], ids=["pruning", "low rank"])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(technique: Any, stop: int, tmp_path: Path) -> None:
    whole, transition = prepared(technique=technique)
    trainer_for(tmp_path / "whole", whole, transition, save_strategy="steps", save_steps=stop).train()
    transition.finish()

    # A run that was killed just after its checkpoint: nothing of it is left but the folder.
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    resumed, transition = prepared(technique=technique)
    run = trainer_for(tmp_path / "resumed", resumed, transition)
    run.train(resume_from_checkpoint=str(checkpoint))
    transition.finish()
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("stop", [5, 13])
def test_what_an_adaptive_schedule_decided_is_in_the_checkpoint(stop: int, tmp_path: Path) -> None:
    def begun() -> tuple[Any, Transition]:
        model = bert()
        slow = Adaptive(Staggered(LinearSchedule(steps="40%")), limit=0.2, deadline="80%", every=2)
        return model, vanishing.prepare(model, Recipe({"*": MagnitudePruning(0.5)}, schedule=slow, ignore="classifier"))

    whole, transition = begun()
    watch = BetaAtEachStep(transition)
    trainer_for(tmp_path / "whole", whole, transition, (watch,), save_strategy="steps", save_steps=stop).train()
    # It was slower than its schedule, which takes 40 % of the steps, and yet over by the deadline.
    assert watch.betas[round(0.4 * STEPS)] > 0.0 == watch.betas[round(0.8 * STEPS) - 1]
    transition.finish()
    resumed, transition = begun()
    again = BetaAtEachStep(transition)
    run = trainer_for(tmp_path / "resumed", resumed, transition, (again,))
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert again.betas == watch.betas[stop:]
    transition.finish()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_tied_weights_that_are_compressed_together_are_in_the_checkpoint_once(tmp_path: Path) -> None:
    def tied() -> tuple[Any, Transition]:
        torch.manual_seed(1)
        config = GPT2Config(
            vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
        rules = {"transformer.wte": vanishing.Binary(), "lm_head": vanishing.Binary()}
        recipe = vanishing.Recipe(rules, schedule=vanishing.LinearSchedule(steps="50%"))
        return model, vanishing.prepare(model, recipe)

    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in examples()]
    whole, transition = tied()
    run = trainer_for(tmp_path, whole, transition, save_strategy="steps", save_steps=6)
    run.train_dataset = data
    run.train()
    transition.finish()
    with safe_open(tmp_path / "checkpoint-6" / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if "wte" in name or "lm_head" in name]) == 1  # noqa: SIM118
    # The model is as transformers made it again, and saves itself.
    whole.tie_weights()
    whole.save_pretrained(tmp_path / "own")

    resumed, transition = tied()
    run = trainer_for(tmp_path, resumed, transition)
    run.train_dataset = data
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    transition.finish()
    assert resumed.lm_head.weight is resumed.transformer.wte.weight
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_evaluation_is_of_the_shipped_form_and_of_the_blend(tmp_path: Path) -> None:
    model, transition = prepared(steps=10, technique=MagnitudePruning(0.95))
    run = trainer_for(tmp_path, model, transition, per_device_eval_batch_size=16)
    transition.seek(4)
    metrics = run.evaluate()
    model.eval()
    rows = examples()[:16]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        blend = model(**batch).loss.item()
        with transition.compressed():
            shipped = model(**batch).loss.item()
    assert metrics["eval_loss"] == pytest.approx(shipped, rel=1e-6)
    assert metrics["eval_blend_loss"] == pytest.approx(blend, rel=1e-6)
    assert shipped != pytest.approx(blend, rel=1e-4)
    transition.seek(10)
    assert "eval_blend_loss" not in run.evaluate()
    transition.finish()
    assert run.evaluate().keys() >= {"eval_loss"}


def test_the_log_shows_beta_and_the_gap_with_the_loss(tmp_path: Path) -> None:
    model, transition = prepared(steps=4)
    run = trainer_for(tmp_path, model, transition)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["beta"] for entry in entries[:5]] == [0.75, 0.5, 0.25, 0.0, 0.0]
    weights = [
        (module.parametrizations.weight.original.detach(), module.weight.detach())  # type: ignore[union-attr,operator]
        for module in model.modules()
        if isinstance(module, nn.Linear) and hasattr(module, "parametrizations")
    ]
    gaps = [((compressed - original).norm() / original.norm()).item() for original, compressed in weights]
    assert transition.gap() == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    assert 0.1 < entries[-1]["gap"] < 0.9


def test_the_best_model_is_one_of_the_compressed_ones(tmp_path: Path) -> None:
    model, transition = prepared(steps=12)
    run = trainer_for(
        tmp_path,
        model,
        transition,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    # Every evaluation is worse than the one before, so that the first one is best.
    falling = itertools.count(0, -1)
    run.compute_metrics = lambda _: {"score": next(falling)}
    at_12 = WeightsAtStep(12)
    run.add_callback(at_12)
    run.train()
    assert run.state.best_global_step == 12
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    for name, value in model.state_dict().items():
        assert torch.equal(value, at_12.weights[name]), name
    transition.finish()


@pytest.mark.parametrize("saving", [{"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "no"}])
def test_early_stopping_waits_for_the_end_of_the_transition(saving: dict[str, Any], tmp_path: Path) -> None:
    model, transition = prepared(steps=12)
    run = trainer_for(
        tmp_path,
        model,
        transition,
        (EarlyStoppingCallback(early_stopping_patience=3),),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=saving["save_strategy"] != "no",
        metric_for_best_model="score",
        greater_is_better=True,
        **saving,
    )
    falling = itertools.count(0, -1)
    run.compute_metrics = lambda _: {"score": next(falling)}
    run.train()
    # The evaluation of step 12 is the best, and three worse ones follow.
    assert run.state.global_step == 15
    transition.finish()


def test_the_shipped_model_can_be_trained_on(tmp_path: Path) -> None:
    model, transition = prepared()
    run = trainer_for(tmp_path, model, transition)
    run.train()
    transition.finish()
    run.train()
    assert run.state.global_step == STEPS


def test_a_checkpoint_counts_only_when_it_was_written_to_its_end(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    model, transition = prepared()
    trainer_for(tmp_path, model, transition, save_strategy="steps", save_steps=10).train()
    newest = tmp_path / f"checkpoint-{STEPS}"
    assert last_complete_checkpoint(tmp_path) == str(newest)
    # The Trainer writes this file last: a process that is killed leaves a part of it, or none.
    state = newest / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-9])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_training_shorter_than_the_fade_is_refused_before_it_begins(tmp_path: Path) -> None:
    model, transition = prepared(steps=STEPS + 1)
    run = trainer_for(tmp_path, model, transition)
    with pytest.raises(TransitionError, match=rf"ends at optimizer step {STEPS + 1} and the training at step {STEPS}"):
        run.train()
    assert run.state.global_step == 0


def test_the_trainer_must_have_the_prepared_model(tmp_path: Path) -> None:
    _, transition = prepared()
    with pytest.raises(TransitionError, match="another model"):
        trainer_for(tmp_path, bert(), transition).train()


def test_a_checkpoint_without_a_transition_is_refused(tmp_path: Path) -> None:
    model, transition = prepared()
    trainer_for(tmp_path, model, transition, save_strategy="steps", save_steps=8).train()
    state_file = tmp_path / "checkpoint-8" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["stateful_callbacks"]["vanishing"]
    state_file.write_text(json.dumps(state))
    model, transition = prepared()
    with pytest.raises(TransitionError, match="without a TransitionCallback"):
        trainer_for(tmp_path, model, transition).train(resume_from_checkpoint=str(state_file.parent))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    model, transition = prepared()
    trainer_for(tmp_path, model, transition, save_strategy="steps", save_steps=8).train()
    model, transition = prepared(technique=MagnitudePruning(0.25))
    with pytest.raises(TransitionError, match="saved with another recipe"):
        trainer_for(tmp_path, model, transition).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_deepspeed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model, transition = prepared()
    trainer = trainer_for(tmp_path, model, transition)
    # DeepSpeed itself is not needed to ask for it.
    trainer.args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(TransitionError, match="Train with DistributedDataParallel or FSDP2"):
        trainer.train()
    assert transition.steps_done == 0


def test_a_callback_belongs_to_a_trainer() -> None:
    _, transition = prepared()
    with pytest.raises(TransitionError, match="must be called by transformers' Trainer"):
        TransitionCallback(transition).on_train_begin(None, None, None)


def test_a_run_resumed_at_its_very_end_trains_no_further(tmp_path: Path) -> None:
    # In the middle of an epoch, and with a learning rate that is not 0 at the end.
    changes: dict[str, Any] = {
        "max_steps": 15,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 15,
    }
    model, transition = prepared()
    trainer_for(tmp_path, model, transition, **changes).train()
    resumed, transition = prepared()
    run = trainer_for(tmp_path, resumed, transition, **changes)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert run.state.global_step == 15
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-15"]


@pytest.mark.parametrize("technique", [MagnitudePruning(0.5), LowRank(rank=4)], ids=["pruning", "low rank"])
def test_recomputed_activations_train_the_same_model(technique: Any, tmp_path: Path) -> None:
    models = []
    for checkpointing in (False, True):
        model, transition = prepared(technique=technique)
        if checkpointing:
            model.activation_checkpointing_enable()
        trainer_for(tmp_path, model, transition).train()
        transition.finish()
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], msg=name)


def test_training_in_bfloat16_autocast_ships_single_precision_weights(tmp_path: Path) -> None:
    model, transition = prepared(technique=LowRank(rank=4))
    run = trainer_for(tmp_path, model, transition, bf16=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    transition.finish()
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert run.evaluate()["eval_loss"] < before


class _Losses(TrainerCallback):  # type: ignore[misc]
    """Notes the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        named = keywords["model"].named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


DISTILLATION = (LocalLoss(weight=0.3), Teacher(features=("bert.encoder.layer.?",)))


def distilled(model: Any) -> Transition:
    rules = {"*.layer.*": LowRank(rank=4)}
    recipe = vanishing.Recipe(rules, schedule=vanishing.LinearSchedule(steps="40%"), distillation=DISTILLATION)
    return vanishing.prepare(model.train(), recipe)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("by_items", [False, True], ids=["mean of each part", "sum over all items"])
def test_the_auxiliary_loss_is_added_and_counts_alike_whatever_is_accumulated(
    by_items: bool, accumulation: int, tmp_path: Path
) -> None:
    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    model = bert(dropout=0.0)
    transition = distilled(model)
    watch = _Losses()
    run = trainer_for(
        tmp_path,
        model,
        transition,
        (watch,),
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=accumulation,
        max_steps=3,
    )
    run.compute_loss_func = summed if by_items else None
    # This model takes the number of items, but its loss is a mean all the same.
    run.model_accepts_loss_kwargs = False
    run.train()

    plain, data = bert(dropout=0.0), examples()
    by_hand = distilled(plain)
    by_hand.set_length(3)
    rows = [data[i * BATCH : (i + 1) * BATCH] for i in range(accumulation)]
    auxiliary = []
    for part in rows:
        loss = plain(**{name: torch.stack([row[name] for row in part]) for name in part[0]}).loss
        auxiliary.append(by_hand.auxiliary_loss().detach())
        ((loss + by_hand.auxiliary_loss()) / accumulation).backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(watch.gradients[0][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    assert entry["auxiliary_loss"] == pytest.approx(float(torch.stack(auxiliary).mean()), rel=1e-4)
    assert entry["loss"] > entry["auxiliary_loss"] > 0


@pytest.mark.parametrize("stop", [4, 16])
def test_a_distilled_run_that_is_resumed_ends_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    states = []
    for checkpoint in (None, str(tmp_path / "whole" / f"checkpoint-{stop}")):
        model = bert()
        transition = distilled(model)
        folder = tmp_path / ("resumed" if checkpoint else "whole")
        run = trainer_for(folder, model, transition, save_strategy="steps", save_steps=stop)
        run.train(resume_from_checkpoint=checkpoint)
        assert "auxiliary_loss" not in run.evaluate()
        states.append(transition.finish().state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_distilled_run_in_bfloat16_with_recomputed_activations(tmp_path: Path) -> None:
    model = bert()
    transition = distilled(model)
    model.activation_checkpointing_enable()
    run = trainer_for(tmp_path, model, transition, bf16=True)
    run.train()
    losses = [entry["auxiliary_loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    # After the fade it is the teacher's alone.
    assert sum(losses[9:14]) > sum(losses[-5:]) > 0
    transition.finish()
    run.train()
    assert "auxiliary_loss" not in run.state.log_history[0]
