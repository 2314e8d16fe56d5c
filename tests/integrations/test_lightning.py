"""Lightning's callback against a plain loop, its own checkpoints and evaluation by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

import vanishing
from vanishing import (
    LinearSchedule,
    LocalLoss,
    LowRank,
    MagnitudePruning,
    Quantization,
    Recipe,
    StepSchedule,
    Teacher,
    Transition,
    TransitionError,
)
from vanishing.integrations.lightning import TransitionCallback

pytestmark = pytest.mark.filterwarnings("ignore")
"""Lightning warns of missing workers, of an `lr_scheduler` and of much else."""

BATCH, EXAMPLES, EPOCHS = 4, 40, 2
STEPS = EPOCHS * EXAMPLES // BATCH


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(EXAMPLES, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class Classifier(LightningModule):
    """A small network; its validation loss gets worse each time if `falling`."""

    def __init__(self, *, falling: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.falling = falling
        self.validations = 0
        self.validated: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.network(inputs), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.validations += 1
        loss = self.loss(batch)
        self.validated.append(loss.item())
        self.log("val_loss", torch.tensor(float(self.validations)) if self.falling else loss)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class BetaAtEachStep(Callback):
    """Notes beta after every batch."""

    def __init__(self, transition: Transition) -> None:
        self.transition = transition
        self.betas: list[float] = []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.betas.append(self.transition.beta)


def prepared(technique: Any = None, steps: int | str = "40%", **settings: Any) -> tuple[Classifier, Transition]:
    module = Classifier(**settings)
    return module, vanishing.prepare(module.network, technique or MagnitudePruning(0.5), steps=steps)


def trainer_for(folder: Path, transition: Transition, *callbacks: Callback, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": folder,
    }
    return Trainer(callbacks=[TransitionCallback(transition), *callbacks], **(settings | changes))


def train_loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=BATCH)


def whole() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=EXAMPLES)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_lightning_and_a_plain_loop_train_the_same_model(tmp_path: Path) -> None:
    module, transition = prepared()
    watch = BetaAtEachStep(transition)
    trainer_for(tmp_path, transition, watch).fit(module, train_loader())

    plain, by_hand = prepared(steps=round(0.4 * STEPS))
    optimizer = plain.configure_optimizers()
    betas = []
    plain.train()
    for _ in range(EPOCHS):
        for batch in train_loader():
            optimizer.zero_grad()
            plain.loss(batch).backward()
            optimizer.step()
            by_hand.step()
            betas.append(by_hand.beta)
    assert watch.betas == betas
    assert betas[7] == 0.0 < betas[6]
    assert same_weights(module, plain)
    transition.finish()


def test_beta_follows_optimizer_steps_whatever_is_accumulated(tmp_path: Path) -> None:
    module, transition = prepared(steps=4)
    watch = BetaAtEachStep(transition)
    trainer_for(tmp_path, transition, watch, accumulate_grad_batches=4).fit(module, train_loader())
    # Ten batches an epoch are steps of four, four and two.
    assert watch.betas == [1, 1, 1, 0.75, 0.75, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25] + [0] * 7
    transition.finish()


@pytest.mark.parametrize("stop", [10, 20, 30])
@pytest.mark.parametrize("technique", [MagnitudePruning(0.5), LowRank(rank=2)], ids=["pruning", "low rank"])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(technique: Any, stop: int, tmp_path: Path) -> None:
    uninterrupted, transition = prepared(technique, steps="50%")
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    trainer_for(tmp_path, transition, keep, max_epochs=4).fit(uninterrupted, train_loader())
    transition.finish()
    resumed, transition = prepared(technique, steps="50%")
    path = str(tmp_path / f"step={stop}.ckpt")
    trainer_for(tmp_path, transition, max_epochs=4).fit(resumed, train_loader(), ckpt_path=path)
    transition.finish()
    assert same_weights(resumed, uninterrupted)


def test_evaluation_is_of_the_shipped_form(tmp_path: Path) -> None:
    module, transition = prepared(steps=10)
    transition.seek(4)
    run = trainer_for(tmp_path, transition)
    result = run.test(module, whole(), verbose=False)[0]["val_loss"]
    module.eval()
    batch = next(iter(whole()))
    with torch.no_grad():
        blend = module.loss(batch).item()
        with transition.compressed():
            shipped = module.loss(batch).item()
    assert result == pytest.approx(shipped, rel=1e-6)
    assert result != pytest.approx(blend, rel=1e-3)
    assert transition.beta == 0.6
    transition.finish(force=True)
    assert trainer_for(tmp_path, transition).test(module, whole(), verbose=False)[0]["val_loss"] > 0


def test_the_best_checkpoint_and_early_stopping_wait_for_the_end(tmp_path: Path) -> None:
    module, transition = prepared(falling=True)
    best = ModelCheckpoint(dirpath=tmp_path, filename="{step}", monitor="val_loss", save_top_k=1)
    stop = EarlyStopping("val_loss", patience=3)
    run = trainer_for(tmp_path, transition, best, stop, val_check_interval=2)
    run.fit(module, train_loader(), whole())
    # The fade ends at step 8; the first evaluation from there on is the best, and three worse ones follow.
    assert best.best_model_path == str(tmp_path / "step=8.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=8.ckpt"]
    assert run.global_step == 14
    transition.finish()


def test_what_is_best_by_a_training_metric_waits_as_well(tmp_path: Path) -> None:
    module, transition = prepared(steps=25)
    module.training_step = lambda batch, batch_idx: rising(module, batch)  # type: ignore[method-assign]
    best = ModelCheckpoint(dirpath=tmp_path, filename="{step}", monitor="train_loss", save_top_k=1)
    stop = EarlyStopping("train_loss", patience=1, check_on_train_epoch_end=True)
    run = trainer_for(tmp_path, transition, best, stop, max_epochs=6)
    run.fit(module, train_loader())
    # Epochs end at steps 10, 20, 30 and on: the third is the first one after the fade.
    assert best.best_model_path == str(tmp_path / "step=30.ckpt")
    assert run.global_step == 40
    # On with the same Trainer.
    transition.finish()
    run.fit_loop.max_epochs = 7
    run.should_stop = False
    run.fit(module, train_loader())


def rising(module: Classifier, batch: Any) -> Tensor:
    module.log("train_loss", torch.tensor(float(module.global_step)))
    return module.loss(batch)


def test_a_training_without_a_known_length_takes_steps_only(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(data())

    module, transition = prepared(steps=4)
    endless: Any = DataLoader(Endless(), batch_size=BATCH)
    trainer_for(tmp_path, transition, log_every_n_steps=0).fit(module, endless)
    assert transition.done
    module, transition = prepared(steps="40%")
    with pytest.raises(TransitionError, match="length is not known"):
        trainer_for(tmp_path, transition).fit(module, endless)


def test_a_checkpoint_is_tested_as_it_was_in_training(tmp_path: Path) -> None:
    recipe = Recipe({"*": Quantization(bits=2)}, schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=5))
    module = Classifier()
    transition = vanishing.prepare(module.network, recipe)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}")
    run = trainer_for(tmp_path, transition, keep)
    run.fit(module, train_loader())
    expected = run.test(module, whole(), verbose=False)[0]["val_loss"]
    fresh = Classifier()
    again = vanishing.prepare(fresh.network, recipe)
    path = str(tmp_path / f"step={STEPS}.ckpt")
    got = trainer_for(tmp_path, again).test(fresh, whole(), ckpt_path=path, verbose=False)[0]["val_loss"]
    assert got == pytest.approx(expected, rel=1e-6)
    assert again.steps_done == STEPS


def test_beta_and_the_gap_are_logged(tmp_path: Path) -> None:
    module, transition = prepared(steps=30)
    run = trainer_for(tmp_path, transition, log_every_n_steps=5, max_epochs=4)
    run.fit(module, train_loader())
    assert run.logged_metrics["beta"] == 0.0
    assert run.logged_metrics["gap"] == pytest.approx(transition.gap(), rel=1e-5)


def test_a_training_shorter_than_the_fade_is_refused_before_it_begins(tmp_path: Path) -> None:
    module, transition = prepared(steps=STEPS + 1)
    with pytest.raises(TransitionError, match=rf"ends at optimizer step {STEPS + 1} and the training at step {STEPS}"):
        trainer_for(tmp_path, transition).fit(module, train_loader())


def test_the_trainer_must_have_the_prepared_model(tmp_path: Path) -> None:
    _, transition = prepared()
    with pytest.raises(TransitionError, match="another model"):
        trainer_for(tmp_path, transition).fit(Classifier(), train_loader())


def test_a_checkpoint_without_a_transition_is_refused(tmp_path: Path) -> None:
    module, transition = prepared()
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer_for(tmp_path, transition, keep).fit(module, train_loader())
    path = tmp_path / "step=4.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["callbacks"] = {key: value for key, value in checkpoint["callbacks"].items() if "Transition" not in key}
    torch.save(checkpoint, path)
    module, transition = prepared()
    with pytest.raises(TransitionError, match="without a TransitionCallback"):
        trainer_for(tmp_path, transition).fit(module, train_loader(), ckpt_path=str(path))


class Distilled(Classifier):
    """A classifier that learns from its original, too."""

    def __init__(self) -> None:
        super().__init__()
        recipe = Recipe(
            {"*": LowRank(rank=2)},
            schedule=LinearSchedule(steps=5),
            distillation=[LocalLoss(), Teacher(features=("0",))],
        )
        self.transition = vanishing.prepare(self.network, recipe)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + self.transition.auxiliary_loss()


def test_a_training_step_adds_the_auxiliary_loss(tmp_path: Path) -> None:
    module = Distilled()
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=8,
        callbacks=[TransitionCallback(module.transition)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data(), batch_size=BATCH))

    plain = Distilled()
    optimizer: Any = plain.configure_optimizers()
    for index, batch in enumerate(DataLoader(data(), batch_size=BATCH)):
        if index == 8:
            break
        plain.training_step(batch, index).backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.transition.step()
    expected = plain.network.state_dict()
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
