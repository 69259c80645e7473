"""The tokenizer: text <-> token ids, and a chat turn around a document.

    tokenizer.model, lines "IQ== 0"       Llama 3               tiktoken
    tokenizer.json, byte-level BPE        SmolLM2, Qwen, ...    tiktoken
    tokenizer.model, protobuf             Llama 2, Mistral      sentencepiece (optional package)

Text never becomes a control token: a document that says "<|im_end|>" is a document about chat
formats. Control tokens come from the templates below, and BOS only from there: once.
"""
import base64
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import regex  # comes with tiktoken; re lacks \p{L}
import tiktoken

from configs import BadInput, read_json, reading

GPT2_SPLIT = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
              r"|\s+(?!\S)|\s+")
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ("begin_of_text", "end_of_text", "reserved_special_token_0",
                  "reserved_special_token_1", "finetune_right_pad_id", "reserved_special_token_2",
                  "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag")
LLAMA3_WORDS = 128000


# ------------------------------------------------------------------------------- chat templates

class Template(NamedTuple):
    """One user turn: begin + [system] + user | document | tail. The answer ends with stops[0].

    <|name|>, <bos> and <eos> become ids, everything else is encoded text. Why not the template in
    the folder? It is a program (Jinja) that makes one text: the document would be encoded with what
    stands around it, and its chunks would not begin and end where we cut them.
    """
    marker: str  # tells the template, by special tokens or the folder's own; the first match wins
    begin: str
    system: str
    user: str
    tail: str
    stops: str
    default_system: str | None = None


# What their own templates say where a conversation names no system.
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN2 = "You are a helpful assistant."
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHATML = Template(
    marker="<|im_start|>",
    begin="",
    system="<|im_start|>system\n{text}<|im_end|>\n",
    user="<|im_start|>user\n{text}",
    tail="{text}<|im_end|>\n<|im_start|>assistant\n",
    stops="<|im_end|><|endoftext|><eos>")
TEMPLATES = {
    "llama3": Template(
        marker="<|start_header_id|>",
        begin="<bos>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}",
        tail="{text}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        stops="<|eot_id|><|eom_id|><|end_of_text|>"),
    "smollm2": CHATML._replace(marker=SMOLLM2, default_system=SMOLLM2),
    "qwen2.5": CHATML._replace(marker=QWEN25, default_system=QWEN25),
    # A model that may think first. Here it does not: chosen and rejected answers are short, and
    # thoughts would be most of what is scored. So its turn begins with an empty thought, as its own
    # template writes at enable_thinking=False.
    "qwen3": CHATML._replace(marker="enable_thinking",
                             tail=CHATML.tail + "<think>\n\n</think>\n\n"),
    "qwen2": CHATML._replace(marker=QWEN2 + "<|im_end|>", default_system=QWEN2),
    "chatml": CHATML,
    # Since Mistral-7B-v0.3 the brackets are tokens, and no space stands beside them.
    "mistral3": Template(
        marker="<|inst|>",
        begin="<bos><|inst|>",
        system="{text}\n\n",
        user="{text}",
        tail="{text}<|end_inst|>",
        stops="<eos>"),
    "llama2": Template(
        marker="<<SYS>>",
        begin="<bos>[INST] ",
        system="<<SYS>>\n{text}\n<</SYS>>\n\n",
        user="{text}",
        tail="{text} [/INST]",
        stops="<eos>"),
    "mistral": Template(
        marker="[INST]",
        begin="<bos>[INST] ",
        system="{text}\n\n",
        user="{text}",
        tail="{text} [/INST]",
        stops="<eos>"),
    "plain": Template(
        marker="",
        begin="<bos>",
        system="{text}\n\n",
        user="{text}",
        tail="{text}",
        stops="<eos>"),
}
# QwQ, Qwen3-Thinking; DeepSeek-R1's distillates. An empty thought is none. In Jinja's text a new
# line may be spelled \\n.
ALWAYS_THINKS = re.compile(r"(?:<\|im_start\|>assistant(?:\n|\\n)|<｜Assistant｜>)<think>"
                           r"(?!(?:\n|\\n){2}</think>)")
# Control tokens whose names are text in other templates, as a template calls them.
OTHER_NAMES = {"<|inst|>": "[INST]", "<|end_inst|>": "[/INST]"}
CONTROL = re.compile(r"(<\|\w+\|>|</?think>|<bos>|<eos>)")


# ------------------------------------------------------------------------- three kinds of file

class Vocabulary(NamedTuple):
    """What a tokenizer file says."""
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    special: dict[str, int]  # control tokens, which encode never gives
    size: int  # highest id + 1
    ends: dict[str, Any]  # bos and eos as far as the file knows them, under Hugging Face's keys


def byte_alphabet() -> dict[str, int]:
    """{"A": 65, "Ġ": 32, ...}: the character for each byte in tokenizer.json, GPT-2's invention.

    Bytes that print stand for themselves. The others, a space among them, take what follows 255.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet = {}
    unused = 256
    for byte in range(256):
        if byte in printable:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(unused)] = byte
            unused += 1
    return alphabet


BYTES = byte_alphabet()
NFC = {"type": "NFC"}  # Qwen's normalizer: Unicode's composed form, e with its accent one character


def read_byte_level(path: Path) -> Vocabulary:
    """tokenizer.json of Hugging Face, byte-level BPE. BadInput for any other kind."""
    spec = read_json(path)
    model = spec.get("model") or {}
    unusual = {}
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            unusual[key] = model[key]
    normalizer = spec.get("normalizer")
    if normalizer == {"type": "Sequence", "normalizers": []}:  # another way of saying none
        normalizer = None
    if model.get("type") != "BPE" or unusual or normalizer not in (None, NFC):
        raise BadInput(f"{path}: expected byte-level BPE without normalizer, or with NFC, "
                       f"found {model.get('type')} {unusual}, normalizer {normalizer}")
    special = {}
    for token in spec.get("added_tokens") or []:  # also those with "special": false
        name = checked_name(token["content"], "an added token", path)
        special[name] = checked_id(token["id"], name, path)
    vocab = read_vocab(model["vocab"], special, path)
    bpe = ByteLevel(vocab, read_merges(model["merges"], path), split_patterns(spec, path),
                    bool(model.get("ignore_merges")), nfc=normalizer == NFC)
    return Vocabulary(bpe.encode, bpe.decode, special, 1 + max(vocab.values()), {})


def checked_id(value: Any, name: str, path: Path) -> int:
    # An id of null would not fail anywhere: its word would vanish from every text.
    if type(value) is not int or value < 0:
        raise BadInput(f"{path}: the id of {name!r} is {value!r}, expected a whole number")
    return value


def checked_name(value: Any, what: str, path: Path) -> str:
    """The name of a control token: a text that a chat template can be written with."""
    # JSON can spell halves of characters, which UTF-8 has not.
    if not isinstance(value, str) or value != value.encode("utf-8", "ignore").decode():
        raise BadInput(f"{path}: {what} is {value!r}, expected a text")
    return value


def to_bytes(word: str, path: Path) -> bytes:
    """A word of tokenizer.json as the bytes that it stands for."""
    try:
        return bytes(BYTES[character] for character in word)
    except KeyError as e:
        raise BadInput(f"{path}: expected byte-level vocab and merges, found {e}") from None


def read_vocab(vocab: dict[str, int], special: dict[str, int], path: Path) -> dict[bytes, int]:
    """{word: id} without the control tokens."""
    words = {}
    for word, i in vocab.items():
        if word not in special:
            words[to_bytes(word, path)] = checked_id(i, word, path)
    return words


def read_merges(merges: list, path: Path) -> list[bytes]:
    """The words that merges make, in their order."""
    words = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge  # the two spellings in use
        if len(pair) != 2:
            raise BadInput(f"{path}: expected a merge of two words, found {merge!r}")
        words.append(to_bytes(pair[0] + pair[1], path))
    return words


# Where a pattern matches an empty string, tiktoken ends the process and regex drops a character.
PROBE = "Word  words 1234567 don't,\n\n\té 漢字 !? x"


def split_patterns(spec: dict[str, Any], path: Path) -> list[str]:
    """pre_tokenizer as regular expressions, each to split the pieces that the one before left."""
    pre = spec.get("pre_tokenizer")
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    last = parts[-1]
    if not last or last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        raise BadInput(f"{path}: expected a last pre_tokenizer ByteLevel without add_prefix_space, "
                       f"found {last}")
    patterns = []
    for part in parts[:-1]:
        if part["type"] == "Digits":
            patterns.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            found = part["pattern"]
            patterns.append(found["Regex"] if "Regex" in found else regex.escape(found["String"]))
        else:
            raise BadInput(f"{path}: expected pre_tokenizers Digits, isolated Split, ByteLevel, "
                           f"found {part}")
    if last.get("use_regex", True):
        patterns.append(GPT2_SPLIT)
    for pattern in patterns:
        check_pattern(pattern, path)
    # What lies between two matches is a piece as well; tiktoken alone would drop it.
    return [rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+" for pattern in patterns]


def check_pattern(pattern: str, path: Path) -> None:
    try:
        lengths = [len(match.group()) for match in regex.finditer(pattern, PROBE)]
    except regex.error as e:
        raise BadInput(f"{path}: {pattern!r} is no regular expression ({e})") from None
    if 0 in lengths:
        raise BadInput(f"{path}: the split pattern {pattern!r} can match an empty string, "
                       "which is not implemented")


class ByteLevel:
    """Byte-level BPE by tiktoken.

    tiktoken merges by id, tokenizer.json by the order of its merges. So tiktoken gets ranks by that
    order, and ranks are mapped to ids here. tiktoken merges any two neighbours that make a word,
    Hugging Face only the listed pairs: the same for merges that training made, not for every list
    written by hand.
    """

    def __init__(self, vocab: dict[bytes, int], merges: list[bytes], patterns: list[str],
                 ignore_merges: bool, nfc: bool = False):
        self.nfc = nfc
        self.words = {i: word for word, i in vocab.items()}
        bytes_first = [bytes([byte]) for byte in range(256)]
        ranks = {}
        for word in bytes_first + merges:
            ranks.setdefault(word, len(ranks))
        # None: a byte without a token. It vanishes from the text, as in Hugging Face.
        self.ids = [vocab.get(word) for word in ranks]

        # With ignore_merges, a word that no merge makes is taken whole or not at all. It must stay
        # out of tiktoken's table, where smaller words would merge into it.
        self.unmerged = {}
        for word, i in vocab.items():
            if ignore_merges and word not in ranks:
                # Half a character becomes a surrogate, which no text holds.
                self.unmerged[word.decode("utf-8", "surrogateescape")] = i

        # The last pattern is tiktoken's work, unless pieces must be looked up before it merges.
        everything = r"[\s\S]+"
        if self.unmerged or not patterns:
            patterns = [*patterns, everything]
        self.stages = [regex.compile(pattern) for pattern in patterns[:-1]]
        self.bpe = tiktoken.Encoding("byte-level", pat_str=patterns[-1], mergeable_ranks=ranks,
                                     special_tokens={})

    def encode(self, text: str) -> list[int]:
        if self.nfc:
            # By Python's tables, as in Qwen's own code. The tokenizers package has those of Unicode
            # 9: there a hundred marks, of scripts that are younger, stay in the order they come in.
            text = unicodedata.normalize("NFC", text)
        pieces = [text]
        for stage in self.stages:
            smaller = []
            for piece in pieces:
                smaller += [match.group() for match in stage.finditer(piece)]
            pieces = smaller
        ids = []
        for piece in pieces:
            if piece in self.unmerged:
                ids.append(self.unmerged[piece])
            else:
                ids += [self.ids[rank] for rank in self.bpe.encode_ordinary(piece)]
        return [i for i in ids if i is not None]

    def decode(self, ids: list[int]) -> str:
        words = [self.words.get(i, b"") for i in ids]
        return b"".join(words).decode("utf-8", "replace")


def read_llama3(path: Path) -> Vocabulary:
    """Lines "base64 rank", where rank = id. The 256 control tokens follow without their names."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            word, rank = line.split()
            ranks[base64.b64decode(word)] = int(rank)
    except ValueError:
        raise BadInput(f"{path}: expected lines of 'base64 rank', found something else") from None
    if len(ranks) != LLAMA3_WORDS:  # Llama 4 has another split pattern
        raise BadInput(f"{path}: expected the {LLAMA3_WORDS} words of Llama 3, found {len(ranks)}")
    if set(ranks.values()) != set(range(LLAMA3_WORDS)):
        raise BadInput(f"{path}: expected each rank below {LLAMA3_WORDS} once, found others")
    special = {}
    for name in [*LLAMA3_SPECIAL, *(f"reserved_special_token_{i}" for i in range(3, 248))]:
        special[f"<|{name}|>"] = LLAMA3_WORDS + len(special)
    bpe = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                            special_tokens={})
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    size = LLAMA3_WORDS + len(special)
    return Vocabulary(bpe.encode_ordinary, bpe.decode, special, size, ends)


def read_sentencepiece(path: Path) -> Vocabulary:
    """Llama 2 and Mistral. As in Meta's code, each text begins with a word mark: "a" is "▁a"."""
    try:
        from sentencepiece import SentencePieceProcessor
        model = SentencePieceProcessor(model_file=str(path))
    except ImportError:
        raise BadInput(f"{path}: this tokenizer needs: pip install sentencepiece") from None
    except (RuntimeError, OSError):
        raise BadInput(f"{path}: expected a tokenizer of Llama 3 or of sentencepiece, "
                       "found neither") from None
    special = {}
    for i in range(len(model)):
        if model.is_control(i) or model.is_unknown(i):
            special[model.id_to_piece(i)] = i
    ends = {}
    for key, i in (("bos_token_id", model.bos_id()), ("eos_token_id", model.eos_id())):
        if i >= 0:  # -1: it has none
            ends[key] = i

    def decode(ids: list[int]) -> str:
        # A model may have more rows than there are pieces, to be a multiple of 64. What nobody
        # trained is drawn hardly ever; but then sentencepiece would end a build of hours.
        return model.decode([i for i in ids if i < len(model)])

    return Vocabulary(model.encode, decode, special, len(model), ends)


# ------------------------------------------------------------------------- the folder's settings

# Later files know better.
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def read_settings(folder: Path) -> dict[str, Any]:
    """What the JSON files of a folder say of the tokenizer, in one dict."""
    settings = {}
    for path in [folder / name for name in SETTINGS]:
        if path.is_file():
            found = read_json(path)
            with reading(path):
                check_settings(found, path)
            settings |= found
    return settings


def check_settings(found: dict[str, Any], path: Path) -> None:
    """BadInput for a name or an id of BOS or EOS, or a list of added tokens, that is none."""
    for i, token in (found.get("added_tokens_decoder") or {}).items():
        checked_id(int(i), checked_name(token["content"], f"added token {i}", path), path)
    for key in ("bos_token", "eos_token"):
        name = found.get(key)
        if isinstance(name, dict):
            name = name["content"]
        if name is not None:
            checked_name(name, key, path)
    for key in ("bos_token_id", "eos_token_id"):
        ids = found.get(key)
        if ids == []:
            raise BadInput(f"{path}: {key} is [], expected an id or a list of ids")
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None:
                checked_id(i, key, path)


def end_of(which: str, settings: dict[str, Any], special: dict[str, int]) -> int | None:
    """The id of "bos" or "eos": by name where one is given, else by id; of several the first."""
    name = settings.get(f"{which}_token")
    if which == "bos" and name is None and "bos_token" in settings:
        return None  # Qwen: config.json has an id for it, and yet no text begins with it
    if isinstance(name, dict):
        name = name["content"]
    if name in special:
        return special[name]
    ids = settings.get(f"{which}_token_id")
    return ids[0] if isinstance(ids, list) else ids


def find_template(folder: Path, settings: dict[str, Any], special: dict[str, int]) -> str:
    """The first of TEMPLATES whose marker is a special token or in the folder's own template."""
    clues = [*special, str(settings.get("chat_template"))]
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        with reading(jinja):
            clues.append(jinja.read_text("utf-8"))
    text = "\n".join(clues)
    if ALWAYS_THINKS.search(text):
        raise BadInput(f"{folder}: its chat template opens every answer with <think>, expected a "
                       "model that can answer at once (or, at your own risk, template=chatml)")
    return next(name for name, template in TEMPLATES.items() if template.marker in text)


# ------------------------------------------------------------------------------- the tokenizer

# Unicode's names of their characters begin so.
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def has_no_spaces(character: str) -> bool:
    """Whether a character is of a script that has none between words. Korean has."""
    return unicodedata.name(character, "").startswith(WITHOUT_SPACES)


def load_tokenizer(folder: str | Path, template: str = "auto") -> "Tokenizer":
    """The Tokenizer of a model folder. BadInput names the file, what was found, what expected."""
    folder = Path(folder)
    path = folder / "tokenizer.model"
    read = read_byte_level
    # os.path's, to which a name that is too long is one that is not there.
    if not os.path.isfile(path):
        path = folder / "tokenizer.json"
        if not os.path.isfile(path):
            raise BadInput(f"{folder}: found no tokenizer, "
                           "expected tokenizer.model or tokenizer.json")
    with reading(path):
        content = path.read_bytes()
        if path.name == "tokenizer.model":
            # The first line tells Llama 3's text from a protobuf.
            is_text = re.match(rb"[\w+/]+=* \d+\s", content[:64])
            read = read_llama3 if is_text else read_sentencepiece
        vocabulary = read(path)
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Tokenizer(folder, template, vocabulary, digest)


class Tokenizer:
    """One model folder's encode, decode and chat; made by load_tokenizer.

    special: {name: id} of control tokens. bos_id, eos_id: int, or None where the folder names none.
    vocab_size: highest id + 1 (a model may have more rows). template: a name in TEMPLATES. digest:
    16 hexadecimal digits of the tokenizer file's sha256: where they are equal, so are the ids.
    """

    def __init__(self, folder: Path, template: str, vocabulary: Vocabulary, digest: str):
        self._encode = vocabulary.encode
        self._decode = vocabulary.decode
        self.digest = digest
        self.folder = folder
        settings = vocabulary.ends | read_settings(folder)
        self.special = dict(vocabulary.special)
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            self.special[token["content"]] = int(i)
        self._names = {i: name for name, i in self.special.items()}
        for other, name in OTHER_NAMES.items():
            if name in self.special:
                self.special[other] = self.special[name]
        self.vocab_size = max([vocabulary.size, *(i + 1 for i in self._names)])
        self.bos_id = end_of("bos", settings, self.special)
        self.eos_id = end_of("eos", settings, self.special)
        for key, i in (("bos_token_id", self.bos_id), ("eos_token_id", self.eos_id)):
            if i is not None and i >= self.vocab_size:
                raise BadInput(f"{folder}: {key} is {i}, its tokenizer has {self.vocab_size} ids")

        if template == "auto":
            template = find_template(folder, settings, self.special)
        elif template not in TEMPLATES:
            raise BadInput(f"unknown template {template!r}, expected auto, {', '.join(TEMPLATES)}")
        self.template = template
        needed = set(CONTROL.findall(TEMPLATES[template].user + TEMPLATES[template].tail))
        if needed - set(self.special):
            found = list(self.special)[:20]
            raise BadInput(f"{folder}: template {template} needs {sorted(needed)}, found {found}")

    def encode(self, text: str) -> list[int]:
        """No BOS, and no control tokens whatever the text says."""
        ids = []
        # tiktoken panics at 1,000,000 spaces; 100,000 were fine.
        for part in re.split(r"(\s{25000})", text):
            ids += self._encode(part)
        return ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Control tokens are left out or shown by name; bytes that are not UTF-8 show as U+FFFD."""
        if skip_special:
            return self._decode([i for i in ids if i not in self._names])
        # What lies between two control tokens is decoded at once: a character may take several ids.
        text = ""
        run = []
        for i in ids:
            if i in self._names:
                text += self._decode(run) + self._names[i]
                run = []
            else:
                run.append(i)
        return text + self._decode(run)

    def chat(self, user_head: str, user_tail: str, system: str | None = None
             ) -> tuple[list[int], list[int], list[int]]:
        """One user turn around a document: (prefix_ids, suffix_ids, stop_ids).

        prompt = prefix_ids + the document's tokens + suffix_ids; the answer follows and ends with
        stop_ids[0] (any of stop_ids when generating). system: None is the template's default, "" is
        no system part.
        """
        template = TEMPLATES[self.template]
        if system is None:
            system = template.default_system
        head = [(template.begin, ""), (template.user, user_head)]
        if system:
            head.insert(1, (template.system, system))
        stops = list(dict.fromkeys(self._fill([(template.stops, "")])))
        if not stops:
            raise BadInput(f"{self.folder}: template {self.template} ends answers with "
                           f"{template.stops}, found no such token")
        return self._fill(head), self._fill([(template.tail, user_tail)]), stops

    def as_answer(self, text: str, suffix: list[int]) -> str:
        """A text as a model writes it after a prompt's suffix: " Naples" after "Answer:".

        What goes on with words begins with a space. After a control token, a line's end, a space or
        a bracket it does not, nor where a script has none, and sentencepiece adds its word mark,
        which is one, by itself.
        """
        if not text or not suffix or suffix[-1] in self._names:
            return text
        before = self.decode(suffix)
        after_words = before[-1:].isalnum() or before.endswith((":", ";", ",", ".", "!", "?"))
        if not after_words or has_no_spaces(before[-1]) or has_no_spaces(text[0]):
            return text
        joined = self.decode(suffix + self.encode(text))
        return " " + text if joined == before + text.lstrip() else text

    def jinja(self) -> str:
        """The template as a chat template of transformers, for a folder that came without one.

        It makes the prompts that chat() makes: a system message if there is one, a user's turn, the
        answer. It begins with the marker by which find_template knows it.
        """
        template = TEMPLATES[self.template]
        content = "{{ message.content }}"
        user = template.user.replace("{text}", content) + template.tail.replace("{text}", "")
        stop = self._names[self.chat("", "")[2][0]]
        default = ""
        if template.default_system:
            system = template.system.replace("{text}", template.default_system)
            default = "{% if messages[0].role != 'system' %}" + system + "{% endif %}"
        parts = [
            "{# " + template.marker + " #}",
            template.begin,
            default,
            "{% for message in messages %}{% if message.role == 'system' %}",
            template.system.replace("{text}", content),
            "{% elif message.role == 'user' %}",
            user,
            "{% else %}",
            content + stop,
            "{% endif %}{% endfor %}",
        ]
        text = "".join(parts)
        for other, name in OTHER_NAMES.items():
            text = text.replace(other, name)
        bos = "" if self.bos_id is None else self._names[self.bos_id]
        return text.replace("<bos>", bos)

    def _fill(self, forms: list[tuple[str, str]]) -> list[int]:
        """(format, text) pairs -> ids. Control tokens come out before text goes in: it has none."""
        control = {**self.special, "<bos>": self.bos_id, "<eos>": self.eos_id}
        # Between two control tokens all is encoded at once: a word may cross two formats.
        ids = []
        words = ""
        for form, text in forms:
            for part in CONTROL.split(form):
                if not CONTROL.fullmatch(part):
                    words += part.format(text=text)
                    continue
                ids += self.encode(words)
                words = ""
                if control.get(part) is not None:
                    ids.append(control[part])
        return ids + self.encode(words)
