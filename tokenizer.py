"""The tokenizer: text <-> token ids, and a chat turn around a document.

    tokenizer.model, lines "IQ== 0"       Llama 3               tiktoken
    tokenizer.json, byte-level BPE        SmolLM2, Llama 3, ..  tiktoken, from vocab + merges + split pattern
    tokenizer.model, protobuf             Llama 2, Mistral      sentencepiece (optional package)

Text never becomes a control token: a document that says "<|im_end|>" is a document about chat formats.
Control tokens come from the templates below, and BOS only from there: once.
"""
import base64
import hashlib
import itertools
import re
from collections import namedtuple
from pathlib import Path

import regex                                          # comes with tiktoken; re lacks \p{L}
import tiktoken

from configs import BadInput, read_json

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ("begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id "
                  "reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag").split()

# A turn: begin + [system] + user | document | tail. <|name|>, <bos>, <eos> become ids, everything else is encoded text.
# marker: what chooses the template, among special tokens and in the folder's own chat template; the first match wins.
Template = namedtuple("Template", "marker begin system user tail stops default_system", defaults=[None])
CHATML = Template("<|im_start|>", "", "<|im_start|>system\n{text}<|im_end|>\n", "<|im_start|>user\n{text}",
                  "{text}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|><|endoftext|><eos>")
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATES = {
    "llama3": Template("<|start_header_id|>", "<bos>",
                       "<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
                       "<|start_header_id|>user<|end_header_id|>\n\n{text}",
                       "{text}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                       "<|eot_id|><|eom_id|><|end_of_text|>"),
    "smollm2": CHATML._replace(marker=SMOLLM2, default_system=SMOLLM2),
    "chatml": CHATML,
    "llama2": Template("<<SYS>>", "<bos>[INST] ", "<<SYS>>\n{text}\n<</SYS>>\n\n", "{text}", "{text} [/INST]", "<eos>"),
    "mistral": Template("[INST]", "<bos>[INST] ", "{text}\n\n", "{text}", "{text} [/INST]", "<eos>"),
    "plain": Template("", "<bos>", "{text}\n\n", "{text}", "{text}", "<eos>")}
CONTROL = re.compile(r"(<\|\w+\|>|<bos>|<eos>)")


def byte_alphabet():
    """The printable character for each byte in tokenizer.json, GPT-2's invention: {"A": 65, "Ġ": 32, ...}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_patterns(pre, path):
    """pre_tokenizer -> regular expressions, each to split the pieces that the one before left."""
    *parts, last = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    if not last or last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        raise BadInput(f"{path}: expected a last pre_tokenizer ByteLevel without add_prefix_space, found {last}")
    patterns = [GPT2_SPLIT] if last.get("use_regex", True) else []
    for part in reversed(parts):
        if part["type"] == "Digits":
            patterns.insert(0, r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif part["type"] == "Split" and part["behavior"] == "Isolated":
            patterns.insert(0, part["pattern"].get("Regex") or regex.escape(part["pattern"]["String"]))
        else:
            raise BadInput(f"{path}: expected pre_tokenizers Digits, isolated Split, ByteLevel, found {part}")
    # What lies between two matches is a piece as well; tiktoken alone would drop it.
    return [rf"(?:{p})|(?:(?!{p})[\s\S])+" for p in patterns] or [r"[\s\S]+"]


def read_byte_level(path):
    """tokenizer.json of Hugging Face. tiktoken merges by id, so: rank by merge order, then map ranks to ids.

    tiktoken merges any two neighbours that make a word, Hugging Face only the listed pairs: the same for merges that
    training made, not for every list written by hand.
    """
    spec = read_json(path)
    model = spec.get("model") or {}
    unusual = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    odd = {key: model[key] for key in unusual if model.get(key)}
    if model.get("type") != "BPE" or odd or spec.get("normalizer"):
        raise BadInput(f"{path}: expected byte-level BPE without normalizer, found {model.get('type')} {odd}, "
                         f"normalizer {spec.get('normalizer')}")
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}     # also "special": false
    alphabet = byte_alphabet()
    try:
        vocab = {bytes(alphabet[c] for c in word): i for word, i in model["vocab"].items() if word not in special}
        merges = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        merges = [bytes(alphabet[c] for c in word) for word in merges]
    except KeyError as error:
        raise BadInput(f"{path}: expected byte-level vocab and merges, found no {error}") from None
    ranks = {word: rank for rank, word in enumerate(dict.fromkeys([bytes([b]) for b in range(256)] + merges))}
    ids = [vocab.get(word) for word in ranks]         # None: a byte without a token; it vanishes, as in Hugging Face
    # A word that no merge makes is taken whole or not at all; in tiktoken's table, smaller words would merge into it.
    whole = {word for word in vocab if model.get("ignore_merges") and word not in ranks}
    whole = {word.decode("utf-8", "surrogateescape"): vocab[word] for word in whole}      # half a character never matches
    *stages, last = split_patterns(spec.get("pre_tokenizer"), path) + ([r"[\s\S]+"] if whole else [])
    bpe = tiktoken.Encoding("byte-level", pat_str=last, mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        pieces = [text]
        for stage in stages:
            pieces = [match.group() for piece in pieces for match in regex.finditer(stage, piece)]
        for piece in pieces:
            yield from [whole[piece]] if piece in whole else [ids[rank] for rank in bpe.encode_ordinary(piece)]

    words = {i: word for word, i in vocab.items()}
    decode = lambda tokens: b"".join(words.get(i, b"") for i in tokens).decode("utf-8", "replace")
    return (lambda text: [i for i in encode(text) if i is not None]), decode, special, 1 + max(vocab.values()), {}


def read_llama3(path):
    """Lines "base64 rank", where rank = id. The names of the 256 control tokens after them are not in the file."""
    try:
        ranks = {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, path.read_bytes().splitlines())}
    except ValueError:
        raise BadInput(f"{path}: expected lines of 'base64 rank', found something else") from None
    if len(ranks) != 128000:                          # Llama 4 has another split pattern
        raise BadInput(f"{path}: expected the 128000 words of Llama 3, found {len(ranks)}")
    names = LLAMA3_SPECIAL + [f"reserved_special_token_{i}" for i in range(3, 248)]
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    bpe = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return bpe.encode_ordinary, bpe.decode, special, len(ranks) + len(special), ends


def read_sentencepiece(path):
    """Llama 2 and Mistral. Every encode() begins with a word mark, as in Meta's code: "a" is the token "▁a"."""
    try:
        from sentencepiece import SentencePieceProcessor
        model = SentencePieceProcessor(model_file=str(path))
    except ImportError:
        raise BadInput(f"{path}: this tokenizer needs: pip install sentencepiece") from None
    except (RuntimeError, OSError):
        raise BadInput(f"{path}: expected a tokenizer of Llama 3 or of sentencepiece, found neither") from None
    special = {model.id_to_piece(i): i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)}
    ends = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()}
    return model.encode, model.decode, special, len(model), ends


def load_tokenizer(folder, template="auto"):
    """The Tokenizer of a model folder. ValueError names the file, what was found and what was expected."""
    folder = Path(folder)
    path = folder / "tokenizer.model"
    if path.is_file():                                # the first line tells Llama 3's text from a protobuf
        with open(path, "rb") as f:
            read = read_llama3 if re.match(rb"[\w+/]+=* \d+\s", f.read(64)) else read_sentencepiece
    else:
        path, read = folder / "tokenizer.json", read_byte_level
    if not path.is_file():
        raise BadInput(f"{folder}: found no tokenizer, expected tokenizer.model or tokenizer.json")
    tokenizer = Tokenizer(folder, template, *read(path))
    tokenizer.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return tokenizer


class Tokenizer:
    """One model folder's encode, decode and chat; made by load_tokenizer.

    special {name: id} of control tokens; bos_id, eos_id int, or None where the folder names none; vocab_size highest
    id + 1 (a model may have more rows); template a name in TEMPLATES; digest the first 16 hexadecimal digits of the
    sha256 of the file that gives the ids.
    """

    def __init__(self, folder, template, encode, decode, special, size, settings):
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):   # later files know better
            settings |= read_json(folder / name) if (folder / name).is_file() else {}
        self._encode, self._decode, self.template = encode, decode, template
        self.special = special | {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}
        self._names = {i: name for name, i in self.special.items()}
        self.vocab_size = max(size, *(i + 1 for i in self._names), 0)
        self.bos_id, self.eos_id = self._end("bos", settings), self._end("eos", settings)
        if template == "auto":
            jinja = folder / "chat_template.jinja"
            clues = "\n".join([*self.special, str(settings.get("chat_template"))])
            clues += jinja.read_text("utf-8") if jinja.is_file() else ""
            self.template = next(name for name, t in TEMPLATES.items() if t.marker in clues)
        elif template not in TEMPLATES:
            raise BadInput(f"unknown template {template!r}, expected auto, {', '.join(TEMPLATES)}")
        needed = set(CONTROL.findall(TEMPLATES[self.template].user + TEMPLATES[self.template].tail))
        if needed - set(self.special):
            raise BadInput(f"{folder}: template {self.template} needs {sorted(needed)}, found {[*self.special][:20]}")

    def _end(self, which, settings):
        """bos or eos: a name in tokenizer_config.json, else an id or (Llama 3.1) a list of ids."""
        name, ids = settings.get(f"{which}_token"), settings.get(f"{which}_token_id")
        name = name["content"] if isinstance(name, dict) else name
        return self.special.get(name, ids[0] if isinstance(ids, list) else ids)

    def encode(self, text):
        """str -> [int]. No BOS, and no control tokens whatever the text says."""
        parts = re.split(r"(\s{25000})", text)        # tiktoken panics at 1,000,000 spaces; 100,000 were fine
        return [i for part in parts for i in self._encode(part)]

    def decode(self, ids, skip_special=True):
        """[int] -> str. Control tokens are left out or shown by name; bytes that are not UTF-8 show as U+FFFD."""
        if skip_special:
            return self._decode([i for i in ids if i not in self._names])
        runs = itertools.groupby(ids, self._names.get)
        return "".join(name * len(list(run)) if name else self._decode(list(run)) for name, run in runs)

    def chat(self, user_head, user_tail, system=None):
        """One user turn around a document: (prefix_ids, suffix_ids, stop_ids).

        prompt = prefix_ids + the document's tokens + suffix_ids; the answer follows and ends with stop_ids[0] (any of
        stop_ids when generating). system: None is the template's default, "" is no system part.
        """
        t = TEMPLATES[self.template]
        system = t.default_system if system is None else system
        prefix = self._ids((t.begin, ""), (t.system if system else "", system), (t.user, user_head))
        stops = list(dict.fromkeys(self._ids((t.stops, ""))))
        if not stops:
            raise BadInput(f"template {self.template} ends answers with {t.stops}: found no such token in this folder")
        return prefix, self._ids((t.tail, user_tail)), stops

    def _ids(self, *filled):
        """(format, text) pairs -> ids. Text goes in after the control tokens came out, so it cannot bring its own."""
        control = {**self.special, "<bos>": self.bos_id, "<eos>": self.eos_id}
        runs = [""]                                   # text, id, text, id, ..., text: words may cross two formats
        for form, text in filled:
            first, *rest = CONTROL.split(form)
            runs[-1] += first.format(text=text)
            for name, words in zip(rest[::2], rest[1::2]):
                runs += [control.get(name), words.format(text=text)]
        ids = [run if i % 2 else self.encode(run) for i, run in enumerate(runs)]
        return [i for run in ids if run is not None for i in (run if isinstance(run, list) else [run])]
