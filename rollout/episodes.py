"""Episodes: multi-turn rollouts - the model and an environment take turns, and each sample ends as one Rollout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine import SamplingParams
from engine.prompts import derive_seed
from engine.tokenizer import encode
from rollout import requests
from rollout.conversation import Conversation
from rollout.environment import EnvironmentFactory, Observation, Row, Turn
from rollout.environment_calls import EnvironmentCalls, EnvironmentFailure
from rollout.handle import PoolHandle
from rollout.observation_encoder import ObservationEncoder
from rollout.rollout import Rollout
from rollout.turn_drawer import TurnDrawer

logger = logging.getLogger(__name__)

EndedBy = Literal["environment", "max_turns", "max_total_tokens", "abort", "failure"]


@dataclass(slots=True, kw_only=True)
class _Episode:
    """One sample on its way."""

    group_id: str
    index: int
    row: Row
    seed: int  # of which those of its turns and of its environment are derived
    conversation: Conversation
    rewards: list[float | None]  # by turn
    ended_by: EndedBy | None = None
    failure: str | None = None


class EpisodeRunner:
    """Plays episodes of a pool's model against environments, one environment for each sample.

    make_environment: called for each sample; an Environment class will do. params: of each turn; `n` is the number of
    samples per row, and `max_tokens` that of one turn. An episode ends when its environment says so, after max_turns,
    or when max_total_tokens (the first prompt and all after it; at most and by default the engines' max_model_len) is
    reached. Samples go on independently: a slow environment holds up its own only. An environment that raises, or
    whose call takes longer than environment_timeout seconds, ends its sample, which is masked and counted.
    max_concurrency: samples under way at a time. None of it, nor the number of engines, changes a bit of a sample:
    that depends on the weights, the environment, `params`, the pool's seed (or `params.seed`) and the group id.
    """

    def __init__(
        self,
        pool: PoolHandle,
        make_environment: EnvironmentFactory,
        params: SamplingParams | None = None,
        *,
        max_turns: int = 8,
        max_total_tokens: int | None = None,
        environment_timeout: float | None = 60.0,
        max_concurrency: int = 256,
    ) -> None:
        _check_positive(max_turns=max_turns, max_concurrency=max_concurrency, environment_timeout=environment_timeout)
        self.pool, self.make_environment = pool, make_environment
        self.params = params or SamplingParams()
        self.max_turns, self.max_concurrency = max_turns, max_concurrency
        self.max_total_tokens = _resolve_max_total_tokens(max_total_tokens, pool.engine_info.max_model_len)
        self.environment_timeout = environment_timeout
        self.encoder = ObservationEncoder(pool.tokenizer, pool.vocab_size)
        self._num_groups = 0  # so far, for ids where the caller gives none

    def run(
        self, rows: Sequence[Row], group_ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[list[Rollout]]:
        """Rollouts [row][sample], in the order of `rows`; `run_async` is the same inside a running event loop.

        `group_ids` name the rows and, with the run's seed, fix the samples; left out, they are e0, e1, ... in the
        order of calls. `timeout` is in seconds, for the whole call.

        A rollout's `prompt_token_ids` are the first prompt, its `token_ids` all that came after it, turns and
        observations. Tokens of observations have loss_mask 0, logprob 0.0 and the policy version of the token before.
        `finish_reason` is the last turn's, `text` all of it, without special tokens but with stop strings. `metadata`
        holds

        - row: as given; reward: the sum of the rewards, None if there was none; turn_rewards: one for each turn or None
        - num_turns; turn_spans: (start, end) of each turn in token_ids
        - ended_by: "environment", "max_turns", "max_total_tokens", "abort" or "failure"; failure: what failed, or None

        After an abort or a failure the sample has finish_reason "abort", no reward, and loss_mask 0 throughout.

        Raises ValueError for the caller's mistakes, a chat template that cannot be cut among them, and whatever
        `pool.generate` raises; then everything that runs is aborted.
        """
        if _is_in_event_loop():
            raise RuntimeError("an event loop runs in this thread already: use `await runner.run_async(...)`")
        return asyncio.run(self.run_async(rows, group_ids, timeout))

    async def run_async(
        self, rows: Sequence[Row], group_ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[list[Rollout]]:
        """See `run`."""
        episodes = self._episodes(list(rows), group_ids)
        limit, drawer = asyncio.Semaphore(self.max_concurrency), TurnDrawer(self.pool)
        try:
            with EnvironmentCalls(self.environment_timeout) as calls:
                async with asyncio.timeout(timeout), asyncio.TaskGroup() as tasks:
                    playing = [tasks.create_task(self._play(e, limit, drawer, calls)) for e in episodes]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        except TimeoutError:
            num_unfinished = sum(episode.ended_by is None for episode in episodes)
            raise TimeoutError(
                f"{num_unfinished} of {len(episodes)} episodes are unfinished after {timeout} s and are aborted: raise "
                "timeout, or lower max_turns, max_tokens or environment_timeout"
            ) from None
        finally:
            drawer.close()
        rollouts = [task.result() for task in playing]
        _report_failures(episodes)
        return [rollouts[i : i + self.params.n] for i in range(0, len(rollouts), self.params.n)]

    # --- one episode ---

    async def _play(
        self, episode: _Episode, limit: asyncio.Semaphore, drawer: TurnDrawer, calls: EnvironmentCalls
    ) -> Rollout:
        async with limit:
            environment = None
            try:
                environment = await calls.call("make_environment", self.make_environment)
                await self._begin(episode, environment, calls)
                while episode.ended_by is None:
                    await self._take_turn(episode, environment, drawer, calls)
            except EnvironmentFailure as failure:
                episode.ended_by, episode.failure = "failure", str(failure)
            finally:
                await _close(environment, calls)
        return self._rollout(episode)

    async def _begin(self, episode: _Episode, environment: Any, calls: EnvironmentCalls) -> None:
        prompt = await calls.call("reset", environment.reset, episode.row, derive_seed(episode.seed, "environment"))
        try:
            episode.conversation.prompt_token_ids = encode(self.pool.tokenizer, prompt, self.pool.vocab_size)
        except (TypeError, ValueError) as error:
            raise EnvironmentFailure(f"reset gave no prompt: {error}") from error
        num_tokens = episode.conversation.num_tokens
        if num_tokens >= self.max_total_tokens:
            raise EnvironmentFailure(
                f"reset gave a prompt of {num_tokens} tokens, which leaves no room in "
                f"max_total_tokens={self.max_total_tokens}"
            )

    async def _take_turn(
        self, episode: _Episode, environment: Any, drawer: TurnDrawer, calls: EnvironmentCalls
    ) -> None:
        """One turn of the model, what the environment says to it, and whether the episode goes on."""
        conversation = episode.conversation
        turn_index = len(conversation.turns)
        drawn = await drawer.draw(
            f"{episode.group_id}/{episode.index}/{turn_index}", conversation.next_prompt, self._turn_params(episode)
        )
        conversation.add_turn(drawn)
        if drawn.finish_reason == "abort":
            episode.ended_by = "abort"
            return
        is_full = conversation.num_tokens >= self.max_total_tokens
        turn = Turn(
            index=turn_index,
            text=drawn.text,
            token_ids=list(drawn.token_ids),
            finish_reason=drawn.finish_reason,
            stop_reason=drawn.stop_reason,
            is_last=is_full or turn_index + 1 == self.max_turns,
        )
        observation = await calls.call(f"step of turn {turn_index}", environment.step, turn)
        self._take_observation(episode, turn, observation)

    def _take_observation(self, episode: _Episode, turn: Turn, observation: Any) -> None:
        if not isinstance(observation, Observation):
            raise EnvironmentFailure(f"step of turn {turn.index} returned {observation!r}, which is no Observation")
        episode.rewards.append(observation.reward)
        if observation.is_done:
            episode.ended_by = "environment"
        elif turn.index + 1 == self.max_turns:
            episode.ended_by = "max_turns"
        else:
            self._append_observation(episode, turn, observation)

    def _append_observation(self, episode: _Episode, turn: Turn, observation: Observation) -> None:
        conversation = episode.conversation
        self.encoder.check(observation.content)  # the caller's mistake, not this one environment's
        try:
            token_ids = self.encoder.encode(observation.content, turn.token_ids[-1])
        except ValueError as error:
            raise EnvironmentFailure(f"step of turn {turn.index} gave an Observation that is none: {error}") from error
        if conversation.num_tokens + len(token_ids) >= self.max_total_tokens:
            episode.ended_by = "max_total_tokens"
        else:
            conversation.add_observation(token_ids)

    # --- what goes in and comes out ---

    def _episodes(self, rows: list[Row], group_ids: Sequence[str] | None) -> list[_Episode]:
        if not rows:
            raise ValueError("rows is empty: give at least one")
        checked_ids = requests.per_prompt_group_ids(group_ids, len(rows))
        run_seed = self.pool.seed if self.params.seed is None else self.params.seed
        return [
            _Episode(
                group_id=group_id,
                index=index,
                row=row,
                seed=derive_seed(run_seed, f"{group_id}/{index}"),
                conversation=Conversation(prompt_token_ids=[]),
                rewards=[],
            )
            for row, group_id in zip(rows, map(self._named, checked_ids), strict=True)
            for index in range(self.params.n)
        ]

    def _named(self, group_id: str | None) -> str:
        if group_id is not None:
            return group_id
        self._num_groups += 1
        return f"e{self._num_groups - 1}"

    def _turn_params(self, episode: _Episode) -> SamplingParams:
        conversation, params = episode.conversation, self.params
        turn_index = len(conversation.turns)
        max_tokens = min(params.max_tokens, self.max_total_tokens - conversation.num_tokens)
        return replace(
            params,
            n=1,
            seed=derive_seed(episode.seed, str(turn_index)),
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            prompt_logprobs=None if turn_index else params.prompt_logprobs,  # of the first prompt
        )

    def _rollout(self, episode: _Episode) -> Rollout:
        conversation = episode.conversation
        turns = conversation.turns
        is_whole = episode.ended_by not in ("abort", "failure")
        return Rollout(
            group_id=episode.group_id,
            index=episode.index,
            prompt_token_ids=conversation.prompt_token_ids,
            token_ids=conversation.token_ids,
            logprobs=conversation.logprobs,
            policy_versions=conversation.policy_versions,
            finish_reason=turns[-1].finish_reason if is_whole else "abort",
            stop_reason=turns[-1].stop_reason if is_whole else None,
            text=self.encoder.decode(conversation.token_ids),
            loss_mask=conversation.loss_mask if is_whole else [0] * len(conversation.token_ids),
            seed=episode.seed,
            sampling_params=self.params,
            is_exact=all(turn.is_exact for turn in turns),
            kernel_fingerprint=self.pool.kernel_fingerprint,
            metadata=_metadata(episode, is_whole),
            prompt_logprobs=turns[0].prompt_logprobs if turns else None,
            **conversation.details,
        )


def _metadata(episode: _Episode, is_whole: bool) -> dict[str, Any]:
    rewards = [reward for reward in episode.rewards if reward is not None]
    return {
        "row": episode.row,
        "reward": sum(rewards) if rewards and is_whole else None,
        "turn_rewards": episode.rewards,
        "num_turns": len(episode.conversation.turns),
        "turn_spans": episode.conversation.turn_spans,
        "ended_by": episode.ended_by,
        "failure": episode.failure,
    }


async def _close(environment: Any, calls: EnvironmentCalls) -> None:
    """Also while a call that ran out of time still runs: closing may be what ends it."""
    if not hasattr(environment, "close"):
        return
    if asyncio.current_task().cancelling():  # the whole call ends, and waits for nobody
        calls.start(environment.close)
        return
    try:
        await calls.call("close", environment.close)
    except EnvironmentFailure as failure:
        logger.warning("an environment did not close: %s", failure)


def _report_failures(episodes: Sequence[_Episode]) -> None:
    failures = [episode.failure for episode in episodes if episode.failure is not None]
    if failures:
        logger.warning(
            "%d of %d episodes failed and are masked; the first: %s", len(failures), len(episodes), failures[0]
        )


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _check_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")


def _resolve_max_total_tokens(max_total_tokens: int | None, max_model_len: int) -> int:
    if max_total_tokens is None:
        return max_model_len
    if not 2 <= max_total_tokens <= max_model_len:
        raise ValueError(
            f"max_total_tokens={max_total_tokens} must be from 2 to the engines' max_model_len={max_model_len}"
        )
    return max_total_tokens
