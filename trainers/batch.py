"""Batches: packs rollouts into rows without padding, the prompt of a group once.

T counts packed rows, C target tokens: the completion tokens with a loss_mask of 1. Others, such as the observations of
a multi-turn sample, are laid down for their successors to see and are nobody's target, which spares their logits. A
completion's last token predicts nothing, so it has no row; the last row of a prompt predicts the first token of every
sample of its group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat

import torch

from engine.attention import Segment
from rollout import Rollout

# What changes a distribution by more than truncation, and its value that does not.
_OF_THE_WHOLE = {
    "temperature": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "min_tokens": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A packed batch: rows for the model, targets for the loss."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int32, absolute position within the sample
    segments: tuple[Segment, ...]  # who attends to whom
    target_rows: torch.Tensor  # [C] int64, the row whose hidden state predicts the token
    target_ids: torch.Tensor  # [C] int64
    temperature: torch.Tensor  # [C] float32
    rollout_logprobs: torch.Tensor  # [C] float32, as the engine reported them, of the whole distribution
    kept_mass: torch.Tensor  # [C] float32, the share of the distribution that could be drawn; 1 where all could
    advantages: torch.Tensor  # [C] float32, the sample's advantage on each of its tokens
    loss_mask: torch.Tensor  # [C] float32, 1 where a token is trained; all 1 as `pack` makes it
    sample_index: torch.Tensor  # [C] int32, the token's sample: its place in the list that was packed
    policy_versions: torch.Tensor  # [C] int32, the version that drew the token

    @property
    def num_rows(self) -> int:
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        return self.target_ids.numel()


def pack(rollouts: Sequence[Rollout], advantages: Sequence[float], share_prompts: bool = True) -> PackedBatch:
    """Pack rollouts, whose groups stand together, into one batch.

    advantages: one per rollout. share_prompts=False lays each sample's prompt down again; the log-probabilities are
    the same bits, at the cost of more rows.
    Raises ValueError for rollouts whose distribution was changed by more than a temperature, or truncation at
    temperature 1: their log-probabilities are not those of a trainer's forward pass.
    """
    return _pack_samples(rollouts, advantages, range(len(rollouts)), share_prompts)


def pack_micro_batches(
    rollouts: Sequence[Rollout], advantages: Sequence[float], max_tokens: int, share_prompts: bool = True
) -> list[PackedBatch]:
    """Pack rollouts into batches of at most max_tokens rows, in order; see `split_samples` for how they are cut."""
    parts = split_samples(rollouts, max_tokens, share_prompts)
    return [_pack_samples(rollouts, advantages, part, share_prompts) for part in parts]


def split_samples(rollouts: Sequence[Rollout], max_tokens: int, share_prompts: bool = True) -> list[list[int]]:
    """Indices of the samples of each micro-batch, in order.

    A group stays whole if it fits max_tokens rows; a larger one is cut between samples, and its prompt is then laid
    down once in each part. A single sample beyond max_tokens is a part of its own.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    parts: list[list[int]] = []
    num_rows = max_tokens
    for group in _groups(rollouts, range(len(rollouts))):
        for piece in _split_group(rollouts, group, max_tokens, share_prompts):
            cost = _num_rows(rollouts, piece, share_prompts)
            if num_rows + cost > max_tokens:
                parts.append([])
                num_rows = 0
            parts[-1].extend(piece)
            num_rows += cost
    return parts


def pack_tokens(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], first_sample: int = 0
) -> PackedBatch:
    """Pack given token ids at temperature 1: completions[p] are the continuations of prompts[p].

    sample_index counts the continuations in order from first_sample. For measuring probabilities: rollout_logprobs
    and advantages are 0.
    """
    layout = _Layout()
    sample_index = first_sample
    for prompt, continuations in zip(prompts, completions, strict=True):
        layout.add_prompt(prompt)
        for token_ids in continuations:
            layout.add_completion(sample_index, token_ids, [1] * len(token_ids))
            sample_index += 1
    zeros, ones = [0.0] * len(layout.target_ids), [1.0] * len(layout.target_ids)
    versions = [0] * len(layout.target_ids)
    columns = {"temperature": ones, "rollout_logprobs": zeros, "kept_mass": ones}
    return layout.to_batch(versions, **columns, advantages=zeros, loss_mask=ones)


def idle_batch() -> PackedBatch:
    """One row that predicts nothing: with it a rank that has no samples left takes part in a step of all ranks."""
    layout = _Layout()
    layout.add_prompt([0])
    return layout.to_batch([], temperature=[], rollout_logprobs=[], kept_mass=[], advantages=[], loss_mask=[])


@dataclass(slots=True)
class _Layout:
    """Rows and targets laid down so far."""

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    target_rows: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    sample_index: list[int] = field(default_factory=list)
    prompt: Sequence[int] = ()
    prompt_segment: int = -1
    prompt_end: int = 0

    def add_prompt(self, prompt: Sequence[int]) -> None:
        """Lay down the prompt of the completions to come."""
        self._add_segment(prompt, first_position=0, parent=None)
        self.prompt = prompt
        self.prompt_segment, self.prompt_end = len(self.segments) - 1, len(self.input_ids)

    def add_completion(self, index: int, token_ids: Sequence[int], loss_mask: Sequence[int]) -> None:
        """Lay down a completion after the latest prompt, which it shares."""
        first_row = len(self.input_ids)
        rows = [self.prompt_end - 1, *range(first_row, first_row + len(token_ids) - 1)]
        self._add_targets(index, token_ids, rows, loss_mask)
        if len(token_ids) > 1:
            self._add_segment(token_ids[:-1], first_position=len(self.prompt), parent=self.prompt_segment)

    def add_sequence(
        self, index: int, prompt: Sequence[int], token_ids: Sequence[int], loss_mask: Sequence[int]
    ) -> None:
        """Lay down a prompt and its completion as one sequence of their own."""
        first_row = len(self.input_ids) + len(prompt) - 1
        self._add_segment([*prompt, *token_ids[:-1]], first_position=0, parent=None)
        self._add_targets(index, token_ids, range(first_row, first_row + len(token_ids)), loss_mask)

    def _add_segment(self, token_ids: Sequence[int], first_position: int, parent: int | None) -> None:
        start_row = len(self.input_ids)
        self.input_ids.extend(token_ids)
        self.positions.extend(range(first_position, first_position + len(token_ids)))
        self.segments.append(Segment(start_row=start_row, end_row=len(self.input_ids), parent=parent))

    def _add_targets(self, index: int, token_ids: Sequence[int], rows: Sequence[int], loss_mask: Sequence[int]) -> None:
        self.target_rows.extend(compress(rows, loss_mask))
        self.target_ids.extend(compress(token_ids, loss_mask))
        self.sample_index.extend([index] * sum(loss_mask))

    def to_batch(self, policy_versions: Sequence[int], **columns: Sequence[float]) -> PackedBatch:
        return PackedBatch(
            input_ids=torch.tensor(self.input_ids, dtype=torch.int64),
            positions=torch.tensor(self.positions, dtype=torch.int32),
            segments=tuple(self.segments),
            target_rows=torch.tensor(self.target_rows, dtype=torch.int64),
            target_ids=torch.tensor(self.target_ids, dtype=torch.int64),
            sample_index=torch.tensor(self.sample_index, dtype=torch.int32),
            policy_versions=torch.tensor(policy_versions, dtype=torch.int32),
            **{name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()},
        )


def _pack_samples(
    rollouts: Sequence[Rollout], advantages: Sequence[float], indices: Sequence[int], share_prompts: bool
) -> PackedBatch:
    if len(advantages) != len(rollouts):
        raise ValueError(f"{len(advantages)} advantages for {len(rollouts)} rollouts: give one for each")
    layout = _Layout()
    packed: list[int] = []
    for group in _groups(rollouts, indices):
        if share_prompts:
            layout.add_prompt(rollouts[group[0]].prompt_token_ids)
        for index in group:
            rollout = rollouts[index]
            if share_prompts:
                layout.add_completion(index, rollout.token_ids, rollout.loss_mask)
            else:
                layout.add_sequence(index, rollout.prompt_token_ids, rollout.token_ids, rollout.loss_mask)
        packed.extend(group)
    chosen = [rollouts[i] for i in packed]
    versions = [version for r in chosen for version in compress(r.policy_versions, r.loss_mask)]
    return layout.to_batch(versions, **_columns(chosen, [float(advantages[i]) for i in packed]))


def _columns(rollouts: Sequence[Rollout], advantages: Sequence[float]) -> dict[str, list[float]]:
    for rollout in rollouts:
        check_is_reproducible(rollout)
    lengths = [sum(rollout.loss_mask) for rollout in rollouts]
    temperatures = [rollout.sampling_params.logprob_temperature for rollout in rollouts]
    return {
        "temperature": [t for t, length in zip(temperatures, lengths, strict=True) for _ in range(length)],
        "rollout_logprobs": [logprob for r in rollouts for logprob in compress(whole_logprobs(r), r.loss_mask)],
        "kept_mass": [mass for r in rollouts for mass in compress(r.kept_mass or repeat(1.0), r.loss_mask)],
        "advantages": [a for a, length in zip(advantages, lengths, strict=True) for _ in range(length)],
        "loss_mask": [1.0] * sum(lengths),
    }


def check_is_reproducible(rollout: Rollout) -> None:
    """ValueError for a sample whose log-probabilities a trainer's forward pass does not give."""
    params = rollout.sampling_params
    if rollout.kept_mass is None:
        return
    changed = [name for name, plain in _OF_THE_WHOLE.items() if getattr(params, name) != plain]
    if changed:
        name = changed[0]
        raise ValueError(
            f"rollout {rollout.group_id}[{rollout.index}] was drawn with {name}={getattr(params, name)!r} from a "
            "distribution that a trainer does not know: it computes the model's own, at a temperature, or cut by "
            f"top_p, top_k and min_p at temperature 1. Leave {', '.join(_OF_THE_WHOLE)} at their defaults for samples "
            "to train on"
        )


def whole_logprobs(rollout: Rollout) -> list[float]:
    """Log-probabilities of its tokens under the whole distribution, also where they were drawn from a part of it."""
    return rollout.logprobs if rollout.kept_mass is None else rollout.raw_logprobs


def _groups(rollouts: Sequence[Rollout], indices: Sequence[int]) -> Iterator[list[int]]:
    """Runs of samples that stand together and continue the same prompt; a sample with no token to train is left out."""
    group: list[int] = []
    for index in indices:
        if not any(rollouts[index].loss_mask):
            continue
        if group and not _are_siblings(rollouts[group[0]], rollouts[index]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _are_siblings(first: Rollout, second: Rollout) -> bool:
    return first.group_id == second.group_id and first.prompt_token_ids == second.prompt_token_ids


def _split_group(
    rollouts: Sequence[Rollout], group: list[int], max_tokens: int, share_prompts: bool
) -> Iterator[list[int]]:
    piece: list[int] = []
    for index in group:
        if piece and _num_rows(rollouts, [*piece, index], share_prompts) > max_tokens:
            yield piece
            piece = []
        piece.append(index)
    yield piece


def _num_rows(rollouts: Sequence[Rollout], group: Sequence[int], share_prompts: bool) -> int:
    num_prompts = 1 if share_prompts else len(group)
    num_prompt_rows = num_prompts * len(rollouts[group[0]].prompt_token_ids)
    return num_prompt_rows + sum(len(rollouts[index].token_ids) - 1 for index in group)
