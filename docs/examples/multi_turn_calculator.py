"""Multi-turn GRPO: the model learns to ask a calculator, whose answers it reads and is not trained on."""

import ast
import re

from rollout import EngineConfig, EpisodeRunner, Observation, RolloutPool, SamplingParams
from trainers import Policy, episode_rewards, group_advantages, pack, policy_loss

MODEL, NUM_STEPS = "smollm2-135m-instruct", 20
SHOT = "Q: What is {0}?\nA: <calc>{0}</calc> = {1}\nSo it is {1}.\n\n"
SHOTS = SHOT.format("3*12+4", 40) + SHOT.format("20*7-5", 135)
ROWS = [{"question": f"{a}*{b}-2", "answer": a * b - 2} for a in (27, 36) for b in (29, 13)]
OPERATORS = {ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__}


def calculate(node):
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](calculate(node.left), calculate(node.right))
    return node.value


class Calculator:
    def reset(self, row, seed):
        self.answer = row["answer"]
        return f"{SHOTS}Q: What is {row['question']}?\nA:"

    def step(self, turn):
        call = re.search(r"<calc>([1-9]\d*([-+*][1-9]\d*)*)$", turn.text.replace(" ", ""))
        if not call or turn.is_last:
            return Observation(reward=float(f"it is {self.answer}." in turn.text), is_done=True)
        return Observation(f" = {calculate(ast.parse(call[1], mode='eval').body)}\n")


def loss_fn(logprobs, batch):
    old, mask = batch.rollout_logprobs, batch.loss_mask
    return policy_loss(logprobs, old, batch.advantages, mask, num_tokens=batch.num_targets)


policy = Policy(MODEL)
with RolloutPool(EngineConfig(model=MODEL)) as pool:
    runner = EpisodeRunner(pool, Calculator, SamplingParams(n=8, max_tokens=24, stop=("</calc>", "\n\n")), max_turns=3)
    for step in range(NUM_STEPS):
        groups = runner.run(ROWS)
        rewards = episode_rewards(groups)
        rollouts = [rollout for group in groups for rollout in group]
        batch = pack(rollouts, group_advantages(rewards).flatten().tolist())
        output = policy.forward_backward(batch, loss_fn)
        assert output.logprobs.equal(batch.rollout_logprobs)  # lockstep, in every turn
        policy.optim_step()
        pool.sync_weights(policy.named_weights(), policy.policy_version)
        print(f"step {step}: reward {rewards.nanmean():.2f}, {groups[0][0].text!r}", flush=True)
