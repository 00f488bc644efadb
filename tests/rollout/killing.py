"""Engines that end themselves by SIGKILL at an ordered moment, so that a test chooses where death strikes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from engine import EngineConfig, LLMEngine

Moment = Literal["start", "step", "delivery", "staging", "commit", "after commit"]
MOMENTS: tuple[Moment, ...] = ("start", "step", "delivery", "staging", "commit", "after commit")


class Orders:
    """A folder of orders to die. Each is carried out once, by the first engine that comes to its moment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def give(self, moment: Moment) -> None:
        (self.directory / f"{len(list(self.directory.iterdir()))} {moment}").touch()

    def carry_out(self, moment: Moment) -> None:
        """Ends this process if there is such an order."""
        for order in sorted(self.directory.glob(f"* {moment}")):
            try:
                order.rename(order.with_suffix(f".done-by-{os.getpid()}"))
            except FileNotFoundError:
                continue  # another engine was faster
            os.kill(os.getpid(), signal.SIGKILL)

    def num_done(self) -> dict[str, int]:
        """Orders carried out, by moment."""
        done = [path.name.split(" ", 1)[1].split(".done")[0] for path in self.directory.glob("*.done-by-*")]
        return {moment: done.count(moment) for moment in MOMENTS}

    def is_open(self) -> bool:
        return any(".done-by-" not in path.name for path in self.directory.iterdir())


def mortal_engines(orders: Orders) -> type[LLMEngine]:
    class MortalEngine(LLMEngine):
        def __init__(self, config: EngineConfig) -> None:
            orders.carry_out("start")
            super().__init__(config)
            self.has_something_to_deliver = False

        def can_step(self) -> bool:
            if self.has_something_to_deliver:  # the loop has it, its caller has not
                orders.carry_out("delivery")
                self.has_something_to_deliver = False
            return super().can_step()

        def step(self):
            if self.scheduler.num_generated_tokens > 20:
                orders.carry_out("step")
            output = super().step()
            self.has_something_to_deliver = bool(output.finished)
            return output

        def update_weights(self, *args, **kwargs):
            orders.carry_out("commit")
            update = super().update_weights(*args, **kwargs)
            orders.carry_out("after commit")
            return update

    return MortalEngine


def dying_amid(named_tensors: Mapping, orders: Orders, pids: Callable[[], list[int]]):
    """The tensors, one by one. Amid them, if that was ordered, an engine is killed that has staged some of them."""
    for place, (name, tensor) in enumerate(named_tensors.items()):
        for order in orders.directory.glob("* staging") if place == len(named_tensors) // 2 else ():
            while not (alive := pids()):  # all of them are being replaced
                time.sleep(0.05)
            pid = random.Random(order.name).choice(alive)
            order.rename(order.with_suffix(f".done-by-{pid}"))
            os.kill(pid, signal.SIGKILL)
            break
        yield name, tensor
