"""What the ranks of a test do, each in a process of its own: run_ranks starts them, and this file is what they run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 250  # of which nearly all is for a machine that others use


def run_ranks(directory: Path, job: Callable[..., Any], num_ranks: int, **arguments: Any) -> list[Any]:
    """What the job, a function of this file, returned on each rank."""
    torch.save(arguments, directory / "arguments.pt")
    port = free_port()
    processes = [start_rank(directory, job, rank, num_ranks, port) for rank in range(num_ranks)]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def start_rank(directory: Path, job: Callable[..., Any], rank: int, num_ranks: int, port: int) -> subprocess.Popen[str]:
    places = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    root = Path(__file__).parents[2]
    environment = os.environ | {name: str(value) for name, value in places.items()}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, __file__, job.__name__, str(directory)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_one_step(
    model: str,
    numerics: str,
    parallelism: str,
    rollouts: list,
    advantages: list[float],
    max_tokens: int,
    checkpoint: Path,
) -> dict[str, Any]:
    """Everything that a test wants to know of one step: twice its gradients, then the optimiser's move.

    checkpoint: an existing directory, in which the state after it is left.
    """
    from trainers import Policy
    from trainers.shares import rank_micro_batches

    policy = Policy(
        model, numerics=numerics, parallelism=parallelism, num_threads=1, learning_rate=1e-2, warmup_steps=0
    )
    ranks = policy.ranks
    batches = rank_micro_batches(
        rollouts, advantages, rank=ranks.rank, num_ranks=ranks.num_ranks, max_tokens=max_tokens
    )
    found = {"num_idle": sum(not batch.num_targets for batch in batches), "num_batches": len(batches)}
    first, again = gradients(policy, batches), gradients(policy, batches)
    found["gradients"] = first
    found["is_repeatable"] = all(torch.equal(first[name], again[name]) for name in first)
    found["logprobs"] = [policy.forward_backward(batch, mean_loss(len(rollouts))).logprobs for batch in batches]
    found["rollout_logprobs"] = [batch.rollout_logprobs for batch in batches]
    num_bytes = {"gradients": local_bytes(parameter.grad for parameter in policy.model.parameters())}
    found["metrics"] = policy.optim_step()
    with torch.no_grad():
        found["new_logprobs"] = [policy.token_logprobs(batch) for batch in batches]
    found["parameter_types"] = sorted({type(parameter).__name__ for parameter in policy.model.parameters()})
    found["weights"], found["num_gathered"] = gathered_weights(policy)
    found["moments"] = moments(policy)
    num_bytes["masters"] = local_bytes(policy.model.parameters())
    num_bytes["moments"] = local_bytes(
        state[key] for state in policy.optimizer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    found["num_bytes"] = num_bytes
    policy.save_checkpoint(checkpoint)
    found["expected_reward"] = expected_reward(policy)
    return found


def go_on(
    model: str, parallelism: str, checkpoint: Path, numerics: str, rollouts: list, advantages: list
) -> dict[str, Any]:
    """A step from a checkpoint that other ranks saved, and the state again before it."""
    from trainers import Policy
    from trainers.shares import rank_micro_batches

    policy = Policy(
        model, numerics=numerics, parallelism=parallelism, num_threads=1, learning_rate=1e-2, warmup_steps=0
    )
    ranks = policy.ranks
    policy.load_checkpoint(checkpoint)
    found = {"moments": moments(policy), "policy_version": policy.policy_version}
    found["num_updates"] = policy.optimizer.num_updates
    found["loaded"] = {name: tensor.clone() for name, tensor in policy.named_weights()}
    batches = rank_micro_batches(rollouts, advantages, rank=ranks.rank, num_ranks=ranks.num_ranks, max_tokens=64)
    for batch in batches:
        policy.forward_backward(batch, mean_loss(100))
    policy.optim_step()
    return found | {"weights": {name: tensor.clone() for name, tensor in policy.named_weights()}}


def train_grpo(model: str, configs: list, rollouts: list, advantages: list, checkpoints: Path) -> list[dict[str, Any]]:
    """For each config two steps of a GRPO actor on the same samples, which are fresh in the first and stale then.

    Between them it saves itself, and another takes the second step again from there.
    """
    num_ranks = os.environ.get("WORLD_SIZE", "1")
    return [
        _train_grpo(model, config, rollouts, advantages, checkpoints / f"{i}-of-{num_ranks}")
        for i, config in enumerate(configs)
    ]


def _train_grpo(model: str, config, rollouts: list, advantages: list, checkpoint: Path) -> dict[str, Any]:
    from trainers.grpo_actor import GRPOActor

    checkpoint.mkdir(exist_ok=True)
    num_trained = len(advantages)  # the others are only compared
    batch = rollouts[:num_trained], advantages, rollouts[num_trained:]
    actor = GRPOActor(model, "float32", config, Pool())
    found = {"first": actor.step(*batch)}
    facts = actor.save_checkpoint(str(checkpoint))
    found["synced"] = actor.sync("keep")
    found["second"] = actor.step(*batch)
    resumed = GRPOActor(model, "float32", config, Pool())
    resumed.load_checkpoint(str(checkpoint), facts)
    found["second_resumed"] = resumed.step(*batch)
    found["weights"] = {name: tensor.clone() for name, tensor in actor.policy.named_weights()}
    found["weights_resumed"] = {name: tensor.clone() for name, tensor in resumed.policy.named_weights()}
    found["rest"] = resumed.step([], [], [])
    return found


def train_ppo(model: str, config, rollouts: list, scores: list, checkpoint: Path) -> dict[str, Any]:
    """Two steps of a PPO actor; between them it saves itself, and another takes the second step again from there."""
    from trainers.ppo_actor import PPOActor

    actor = PPOActor(model, "float32", config, Pool())
    found = {"first": actor.step(rollouts, scores)}
    facts = actor.save_checkpoint(str(checkpoint))
    found["critic"] = {name: tensor.clone() for name, tensor in actor.critic.named_weights()}
    found["second"] = actor.step(rollouts, scores)
    resumed = PPOActor(model, "float32", config, Pool())
    resumed.load_checkpoint(str(checkpoint), facts)
    found["loaded_critic"] = {name: tensor.clone() for name, tensor in resumed.critic.named_weights()}
    found["second_resumed"] = resumed.step(rollouts, scores)
    found["num_bytes"] = local_bytes(actor.critic.model.parameters())
    return found


class Pool:
    """Stands where a pool's handle does: takes the weights, and tells what it was given."""

    def sync_weights(self, named_tensors, policy_version: int, mode: str) -> tuple[int, int, str]:
        return len(dict(named_tensors)), policy_version, mode


def expected_reward(policy) -> float:
    """Of three prompts, each in a chunk of its own."""
    return policy.expected_reward(["what is it? ", "it is", "so "], [" 1", "the", " 2\n"], max_tokens=1)


def moments(policy) -> dict[str, torch.Tensor]:
    """Copies of the optimiser's state, whole, by name."""
    policy.ranks.named_weights(policy.model)  # parameters are as the optimiser knows them
    tensors = policy.optimizer.tensors(dict(policy.model.named_parameters()))
    return {name: tensor.clone() for name, tensor in tensors}


def whole_batch(rollouts):
    from trainers import pack

    return pack(rollouts, [0.0] * len(rollouts))


def peak_bytes_of_a_step(model: str, gradient_checkpointing: bool = False) -> int:
    """How much more memory than before the process holds at the worst moment of a forward and backward of 750 rows."""
    from trainers import Policy
    from trainers.batch import pack_tokens

    policy = Policy(model, num_threads=1, gradient_checkpointing=gradient_checkpointing)
    batch = pack_tokens([[i % 300 for i in range(500)]], [[[i % 290 for i in range(250)]]])
    policy.forward_backward(pack_tokens([[1]], [[[2]]]), mean_loss(1))  # imports, threads and gradients
    before = memory_bytes("VmRSS")
    policy.forward_backward(batch, mean_loss(batch.num_targets))
    return memory_bytes("VmHWM") - before


def memory_bytes(field: str) -> int:
    """Of this process: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def gradients(policy, batches) -> dict[str, torch.Tensor]:
    """By parameter, whole, of all ranks' samples; the policy is left without."""
    policy.optimizer.zero_grad()
    for batch in batches:
        policy.forward_backward(batch, mean_loss(100))
    policy.ranks.reduce_gradients(policy.model)
    found = {name: policy.ranks.full(p.grad).clone() for name, p in policy.model.named_parameters()}
    policy.optimizer.zero_grad()
    return found


def mean_loss(num_tokens: int):
    from trainers import policy_loss

    def loss_fn(logprobs, batch):
        return policy_loss(logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask, num_tokens=num_tokens)

    return loss_fn


def gathered_weights(policy) -> tuple[dict[str, torch.Tensor], int]:
    """Copies of the weights, and how many of the tensors they are part of were alive at once."""
    weights, sources, most = {}, {}, 0
    for name, tensor in policy.named_weights():
        weights[name] = tensor.clone()
        source = tensor if tensor._base is None else tensor._base
        sources[id(source)] = weakref.ref(source)
        del tensor, source
        most = max(most, sum(source() is not None for source in sources.values()))
    return weights, most


def local_bytes(tensors) -> int:
    """What they take on this rank."""
    from torch.distributed.tensor import DTensor

    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


if __name__ == "__main__":
    job, directory = globals()[sys.argv[1]], Path(sys.argv[2])
    result = job(**torch.load(directory / "arguments.pt", weights_only=False))
    torch.save(result, directory / f"{os.environ['RANK']}.pt")
