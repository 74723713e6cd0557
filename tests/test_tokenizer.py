"""Tokenizer, chat template and the text of token ids that arrive one by one."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jmoe.synthetic import SPECIAL_TOKENS, byte_tokenizer
from jmoe.tokenizer import TextStream, Tokenizer, load_tokenizer

CORPUS = ["the cat and the hat", "naïve café — 世界 🙂", "def f(x):\n    return x + 1", "the the then than that"] * 4
TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user'] %}{{ raise_exception('no such role') }}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "    {%- generation %}{{ message.content | tojson }}{% endgeneration %}\n"
    "    {%- if loop.index > 5 %}{% break %}{% endif %}\n"
    "    {{- eos_token + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be <brief> & 'kind'."}, {"role": "user", "content": "Grüße, 世界\n🙂"}]


def byte_level() -> tokenizers.Tokenizer:
    """A trained byte-level BPE: some tokens hold several characters, some hold part of one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """A tokenizer whose decoder drops the space before the first word, and which begins every text with a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_checkpoint(path: Path, inner: tokenizers.Tokenizer, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    inner.save(str(path / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | config
    (path / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return path


BYTES = Tokenizer(byte_tokenizer(512), eos_ids=(258,))
TRAINED = Tokenizer(byte_level(), eos_ids=(2,))
SPACED = Tokenizer(metaspace(), eos_ids=(1,))

# Loading


@pytest.mark.parametrize(("inner", "names"), [(byte_level, {}), (metaspace, {"bos_token": "<s>", "eos_token": "</s>"})])
def test_it_does_what_transformers_does(tmp_path: Path, inner, names: dict[str, str]) -> None:
    from transformers import AutoTokenizer

    path = write_checkpoint(tmp_path, inner(), chat_template=TEMPLATE, **names)
    ours = load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    for text in [*CORPUS[:4], "", " two  spaces ", "<|im_start|>user", "x<s>y"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)
    for prompted in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompted, tokenize=False)
        assert ours.render_chat(MESSAGES, prompted) == expected
        expected_ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompted, return_dict=False)
        assert ours.apply_chat_template(MESSAGES, prompted) == expected_ids


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    assert len(load_tokenizer(write_checkpoint(tmp_path, inner)).encode("x + x + x")) == len(
        TRAINED.encode("x + x + x")
    )


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
        (None, None, (2,)),  # <|im_end|> of tokenizer_config.json
    ],
)
def test_end_of_sequence_ids(tmp_path: Path, generation, config, expected: tuple[int, ...]) -> None:
    write_checkpoint(tmp_path, byte_level())
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_ids == expected


def test_where_chat_templates_are_found(tmp_path: Path) -> None:
    def render() -> str:
        return load_tokenizer(tmp_path).render_chat([])

    write_checkpoint(tmp_path, byte_level(), chat_template="config")
    assert render() == "config"
    named = [{"name": "tools", "template": "tools"}, {"name": "default", "template": "named"}]
    write_checkpoint(tmp_path, byte_level(), chat_template=named)
    assert render() == "named"
    (tmp_path / "chat_template.jinja").write_text("a file {{ eos_token }}", encoding="utf-8")
    assert render() == "a file <|im_end|>"


def test_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(write_checkpoint(tmp_path, byte_level())).apply_chat_template(MESSAGES)


def test_a_template_that_refuses_a_conversation() -> None:
    tokenizer = Tokenizer(byte_level(), (2,), TEMPLATE, {"eos_token": "."})
    with pytest.raises(ValueError, match="refuses this conversation: no such role"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",  # what it is given is not its to change
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].x.y }}",
        "{% for %}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_are_confined_and_their_faults_are_named(template: str) -> None:
    with pytest.raises(RuntimeError, match="chat template cannot be rendered"):
        Tokenizer(byte_level(), (2,), template).render_chat([{"role": "user", "content": ""}])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no tokenizer\.json.*Download"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    write_checkpoint(tmp_path, byte_level())
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(RuntimeError, match=rf"{name}: .*Download it again"):
        load_tokenizer(tmp_path)


def test_files_of_two_versions_are_refused(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, byte_level(), added_tokens_decoder={"2": {"content": "<|im_end|>"}, "999": {"content": "<x>"}}
    )
    with pytest.raises(RuntimeError, match=r"999: '<x>'"):
        load_tokenizer(tmp_path)


# Streams


def streamed(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...], sizes: list[int]
) -> tuple[list[str], TextStream]:
    """What pushes of these sizes return (the last one takes what is left), and the stream afterwards, flushed."""
    stream, deltas, at = TextStream(tokenizer, stop), [], 0
    for size in [*sizes, len(ids)]:
        deltas.append(stream.push(ids[at : at + size]))
        at += size
    return [*deltas, stream.flush()], stream


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, and whether there is one."""
    ends = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@st.composite
def streams(draw):
    tokenizer = draw(st.sampled_from([BYTES, TRAINED, SPACED]))
    text = draw(st.text("abthe né世🙂\n\ufffd", max_size=30))
    noise = st.lists(st.integers(0, tokenizer.inner.get_vocab_size() - 1), max_size=30)
    ids = draw(st.one_of(st.just(tokenizer.encode(text)), noise))
    whole = tokenizer.decode(ids)
    parts = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda at: whole[at[0] : at[0] + at[1]])
    strings = st.one_of(parts, st.text("abthe né世", min_size=1, max_size=4)).filter(bool)
    return tokenizer, ids, tuple(draw(st.lists(strings, max_size=3))), draw(st.lists(st.integers(0, 5), max_size=20))


@settings(max_examples=250, deadline=None)
@given(streams())
@example((BYTES, list("🙂".encode()), (), [1, 1, 1]))
@example((BYTES, [*b"a", 0xF0, 0x9F, 0xFF, *b"b"], (), [1] * 5))  # a character that is never whole
@example((BYTES, list(b"abababc"), ("ababc",), [1] * 7))  # the stop string begins again inside itself
@example((BYTES, list(b"abcd"), ("abcd", "c"), [4]))
@example((SPACED, SPACED.encode("the cat the"), (), [1] * 20))
def test_deltas_are_the_text_up_to_the_first_stop_string(case) -> None:
    tokenizer, ids, stop, sizes = case
    deltas, stream = streamed(tokenizer, ids, stop, sizes)
    expected, stopped = cut(tokenizer.decode(ids), stop)
    assert ("".join(deltas), stream.stopped) == (expected, stopped)
    if not stopped:
        assert stream.num_tokens == len(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="<", codec="utf-8"), min_size=1, max_size=20), st.integers(0, 19))
def test_num_tokens_belong_to_the_text(text: str, at: int) -> None:
    ids = BYTES.encode(text)
    stop = text[at % len(text) :][:3]
    deltas, stream = streamed(BYTES, ids, (stop,), [])
    assert stream.stopped
    assert BYTES.decode(ids[: stream.num_tokens]) == "".join(deltas) == text[: text.index(stop)]


def test_a_token_that_holds_the_beginning_of_a_stop_string_counts() -> None:
    ids = TRAINED.encode("xthe the")
    assert [TRAINED.decode([token]) for token in ids][-1].endswith("the"), "the vocabulary was trained to have it"
    deltas, stream = streamed(TRAINED, ids, ("he the",), [])
    assert "".join(deltas) == "xt"
    assert stream.num_tokens == next(n for n in range(len(ids)) if len(TRAINED.decode(ids[:n])) >= 2)


def test_what_is_shown_at_once() -> None:
    stream = TextStream(BYTES, ("END",))
    shown = [stream.push([byte]) for byte in "é E EN ENX".encode()]
    assert shown == ["", "é", " ", "", "E ", "", "", "EN ", "", "", "ENX"]
    assert stream.flush() == ""
    assert stream.push(b"EN") == ""
    assert (stream.flush(), stream.stopped, stream.num_tokens) == ("EN", False, 13)


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(BYTES, ("b",))
    assert stream.push(b"abcabc") == "a"
    assert (stream.stopped, stream.num_tokens) == (True, 1)
    assert (stream.push(b"more"), stream.flush(), stream.num_tokens) == ("", "", 1)


def test_special_tokens_are_no_text() -> None:
    deltas, stream = streamed(BYTES, [256, 104, 257, 105, 258], (), [1] * 5)
    assert "".join(deltas) == "hi"
    assert stream.num_tokens == 5


def test_a_long_stream_decodes_a_few_ids_at_a_time() -> None:
    lengths = []

    class Watched(Tokenizer):
        def decode(self, ids, skip_special_tokens=True):
            lengths.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    stream = TextStream(Watched(BYTES.inner, BYTES.eos_ids))
    assert stream.push("naïve 世界 ".encode() * 200) + stream.flush() == "naïve 世界 " * 200
    assert max(lengths) <= 8
