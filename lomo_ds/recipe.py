"""A recipe: everything that a training run needs to know, in frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from lomo_ds.config import AtLeastOne, Fraction, NonNegative
from lomo_ds.recipe_data import DataRecipe, TaskRecipe


@dataclass(frozen=True, kw_only=True)
class BatchRecipe:
    """How many examples make a step.

    Attributes:
        train_batch_size: examples of a step, over all ranks.
        micro_batch_size: examples of one forward on each rank; None for the rank's whole share, without
            accumulation.
    """

    train_batch_size: AtLeastOne
    micro_batch_size: AtLeastOne | None = None

    def per_rank(self, world_size: int) -> tuple[int, int]:
        """(micro batch size, number of micro batches in a step) of each of ``world_size`` ranks.

        Raises:
            ValueError: the batch does not divide over the ranks, or the share of a rank into micro batches.
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

    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None


@dataclass(frozen=True, kw_only=True)
class LrSearchRecipe:
    """A short search for the learning rate before the run, on its training data alone.

    Attributes:
        steps: of each try, at most those of the run.
        num_examples: training examples that no try trains on and that judge it, at most a fifth of all.
    """

    steps: AtLeastOne = 20
    num_examples: AtLeastOne = 200


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Low-rank adapters in addition to the model's own weights, trained by AdamW.

    Attributes:
        r: rank of an adapter.
        alpha: an adapter adds alpha / r times its product.
        target_modules: linear layers that get an adapter, by the ends of their names.
        lr: peak learning rate of the adapters.
        weight_decay: of the adapters, as in AdamW.
        train_base: whether the JSON's optimizer trains the model's own weights, too; False freezes them, but
            for a classifier's head, which is trained as the adapters are.
    """

    r: AtLeastOne = 2
    alpha: NonNegative = 16.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    lr: NonNegative = 5e-4
    weight_decay: NonNegative = 0.0
    train_base: bool = True


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe:
    """How the learning rate changes over the steps.

    Attributes:
        type: "linear" or "cosine" (towards 0 after the last step), "constant", or the name of a scheduler of
            DeepSpeed, for the JSON's "scheduler" section. None leaves it to the JSON.
        warmup_ratio: share of the steps over which the learning rate rises linearly, in [0, 1).
        params: of DeepSpeed's scheduler; "auto" is replaced for numbers of steps and learning rates.
    """

    type: str | None = None
    warmup_ratio: Fraction = 0.0
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """How the held-out examples are scored.

    Attributes:
        num_examples: how many of the file's examples are scored, from the first; None for all.
        batch_size: prompts of one forward on each rank.
        before: score the model before training, too.
    """

    num_examples: AtLeastOne | None = None
    batch_size: AtLeastOne = 16
    before: bool = True


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    """When a run is saved, so that it can be resumed. A run that is told to stop by SIGTERM or SIGUSR1 is
    saved in any case.

    Attributes:
        every: steps from one checkpoint to the next; None saves only when the run is told to stop.
        keep_last: how many checkpoints are kept.
        asynchronous: write while training continues; needs host memory for a copy of the shards.
        compress: store bfloat16 weights in three quarters of their bytes, without loss.
    """

    every: AtLeastOne | None = None
    keep_last: AtLeastOne = 2
    asynchronous: bool = False
    compress: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run from model to metric. docs/training.md explains every key.

    Attributes:
        model: folder in Hugging Face format, or a model's name on the hub.
        data: where the examples are.
        task: prompt and answers, or the name of a task (``lomo_ds.tasks.named``).
        batch: examples of a step.
        output: folder for the results, relative to the working directory.
        deepspeed: path of the DeepSpeed JSON.
        dtype: of weights and computation, in place of the JSON's "bf16" and "fp16"; "auto" is bf16, or fp32
            where this machine is clearly faster in it. None leaves it to the JSON.
        trust_remote_code: allow a model that comes with its own code.
        model_class: of transformers, an auto class or a model's own; one for sequence classification gets
            a classifier of the task's options.
        weights: a universal checkpoint of DeepSpeed, whose parameters replace the model's own.
        chat_template_path: Jinja file that replaces the tokenizer's chat template; None keeps that.
        max_sequence_length: in tokens; longer prompts lose their beginning.
        packing: several examples of a micro-batch share a row of ``max_sequence_length`` tokens, in place of
            padding.
        epochs: passes over the training examples; give either epochs or steps.
        steps: optimizer steps.
        optimizer: learning rate and weight decay.
        lr_search: find ``optimizer.lr`` before the run, whatever it is set to.
        lora: adapters; None trains only the model's own weights.
        schedule: of the learning rate.
        activation_checkpointing: recompute activations in backward (reentrant, which needs least memory).
        evaluation: how the held-out examples are scored.
        checkpoint: when the run is saved to ``output/checkpoints``.
        resume: "auto" continues from the latest resumable checkpoint of ``output``, or starts a new run where
            there is none; the folder of a checkpoint continues from that one.
        save_model: write the trained model to ``output/model``.
        seed: of the order of the examples, of new adapters and of dropout.
        overwrite: replace the results of an earlier run in ``output``.
    """

    model: str
    data: DataRecipe
    task: TaskRecipe | str
    batch: BatchRecipe
    output: str
    deepspeed: str
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None
    trust_remote_code: bool = False
    model_class: str = "AutoModelForCausalLM"
    weights: str | None = None
    chat_template_path: str | None = None
    max_sequence_length: AtLeastOne = 512
    packing: bool = False
    epochs: AtLeastOne | None = None
    steps: AtLeastOne | None = None
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    lr_search: LrSearchRecipe | bool = False
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
            raise ValueError(
                "resume has to be auto or the folder of a checkpoint, not empty; delete it to start a new run"
            )
        if self.chat_template_path is not None and self.task != "chat":
            raise ValueError("chat_template_path is for conversations: set task to chat, or delete it")
        if self.has_classifier and self.packing:
            raise ValueError("packing is for causal language models: a classifier scores a row as a whole")

    @property
    def has_classifier(self) -> bool:
        """Whether the model scores the options without reading them."""
        return self.model_class.endswith("ForSequenceClassification")
