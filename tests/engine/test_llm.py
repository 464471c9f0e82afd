"""``frugallm.LLM``: prompts in, answers out, from threads and tasks; and which models run how."""

import asyncio
import json
import threading

import numpy as np
import pytest
import torch
from tiny_llama import GGUFWriter

import frugallm
from finished_run import finished
from frugallm import LLM, SamplingParams
from frugallm.errors import DataError, ModelError, ParameterError
from frugallm.kernels.library import usable_paths
from tiny_decoders import tiny

GREEDY = SamplingParams(temperature=0, seed=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(seed=2, max_tokens=12, ignore_eos=True, n=2)


@pytest.fixture
def llm(small_llama, letters):
    made = LLM(small_llama, letters, cache_tokens=800)
    yield made
    assert made.engine.blocks.free == made.engine.blocks.count
    made.engine.check()
    made.close()


def plain_greedy(model, prompt, count):
    """The tokens that the model in memory takes, each by a pass over everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def test_prompts_of_every_form(llm, letters, small_llama):
    words = "Hello there"
    messages = [{"role": "user", "content": "Hi"}]
    ids = letters(words)["input_ids"]
    text, tokens, chat = llm.generate([words, ids, messages], GREEDY)
    assert text.prompt == tuple(ids) and text == tokens
    assert letters.decode(chat.prompt) == "u Hi\n"
    assert text.answers[0].tokens == plain_greedy(small_llama, ids, 12)
    assert text.text == letters.decode(text.answers[0].tokens, skip_special_tokens=True)
    assert [llm.generate(one, GREEDY)[0] for one in (words, ids, messages)] == [text, tokens, chat]
    assert llm.generate(torch.tensor([ids, ids]), GREEDY) == [text, text]
    assert llm.generate([]) == []
    with pytest.raises(DataError, match="the prompt is empty"):
        llm.generate("")


def test_parameters_for_each_prompt(llm):
    short, drawn = llm.generate(["abc", "abc"], [GREEDY.model_copy(update={"max_tokens": 3}), DRAWN])
    assert len(short.answers[0].tokens) == 3 and len(drawn.answers) == 2
    with pytest.raises(ParameterError, match="1 sampling parameters for 2 prompts"):
        llm.generate(["abc", "abc"], [GREEDY])


def test_one_bad_prompt_and_nothing_is_computed(llm):
    with pytest.raises(DataError, match="the model's context 256"):
        llm.generate(["fine", "x" * 300], GREEDY)
    assert not llm.engine.requests


def test_prompts_from_an_iterator_and_ids_of_numpy(llm, letters):
    ids = letters("abc")["input_ids"]
    expected = llm.generate(["abc", "abc"], GREEDY)
    assert llm.generate(iter(["abc", ids]), GREEDY) == expected
    assert llm.generate([np.array(ids), list(np.array(ids))], GREEDY) == expected


SAID = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "a prompt must be a text, token ids or messages; got None"),
        (5, "got 5"),
        (b"abc", "got b'abc'"),
        (SAID, "got {'content': 'Hi', 'role': 'user'}"),
        ([5.0], "got 5.0"),
        (["abc", 5], "got 5"),
        (
            [["abc"]],
            "a prompt cannot hold 'abc'. Give a text, token ids, or messages with a role and a content",
        ),
        ([SAID, 5], "a prompt cannot hold 5"),
        ([SAID, "abc"], "got {'content'"),
        ([{"role": "user"}], "a prompt cannot hold {'role': 'user'}"),
        ([{"role": "user", "content": None}], "a prompt cannot hold {"),
        ([[]], "the prompt is empty"),
        ("ab\udcff", "character 3 of the prompt is no Unicode character"),
        ([{"role": "user", "content": "\udcff"}], "is no Unicode character"),
    ],
)
def test_what_is_no_prompt_ends_in_one_line(llm, prompt, message):
    with pytest.raises(DataError) as caught:
        llm.generate(prompt, GREEDY)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not llm.engine.requests


def test_several_prompts_are_no_stream(llm):
    with pytest.raises(DataError, match="a prompt cannot hold 'abc'"):
        next(llm.stream(["abc", "def"], GREEDY))


@pytest.mark.parametrize("wrong", [{"temperature": 0}, "greedy", [None, {}]])
def test_what_are_no_parameters_ends_in_one_line(llm, wrong):
    with pytest.raises(ParameterError, match="parameters must be SamplingParams; got"):
        llm.generate(["abc", "abc"], wrong)
    assert not llm.engine.requests


@pytest.mark.parametrize(
    "template", ["{% for m in %}", "{{ messages + 3 }}", "{{ raise_exception('no') }}", "{{ a.b }}"]
)
def test_a_template_that_fails_is_one_line(llm, monkeypatch, template):
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    with pytest.raises(DataError, match="the model's chat template refuses these messages"):
        llm.generate([SAID], GREEDY)


def test_a_stream_is_the_answer_and_closing_it_cancels(llm):
    whole = llm.generate("abc", GREEDY)[0].text
    assert "".join(event.text for event in llm.stream("abc", GREEDY)) == whole
    events = llm.stream("abc", GREEDY)
    next(events)
    assert llm.engine.requests
    events.close()
    assert not llm.engine.requests


def test_tasks_share_steps_and_each_gets_its_answer(llm):
    expected = [llm.generate(prompt, DRAWN)[0] for prompt in ("abc", "xyz", "hello")]

    async def listen(prompt):
        texts = ["", ""]
        async for event in llm.astream(prompt, DRAWN):
            texts[event.choice] += event.text
        return texts

    async def all_of_them():
        return await asyncio.gather(*(listen(prompt) for prompt in ("abc", "xyz", "hello")))

    assert asyncio.run(all_of_them()) == [[a.text for a in generation.answers] for generation in expected]


def test_a_cancelled_task_leaves_nothing(llm):
    async def leave():
        async def listen():
            async for _ in llm.astream("abc", DRAWN.model_copy(update={"max_tokens": 200})):
                heard.set()

        heard = asyncio.Event()
        task = asyncio.create_task(listen())
        await heard.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.get_running_loop().run_in_executor(llm._worker, lambda: None)

    asyncio.run(leave())
    assert not llm.engine.requests and not llm._abandoned


def test_a_task_cancelled_while_its_request_is_taken_leaves_nothing(llm):
    async def leave():
        with llm._lock:  # the worker has begun, and waits
            task = asyncio.create_task(anext(llm.astream("abc", GREEDY)))
            while not llm._worker._work_queue.empty() or not llm._worker._threads:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.get_running_loop().run_in_executor(llm._worker, lambda: None)

    asyncio.run(leave())
    assert not llm.engine.requests and not llm._abandoned


def test_threads_get_what_they_asked_for(llm):
    prompts = ["abc", "hello", "the end", "abcd"]
    expected = [llm.generate(prompt, DRAWN)[0] for prompt in prompts]
    found = {}

    def ask(prompt):
        found[prompt] = llm.generate(prompt, DRAWN)[0]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == expected


@pytest.mark.parametrize("step", ["rtn:bits=4", "smoothquant:activation=token"])
def test_a_result_of_a_run(tmp_path, letters, step):
    folder, _, model = finished(tmp_path, "tied", [step])
    letters.save_pretrained(folder)
    llm = LLM(folder)
    assert llm.note == ""
    (answer,) = llm.generate("abcdef", GREEDY)[0].answers
    assert answer.tokens == plain_greedy(model, letters("abcdef")["input_ids"], 12)


def test_a_gguf_file(tmp_path):
    path = GGUFWriter(tmp_path)()
    llm = LLM(path)
    model, tokenizer = frugallm.load(path)
    (answer,) = llm.generate("the 12", GREEDY)[0].answers
    assert answer.tokens == plain_greedy(model, tokenizer("the 12")["input_ids"], 12)


def unknown(kind):
    """A model that the engine does not know."""
    changes = {"n_positions": 256} if kind == "gpt2" else {"ffn_dim": 36, "word_embed_proj_dim": 24}
    return tiny(kind, num_key_value_heads=None, **changes)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_what_the_engine_does_not_know_runs_through_transformers(letters, kind):
    model = unknown(kind)
    llm = LLM(model, letters)
    assert llm.note.startswith(f"the engine does not know the architecture '{kind}'")
    first, second = llm.generate(["abcdef", "xyz"], [GREEDY, DRAWN])
    assert first.answers[0].tokens == plain_greedy(model, first.prompt, 12)
    assert len({answer.tokens for answer in second.answers}) == 2
    assert llm.generate("xyz", DRAWN)[0] == second
    assert not llm.engine.requests and llm.engine.blocks.free == llm.engine.blocks.count


@pytest.mark.parametrize("stage", range(0, 30, 3))
def test_one_after_another_and_cancelled_at_any_stage(letters, stage):
    llm = LLM(unknown("gpt2"), letters)
    engine = llm.engine
    expected = llm.generate("xyz", DRAWN)[0]
    first, second = (engine.add(letters(text)["input_ids"], DRAWN) for text in ("abc", "xyz"))
    for _ in range(stage):
        engine.step()
    engine.cancel(first)
    assert first.finished
    while not second.finished:
        engine.step()
    assert [tuple(s.output) for s in second.sequences] == [a.tokens for a in expected.answers]
    assert not engine.requests and not engine.scheduler.waiting and not engine.scheduler.running


def test_every_path_that_is_asked_for_answers_and_native_ones_alike(
    small_llama, letters, tmp_path, monkeypatch
):
    small_llama.save_pretrained(tmp_path)
    letters.save_pretrained(tmp_path)
    answers = {}
    for path in ("reference", *usable_paths()):
        monkeypatch.setenv("FRUGAL_KERNELS", path)
        llm = LLM(tmp_path)
        assert getattr(llm.engine.runner, "path", "reference").startswith(path) and llm.note == ""
        answers[path] = llm.generate(["abc", "hello"], DRAWN.model_copy(update={"logprobs": 2}))
    native = [answers[path] for path in usable_paths()]
    assert all(answer == native[0] for answer in native)
    assert [len(one.answers[0].tokens) for one in answers["reference"]] == [12, 12]


def test_what_cannot_be_opened(small_llama, letters, tmp_path):
    with pytest.raises(ModelError, match="without its tokenizer"):
        LLM(small_llama)
    with pytest.raises(ModelError):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("size", "value", "message"),
    [
        ("cache_tokens", 3, "cache_tokens must be a whole number of at least 16; got 3"),
        ("cache_tokens", "all", "cache_tokens must be a whole number of at least 16; got 'all'"),
        ("cache_tokens", 10**12, r"which takes 192000.0 GB of memory; .* are free. Take at most"),
        ("step_tokens", 0, "step_tokens must be a whole number of at least 1; got 0"),
        ("step_tokens", None, "step_tokens must be a whole number of at least 1; got None"),
        ("sequences", 1.5, "sequences must be a whole number of at least 1; got 1.5"),
    ],
)
def test_sizes_that_make_no_sense(small_llama, letters, size, value, message):
    with pytest.raises(ParameterError, match=message):
        LLM(small_llama, letters, **{size: value})


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("context", [0, -1])
def test_a_folder_without_a_context(small_llama, letters, tmp_path, monkeypatch, kernels, context):
    monkeypatch.setenv("FRUGAL_KERNELS", "" if kernels == "native" else kernels)
    small_llama.save_pretrained(tmp_path)
    letters.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": context}))
    with pytest.raises(
        ModelError, match=rf"config.json is no valid 'llama' .*context of {context} positions"
    ):
        LLM(tmp_path)
