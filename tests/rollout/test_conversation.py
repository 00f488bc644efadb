from __future__ import annotations

import pytest

from engine.tokenizer import load_tokenizer
from rollout.conversation import Conversation
from rollout.observation_encoder import ObservationEncoder

QUESTION = [{"role": "user", "content": "what is the sum?"}]
ANSWER = [{"role": "tool", "content": "= 36"}]
# leaves out what an assistant thought once a user has spoken again, as templates of reasoning models do
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and not loop.last %}"
    "<|im_start|>assistant\n{{ message['content'] }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nthink: {% endif %}"
)
# puts the system message into the last message of a user, wherever that is
WANDERING_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# numbers the turns of the user
COUNTING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ loop.index }}"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(model_dir):
    return load_tokenizer(model_dir)


@pytest.fixture
def encoder(tokenizer) -> ObservationEncoder:
    return ObservationEncoder(tokenizer, vocab_size=320)


def with_template(tokenizer, template: str) -> ObservationEncoder:
    tokenizer.chat_template = template
    return ObservationEncoder(tokenizer, vocab_size=320)


def template_ids(tokenizer, messages) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_conversation_that_grew_has_the_ids_of_its_template(tokenizer, encoder):
    said = tokenizer.encode("it is here", add_special_tokens=False)
    first, end = template_ids(tokenizer, QUESTION), tokenizer.eos_token_id
    grown = [*first, *said, end, *encoder.encode(ANSWER, last_token_id=end)]
    messages = [*QUESTION, {"role": "assistant", "content": "it is here"}, *ANSWER]
    assert grown == template_ids(tokenizer, messages)
    for _ in range(2):  # and again, however long it gets
        messages += [{"role": "assistant", "content": "it is here"}, *ANSWER, *ANSWER]
        grown += [*said, end, *encoder.encode([*ANSWER, *ANSWER], last_token_id=end)]
        assert grown == template_ids(tokenizer, messages)


def test_the_real_models_template_can_be_cut(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    encoder = ObservationEncoder(tokenizer, vocab_size=49152)
    said = tokenizer.encode("12 times 3 is", add_special_tokens=False)
    messages = [*QUESTION, {"role": "assistant", "content": "12 times 3 is"}, {"role": "user", "content": " 36\n"}]
    grown = [*template_ids(tokenizer, QUESTION), *said, *encoder.encode(messages[-1:], last_token_id=said[-1])]
    assert encoder.template_problem is None
    assert grown == template_ids(tokenizer, messages)


def test_a_turn_without_its_end_token_is_closed_by_the_observation(tokenizer, encoder):
    end = tokenizer.eos_token_id
    closed, unclosed = encoder.encode(ANSWER, last_token_id=end), encoder.encode(ANSWER, last_token_id=70)
    assert unclosed == [end, *closed]


def test_text_and_ids_are_appended_as_they_are(tokenizer, encoder):
    end = tokenizer.eos_token_id
    assert encoder.encode(" = 36\n", end) == tokenizer.encode(" = 36\n", add_special_tokens=False)
    assert encoder.encode([5, 319], end) == [5, 319]
    with pytest.raises(ValueError, match="token id 320 in an observation is outside the vocabulary of 320 tokens"):
        encoder.encode([5, 320], end)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (FORGETFUL_TEMPLATE, "rewrites earlier turns: before the assistant's words it writes .*think: "),
        (WANDERING_TEMPLATE, "rewrites earlier turns: .*Be brief"),
        (COUNTING_TEMPLATE, "writes after a turn depends on the turns before it: "),
        (PLAIN_TEMPLATE, r"ends a turn with '\\nuser: Hello.*does not begin with a special token"),
        (None, "this model has no chat template"),
    ],
)
def test_a_template_that_cannot_be_cut_is_named_and_text_is_the_way_out(tokenizer, template, problem):
    encoder = with_template(tokenizer, template)
    with pytest.raises(ValueError, match=f"(?s)cannot be chat messages: .*{problem}.*text or token ids"):
        encoder.check(ANSWER)
    encoder.check(" = 36\n")
    assert encoder.encode(" = 36\n", 70) == tokenizer.encode(" = 36\n", add_special_tokens=False)


def test_a_template_without_system_messages_can_be_cut(tokenizer):
    with_template(tokenizer, NO_SYSTEM_TEMPLATE).check(ANSWER)


def test_messages_that_the_template_refuses_are_an_error(tokenizer):
    encoder = with_template(tokenizer, NO_SYSTEM_TEMPLATE)
    with pytest.raises(ValueError, match="the chat template refuses these messages: no system"):
        encoder.encode([{"role": "system", "content": "hush"}], 70)


def test_without_a_tokenizer_ids_alone_can_be_observations():
    encoder = ObservationEncoder(None, vocab_size=320)
    assert encoder.encode([7, 8], 70) == [7, 8]
    for content in (" = 36\n", ANSWER):
        with pytest.raises(ValueError, match="token ids"):
            encoder.check(content)


def test_observations_are_masked_and_carry_the_version_before_them(make_turn):
    conversation = Conversation(prompt_token_ids=[1, 2])
    conversation.add_turn(make_turn([3, 4], logprobs=[-0.5, -0.25], policy_versions=[4, 5]))
    conversation.add_observation([9, 9, 9])
    assert conversation.next_prompt == [1, 2, 3, 4, 9, 9, 9]
    conversation.add_turn(make_turn([6], logprobs=[-1.0], policy_versions=[6]))
    assert conversation.token_ids == [3, 4, 9, 9, 9, 6]
    assert conversation.loss_mask == [1, 1, 0, 0, 0, 1]
    assert conversation.logprobs == [-0.5, -0.25, 0.0, 0.0, 0.0, -1.0]
    assert conversation.policy_versions == [4, 5, 5, 5, 5, 6]
    assert conversation.turn_spans == [(0, 2), (5, 6)]
    assert conversation.num_tokens == 8
    assert conversation.details == {}


def test_what_is_asked_for_of_each_token_has_an_entry_for_observed_ones_too(make_turn):
    conversation = Conversation(prompt_token_ids=[1])
    conversation.add_turn(make_turn([3], raw_logprobs=[-0.5], kept_mass=[0.5], top_logprobs=[{3: -0.1}]))
    conversation.add_observation([8, 9])
    assert conversation.details == {
        "raw_logprobs": [-0.5, 0.0, 0.0],
        "kept_mass": [0.5, 1.0, 1.0],
        "top_logprobs": [{3: -0.1}, {}, {}],
    }
