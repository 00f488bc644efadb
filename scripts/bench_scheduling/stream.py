"""Stream: load (a) - short chats with long documents among them - sized by a rule before any loop is compared.

Chats come as a Poisson stream; documents alone would keep the machine busy for half of the time, chats for 0.3 of it,
both by what the V0-style loop needs for each kind alone. The engine's prompts are cut into the smallest pieces
(multiples of 64 tokens) with which a document takes at most 1.3 times what it takes whole: 0.5 x 1.3 + 0.3 stays within
0.95 of the capacity, so nobody's queue grows. Nothing else is chosen, and every seed is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scripts.bench_scheduling import loads
from scripts.bench_scheduling.comparison import BLOCKS, Comparison, compare, with_options
from scripts.bench_scheduling.replay import replay
from scripts.bench_scheduling.variants import CUT, TINY, V0, V1, VARIANTS, WIDE, Setting, Variant, start

PIECES = (64, 128, 192, 256, 384, 512, 576, 640, 768, 1024)
MAX_SLOWDOWN = 1.3  # of a document that is cut
SIZES = {"num_blocks": BLOCKS, "max_num_batched_tokens": 1024}


def _setting(model: Mapping[str, Any], **device: float) -> Setting:
    return Setting(model=model, max_model_len=loads.DOCUMENT_TOKENS + 64, options=SIZES, **device)


# What the 99th percentile between tokens sees of a loop that stalls depends on the machine: of the chats' tokens,
# 0.5 x (time between tokens / time of a document) meet a document. On a CPU a decode step of SmolLM2's shape takes
# 1/100 of a 4,096-token prompt and less: whether 1 token of 100 meets one is chance. A large vocabulary on a small body
# comes nearer to an 8-billion model on a GPU (1/20); the stand-in has that model's times: 16.06 GB of bfloat16 weights
# over 3.35 TB/s, and 16.06 GFLOP a token over 60% of 989 TFLOP/s (Llama 3.1 8B; H100 SXM's data sheet).
STREAMS = {
    "smollm2-cut": _setting(CUT),
    "wide": _setting(WIDE),
    "h100-8b": _setting(TINY, step_seconds=16.06 / 3350, token_seconds=16.06e9 / (0.6 * 989e12)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What the rule found for a machine."""

    chat_seconds: float  # of an otherwise idle machine, of a chat among 32 at once
    document_seconds: float  # the same for a document, whole
    piece: int  # tokens that a document may take of a step
    slowdown: float  # of a document in such pieces


def compare_stream(name: str, seconds: float, num_seeds: int, options: Mapping[str, Any]) -> tuple[Sizing, Comparison]:
    """(a): every variant with the first seed; the V0-style loop and the engine with the others too."""
    setting = with_options(STREAMS[name], options)
    sizing = size(setting)
    setting = with_options(setting, {"long_prefill_token_threshold": sizing.piece})
    chats, documents = loads.CHAT_SHARE / sizing.chat_seconds, loads.DOCUMENT_SHARE / sizing.document_seconds
    warm_up = loads.groups(2, 1, 8, loads.DOCUMENT_TOKENS, seed=1000)
    comparison = compare(
        setting,
        lambda seed: loads.stream(seconds, chats, documents, seed),
        warm_up,
        num_seeds,
        lambda turn: VARIANTS if turn == 0 else (V0, V1),
    )
    title = f"{comparison.title}; {name}, pieces of {sizing.piece} tokens"
    return sizing, replace(comparison, title=title)


def size(setting: Setting) -> Sizing:
    chat, document = _seconds(setting, V0, 32, loads.CHAT_TOKENS, loads.CHAT_NEW_TOKENS), _document(setting, V0)
    cut = Variant(name="cut", options={"async_scheduling": False})

    def slowdown(piece: int) -> float:
        return _document(with_options(setting, {"long_prefill_token_threshold": piece}), cut) / document

    piece, measured = smallest_piece(slowdown)
    return Sizing(chat_seconds=chat, document_seconds=document, piece=piece, slowdown=measured)


def smallest_piece(slowdown: Callable[[int], float]) -> tuple[int, float]:
    """The first of PIECES that slows a document down by at most MAX_SLOWDOWN, and by how much it does."""
    for piece in PIECES:
        measured = slowdown(piece)
        if measured <= MAX_SLOWDOWN:
            return piece, measured
    raise ValueError(f"a document takes {measured:.2f} times as long in pieces of {PIECES[-1]} tokens: is all quiet?")


def _document(setting: Setting, variant: Variant) -> float:
    return _seconds(setting, variant, 1, loads.DOCUMENT_TOKENS, 1)


def _seconds(setting: Setting, variant: Variant, num_requests: int, prompt_length: int, max_tokens: int) -> float:
    """For one of so many requests at once; the best of a few."""
    loop, block_pool = start(setting, variant)
    bursts = [loads.burst(num_requests, prompt_length, max_tokens, seed) for seed in range(4)]
    return min(replay(loop, block_pool, burst).seconds for burst in bursts) / num_requests
