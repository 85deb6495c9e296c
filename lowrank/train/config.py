"""What a training run is told, under the names that users of transformers and TRL know."""

from __future__ import annotations

from dataclasses import InitVar, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lowrank.train.rules import (
    check_fields,
    check_not_reentrant,
    check_together,
    grouped_by,
    refuses_unknown,
    respell,
)


@refuses_unknown
@dataclass
class TrainConfig:
    """Settings of one training run. A value that cannot be is a ConfigError naming its field.

    SPELLINGS has other names of some, which are taken as well.

    output_dir: where the adapter, the metrics and the configuration go; refused if it holds a run.
    overwrite_output_dir: replace the run that output_dir holds; its files go when this one begins.
    learning_rate: the highest that the schedule reaches.
    lr_scheduler_type: after a warmup: linear, cosine (both to 0), cosine_with_min_lr,
        constant_with_warmup or warmup_stable_decay; or constant, which has no warmup.
    lr_scheduler_kwargs: of cosine_with_min_lr: min_lr_rate (0.1 of learning_rate) or min_lr; of
        warmup_stable_decay: num_decay_steps (a share if below 1; 0.1), min_lr_ratio (0),
        decay_type (linear, cosine or 1-sqrt).
    warmup_ratio: the share of all steps in which the learning rate rises from 0.
    warmup_steps: the same as a number of steps, or as a share if below 1; 0: warmup_ratio.
    num_train_epochs: times that every example is seen; may be a fraction.
    max_steps: optimizer steps; -1 takes them from num_train_epochs.
    parallel: how the processes that torchrun started share the work: ddp: each has the model and
        takes its share of the examples of a step, of which there are that many times more; fsdp:
        the same, but each has a part of every weight alone (FSDP2). None: ddp, if there are
        several.
    cpu_offload: of fsdp: keep those parts in host memory between uses.
    ddp_timeout: seconds that a process waits for the others before it gives the run up.
    per_device_train_batch_size: examples in one forward and backward.
    per_device_eval_batch_size: examples in one forward of the evaluation.
    gradient_accumulation_steps: batches whose gradients make one optimizer step.
    auto_find_batch_size: when memory does not suffice, halve the batches and double their number in
        a step, from there on; what is learned is the same.
    optim: the optimizer: adamw_torch is torch's fused AdamW, adamw_8bit a quarter of its
        memory, paged_adamw_8bit that with what does not fit in host memory or a file.
    device_budget: of a paged optimizer: bytes of its state that may lie on the device. None: all,
        until memory is short. What that changes is the time of a step, not its result.
    host_budget: bytes of the rest that may lie in host memory; on a CPU, of all.
    page_dir: where what is left goes, to a file without a name. None: TMPDIR or /var/tmp.
    weight_decay: decoupled, on matrices only (not on biases and norms).
    adam_beta1, adam_beta2: decay of the means of the gradient and of its square.
    adam_epsilon: added to the root of the latter.
    loraplus_lr_ratio: LoRA+: B learns with that many times the rate of A; 16 is usual. None: 1.
    loraplus_lr_embedding: with that, the rate of adapters of embeddings.
    max_grad_norm: clip the global norm of the gradient to this; 0 does not clip.
    bf16: compute in bfloat16 under autocast.
    fp16: compute in float16 under autocast, the loss scaled against underflow; trains float32 only.
    gradient_checkpointing: recompute activations in the backward: less memory, more time. True
        keeps the input of each block; selective, for our decoders, a little more for less time.
    activation_offloading: keep what is left of them in pinned host memory; for a GPU.
    torch_compile: compile what computes the loss; takes minutes before the first step.
    torch_compile_backend: of torch.compile, and turns it on. None: inductor.
    label_smoothing_factor: share of each token that is learned as any word; the held-out loss has
        none of it.
    neftune_noise_alpha: NEFTune: noise of alpha / sqrt(tokens * width) on the embeddings of what is
        learned from; 5 is usual. None: no noise.
    max_length: tokens an example may have; longer ones are cut.
    padding_free: lay the examples of a batch end to end, if the model confines attention to each.
    packing: fill rows of max_length tokens with whole examples, each attending to itself alone; a
        batch is then per_device_train_batch_size rows.
    group_by_length: take examples of similar length in a step, for models that need padding.
    completion_only_loss: learn completions and the assistant's turns only; otherwise all tokens.
    eval_strategy: when to evaluate but for before and after training: no, steps or epoch. None:
        steps if eval_steps is given.
    eval_steps: steps between two evaluations, or a share of all if below 1. None: logging_steps.
    load_best_model_at_end: save what was trained by the best evaluation, not by the last step.
    metric_for_best_model: what is compared: eval_loss, or a name that compute_metrics returns.
    greater_is_better: whether more of it is better. None: unless its name ends in loss.
    early_stopping_patience: end after so many evaluations in a row without gain. None: never.
    early_stopping_threshold: what the metric must gain to count.
    assistant_only_loss: the same for conversations alone; None: as completion_only_loss. If true, a
        chat template that does not show the assistant's turns is refused.
    chat_template_path: a Jinja file, or a directory with a chat_template.jinja, that becomes the
        tokenizer's chat template. None: as the tokenizer has it.
    dataset_text_field: the field that holds the text of an example, where it is not "text".
    token_cache: a directory that keeps tokenized data for the next run; auto: the user's own, if
        tokenizing took over two seconds; none: nowhere.
    save_strategy: no, or a checkpoint after every save_steps steps or every epoch; and at the end.
    save_steps: steps between checkpoints, or a share of all if below 1.
    save_total_limit: checkpoints that are kept, the newest; None: all.
    resume: auto: go on from the newest checkpoint in output_dir, if any; or a checkpoint's path.
    logging_steps: steps between lines of the log, or a share of all if below 1; metrics.jsonl has
        every step.
    disable_tqdm: lines of the log in place of the progress bar, as where there is no terminal; none
        over tokenizing and evaluating.
    report_to: what is told of every step: tensorboard, wandb, trackio, a list of them, or none.
    project: what that files the run under.
    run_name: what that calls the run; None: the name of output_dir.
    seed: of the order of the examples and of dropout.
    data_seed: of the order of the examples alone. None: seed.
    full_determinism: deterministic algorithms only, on a GPU too; slower.
    """

    output_dir: str | Path
    overwrite_output_dir: bool = False
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, float | str] | None = None
    warmup_ratio: float = 0.03
    warmup_steps: int | float = 0
    num_train_epochs: float = 3.0
    max_steps: int = -1
    parallel: str | None = None
    cpu_offload: bool = False
    ddp_timeout: float = 1800.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    auto_find_batch_size: bool = False
    optim: str = "adamw_torch"
    device_budget: int | None = None
    host_budget: int | None = None
    page_dir: str | Path | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    max_grad_norm: float = 1.0
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool | Literal["selective"] = False
    activation_offloading: bool = False
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    max_length: int = 1024
    padding_free: bool = True
    packing: bool = False
    group_by_length: bool = False
    completion_only_loss: bool = True
    eval_strategy: str | None = None
    eval_steps: int | float | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    assistant_only_loss: bool | None = None
    chat_template_path: str | Path | None = None
    dataset_text_field: str | None = None
    token_cache: str | Path | None = "auto"
    save_strategy: str = "steps"
    save_steps: int | float = 500
    save_total_limit: int | None = 2
    resume: str | Path | None = None
    logging_steps: int | float = 10
    disable_tqdm: bool = False
    report_to: str | list[str] | None = None
    project: str = "lowrank"
    run_name: str | None = None
    seed: int = 42
    data_seed: int | None = None
    full_determinism: bool = False

    # the names that transformers has given up, or has come to
    evaluation_strategy: InitVar[str | None] = None
    max_seq_length: InitVar[int | None] = None
    activation_checkpointing: InitVar[bool | None] = None
    resume_from_checkpoint: InitVar[str | Path | bool | None] = None
    train_sampling_strategy: InitVar[str | None] = None
    # what tutorials pass beside gradient_checkpointing, and is so here whatever is passed
    gradient_checkpointing_kwargs: InitVar[dict[str, Any] | None] = None

    SPELLINGS: ClassVar[dict[str, str]] = {
        "evaluation_strategy": "eval_strategy",
        "max_seq_length": "max_length",
        "activation_checkpointing": "gradient_checkpointing",
        "resume_from_checkpoint": "resume",
        "train_sampling_strategy": "group_by_length",
    }

    def __post_init__(
        self,
        evaluation_strategy: str | None,
        max_seq_length: int | None,
        activation_checkpointing: bool | None,
        resume_from_checkpoint: str | Path | bool | None,
        train_sampling_strategy: str | None,
        gradient_checkpointing_kwargs: dict[str, Any] | None,
    ) -> None:
        respell(self, "evaluation_strategy", evaluation_strategy)
        respell(self, "max_seq_length", max_seq_length)
        respell(self, "activation_checkpointing", activation_checkpointing)
        if isinstance(resume_from_checkpoint, bool):  # there, true means the newest
            resume_from_checkpoint = "auto" if resume_from_checkpoint else None
        respell(self, "resume_from_checkpoint", resume_from_checkpoint)
        if self.resume == Path("auto"):  # as a flag is read
            self.resume = "auto"
        if train_sampling_strategy is not None:
            respell(self, "train_sampling_strategy", grouped_by(train_sampling_strategy))
        check_not_reentrant(gradient_checkpointing_kwargs)
        check_fields(self)
        check_together(self)

    @property
    def evaluates_by(self) -> str:
        """eval_strategy: no, steps or epoch, also where it is None."""
        return self.eval_strategy or ("no" if self.eval_steps is None else "steps")

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON or TOML."""
        values = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
