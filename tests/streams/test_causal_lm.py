"""Tasks in text for causal language models, against slow twins that read one example at a time."""

import json
import logging
import math

import pytest
import torch
from tiny_decoder import decoder, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from manifold_cl import ContinualRunner, TaskStream
from manifold_cl.adapters.frozen_updates import keep_factors
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual import Training, make_method
from manifold_cl.files import FileError
from manifold_cl.streams import CausalLMTask, TextExample
from manifold_cl.streams.causal_tokens import TextEncoder, greedy_answers, option_log_likelihoods

COLOURS = ("red", "green", "blue sky")
EXAMPLES = (
    TextExample("what is the colour ?", "red"),
    TextExample("colour of the sky ?", "blue sky"),
    TextExample("say green", "green"),
    TextExample("this is a cow . name the colour of that cow :", "red"),
)


def task(examples=EXAMPLES, *, name="colours", **options) -> CausalLMTask:
    options = {"options": COLOURS, "max_new_tokens": 4, "answer_batch": 3} | options
    return CausalLMTask(name, {"train": examples, "test": examples}, tokenizer=tokenizer(), **options)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def log_likelihood(model, prompt: str, answer: str) -> torch.Tensor:
    """The twin: one unpadded sequence, the model's complete logits."""
    read, written = ids(prompt), [*ids(answer), 2]
    logits = model(input_ids=torch.tensor([read + written])).logits[0].double().log_softmax(-1)
    return sum(logits[len(read) + i - 1, token] for i, token in enumerate(written))


@pytest.mark.parametrize("make", [decoder, gpt2])
def test_the_loss_is_the_mean_over_answer_tokens(make):
    model = make()
    with torch.no_grad():
        found = task().loss(model, EXAMPLES)
        total = sum(log_likelihood(model, e.prompt, e.answer) for e in EXAMPLES)
    count = sum(len(ids(e.answer)) + 1 for e in EXAMPLES)
    assert float(found) == pytest.approx(-float(total) / count, rel=1e-5)


@pytest.mark.parametrize("make", [decoder, gpt2])
@pytest.mark.parametrize("cached", [True, False])
def test_likelihoods_of_options_are_those_of_single_sequences(make, cached, monkeypatch):
    model, encoder = make(), TextEncoder(tokenizer(), 40)
    if not cached:
        monkeypatch.setattr(type(model(torch.tensor([[5]]), use_cache=True).past_key_values), "batch_select_indices",
                            property(lambda self: (_ for _ in ()).throw(AttributeError)))  # fmt: skip
    options = [COLOURS, COLOURS[:1], COLOURS[1:], COLOURS]
    read = encoder.prompts([e.prompt for e in EXAMPLES])
    found = option_log_likelihoods(model, read, [encoder.answers(each) for each in options], encoder.pad)
    with torch.no_grad():
        for example, own, values in zip(EXAMPLES, options, found, strict=True):
            expected = torch.stack([log_likelihood(model, example.prompt, option) for option in own])
            torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)


def test_greedy_answers_do_not_depend_on_the_batch():
    model, encoder = decoder(seed=3), TextEncoder(tokenizer(), 40)
    read = encoder.prompts([e.prompt for e in EXAMPLES])
    together = greedy_answers(model, read, encoder, max_new_tokens=5)
    assert together == [greedy_answers(model, [each], encoder, max_new_tokens=5)[0] for each in read]


def test_the_tokenizers_first_token_is_there_once():
    tok = tokenizer()
    tok.backend_tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoder = TextEncoder(tok, 40)
    plain, templated, empty = encoder.prompts(["say red", "<s> say red", ""])
    assert plain == templated == (1, *ids("say red"))
    assert empty == (1,)
    assert encoder.answers(["red"]) == [(*ids("red"), 2)]


def test_encoded_examples_give_the_models_own_loss():
    model = decoder()
    for example, row in zip(EXAMPLES, task().encode("train"), strict=True):
        batch = {key: torch.tensor([values]) for key, values in row.items()}
        with torch.no_grad():
            expected = task().loss(model, [example])
            assert float(model(**batch).loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_long_prompt_loses_its_beginning_and_is_counted(caplog):
    with caplog.at_level(logging.WARNING, logger="manifold_cl"):
        (row,) = task(EXAMPLES[3:], max_length=6).encode("train")
    assert row["input_ids"] == [*ids("of that cow :"), *ids("red"), 2]
    (record,) = caplog.records
    assert record.args[:5] == ("colours", 1, 1, "train", 6)


def test_an_answer_that_fills_the_length_keeps_one_token_to_read():
    tokens = TextEncoder(tokenizer(), 3).examples(["say this"], ["red green blue"])
    assert [len(tokens[0].prompt), len(tokens[0].answer), tokens[0].cut] == [1, 2, 3]


def test_scores_count_right_and_illegal_answers(monkeypatch):
    answers = {ids(e.prompt)[-2]: a for e, a in zip(EXAMPLES, ["red", "Blue sky", "yes", "green"], strict=True)}
    monkeypatch.setattr(
        "manifold_cl.streams.causal_lm.greedy_answers", lambda m, read, e, **_: [answers[each[-2]] for each in read]
    )
    assert task().scores(decoder()) == {"score": 50.0, "drift": 25.0}


def test_generated_answers_are_kept_for_an_interrupted_evaluation(tmp_path, monkeypatch):
    model, one = decoder(), task()
    calls = []
    ask = CausalLMTask.answer

    def answer(self, m, items):
        calls.append(len(items))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask(self, m, items)

    monkeypatch.setattr(CausalLMTask, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        one.evaluate(model, "test", tmp_path)
    resumed = one.evaluate(model, "test", tmp_path)
    assert calls == [3, 1, 1]
    monkeypatch.undo()
    assert resumed == one.scores(model, "test")
    lines = (tmp_path / "answers-0.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["prompt"] for line in lines[1:]} == {e.prompt for e in EXAMPLES}


def test_answers_of_other_kept_updates_are_not_taken_for_those_of_this_model(tmp_path):
    one, seen = task(), []
    for seed in range(2):
        model, draw = decoder(), torch.Generator().manual_seed(seed)
        update = Factors(torch.randn(32, 2, generator=draw), torch.randn(32, 2, generator=draw), torch.tensor(1.0))
        keep_factors(model, {"model.layers.0.self_attn.o_proj": update})
        one.evaluate(model, "test", tmp_path)
        seen.append((tmp_path / "answers-0.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert seen[0] != seen[1]


def test_the_most_likely_option_is_the_answer():
    model = decoder(seed=1)
    one = task(score_by="likelihood")
    with torch.no_grad():
        best = [max(COLOURS, key=lambda c: float(log_likelihood(model, e.prompt, c))) for e in EXAMPLES]
    assert one.answer(model, EXAMPLES) == best
    assert one.scores(model) == {"score": 25.0 * sum(b == e.answer for b, e in zip(best, EXAMPLES, strict=True))}


def test_scores_by_loss_are_probabilities_and_perplexities():
    model, one = decoder(), task(score_by="loss")
    with torch.no_grad():
        loss = float(one.loss(model, EXAMPLES))
    assert one.scores(model) == pytest.approx({"score": 100 * math.exp(-loss), "perplexity": math.exp(loss)}, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "exakt"}, "exact"),
        ({"score_by": "luck"}, "likelihood"),
        ({"options": (), "score_by": "likelihood"}, "options"),
        ({"options": ("yes", "no")}, "'red'"),
        ({"max_length": 1}, "at least 2"),
        ({"answer_batch": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        task(**changes)


def test_an_empty_answer_names_its_source():
    with pytest.raises(ValueError, match=r"one\.jsonl:7"):
        task([TextExample("say", " ", source="one.jsonl:7")])


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="end token"):
        TextEncoder(tokenizer(eos_token=None), 8)


def test_a_model_of_another_tokenizer_is_named_once_by_all_tasks(caplog):
    task().validate_model(decoder())
    assert not caplog.records
    model = decoder(vocabulary=200)
    for name in ("colours", "numbers"):
        task(name=name).validate_model(model)
    (message,) = caplog.messages
    assert "37 tokens, the embedding 200 rows" in message
    with pytest.raises(ValueError, match=r"beyond the embedding's 20 rows"):
        task().validate_model(decoder(vocabulary=20))


@pytest.mark.slow
def test_a_method_learns_two_tasks_in_sequence(tmp_path):
    def numbers(split):
        return [TextExample(f"number of {word} ?", word, source=split) for word in ("one", "two", "three")]

    second = CausalLMTask(
        "numbers", {"train": numbers("a") * 8, "test": numbers("b")}, tokenizer=tokenizer(), max_new_tokens=3
    )
    stream = TaskStream(
        name="words",
        tasks=(task([e for e in EXAMPLES for _ in range(8)]), second),
        make_model=lambda: decoder().requires_grad_(False),
        targets=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )

    method = make_method("sequential_merge", rank=8, lr=5e-2)
    record = ContinualRunner(stream, method, tmp_path / "run", training=Training(epochs=8, batch_size=4)).run()
    assert record.primary == "score"
    assert record.matrix()[0, 0] > record.zero_shot["score"][0]
    assert record.losses[0][-1] < 0.7 * record.losses[0][0]


def test_options_of_a_task_begin_with_the_blank_of_the_answer():
    spaced = TextExample("say", " red")
    one = task([spaced], options=("red", "green"))
    assert one.options_of(spaced) == (" red", " green")


def test_prompts_that_an_answer_leaves_no_room_for_are_counted(caplog):
    one = task(EXAMPLES[3:], max_length=16, max_new_tokens=12)
    with caplog.at_level(logging.WARNING, logger="manifold_cl"):
        one.scores(decoder())
        one.scores(decoder())
    (record,) = caplog.records  # the example with its own answer fits
    assert record.args[:5] == ("colours", 1, 1, "test", 4)
    with pytest.raises(ValueError, match="got 16 of 16"):
        task(max_length=16, max_new_tokens=16)


def test_the_models_own_penalties_do_not_change_an_answer():
    encoder, plain, other = TextEncoder(tokenizer(), 40), decoder(seed=3), decoder(seed=3)
    other.generation_config.repetition_penalty = 9.0
    other.generation_config.suppress_tokens = list(range(4, 20))
    read = encoder.prompts([e.prompt for e in EXAMPLES])
    expected = greedy_answers(plain, read, encoder, max_new_tokens=5)
    assert greedy_answers(other, read, encoder, max_new_tokens=5) == expected
    assert other.generation_config.repetition_penalty == 9.0


def test_another_way_of_scoring_is_validated():
    assert task().scored_by("likelihood").score_by == "likelihood"
    with pytest.raises(ValueError, match="likelyhood"):
        task().scored_by("likelyhood")
    with pytest.raises(ValueError, match="no options"):
        task(options=()).scored_by("likelihood")


def test_a_run_does_not_go_on_with_other_rows(tmp_path):
    def runner(examples):
        stream = TaskStream("s", (task(examples),), lambda: decoder().requires_grad_(False), ("q_proj",))
        method = make_method("sequential_merge", rank=2)
        return ContinualRunner(stream, method, tmp_path / "run", training=Training(batch_size=4))

    runner(EXAMPLES).run()
    with pytest.raises(FileError, match="data"):
        runner(EXAMPLES[:3]).run(resume=True)
