"""A recipe: everything that a training run needs to know, in frozen dataclasses."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """Examples that the package ``datasets`` loads.

    Attributes:
        dataset: name on the Hugging Face hub, a folder of ``save_to_disk``, or a folder of data files.
        name: configuration, where the data set has several ("rte" of "super_glue").
        split: "train", "validation[:100]", ...; None where there is but one.
        revision: of the hub's repository.
    """

    dataset: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Where the examples are.

    Attributes:
        train: file of training examples, one a line, for a task that is named its folder will do; or what
            ``datasets`` loads.
        evaluation: the same of held-out examples; without any the run does not evaluate.
        format: "tsv" (a header line, no quoting) or "jsonl"; None goes by the files' suffix.
    """

    train: str | DatasetRecipe
    evaluation: str | DatasetRecipe | None = None
    format: Literal["tsv", "jsonl"] | None = None

    def __post_init__(self) -> None:
        if self.format is not None and not any(isinstance(one, str) for one in (self.train, self.evaluation)):
            raise ValueError("format belongs to files, and none is named")


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """What the model reads and what it has to answer, by choice or freely; see ``lomo_ds.tasks.prompts``.

    Attributes:
        prompt: template; ``{column}`` stands for a column of the data.
        options: the possible answers as they follow the prompt (a leading space counts).
        response: column that holds the answer, in place of options.
        label: column that holds the right option, by its index or by its entry in ``label_names``.
        label_names: values of the label column in the order of ``options``; None means indices.
    """

    prompt: str
    options: tuple[str, ...] | None = None
    response: str | None = None
    label: str = "label"
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _require_plain_places(self.prompt)
        if (self.options is None) == (self.response is None):
            raise ValueError("give exactly one of options (answers to choose from) and response (a column)")
        if self.options is None:
            if self.label_names is not None:
                raise ValueError("label_names belong to options, not to response")
            return
        if len(self.options) < 2 or len(set(self.options)) < len(self.options) or "" in self.options:
            raise ValueError(f"options has to hold at least two different answers, given: {self.options}")
        if self.label_names is not None and len(self.label_names) != len(self.options):
            raise ValueError(f"label_names has {len(self.label_names)} entries, options {len(self.options)}")


def _require_plain_places(prompt: str) -> None:
    """Refuse a template that is none, or that asks for more than columns (formats, attributes)."""
    try:
        places = [place for place in string.Formatter().parse(prompt) if place[1] is not None]
    except ValueError as error:
        raise ValueError(f"prompt: {prompt[:100]!r} is not a template: {error}") from None
    for _, column, form, conversion in places:
        if form or conversion or not column or column.isdigit() or {".", "["} & set(column):
            raise ValueError(f"prompt: {prompt[:100]!r} may hold {{column}} in braces and nothing else")


@dataclass(frozen=True, kw_only=True)
class BatchRecipe:
    """How many examples make a step.

    Attributes:
        train_batch_size: examples a step over all ranks.
        micro_batch_size: examples that one rank takes through the model at a time; None means all its
            share, without accumulation.
    """

    train_batch_size: int
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} has to be at least 1, not {value}")

    def per_rank(self, world_size: int) -> tuple[int, int]:
        """(micro batch size, micro batches a step) of each of ``world_size`` ranks.

        Raises:
            ValueError: the batch does not divide.
        """
        share, rest = divmod(self.train_batch_size, world_size)
        if rest:
            raise ValueError(
                f"batch.train_batch_size {self.train_batch_size} does not divide over {world_size} ranks"
            )
        micro = self.micro_batch_size or share
        if share % micro:
            raise ValueError(
                f"batch.micro_batch_size {micro} does not divide a rank's share of {share} "
                f"(batch.train_batch_size {self.train_batch_size} over {world_size} ranks)"
            )
        return micro, share // micro


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """Fills ``"optimizer": {"params": ...}`` of the DeepSpeed JSON; None leaves that key to the JSON.

    Attributes:
        lr: peak learning rate.
        weight_decay: L2 coefficient.
    """

    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        _require_finite(lr=self.lr, weight_decay=self.weight_decay)


def _require_finite(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} has to be a finite number of at least 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Low-rank adapters beside the model's own weights, trained by AdamW.

    Attributes:
        r: rank of an adapter.
        alpha: an adapter adds alpha / r times its product.
        target_modules: ends of the names of the linear layers that get one.
        lr: peak learning rate of the adapters.
        weight_decay: AdamW's, of the adapters.
        train_base: train the model's own weights, too, by the JSON's optimizer; False freezes them.
    """

    r: int = 2
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    lr: float = 5e-4
    weight_decay: float = 0.0
    train_base: bool = True

    def __post_init__(self) -> None:
        _require_finite(lr=self.lr, weight_decay=self.weight_decay, alpha=self.alpha)
        if self.r < 1:
            raise ValueError(f"r has to be at least 1, not {self.r}")
        if not self.target_modules:
            raise ValueError("target_modules has to name at least one layer")


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe:
    """How the learning rate moves.

    Attributes:
        type: "linear" or "cosine" (to 0 at the last step), "constant", or the name of a scheduler of
            DeepSpeed, whose "scheduler" section it becomes. None leaves it to the JSON.
        warmup_ratio: part of all steps over which the rate rises linearly, in [0, 1).
        params: of DeepSpeed's scheduler; the value "auto" is filled in for numbers of steps and rates.
    """

    type: str | None = None
    warmup_ratio: float = 0.0
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio has to be in [0, 1), not {self.warmup_ratio}")


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """How the held-out examples are scored.

    Attributes:
        num_examples: the first so many of the file; None means all.
        batch_size: prompts that one rank takes through the model at a time.
        before: score the untouched model, too.
    """

    num_examples: int | None = None
    batch_size: int = 16
    before: bool = True

    def __post_init__(self) -> None:
        for name in ("num_examples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} has to be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    """When a run can be gone on with. A run that is told to stop (SIGTERM, SIGUSR1) saves in any case.

    Attributes:
        every: steps from one checkpoint to the next; None saves only when told to stop.
        keep_last: checkpoints that stay.
        asynchronous: write beside training; takes host memory for a copy of the shards.
        compress: store weights in bfloat16 in three quarters of their bytes, without loss.
    """

    every: int | None = None
    keep_last: int = 2
    asynchronous: bool = False
    compress: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} has to be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run from model to metric. docs/training.md explains every key.

    Attributes:
        model: folder in Hugging Face format, or the name of one on the hub.
        data: where the examples are.
        task: prompt and options, or the name of a task (``lomo_ds.tasks.named``).
        batch: examples a step.
        output: folder for the results, relative to the working directory.
        deepspeed: DeepSpeed JSON.
        trust_remote_code: allow a model that brings its own code.
        weights: a universal checkpoint of DeepSpeed; its parameters take the place of the model's own.
        max_sequence_length: tokens; longer prompts lose their beginning.
        epochs: passes over the training examples; exactly one of epochs and steps is given.
        steps: optimizer steps.
        optimizer: learning rate and weight decay.
        lora: adapters; None trains the model's own weights alone.
        schedule: of the learning rate.
        activation_checkpointing: recompute activations in backward (reentrant, which needs least memory).
        evaluation: how the held-out examples are scored.
        checkpoint: when the run is saved to ``output/checkpoints``.
        resume: "auto" goes on from the newest whole checkpoint of ``output``, or begins where there is
            none; a checkpoint's folder goes on from that one.
        save_model: write the trained model to ``output/model``.
        seed: of the order of the examples and of dropout.
        overwrite: replace the results of an earlier run in ``output``.
    """

    model: str
    data: DataRecipe
    task: TaskRecipe | str
    batch: BatchRecipe
    output: str
    deepspeed: str
    trust_remote_code: bool = False
    weights: str | None = None
    max_sequence_length: int = 512
    epochs: int | None = None
    steps: int | None = None
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    lora: LoraRecipe | None = None
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    activation_checkpointing: bool = False
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    resume: str | None = None
    save_model: bool = True
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"give exactly one of epochs and steps, not epochs {self.epochs}, steps {self.steps}"
            )
        if self.resume == "":
            raise ValueError("resume has to be auto or the folder of a checkpoint; delete it to begin anew")
        for name in ("epochs", "steps", "max_sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} has to be at least 1, not {value}")
