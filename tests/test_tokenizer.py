"""The tokenizer equals Hugging Face's, token by token; text is never a control token; bad files are named."""
import base64
import hashlib
import io
import json
import random
from pathlib import Path

import pytest

from tokenizer import byte_alphabet, load_tokenizer

ALPHABETS = {
    "ascii": [chr(c) for c in range(32, 127)],
    "words": ["the", " the", " Rosa", "It's", " we'LL", " DON'T", "ſ", "'ſ", "naïve", " Straße", "\u2019s",
              "can't", "Ǆ", "'SON", "'Llus"],
    "digits": [*"0123456789", " ", "  ", ".", ",", "-", "٣", "४", "²", "Ⅷ", "½", "①", "a", "12345",
               " 2024"],
    "spaces": [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x0b",
               "\x1c", "\x1f", "\u200b", "a", "1", "!"],
    "code": ["def f(x):\n", "    return ", "x[i] += 1;", "\n\t\t", "if (a && b) {", "}\n", "//",
             "0x1F", "===", "'''", "\\n"],
    "emoji": ["😀", "👩\u200d👩\u200d👧", "🏴\U000e0067\U000e0062\U000e007f", "❤\ufe0f",
              "👍🏽", "🇫🇷", " ", "ok"],
    "marks": ["e\u0301", "n\u0303", "\u0301", "a\u0308\u0323", "\u0e01\u0e33", "\u0915\u094d\u0937",
              "\u05e9\u05c1", " ", "z\u0337"],
    "cjk": ["漢", "字", "かな", "カナ", "한국", "。", "、", "「", " ", "２０", "𠀀", "a"],
    "control": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>",
                "[INST]", "<|", "|>", "user\n", "<repo_name>", "<0x0A>", "system"],
    "unicode": [chr(c) for c in [*range(0xa1, 0x3000, 7), *range(0xa000, 0xd7a0, 501), *range(0xe000, 0xffff, 301),
                                 *range(0x10000, 0x20000, 997)]],
}


def make_texts(n=1500):
    """Deterministic: each text draws 1 to 40 pieces from one alphabet, or from all of them."""
    rng = random.Random(0)
    pools = [*ALPHABETS.values(), [piece for pool in ALPHABETS.values() for piece in pool]]
    texts = ["".join(rng.choices(pools[i % len(pools)], k=rng.randint(1, 40))) for i in range(n)]
    return ["", " ", "\n", "Hello, world!", Path(__file__).read_text("utf-8"), *texts]


TEXTS = make_texts()


def assert_same_tokens(ours, encode):
    for text in TEXTS:
        assert ours.encode(text) == encode(text), repr(text[:200])


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    from transformers import AutoTokenizer
    return load_tokenizer(smollm2_folder), AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def llama3_model():
    module = pytest.importorskip("llama_models", reason="needs pip install llama-models, for Llama 3's tokenizer.model")
    return Path(module.__file__).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def llama3(llama3_model, tmp_path_factory):
    """(folder with Meta's file, folder with Hugging Face's, Hugging Face's tokenizer made from Meta's file)."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    meta, hugging = tmp_path_factory.mktemp("meta"), tmp_path_factory.mktemp("hugging")
    (meta / "tokenizer.model").symlink_to(llama3_model)
    names = list(load_tokenizer(meta).special)
    fast = TikTokenConverter(str(llama3_model), extra_special_tokens=names).converted()
    reference = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    reference.save_pretrained(hugging)
    return meta, hugging, reference


# ---- equal to the originals

def test_the_reference_treats_special_looking_text_as_text(smollm2):
    ours, theirs = smollm2
    assert theirs.encode("<|im_end|>") == [ours.eos_id]
    assert len(theirs.encode("<|im_end|>", split_special_tokens=True)) > 1
    assert not set(ours.encode("".join(ours.special))) & set(ours.special.values())


def test_smollm2_equals_transformers(smollm2):
    ours, theirs = smollm2
    assert_same_tokens(ours, lambda text: theirs.encode(text, split_special_tokens=True, add_special_tokens=False))
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert ours.special == theirs.get_added_vocab()


def test_llama3_model_file_equals_meta_and_transformers(llama3, llama3_model):
    meta, _, theirs = llama3
    ours = load_tokenizer(meta)
    assert_same_tokens(ours, lambda text: theirs.encode(text, split_special_tokens=True, add_special_tokens=False))
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (128000, 128001, 128256)
    assert ours.special["<|start_header_id|>"] == 128006 and ours.special["<|eot_id|>"] == 128009
    assert ours.special["<|python_tag|>"] == 128010 and ours.special["<|reserved_special_token_247|>"] == 128255


def test_llama3_json_equals_its_model_file(llama3):
    meta, hugging, _ = llama3
    a, b = load_tokenizer(meta), load_tokenizer(hugging)
    assert_same_tokens(a, b.encode)
    assert (a.special, a.bos_id, a.vocab_size) == (b.special, b.bos_id, b.vocab_size)
    assert b.eos_id == 128009                          # its tokenizer_config.json says so


def test_decode_gives_the_text_back(smollm2, llama3):
    for ours in (smollm2[0], load_tokenizer(llama3[0])):
        for text in TEXTS:
            assert ours.decode(ours.encode(text)) == text


def test_decode_leaves_out_or_names_control_tokens(smollm2):
    ours, theirs = smollm2
    ids = [1, *ours.encode("one é"), 2, 2, *ours.encode("two")]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "one étwo"
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids) == "<|im_start|>one é<|im_end|><|im_end|>two"
    half = ours.encode("漢字" * 3)[:-1]
    assert ours.decode(half) == theirs.decode(half)


def test_a_byte_without_a_token_vanishes_as_in_transformers(smollm2):
    ours, theirs = smollm2                             # SmolLM2 knows no 0x04; nor 0xF1, in planes 4 to 7 of Unicode
    for text in ("a\x04b", "\x04", " the \x13\x14 end", "x\U00040000y"):
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_very_long_runs_do_not_stop_it(smollm2):
    ours, _ = smollm2
    for run in (" ", "\n", "a", "!"):
        assert ours.decode(ours.encode(run * 1_000_000)) == run * 1_000_000
    assert ours.decode(ours.encode("lone \ud800 surrogate")) == "lone \ufffd surrogate"


# ---- chat turns

def turn(tokenizer, head, document, tail, **kw):
    prefix, suffix, stops = tokenizer.chat(head, tail, **kw)
    return prefix + tokenizer.encode(document) + suffix, stops


@pytest.mark.parametrize("system", [None, "Be brief.\n"])
def test_smollm2_turn_equals_chat_template(smollm2, system):
    ours, theirs = smollm2
    ids, stops = turn(ours, "Read {this} <|im_end|>:\n\n", "Rosa is 31.", "\nHow old?", system=system)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "Read {this} <|im_end|>:\n\nRosa is 31.\nHow old?"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.decode(ids, skip_special=False) == text
    assert ids.count(ours.eos_id) == 2                 # ends of system and user; the one in the text is text
    assert stops[0] == theirs.eos_token_id
    # Without a seam at the document the ids are equal too.
    messages[-1]["content"] = "Read this"
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert turn(ours, "Read this", "", "", system=system)[0] == expected


def test_llama3_turn_equals_published_format(llama3):
    ours = load_tokenizer(llama3[0])
    ids, stops = turn(ours, "Answer who are you ", "in the form", " of jeopardy?", system="You are a helpful assistant")
    assert ours.decode(ids, skip_special=False) == (   # prompt_format.md of Llama 3.1
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnswer who are you in the form of jeopardy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert ids.count(ours.bos_id) == 1 and ids[0] == 128000
    assert stops == [128009, 128008, 128001]


def test_other_templates_and_no_system(smollm2_folder):
    def text(template, system=None):
        ours = load_tokenizer(smollm2_folder, template)
        return ours.decode(turn(ours, "A", "B", "C", system=system)[0], skip_special=False)
    assert text("smollm2", "") == text("chatml") == "<|im_start|>user\nABC<|im_end|>\n<|im_start|>assistant\n"
    assert text("plain") == "<|im_start|>ABC"          # SmolLM2 calls <|im_start|> its BOS
    assert text("llama2", "S") == "<|im_start|>[INST] <<SYS>>\nS\n<</SYS>>\n\nABC [/INST]"
    assert text("mistral") == "<|im_start|>[INST] ABC [/INST]"
    with pytest.raises(ValueError, match="needs .*eot_id"):
        load_tokenizer(smollm2_folder, "llama3")
    with pytest.raises(ValueError, match="unknown template 'alpaca', expected auto, llama3"):
        load_tokenizer(smollm2_folder, "alpaca")


# ---- tokenizer.json, small and hand-made

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write_json(folder, words=(), merges=(), pre=BYTE_LEVEL, special=("<|end|>",), **model):
    """A tokenizer.json with the bytes at ids 5 to 260, backwards; returns (ours, the tokenizers package's)."""
    vocab = {c: 5 + i for i, c in enumerate(reversed(byte_alphabet()))}
    vocab |= {word: 300 + i for i, word in enumerate(words)}
    spec = {"version": "1.0", "normalizer": None, "pre_tokenizer": pre, "post_processor": None, "truncation": None,
            "padding": None, "decoder": {**BYTE_LEVEL},
            "model": {"type": "BPE", "vocab": vocab, "merges": list(merges), **model},
            "added_tokens": [{"id": i, "content": name, "special": True, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False} for i, name in enumerate(special)]}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec), "utf-8")
    from tokenizers import Tokenizer
    theirs = Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    return load_tokenizer(folder), lambda text: theirs.encode(text).ids


def test_closed_vocabulary_takes_whole_words_or_bytes(tmp_path):
    words = ["ĠRosa", "Rosa", "an", "is", "Ġis", "Ġisland", "land"]
    ours, theirs = write_json(tmp_path, words, ignore_merges=True)
    assert ours.encode(" Rosa") == [300] and ours.encode("Rosa is") == [301, 304]
    assert len(ours.encode(" Rosario")) == 8           # not " Rosa" + bytes: nothing merges
    for text in ("Rosa is an island", " Rosario", "land is; isan", *TEXTS):
        assert ours.encode(text) == theirs(text) and ours.decode(ours.encode(text)) == text
    ours, theirs = write_json(tmp_path, words, ignore_merges=False)
    assert ours.encode(" Rosa") == theirs(" Rosa") and len(theirs(" Rosa")) == 5


def test_priority_is_merge_order_not_id(tmp_path):
    ours, theirs = write_json(tmp_path, ["ab", "bc"], ["b c", "a b"])
    assert ours.encode("abc") == theirs("abc") == [*ours.encode("a"), 301]
    ours, theirs = write_json(tmp_path, ["ab", "bc"], [["b", "c"], ["a", "b"]])       # the other spelling of merges
    assert ours.encode("abc") == theirs("abc") == [*ours.encode("a"), 301]


@pytest.mark.parametrize("parts", [
    [{"type": "Digits", "individual_digits": True}],
    [{"type": "Digits", "individual_digits": False}],
    [{"type": "Split", "pattern": {"Regex": "[\r\n]"}, "behavior": "Isolated", "invert": False},
     {"type": "Split", "pattern": {"String": "."}, "behavior": "Isolated", "invert": False}],
    [{"type": "Split", "pattern": {"Regex": "\\s?\\p{L}+"}, "behavior": "Isolated", "invert": False},
     {"type": "Digits", "individual_digits": True}],
    [{"type": "Split", "pattern": {"Regex": "\\s?\\p{L}+"}, "behavior": "Isolated", "invert": False},       # ". a": order counts
     {"type": "Split", "pattern": {"Regex": "\\.\\s"}, "behavior": "Isolated", "invert": False}],
])
@pytest.mark.parametrize("use_regex", [True, False])
def test_split_patterns_equal_tokenizers(tmp_path, parts, use_regex):
    pairs = ["a 1", "1 2", "Ġ Ġ", ". .", ". a", "Ġ a", "a Ġ", "Ċ Ċ", "! .", "ĠĠ ĠĠ", "ĠĠ 1", "12 12"]  # a split forbids
    words = list(dict.fromkeys(pair.replace(" ", "") for pair in pairs))
    pre = {"type": "Sequence", "pretokenizers": [*parts, {**BYTE_LEVEL, "use_regex": use_regex}]}
    ours, theirs = write_json(tmp_path, words, pairs, pre=pre)
    rng = random.Random(1)
    for text in [*TEXTS, *("".join(rng.choices("aa112  ..!\n'sé", k=12)) for _ in range(300))]:
        assert ours.encode(text) == theirs(text), repr(text[:200])


# ---- sentencepiece

def test_sentencepiece(tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="needs pip install sentencepiece")
    model = io.BytesIO()
    lines = ["the cat sat on the mat", *(text for text in TEXTS if text.isascii() and 0 < len(text) < 500)]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=600, model_type="bpe",
                                   byte_fallback=True, normalization_rule_name="identity", num_threads=1, minloglevel=2,
                                   remove_extra_whitespaces=False, character_coverage=1.0)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    ours, theirs = load_tokenizer(tmp_path), spm.SentencePieceProcessor(model_proto=model.getvalue())
    assert_same_tokens(ours, theirs.encode)
    assert (ours.bos_id, ours.eos_id, ours.special) == (1, 2, {"<unk>": 0, "<s>": 1, "</s>": 2})
    assert ours.vocab_size == len(theirs) and ours.template == "plain"
    assert not {1, 2} & set(ours.encode("<s>a</s>"))
    assert all(ours.decode(ours.encode(text)) == text.replace("\u2581", " ") for text in TEXTS)   # its word mark
    assert ours.decode([1, *ours.encode("the cat"), 2]) == "the cat"
    assert ours.decode([1, *ours.encode("the cat"), 2], skip_special=False) == "<s>the cat</s>"
    for template, name in (("{{ '[INST] <<SYS>>' }}", "llama2"), ("{{ '[INST]' }}", "mistral")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        ours = load_tokenizer(tmp_path)
        assert ours.template == name
        prefix, suffix, stops = ours.chat("Read: ", " Who?", system="Be brief.")
        assert prefix[0] == 1 and prefix.count(1) == 1 and stops == [2]
        opening = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nRead: " if name == "llama2" else "[INST] Be brief.\n\nRead: "
        assert prefix[1:] == theirs.encode(opening) and suffix == theirs.encode(" Who? [/INST]")


def test_sentencepiece_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(ValueError, match="tokenizer.model.*pip install sentencepiece"):
        load_tokenizer(tmp_path)


# ---- settings and bad input

@pytest.mark.parametrize("files, eos", [
    ({}, None),
    ({"config.json": {"eos_token_id": 7}}, 7),
    ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [8, 9]}}, 8),
    ({"generation_config.json": {"eos_token_id": 8}, "tokenizer_config.json": {"eos_token": "<|end|>"}}, 0),
    ({"tokenizer_config.json": {"eos_token": {"content": "<|new|>"},
                                "added_tokens_decoder": {"999": {"content": "<|new|>"}}}}, 999),
])
def test_eos_comes_from_the_nearest_file(tmp_path, files, eos):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, _ = write_json(tmp_path)
    assert ours.eos_id == eos and ours.bos_id is None
    assert ours.vocab_size == (1000 if eos == 999 else 261)
    if eos is None:
        with pytest.raises(ValueError, match="template plain ends answers with <eos>: found no such token"):
            ours.chat("a", "b")
    else:
        assert ours.chat("a", "b") == (ours.encode("a"), ours.encode("b"), [eos])


def refused(folder, *words):
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message, message
    for word in words:
        assert word in message, message


def test_bad_files_are_named(tmp_path):
    refused(tmp_path / "nowhere", "found no tokenizer")
    refused(tmp_path, "found no tokenizer", "tokenizer.json")
    path = tmp_path / "tokenizer.json"
    for content in (b'{"model": ', b"\xff\xfe", b"[1]"):
        path.write_bytes(content)
        refused(tmp_path, "tokenizer.json", "expected a JSON object")
    path.write_bytes(b'{"model": {"type": "Unigram"}}')
    refused(tmp_path, "tokenizer.json", "byte-level BPE", "Unigram")
    path = tmp_path / "tokenizer.model"
    for content in (b"not a model", b"", b"IQ== 0\nIg== x\n", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        refused(tmp_path, "tokenizer.model", "expected")
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    refused(tmp_path, "expected the 128000 words of Llama 3, found 256")


@pytest.mark.parametrize("change, words", [
    ({"pre": {**BYTE_LEVEL, "add_prefix_space": True}}, ["add_prefix_space"]),
    ({"pre": {"type": "Whitespace"}}, ["ByteLevel", "Whitespace"]),
    ({"pre": None}, ["ByteLevel", "None"]),
    ({"pre": {"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Isolated"}, BYTE_LEVEL]}}, ["Punctuation"]),
    ({"pre": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed", "invert": False}, BYTE_LEVEL]}}, ["Removed"]),
    ({"words": ["▁the"]}, ["byte-level", "▁"]),
    ({"byte_fallback": True}, ["byte_fallback"]),
])
def test_unsupported_tokenizers_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError):
        write_json(tmp_path, **change)
    refused(tmp_path, "tokenizer.json", *words)


def test_a_normalizer_is_refused(tmp_path):
    write_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": {"type": "NFC"}}))
    refused(tmp_path, "NFC")


TINY = Path(__file__).parent.parent / "models" / "tiny"


def change(*keys, to):
    """A function that sets spec[keys[0]][keys[1]]... of a tokenizer.json."""
    def apply(spec):
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = to
    return apply


def pre(*parts):
    return change("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [*parts, BYTE_LEVEL]})


def split(pattern, **more):
    return {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": pattern, **more}


@pytest.mark.parametrize("damage, words", [
    (change("model", to=3), []),
    (change("model", to="BPE"), []),
    (change("model", "vocab", "a", to=None), ["'a' is None, expected a whole number"]),
    (change("model", "vocab", "a", to="7"), ["'a' is '7'"]),
    (change("model", "vocab", "a", to=True), ["'a' is True"]),
    (change("model", "vocab", "a", to=-1), ["'a' is -1"]),
    (change("model", "vocab", to={}), []),
    (change("model", "vocab", to=None), []),
    (change("model", "vocab", to=["a"]), []),
    (change("model", "merges", to=None), []),
    (change("model", "merges", to=[3]), []),
    (change("model", "merges", to=["a b c"]), ["'a b c'"]),
    (change("model", "merges", to=[["a"]]), ["['a']"]),
    (change("model", "merges", to=["ab"]), ["'ab'"]),
    (change("added_tokens", to=[0]), []),
    (change("added_tokens", to=3), []),
    (change("added_tokens", to=[{"content": "<|x|>"}]), ["'id'"]),
    (change("added_tokens", to=[{"content": "<|x|>", "id": None}]), ["'<|x|>' is None"]),
    (change("added_tokens", to=[{"content": ["<|x|>"], "id": 3}]), []),
    (change("pre_tokenizer", to="ByteLevel"), []),
    (change("pre_tokenizer", to=[BYTE_LEVEL]), []),
    (change("pre_tokenizer", to={}), ["ByteLevel"]),
    (change("pre_tokenizer", to={"pretokenizers": [BYTE_LEVEL]}), ["type"]),
    (change("pre_tokenizer", to={"type": "Sequence"}), []),
    (change("pre_tokenizer", to={"type": "Sequence", "pretokenizers": []}), []),
    (change("pre_tokenizer", to={"type": "Sequence", "pretokenizers": 3}), []),
    (pre(3), []),
    (pre({}), ["type"]),
    (pre(split({})), []),
    (pre(split("x")), []),
    (pre(split({"Regex": 3})), []),
    (pre(split({"Regex": "("})), ["'('", "regular expression"]),
    (pre(split({"Regex": "[a"})), ["'[a'", "regular expression"]),
    (pre(split({"Regex": "x*"})), ["'x*'", "empty"]),
    (pre(split({"Regex": ""})), ["empty"]),
    (pre(split({"String": ""})), ["empty"]),
    (pre(split({"Regex": r"(?=(\d{3})+(?!\d))"})), ["empty"]),
    (pre(split({"Regex": "x"}, invert=True)), ["invert"]),
])
def test_a_tokenizer_json_of_another_shape_is_refused_in_a_line(tmp_path, damage, words):
    """Where a pattern can match an empty string, regex leaves characters out and tiktoken ends the process."""
    spec = json.loads((TINY / "tokenizer.json").read_text("utf-8"))
    damage(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    refused(tmp_path, "tokenizer.json", *words)


@pytest.mark.parametrize("name, content, words", [
    ("generation_config.json", {"eos_token_id": []}, ["eos_token_id is []"]),
    ("generation_config.json", {"eos_token_id": ["2"]}, ["eos_token_id", "'2'"]),
    ("config.json", {"bos_token_id": "1"}, ["bos_token_id", "'1'"]),
    ("config.json", {"eos_token_id": True}, ["eos_token_id", "True"]),
    ("config.json", {"eos_token_id": -1}, ["eos_token_id", "-1"]),
    ("config.json", {"eos_token_id": 2.0}, ["eos_token_id", "2.0"]),
    ("tokenizer_config.json", {"eos_token": 3}, ["eos_token is 3"]),
    ("tokenizer_config.json", {"eos_token": {"lstrip": False}}, ["content"]),
    ("tokenizer_config.json", {"eos_token": ["<|end|>"]}, ["eos_token is ['<|end|>']"]),
    ("tokenizer_config.json", {"added_tokens_decoder": [0]}, []),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, []),
    ("tokenizer_config.json", {"added_tokens_decoder": {"3": "y"}}, []),
    ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": None}}}, ["added token 3 is None"]),
    ("tokenizer_config.json", {"added_tokens_decoder": {"-3": {"content": "y"}}}, ["'y' is -3"]),
    ("tokenizer_config.json", [], ["expected a JSON object"]),
])
def test_a_setting_that_is_none_is_refused_by_file(tmp_path, name, content, words):
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    refused(tmp_path, name, *words)


def test_a_chat_template_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    refused(tmp_path, "chat_template.jinja")
    assert load_tokenizer(tmp_path, "plain").template == "plain"  # nobody asked the file


def test_llama3_ranks_that_are_not_the_ids_are_refused(tmp_path):
    words = [base64.b64encode(i.to_bytes(3, "big")) for i in range(128000)]
    lines = [word + b" %d\n" % rank for rank, word in enumerate(words)]
    lines[5] = words[5] + b" 4\n"
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    refused(tmp_path, "tokenizer.model", "each rank below 128000 once")


def test_the_byte_alphabet_is_the_one_of_the_tokenizers_package():
    from tokenizers import pre_tokenizers
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert list(byte_alphabet().values()) == list(range(256))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("A \n\x00\x7f", "é漢😀\xad"):
        (piece, _), = splitter.pre_tokenize_str(text)
        assert bytes(byte_alphabet()[character] for character in piece) == text.encode()


def test_the_digest_names_the_tokenizer_and_nothing_else(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"model_max_length": 1}')
    expected = hashlib.sha256((TINY / "tokenizer.json").read_bytes()).hexdigest()[:16]
    assert {load_tokenizer(folder).digest for folder in (TINY, tmp_path / "a", tmp_path / "b")} == {expected}
    spaced = (TINY / "tokenizer.json").read_text() + " "
    (tmp_path / "b" / "tokenizer.json").write_text(spaced)
    assert load_tokenizer(tmp_path / "b").digest != expected
