"""TRL's GRPOTrainer as a contender in bench_grpo_step; arguments: MODEL_DIRECTORY JOB. Needs nothing of ours."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from grpo_job import last_number_is_right, rows
from protocol import Connection
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepTimer(TrainerCallback):
    """Waits for the word before each step and answers with its seconds."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.started = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.connection.answer(is_ready=True)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.connection.next_request()
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.connection.answer(seconds=time.perf_counter() - self.started)


def main(model_directory: str, job: dict[str, Any]) -> None:
    connection = Connection()
    num_samples = job["num_prompts"] * job["group_size"]
    device_batch_size = min(job["peer_batch_size"], num_samples)
    with tempfile.TemporaryDirectory() as output_dir:
        config = GRPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=device_batch_size,
            gradient_accumulation_steps=num_samples // device_batch_size,
            num_generations=job["group_size"],
            max_completion_length=job["max_tokens"],
            max_steps=job["num_steps"],
            learning_rate=job["learning_rate"],
            temperature=1.0,
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32),
            reward_funcs=last_number_is_right,
            args=config,
            train_dataset=Dataset.from_list(rows()),
            processing_class=AutoTokenizer.from_pretrained(model_directory, padding_side="left"),
            callbacks=[StepTimer(connection)],
        )
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
