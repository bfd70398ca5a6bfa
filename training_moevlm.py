# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Training: arguments, freezing, learning rates per part, LoRA, and a Trainer that watches answers and routers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from pyarrow import compute
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainingArguments

from .collating_moevlm import StagedSampler
from .grounding_moevlm import image_words_loss
from .router_losses_moevlm import count_tokens
from .summary_moevlm import PARTS, is_router, part_of, sparse_layers
from .telemetry_moevlm import (
    EvaluateLastStep,
    LoadBalancer,
    QuietProgress,
    RouterWindow,
    first_non_finite,
    gradient_norms,
    has_bias,
    is_finite,
    routers_of,
    warn_of_unreached_routers,
)

try:
    from peft import LoraConfig, PeftModel, get_peft_model
except ImportError:
    PeftModel = None

FREEZABLE = (*PARTS, "router")
KINDS = ("experts", "router")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")


@dataclass
class ModelArguments:
    """Where the model comes from, which parts of it learn, and LoRA."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "MoeVlm checkpoint to go on from."})
    config: str | None = field(default=None, metadata={"help": "Architecture (json) to train from scratch."})
    vocab_size: int | None = field(default=None, metadata={"help": "Tokens of a new tokenizer; else the config's."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the loaded weights; with --bf16 keep float32."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})
    freeze_vision: bool = field(default=False, metadata={"help": "Do not train the vision tower and its routers."})
    freeze_connector: bool = field(default=False, metadata={"help": "Do not train the connector."})
    freeze_language: bool = field(default=False, metadata={"help": "Do not train decoder, head and their routers."})
    freeze_router: bool = field(default=False, metadata={"help": "Do not train any router."})
    train_only: list[str] = field(default_factory=list, metadata={"help": "Train these alone: experts, router."})
    lora: bool = field(default=False, metadata={"help": "Train LoRA on the decoder's attention and on the experts."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale; the update is alpha / rank times B A."})
    lora_targets: list[str] = field(default_factory=lambda: list(ATTENTION), metadata={"help": "Layers with LoRA."})
    lora_experts: bool = field(default=True, metadata={"help": "Whether the stacked experts get LoRA too."})

    def __post_init__(self):
        if self.model_name_or_path and self.config:
            raise ValueError(
                f"model_name_or_path={self.model_name_or_path!r} and config={self.config!r} exclude each other: "
                "a checkpoint brings its own architecture; drop one"
            )
        if self.train_only and self.lora:
            raise ValueError(f"train_only={self.train_only} is not for lora, where adapters alone learn; drop one")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank} must be at least 1")


@dataclass
class MoeVlmTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the demo's defaults; the same names on both transformers lines."""

    output_dir: str | None = field(default=None, metadata={"help": "Required: checkpoint, metrics, plots, logs."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an unfinished run, or a model."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences (pictures) a step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch for evaluation and generation."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate of all parts without their own."})
    vision_lr: float | None = field(default=None, metadata={"help": "Peak learning rate of the vision tower."})
    connector_lr: float | None = field(default=None, metadata={"help": "Peak learning rate of the connector."})
    router_lr: float | None = field(default=None, metadata={"help": "Peak learning rate of all routers."})
    router_bias_update_rate: float = field(
        default=1e-3, metadata={"help": "Step of the selection bias where a config has use_router_bias; 0: it rests."}
    )
    image_words_steps: int = field(default=0, metadata={"help": "First steps in which image tokens learn words too."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of warm-up steps; --warmup_steps N wins."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of matrices (see `decays`)."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second AdamW beta; 0.98 suits short runs."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two lines of the log."})
    # A filter would hide a non-finite loss from the curves; we stop instead.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave off: a non-finite loss stops."})
    eval_strategy: str | None = field(default=None, metadata={"help": "no, steps, epoch; default: save_strategy's."})
    eval_steps: float | None = field(default=None, metadata={"help": "Or a share of the run; default: save_steps."})
    save_strategy: str | None = field(default=None, metadata={"help": "Or best; default: eval_strategy's, or steps."})
    save_steps: float | None = field(default=None, metadata={"help": "Or a share; default: eval_steps, or 0.25."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every parameter is used."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Finish with the best one, if scored."})
    metric_for_best_model: str | None = field(default="score", metadata={"help": "score: mean over the tasks."})
    greater_is_better: bool | None = field(default=None, metadata={"help": "By default unless its name ends in loss."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Trackers, or none."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Leave as it is."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off: the collator needs the pictures."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that decode pictures meanwhile."})

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir is missing: name the folder for the result, such as --output_dir outputs/mine")
        if not 0 <= (rate := self.router_bias_update_rate) < 1:
            raise ValueError(f"router_bias_update_rate={rate} must be in [0, 1); 0 leaves the biases alone")
        if targets := self.optim_target_modules:
            raise ValueError(f"optim_target_modules={targets} (GaLore, APOLLO) takes no stacked experts; use lora")
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.accelerator_config is None:
            # For a stream accelerate would split one batch by rows, but a row may have any number of pictures.
            self.accelerator_config = {"dispatch_batches": False}
        given = {"save": self.eval_strategy, "eval": self.save_strategy}
        for name, other in given.items():
            if (steps := getattr(self, f"{name}_steps")) is not None and steps <= 0:
                raise ValueError(f"{name}_steps={steps} must be above 0; {name}_strategy=no is never")
            usual = other if steps is None and other in ("steps", "epoch") else "steps"
            setattr(self, f"{name}_strategy", getattr(self, f"{name}_strategy") or usual)
        self.save_steps = self.save_steps or self.eval_steps or 0.25
        self.eval_steps = self.eval_steps or self.save_steps
        if self.save_strategy not in ("best", self.eval_strategy) or self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False
        super().__post_init__()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps by `warmup_steps`, else by `warmup_ratio`, which transformers 5 no longer has."""
        return super().get_warmup_steps(num_training_steps) or math.ceil(num_training_steps * self.warmup_ratio)


def freeze(model: nn.Module, parts: Iterable[str], only: Iterable[str] = ()) -> None:
    """Stop the gradients of whole parts; a router is frozen with its tower, or with all others by "router".

    Args:
        parts: Members of `FREEZABLE`.
        only: Members of `KINDS`, shared experts among the experts: what of the rest still learns; none: all of it.

    Raises:
        ValueError: An unknown part or kind, or nothing is left to train.
    """
    parts, only = set(parts), set(only)
    if unknown := (parts - set(FREEZABLE)) | (only - set(KINDS)):
        raise ValueError(f"{sorted(unknown)}: freeze takes {', '.join(FREEZABLE)}; train_only takes {', '.join(KINDS)}")
    for name, parameter in model.named_parameters():
        kind = "router" if is_router(name) else "experts" if "expert" in name else None
        if part_of(name) in parts or kind in parts or (only and kind not in only):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing is left to train: freeze={sorted(parts)}, train_only={sorted(only)}; free one part")


def decays(name: str, module: nn.Module) -> bool:
    """Whether weight decay applies to a parameter of `module`: not to norms, biases, embeddings and routers."""
    still = isinstance(module, nn.Embedding) or "Norm" in type(module).__name__ or is_router(name)
    return not (still or name.endswith("bias") or "class_embedding" in name)


def parameter_groups(model: nn.Module, args: MoeVlmTrainingArguments) -> list[dict[str, Any]]:
    """Optimizer groups: every learning parameter once, by part, with the part's peak rate and with or without decay.

    The first group has the base rate where one has: its rate is the one that is logged.
    """
    rates = {"vision": args.vision_lr, "connector": args.connector_lr, "router": args.router_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            kinds = ("router", part_of(name)) if is_router(name) else (part_of(name),)
            rate = next((rates[kind] for kind in kinds if rates.get(kind) is not None), args.learning_rate)
            decay = args.weight_decay if decays(name, module) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != args.learning_rate, *key))
    return [{"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in order]


def default_lora_config(arguments: ModelArguments, model: nn.Module) -> "LoraConfig":
    """LoRA on the decoder's attention and on the stacked experts of the whole model.

    `target_modules="all-linear"` would skip the experts without a word: they are 3-D parameters, not linear layers.
    Routers that learn and have a selection bias are trained and saved whole: an adapter cannot hold a bias that moves.
    """
    if PeftModel is None:
        raise ImportError("lora needs PEFT; run: pip install peft")
    names = [name for name, _ in model.named_parameters()]
    for target in arguments.lora_targets:
        if not any(name.endswith(f".{target}.weight") and part_of(name) == "language" for name in names):
            raise ValueError(f"lora_targets: the decoder has no {target!r}; name layers such as {', '.join(ATTENTION)}")
    experts = [target for target in EXPERT_PARAMETERS if any(name.endswith(target) for name in names)]
    moving = {router for router in routers_of(model) if has_bias(router) and router.weight.requires_grad}
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        # Dropout cannot be applied to the input of a whole parameter.
        lora_dropout=0.0,
        target_modules=rf".*language_model\..*\.({'|'.join(arguments.lora_targets)})",
        target_parameters=experts if arguments.lora_experts else None,
        modules_to_save=[name for name, module in model.named_modules() if module in moving] or None,
    )


def adapt(model: nn.Module, arguments: ModelArguments) -> nn.Module:
    """The model with parts frozen and with fresh LoRA adapters, which then learn alone, as the arguments say."""
    frozen = [part for part in FREEZABLE if getattr(arguments, f"freeze_{part}")]
    freeze(model, frozen, arguments.train_only)
    if not arguments.lora:
        return model
    model = get_peft_model(model, default_lora_config(arguments, model))
    freeze(model, frozen)  # PEFT's adapters of these parts, which change nothing while they do not learn
    return model


class MoeVlmTrainer(Trainer):
    """A Trainer that scores generated answers, balances and logs the routers, and stops before it saves broken numbers.

    Args:
        score_fn: Gets the bare model at each evaluation and gives scores of its generated answers, such as
            `{"eval_score": 71.0}`; they count for the best checkpoint, the log and the trackers.
    """

    def __init__(self, *args, score_fn: Callable[[nn.Module], dict[str, float]] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError("model_init would put another model in the place of the watched one; pass a model")
        if not isinstance(self.args, MoeVlmTrainingArguments):
            raise TypeError(f"args is a {type(self.args).__name__}, which lacks flags; pass MoeVlmTrainingArguments")
        if self.args.metric_for_best_model == "score" and score_fn is None and self.compute_metrics is None:
            self.args.metric_for_best_model, self.args.greater_is_better = "loss", False
        if self.args.image_words_steps and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"image_words_steps={self.args.image_words_steps} asks the LM head outside of the forward, where FSDP "
                "and DeepSpeed may hold a part of it; set it to 0, or train with DDP"
            )
        if self.label_smoother:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} is not for this model: transformers would "
                "compare each token's scores with that token, not the next, and drop the router losses; set it to 0"
            )
        self.score_fn = score_fn
        warn_of_unreached_routers(self.model)
        self.router_window = RouterWindow(sparse_layers(self.model.config))
        self.gradient_norms: dict[str, Tensor] = {}
        self.balancer = LoadBalancer(self.model, self.args.router_bias_update_rate)
        self.add_callback(self.balancer)
        self.add_callback(EvaluateLastStep)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(QuietProgress)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args), **settings)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint):
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            hint = "resume with the run's own freeze_*, train_only, lora and *_lr, or begin at it as model_name_or_path"
            raise ValueError(f"the optimizer's state in {checkpoint} does not fit ({error}); {hint}") from error

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        rows = dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
        lengths = compute.list_value_length(rows).to_pylist()
        stages = dataset["stage"][:] if "stage" in dataset.column_names else [1] * len(dataset)
        batch_size = self._train_batch_size * self.accelerator.num_processes
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StagedSampler(lengths, stages, batch_size=batch_size, seed=seed)

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._anywhere(~torch.isfinite(loss)):
            self._stop(f"the loss is {loss.item()}", self._find_break(self._prepare_inputs(inputs)))
        if self.accelerator.sync_gradients and self._logs_this_step():
            # fp16 gradients are scaled up until the optimizer takes them.
            scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
            self.gradient_norms = {part: norm / scale for part, norm in gradient_norms(self.model).items()}
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None  # a finished run, resumed: transformers would take one step more
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = labels is not None and all("input_ids" in one for one in batches)
        # Several GPUs in one process would split the two numbers like rows; ranks are those that share the labels' sum.
        if counted and self.router_window.layers and self.args.n_gpu <= 1:
            image = self.model.config.image_token_id
            total = sum(count_tokens(one["input_ids"], image, one.get("attention_mask")) for one in batches)  # (2,)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total.to(device).unsqueeze(0)).sum(0)
            if layout := getattr(self.accelerator, "parallelism_config", None):
                total = total // layout.non_data_parallel_size
            for one in batches:
                one["num_tokens_in_batch"] = total
        return batches, labels

    def _logs_this_step(self) -> bool:
        """Whether the step under way may end with a line of the log."""
        if self.args.logging_strategy == "steps":
            step = self.state.global_step + 1
            return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)
        return self.accelerator.gradient_state.end_of_dataloader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            inputs = self._without_logits(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        if model.training and self.state.global_step < self.args.image_words_steps and "pixel_values" in inputs:
            loss = loss + self._image_words_loss(model, inputs, outputs) / self.args.gradient_accumulation_steps
        if model.training and outputs.get("expert_load") is not None:
            self.router_window.add(outputs)
            self.balancer.add(outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        inputs = self._without_logits(inputs) if prediction_loss_only else inputs
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _without_logits(self, inputs):
        """The inputs with `skip_logits` unless somebody needs them: over a large vocabulary nothing is larger."""
        needed = self.compute_loss_func or self.args.torch_compile or "labels" not in inputs
        return inputs if needed else {**inputs, "skip_logits": True}

    def _image_words_loss(self, model, inputs, outputs):
        bare = self.accelerator.unwrap_model(model)
        logits = bare.get_output_embeddings()(outputs["image_hidden_states"])  # (I, T, V)
        pictures = (inputs["input_ids"] == bare.config.image_token_id).sum(1) // logits.shape[1]  # (rows,)
        return image_words_loss(logits, inputs["labels"], pictures, bare.config.text_config.eos_token_id)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score_fn is not None and metric_key_prefix == "eval":
            output.metrics.update(self.score_fn(self.accelerator.unwrap_model(self.model)))
        return output

    def _determine_best_metric(self, metrics, trial):
        """Only what is saved at this step can be the best checkpoint; 4.57 forgets it where the score tells to save."""
        by_score = self.args.save_strategy == "best"
        better = (by_score or self.control.should_save) and super()._determine_best_metric(metrics, trial)
        if better and by_score:
            self.state.best_global_step = self.state.global_step
            self.state.best_model_checkpoint = f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}"
        return better

    def log(self, logs, *args, **kwargs):
        scalars, loads = {}, {}
        if "loss" in logs:
            scalars, loads = self.router_window.take(self.accelerator)
            scalars |= {f"grad_norm_{part}": norm.item() for part, norm in self.gradient_norms.items()}
        super().log(logs | scalars, *args, **kwargs)
        if loads:
            # In the history only: a table is nothing for a tracker.
            self.state.log_history[-1]["expert_load"] = loads

    def save_model(self, *args, **kwargs):
        learning = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        if not all(map(is_finite, (*learning, *self.model.buffers()))):
            self._stop("a weight is not finite")
        super().save_model(*args, **kwargs)

    def _anywhere(self, flag: Tensor) -> bool:
        """Whether the flag is set on any rank: all ranks stop together, none waits for another for ever."""
        flag = flag.to(self.args.device).float()
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _find_break(self, inputs) -> str:
        """Where the forward breaks, on each rank where it does; all ranks run it, since sharded weights need them."""
        with self.compute_loss_context_manager():
            place = first_non_finite(self.model, inputs)
        places = gather_object([f"{place} (rank {self.accelerator.process_index})"] if place else [])
        return "; ".join(places) or "every layer of the same batch, run again, is finite"

    def _stop(self, what: str, where: str = ""):
        raise FloatingPointError(
            f"{what} at step {self.state.global_step + 1}{where and f': {where}'}; nothing was saved from this step. "
            f"Go on from the last checkpoint in {self.args.output_dir} with --resume_from_checkpoint last and a lower "
            f"max_grad_norm={self.args.max_grad_norm}, or begin at it with --model_name_or_path, another --output_dir "
            f"and a lower learning_rate={self.args.learning_rate} (which a resumed run takes from its checkpoint)"
        )
