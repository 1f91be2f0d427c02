from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from splitinfer.errors import CheckpointError, TokenizerError, UsageError
from splitinfer.model.tokenizer import Tokenizer
from tests.checkpoints import tiny_config

TEXTS = ["Hello, world!", "  two  spaces\n\n", "naïve 東京 🙂👩‍👩‍👧", "", "a", "<not special>", "\ufffd!"]


def gemma_like() -> tokenizers.Tokenizer:
    """BPE with byte fallback and "▁" for spaces, as Gemma's own: rare characters come in byte tokens."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    words += [*"▁abcdefghijklmnopqrstuvwxyzHW,.!\n<>{}:", "lo", "llo", "wo", "▁wo"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("l", "o"), ("l", "lo"), ("w", "o"), ("▁", "wo")]
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"])
    return core


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte is a character of the vocabulary."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<eos>"])
    return core


def stripping() -> tokenizers.Tokenizer:
    """Llama's kind: the decoder drops the first space of whatever it is given."""
    core = gemma_like()
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


KINDS = {"gemma": gemma_like, "byte level": byte_level, "stripping": stripping}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write(path: Path, core: tokenizers.Tokenizer | None = None, **settings_: Any) -> Path:
    path.mkdir(exist_ok=True)
    (core or gemma_like()).save(str(path / "tokenizer.json"))
    base = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "special": True}}
    (path / "tokenizer_config.json").write_text(json.dumps(base | settings_))
    return path


def opened(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.open(path)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return opened(write(tmp_path_factory.mktemp("tokenizer") / "t", KINDS[request.param]()))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
@example(text=" ")
def test_streamed_pieces_make_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    decoder = tokenizer.stream()
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream()
    pieces = [decoder.push(token) for token in tokenizer.encode("é京🙂a")]
    assert [piece for piece in pieces if piece] == ["é", "京", "🙂", "a"]


def test_broken_bytes_are_given_out_in_the_end(tokenizer: Tokenizer) -> None:
    cut = tokenizer.encode("🙂")[1:-1]
    decoder = tokenizer.stream()
    assert "".join(decoder.push(token) for token in cut) == ""
    assert "\ufffd" in decoder.flush()
    assert decoder.flush() == ""


def test_broken_bytes_do_not_hold_back_for_ever(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("🙂")[-1]
    decoder = tokenizer.stream()
    text = "".join(decoder.push(broken) for _ in range(100))
    assert len(text) > 80
    assert set(text) == {"\ufffd"}


def test_a_long_reply_costs_the_same_per_token(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream()
    for token in tokenizer.encode("hello worl" * 200):
        decoder.push(token)
    assert len(decoder._context) + len(decoder._held) < 10


def test_bos_as_the_model_wants(tmp_path: Path) -> None:
    wants = opened(write(tmp_path / "a"))
    assert wants.encode("a")[0] == wants.bos_id
    assert wants.encode("<bos>a") == wants.encode("a")
    without = opened(write(tmp_path / "b", add_bos_token=False))
    assert without.encode("a") == wants.encode("a")[1:]


def test_special_tokens_have_no_text(tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path / "t"))
    ids = tokenizer.encode("<start_of_turn>a<end_of_turn>")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "a"


def test_eos_ids(tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path / "t"))
    assert tokenizer.eos_ids == (1,)
    (tmp_path / "t" / "config.json").write_text(json.dumps(tiny_config(eos_token_id=[1, 106])))
    assert opened(tmp_path / "t").eos_ids == (1, 106)
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert opened(tmp_path / "t").eos_ids == (5,)


def test_none_at_all(tmp_path: Path) -> None:
    assert Tokenizer.open(tmp_path) is None


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_another_kind_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(TokenizerError, match=f"has {file} but no tokenizer.json") as caught:
        Tokenizer.open(tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "content", ["", "{}", "not json", '{"version": "1.0", "model": {"type": "Unheard"}}']
)
def test_a_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be used"):
        Tokenizer.open(tmp_path)


def test_damaged_settings(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.open(tmp_path)


MESSAGES = [{"role": "user", "content": " Hi "}, {"role": "model", "content": "Hello"}]
RENDERED = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"


@pytest.mark.parametrize("place", ["settings", "jinja", "json", "list"])
def test_chat_template_from_every_place(tmp_path: Path, place: str) -> None:
    write(tmp_path)
    if place == "settings":
        write(tmp_path, chat_template=TEMPLATE)
    elif place == "list":
        write(tmp_path, chat_template=[{"name": "default", "template": TEMPLATE}, {"name": "tool_use"}])
    elif place == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    else:
        write(tmp_path, chat_template="the file beside it wins")
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = opened(tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt=False) == RENDERED
    prompt = tokenizer.render_chat(MESSAGES)
    assert prompt == RENDERED + "<start_of_turn>model\n"
    assert tokenizer.encode(prompt).count(tokenizer.bos_id or -1) == 1


def test_helpers_of_templates(tmp_path: Path) -> None:
    source = '{{ tools | tojson }}{{ strftime_now("%Y") }}{% for x in [1,2] %}{% break %}{% endfor %}'
    tokenizer = opened(write(tmp_path, chat_template=source))
    rendered = tokenizer.render_chat([], tools=[{"name": "<é>"}])
    assert rendered.startswith('[{"name": "<é>"}]20')


def test_no_template(tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="has no chat template"):
        tokenizer.render_chat(MESSAGES)


def test_a_template_rejects_messages(tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UsageError, match="roles must alternate"):
        tokenizer.render_chat(MESSAGES)


@pytest.mark.parametrize("source", ["{% if %}", "{{ messages[0].nothing.at_all }}", "{{ 1 / 0 }}"])
def test_a_template_that_is_wrong(tmp_path: Path, source: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template of"):
        opened(write(tmp_path, chat_template=source)).render_chat(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ range(10000000) | list | length }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(tmp_path: Path, source: str) -> None:
    with pytest.raises(TokenizerError):
        opened(write(tmp_path, chat_template=source)).render_chat(MESSAGES)
