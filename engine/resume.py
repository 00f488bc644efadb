"""Resume: goes on from partial completions, with the bits of a run that was never interrupted."""

from __future__ import annotations

from collections.abc import Sequence

from engine.outputs import Completion, TokenDetail
from engine.request import Request


def resumed_entries(
    leader: Request, partial: Sequence[Completion], vocab_size: int, max_model_len: int
) -> list[Request]:
    """The queue entries of a group some of whose samples have tokens: each of those alone, the others behind a leader.

    A sample that has finished ("stop", "length") is left out. What is drawn next depends on the tokens so far, the
    seed, the index and the position alone, so nothing but the completion is needed.

    Raises:
        ValueError: for an index that is not among the samples or comes twice, columns of unequal length, ids outside
            the vocabulary, missing details or prompt_logprobs, as many tokens as may be drawn, or nothing left to draw.
    """
    if not partial:
        return [leader]
    samples = {sample.index: sample for sample in (leader, *leader.siblings)}
    for sample in samples.values():
        sample.siblings = ()
    own = []
    for completion in partial:
        sample = samples.get(completion.index)
        if sample is None:
            raise ValueError(
                f"resume names sample {completion.index} of request {leader.request_id!r} twice, or it has only "
                f"n={leader.params.n} samples"
            )
        if not completion.token_ids:  # ended before it began
            continue
        del samples[completion.index]
        if completion.finish_reason in ("stop", "length"):
            continue
        _restore(sample, completion, vocab_size, max_model_len)
        own.append(sample)
    fresh = [samples[index] for index in sorted(samples)]
    if fresh:
        fresh[0].siblings = tuple(fresh[1:])
    entries = [*fresh[:1], *own]
    if not entries:
        raise ValueError(
            f"all samples of request {leader.request_id!r} to resume have finished: nothing is left to draw"
        )
    return entries


def _restore(sample: Request, completion: Completion, vocab_size: int, max_model_len: int) -> None:
    _check_columns(sample, completion, vocab_size)
    limit = min(sample.params.max_tokens, max_model_len - sample.num_prompt_tokens)
    if len(completion.token_ids) >= limit:
        raise ValueError(
            f"sample {sample.index} of request {sample.request_id!r} to resume has {len(completion.token_ids)} tokens "
            f"already, and max_tokens={sample.params.max_tokens} or max_model_len={max_model_len} allow {limit}"
        )
    sample.token_ids += completion.token_ids
    sample.logprobs = list(completion.logprobs)
    sample.policy_versions = list(completion.policy_versions)
    sample.is_exact = completion.is_exact
    if sample.prompt_logprobs is not None:
        sample.prompt_logprobs = _prompt_logprobs(sample, completion)
    if sample.rules is not None:
        sample.details = _details(sample, completion)
    if sample.params.stop and sample.detokenizer is not None:
        for token_id in completion.token_ids:
            sample.detokenizer.append(token_id, can_stop=False)


def _check_columns(sample: Request, completion: Completion, vocab_size: int) -> None:
    name, num_tokens = f"sample {sample.index} of request {sample.request_id!r}", len(completion.token_ids)
    if not num_tokens == len(completion.logprobs) == len(completion.policy_versions):
        raise ValueError(
            f"{name} to resume has {num_tokens} token_ids, {len(completion.logprobs)} logprobs and "
            f"{len(completion.policy_versions)} policy_versions: give one of each for every token"
        )
    outside = next((token_id for token_id in completion.token_ids if not 0 <= token_id < vocab_size), None)
    if outside is not None:
        raise ValueError(f"{name} to resume has token id {outside}, outside the vocabulary of {vocab_size} tokens")


def _prompt_logprobs(sample: Request, completion: Completion) -> list[dict[int, float] | None]:
    """Those under the weights of its first token, which need not be the weights of today."""
    known = completion.prompt_logprobs or []
    if len(known) != sample.num_prompt_tokens:
        raise ValueError(
            f"request {sample.request_id!r} to resume lacks prompt_logprobs of its {sample.num_prompt_tokens} prompt "
            f"tokens: the completion has {len(known)}"
        )
    return list(known)


def _details(sample: Request, completion: Completion) -> list[TokenDetail]:
    """What the completion must say of its tokens, since the finished one will."""
    count, rules = len(completion.token_ids), sample.rules
    assert rules is not None
    raw, mass = completion.raw_logprobs, completion.kept_mass
    top = completion.top_logprobs
    if rules.changes_distribution and (raw is None or mass is None or not count == len(raw) == len(mass)):
        raise ValueError(f"request {sample.request_id!r} to resume lacks raw_logprobs or kept_mass of its tokens")
    if rules.num_top and (top is None or len(top) != count):
        raise ValueError(f"request {sample.request_id!r} to resume lacks top_logprobs of its tokens")
    return [
        TokenDetail(raw[i] if raw else completion.logprobs[i], mass[i] if mass else 1.0, top[i] if top else {})
        for i in range(count)
    ]
