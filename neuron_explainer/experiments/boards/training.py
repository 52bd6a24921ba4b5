"""Trains ``BoardGPT`` and ``LEA`` with the library's one loop: folders, logs, checkpoints, resuming.

    config = BoardTrainingConfig(model="gpt")
    train(config, BoardDataset(), "runs/gpt-factor")

The loss is the mean cross-entropy over all cells, visible ones too. LEA adds that of the board drawn from
words, and what the quantiser asks for. AdamW, weight decay on matrices only, one learning rate throughout.

Shape legend: ``b`` boards, ``s`` cells, ``v`` tokens.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer import files
from neuron_explainer.dictionaries.batches import BatchSource
from neuron_explainer.dictionaries.loop import Loop, Plan
from neuron_explainer.dictionaries.runs import RunFolder
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.experiments.boards.blocks import ModelType
from neuron_explainer.experiments.boards.curriculum import (
    CURRICULA,
    BoardBatch,
    BoardBatches,
    Curriculum,
)
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.gpt import BoardGPT, GPTSizes
from neuron_explainer.experiments.boards.lea import LEA, LEASizes
from neuron_explainer.experiments.boards.measures import accuracies
from neuron_explainer.experiments.boards.model_files import (
    BoardModel,
    StoredModel,
    fill,
    load_model,
    save_model,
)
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.devices import check_device
from neuron_explainer.settings import check_types, read_fields

logger = logging.getLogger(__name__)

ModelName = Literal["gpt", "lea"]
MODELS: tuple[ModelName, ...] = ("gpt", "lea")
EPOCHS: dict[str, int] = {"gpt": 2000, "lea": 3000}
"""Enough for each curriculum to end, and for the model to settle after it."""


@dataclass(frozen=True)
class BoardTrainingConfig:
    """Everything that decides the weights, besides the data set. The defaults are the paper's."""

    model: ModelName = "gpt"
    """gpt: the factored transformer; lea: the language-enhanced architecture."""
    type: ModelType = "factor"
    """factor: positions beside the stream; vanilla: positions added to the tokens."""
    epochs: int | None = None
    """Epochs of ``boards_per_epoch`` boards. Default: 2000 for gpt, 3000 for lea."""
    boards_per_epoch: int = 1000
    """Boards of an epoch, drawn with replacement from the training sets."""
    batch_size: int = 64
    """Boards of a step."""
    pace: float = 1.0
    """Epochs of the curriculum that go by in one epoch: 2 makes it end in half the time."""
    learning_rate: float = 1e-3
    """Of AdamW, throughout."""
    weight_decay: float = 0.01
    """On matrices of linear maps only."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and arithmetic."""
    seed: int = 0
    """Random seed of weights, boards and masks."""
    device: str = "cpu"
    """Where the model is trained."""
    log_every: int = 1
    """Epochs between two lines of the log."""
    evaluate_every: int = 250
    """Epochs between two measurements of accuracy on held-out boards; 0: never."""
    checkpoint_every: int = 25
    """Epochs between two checkpoints."""

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("boards_per_epoch", "batch_size", "log_every", "checkpoint_every")
        for name in counts:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("epochs", self.epochs is None or self.epochs >= 1, "at least 1")
        self._check("evaluate_every", self.evaluate_every >= 0, "at least 0")
        for name in ("pace", "learning_rate"):
            self._check(name, getattr(self, name) > 0, "above 0")
        self._check("weight_decay", self.weight_decay >= 0, "at least 0")
        self._check("seed", 0 <= self.seed < 2**31, "in 0 to 2**31 - 1")

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            found = getattr(self, name)
            raise InputError(f"BoardTrainingConfig: {name} must be {expected}, found {found}.")

    @property
    def n_epochs(self) -> int:
        """``epochs``, or the default of the architecture."""
        return EPOCHS[self.model] if self.epochs is None else self.epochs

    @property
    def curriculum(self) -> Curriculum:
        """The schedules of the architecture."""
        return CURRICULA[self.model]


def make_model(config: BoardTrainingConfig, dataset: BoardDataset) -> BoardModel:
    """A new model of the architecture, for boards of the data set."""
    boards, device = dataset.config, check_device(config.device)
    model: BoardModel
    if config.model == "gpt":
        model = BoardGPT(GPTSizes(config.type, boards.vocab_size, boards.n_cells), config.seed)
    else:
        model = LEA(LEASizes(config.type, boards.vocab_size, boards.n_cells), config.seed)
    return model.to(device=device, dtype=getattr(torch, config.dtype))


class BoardStep(NamedTuple):
    """What one step computed."""

    n_tokens: int
    """Cells."""
    numbers: dict[str, Tensor]
    """Losses and errors, each one number."""


def board_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over all cells, of logits ``[b, s, v]``."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class BoardTrainer:
    """A model and its optimiser: the learner that the training loop drives.

    Args:
        model: is trained in place.
        config: settings.
        dataset: the boards it is measured on; its checksum is part of the run's settings.
        result: folder to save the model to at the end, before the run counts as finished.
    """

    def __init__(
        self,
        model: BoardModel,
        config: BoardTrainingConfig,
        dataset: BoardDataset,
        result: Path | None = None,
    ) -> None:
        self.model, self.config, self.dataset, self.result = model, config, dataset, result
        self.steps_per_epoch = -(-config.boards_per_epoch // config.batch_size)
        self._named = {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
        matrices = {
            f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)
        }
        decayed = [p for n, p in self._named.items() if n in matrices]
        others = [p for n, p in self._named.items() if n not in matrices]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._sums: dict[str, Tensor] = {}
        self._n = 0

    def settings(self) -> dict[str, Any]:
        """What ``config.json`` of the run records."""
        c = asdict(self.config) | {"epochs": self.config.n_epochs}
        # At the top, where the loop's list of settings that may change looks for it.
        epochs = c.pop("epochs")
        boards = {"config": asdict(self.dataset.config), "checksum": self.dataset.checksum}
        return {"kind": RUN_KIND, "epochs": epochs, "training": c, "boards": boards}

    def begin(self, source: BatchSource) -> None:
        """Nothing to measure before training."""

    def learn(self, batch: BoardBatch, step: int) -> BoardStep:
        """One step of AdamW."""
        tokens, masked = (x.to(self.config.device) for x in batch)
        epoch = step // self.steps_per_epoch * self.config.pace
        if isinstance(self.model, LEA):
            loss, numbers = self._lea_loss(self.model, tokens, masked, epoch, step)
        else:
            logits = self.model(masked)
            loss = board_loss(logits, tokens)
            numbers = {"loss": loss.detach()} | _errors("", logits, tokens, masked)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        self.optimiser.step()
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._n += 1
        return BoardStep(tokens.numel(), numbers)

    def _lea_loss(
        self, model: LEA, tokens: Tensor, masked: Tensor, epoch: float, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of all passes; before words count, the first pass alone is run."""
        curriculum = self.config.curriculum
        weight, blank = curriculum.words.at(epoch), curriculum.blank.at(epoch)
        output = model(masked, speak=weight > 0)
        loss = board_loss(output.from_board, tokens)
        numbers = {"loss_from_board": loss.detach()} | _errors(
            "", output.from_board, tokens, masked
        )
        if output.from_words is None:
            return loss, {"loss": loss.detach()} | numbers
        assert output.quantised is not None
        assert output.speech is not None
        quantised, from_words = output.quantised, board_loss(output.from_words, tokens)
        not_blank = (quantised.words != model.sizes.n_words - 1).to(loss.dtype).mean()
        loss = loss + weight * (quantised.loss + from_words) + blank * not_blank
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        model.quantiser.update(output.speech, quantised.words, generator)
        numbers |= {
            "loss": loss.detach(),
            "loss_from_words": from_words.detach(),
            "loss_quantiser": quantised.loss.detach(),
            "words_used": torch.tensor(float(quantised.words.unique().numel())),
        }
        return loss, numbers | _errors("_from_words", output.from_words, tokens, masked)

    def _check_finite(self) -> None:
        """An error if a loss since the last line of the log was not finite."""
        if not math.isfinite(float(self._sums.get("loss", 0.0))):
            raise InputError(
                f"the loss is not finite any more with a learning rate of {self.config.learning_rate:g}. "
                "Nothing of this epoch is saved; a checkpoint from before it stays. Lower the learning rate."
            )

    def metrics(self, result: BoardStep, step: int, tokens: int) -> dict[str, dict[str, float]]:
        """Means since the last line of the log; now and then, accuracies on held-out boards."""
        self._check_finite()
        found = (
            {name: float(total) / self._n for name, total in self._sums.items()} if self._n else {}
        )
        self._sums, self._n = {}, 0
        epoch, rest = divmod(step, self.steps_per_epoch)
        every = self.config.evaluate_every
        if every and not rest and (epoch % every == 0 or epoch == self.config.n_epochs):
            found |= accuracies(self.model, self.dataset)
        return {"model": found}

    def state(self) -> dict[str, Any]:
        """Weights and moments, by the parameters' names; an error if a loss was not finite."""
        self._check_finite()
        moments = {
            name: dict(self.optimiser.state[parameter])
            for name, parameter in self._named.items()
            if parameter in self.optimiser.state
        }
        sums = {name: torch.as_tensor(total) for name, total in self._sums.items()}
        return {
            "model": dict(self.model.state_dict()),
            "moments": moments,
            "sums": sums,
            "n": self._n,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self.model.load_state_dict(state["model"])
        for name, moments in state["moments"].items():
            parameter = self._named[name]
            # Copied, because files are mapped at any address, and rounding may depend on it.
            copies = {key: value.clone() for key, value in moments.items()}
            self.optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in copies.items()
            }
        self._sums, self._n = dict(state["sums"]), state["n"]

    def finish(self) -> dict[str, Autoencoder]:
        """Save the model; there are no autoencoders."""
        if self.result is not None:
            save_model(
                self.model, self.result, self.dataset, record_of(self.config), overwrite=True
            )
        return {}

    def outcome(self) -> dict[str, Any]:
        """Accuracies on held-out boards, unless they are never to be measured."""
        measured = self.config.evaluate_every > 0
        return {"metrics": accuracies(self.model, self.dataset) if measured else {}}


def _errors(suffix: str, logits: Tensor, tokens: Tensor, masked: Tensor) -> dict[str, Tensor]:
    """The share of all cells that are wrong, and of hidden ones."""
    wrong = logits.detach().argmax(-1) != tokens
    hidden = masked != tokens
    among_hidden = (wrong & hidden).sum() / hidden.sum().clamp(min=1)
    return {f"error{suffix}": wrong.float().mean(), f"error_hidden{suffix}": among_hidden}


RUN_KIND = "board_training"
MODEL_FOLDER, BOARDS_FOLDER = "model", "boards"


def train(
    config: BoardTrainingConfig,
    dataset: BoardDataset,
    folder: str | Path | None = None,
    *,
    progress: bool = True,
    log_to: tuple[str, ...] = (),
) -> BoardModel:
    """Train a model to the end, from the newest checkpoint in ``folder`` if there is one.

    Args:
        config: settings. A finished run continues if only ``epochs`` was raised.
        dataset: the boards. A run is not resumed with others.
        folder: for config, log, checkpoints, the boards and the model; None: nothing is saved.
        progress: whether to show a progress bar.
        log_to: "tensorboard", "wandb".
    """
    if missing := config.curriculum.unreached(config.n_epochs * config.pace):
        logger.warning(
            "%d epochs at pace %g are fewer than the curriculum of %s takes (%g); not reached: %s.",
            config.n_epochs,
            config.pace,
            config.model,
            config.curriculum.end,
            missing,
        )
    place = None if folder is None else Path(folder)
    batches = BoardBatches(
        dataset,
        config.curriculum,
        config.boards_per_epoch,
        config.batch_size,
        config.seed,
        config.pace,
    )
    model = make_model(config, dataset)
    trainer = BoardTrainer(model, config, dataset, None if place is None else place / MODEL_FOLDER)
    plan = Plan(
        log_every=config.log_every * batches.per_epoch,
        checkpoint_interval=config.checkpoint_every * batches.per_epoch,
        keep_checkpoints=2,
        total_steps=config.n_epochs * batches.per_epoch,
        passes=config.n_epochs,
    )
    loop = Loop(trainer, batches, plan)
    loop.run(place, progress=progress, log_to=log_to, callbacks=[_boards_writer(place, dataset)])
    return model


def load_run(folder: str | Path) -> StoredModel:
    """The model of a run: what it ended with, or what its newest checkpoint holds.

    The config says how far it was trained: ``epochs`` as planned, ``epochs_done``.
    """
    folder = Path(folder)
    if (folder / MODEL_FOLDER / "config.json").is_file():
        return load_model(folder)
    config = files.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("kind") != RUN_KIND:
        return load_model(folder)
    if missing := [name for name in ("boards", "training", "epochs") if name not in config]:
        raise CheckpointError(f"{folder / 'config.json'} lacks {', '.join(missing)}.")
    dataset = BoardDataset.load(folder / BOARDS_FOLDER)
    if dataset.checksum != config["boards"].get("checksum"):
        raise CheckpointError(
            f"{folder / BOARDS_FOLDER} are not the boards of this run: expected the checksum "
            f"{config['boards'].get('checksum')}, found {dataset.checksum}."
        )
    values = {**config["training"], "epochs": config["epochs"]}
    training = read_fields(BoardTrainingConfig, values, str(folder), error=CheckpointError)
    place = RunFolder(folder, {k: v for k, v in config.items() if k != "format_version"}, 2)
    with place.claimed():
        state = place.load_checkpoint()
    if state is None:
        raise CheckpointError(f"{folder} has no checkpoint yet.")
    model = make_model(replace(training, device="cpu"), dataset)
    fill(model, state["model"], f"the checkpoint of {folder}")
    per_epoch = -(-training.boards_per_epoch // training.batch_size)
    return StoredModel(model, dataset, record_of(training, state["step"] / per_epoch))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training's log: ``step`` and the numbers of the model. A last line that a killed process
    did not finish is left out."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            read = json.loads(line)
            found.append({"step": read["step"], **read["dictionaries"]["model"]})
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{path}, line {number}: expected JSON with a step and the numbers of a board model, found "
                f"{line[:40].decode('utf-8', 'replace')!r}."
            ) from None
    return found


def thinned_log(folder: str | Path, lines: int = 200) -> str:
    """The log of a run, or every so many lines of it; empty if it has none."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        return ""
    found = path.read_text("utf-8", errors="replace").split("\n")[:-1]  # whole lines
    step = max(1, -(-len(found) // lines))
    return "".join(f"{line}\n" for line in found[step - 1 :: step])


def record_of(config: BoardTrainingConfig, epochs_done: float | None = None) -> dict[str, Any]:
    """What a model's ``config.json`` says about its training."""
    done = config.n_epochs if epochs_done is None else epochs_done
    return {"training": asdict(config) | {"epochs": config.n_epochs, "epochs_done": done}}


def _boards_writer(place: Path | None, dataset: BoardDataset) -> Any:
    """A callback that puts the boards into the run's folder after the first step."""

    def write(step: int, result: BoardStep) -> None:
        if place is not None and not (place / BOARDS_FOLDER).exists():
            dataset.save(place / BOARDS_FOLDER)

    return write
