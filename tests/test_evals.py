"""evals/: needles where they belong, and every number against transformers or by hand."""
import base64
import io
import json
import math
import os
import random
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from bench.common import peak_bytes
from checkpoint import dtype_named, load_pretrained, save_pretrained
from configs import BadInput, load_config, run_file
from data import encode_group
from evals import needle, perplexity, pictures, preferences, qa
from evals.__main__ import main, read_command
from evals.common import Subject, area_by_length, interval, texts, token_span
from evals.heads import RetrievalScores
from evals.perplexity import token_losses
from generate import generate
from model import HEAD_CHUNK, Llama, LlamaConfig
from pairs.corpus import read_examples
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")
WORLD = f"{TINY}/world.py"
TAIL = "prompt_tail=\nQuestion: {question}\nAnswer:"
TEXT = "Über den Dächern 😀 liegt 東京の夜. Rosa paints in Naples. Ida naïvely sings in Rome."


@pytest.fixture(scope="module")
def tiny():
    return Subject(TINY, {"dtype": "float32", "batch_tokens": 384})


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with a SentencePiece tokenizer, and tiny's model, whose vocabulary is as large."""
    spm = pytest.importorskip("sentencepiece")
    world, model = run_file(WORLD), io.BytesIO()
    lines = [example["context"].strip() for example in world.examples(60, 200, 0)]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=552, model_type="bpe", byte_fallback=True,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(TINY) / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 1, "eos_token_id": 2}))
    return folder


def prompts_of(subject, n, size=100):
    world = run_file(WORLD)
    examples = [world.needle("multikey", size, 25 * (i % 5), i) for i in range(n)]
    return [subject.prompt(e["context"], "", f"\nQuestion: {e['question']}\nAnswer:") for e in examples]


def table_of(path):
    return json.loads(Path(path).read_text())["table"]


# ------------------------------------------------------------------------------------------------------ generation

def test_greedy_answers_equal_transformers(tiny, theirs):
    prompts = prompts_of(tiny, 12)
    ours = tiny.answers([ids for ids, _ in prompts], [context.stop for _, context in prompts], 16)
    stops = tiny.tokenizer.chat("", "")[2]
    for (ids, _), said in zip(prompts, ours):
        full = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=stops, pad_token_id=0)[0, len(ids):].tolist()
        assert said == tiny.tokenizer.decode([t for t in full if t not in stops])


def test_answers_come_back_in_the_order_of_the_prompts(tiny):
    """Batches are by length; what is seen and said is of the prompt that it belongs to."""
    prompts = [prompts_of(tiny, 1, size)[0][0] for size in (100, 40, 80, 60, 90)]
    seen, stops = {}, tiny.tokenizer.chat("", "")[2]
    said = tiny.answers(prompts, [0] * 5, 12, look=lambda i, token, tops: seen.setdefault(i, []).append(token))
    for i, prompt in enumerate(prompts):
        assert [said[i]] == tiny.answers([prompt], [0], 12)
        assert tiny.tokenizer.decode([t for t in seen[i] if t not in stops]) == said[i]


def test_heads_look_where_transformers_heads_look(tiny, theirs):
    prompts = [ids for ids, _ in prompts_of(tiny, 3)] + [prompts_of(tiny, 1, size=60)[0][0]]
    seen, stops = {}, tiny.tokenizer.chat("", "")[2]             # rows end at different steps
    out = generate(tiny.model, prompts, 16, stop_ids=stops, look=lambda row, token, tops: seen.setdefault(row, []).append((token, tops)))
    for row, (prompt, new) in enumerate(zip(prompts, out)):
        attentions = theirs(torch.tensor([prompt + new]), output_attentions=True).attentions  # (1, H, T, T) of each layer
        assert [token for token, _ in seen[row]] == new
        for step, (_, tops) in enumerate(seen[row]):
            expected = torch.stack([a[0, :, len(prompt) + step - 1].argmax(-1) for a in attentions])
            assert (tops == expected).float().mean() > 0.99                    # near ties may fall either way


# ------------------------------------------------------------------------------------------------ characters, tokens

def said_by(tokenizer, ids):
    """[(first byte, last + 1)] of each token, from the tokenizer's own table."""
    processor = getattr(tokenizer._encode, "__self__", None)
    sizes = []
    for i in ids:
        piece = processor.id_to_piece(i)
        sizes.append(1 if processor.is_byte(i) else len(piece.replace("\u2581", " ").encode()))
    sizes[0] -= 1                                                # the space that every text begins with
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends], ends))


def byte_level_folder(tmp_path):
    """A tokenizer of Llama 3's form: all bytes, and merges, one of them over the border of two characters."""
    words = [bytes([b]) for b in range(256)] + [b" R", b"os", b" Ros", b" Rosa", "東".encode()[1:], "東".encode()[1:] + "京".encode()[:1]]
    words += [b"\xff\xfe" + i.to_bytes(3, "big") for i in range(128_000 - len(words))]   # Llama 3 has so many
    (tmp_path / "tokenizer.model").write_text("".join(f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(words)))
    return load_tokenizer(tmp_path), words


def check_every_span(tokenizer, spans):
    """token_span of every stretch of TEXT against the tokens whose bytes it has."""
    ids, size = tokenizer.encode(TEXT), [len(TEXT[:i].encode()) for i in range(len(TEXT) + 1)]
    assert tokenizer.decode(ids) == TEXT and len(ids) == len(spans) and spans[-1][1] == size[-1]
    for start in range(len(TEXT)):
        for end in range(start + 1, min(len(TEXT), start + 12) + 1):
            holding = [i for i, (a, b) in enumerate(spans) if a < size[end] and b > size[start]]
            first, last = token_span(ids, start, end, tokenizer)
            # a token that says nothing, as a lone word mark at the beginning, may stand before
            assert [i for i in range(first, last) if spans[i][1] > spans[i][0]] == holding, TEXT[start:end]


def test_token_spans_of_sentencepiece(pieces):
    tokenizer = load_tokenizer(pieces)
    check_every_span(tokenizer, said_by(tokenizer, tokenizer.encode(TEXT)))


def test_token_spans_of_byte_level_bpe(tmp_path):
    tokenizer, words = byte_level_folder(tmp_path)
    ends = np.cumsum([len(words[i]) for i in tokenizer.encode(TEXT)]).tolist()
    assert any("東".encode()[1:] + "京".encode()[:1] == words[i] for i in tokenizer.encode(TEXT))
    check_every_span(tokenizer, list(zip([0, *ends], ends)))


# -------------------------------------------------------------------------------------------------- retrieval scores

def watched(subject, ids, needles):
    """(scores, look) with the whole of ids as the context of each needle."""
    scores, n = RetrievalScores(subject), len(needles)
    return scores, scores.watch([ids] * n, [range(len(ids))] * n, [SimpleNamespace(needle=text) for text in needles])


def test_retrieval_scores_count_what_was_copied_from_the_needle(tiny):
    """Eq. 5 by hand: the arg-max lies on the needle's token, in the step that writes this token."""
    ids = tiny.tokenizer.encode(" Snow falls in Turin. Rosa paints in Naples. Fog drifts in Paris.")
    scores, look = watched(tiny, ids, ["Rosa paints in Naples."])
    needle_at = scores.find(ids, range(len(ids)), "Rosa paints in Naples.")
    start, end = needle_at.start, needle_at.stop
    assert tiny.tokenizer.decode(ids[start:end]) == " Rosa paints in Naples." and end - start == 5
    tops = torch.zeros(scores.shape, dtype=torch.long)
    tops[1, 2] = start + 1
    look(0, ids[start + 1], tops)         # head 1.2 looked at "paints" when "paints" was written
    look(0, ids[start + 1], tops)         # the same token again counts once
    other = torch.zeros(scores.shape, dtype=torch.long)
    other[0, 1], other[0, 2] = start + 1, end + 1
    look(0, ids[start + 2], other)        # looked at "paints" or behind the needle, wrote "in": no copies
    assert scores.mean()[1, 2] == 1 / 5 and scores.mean().sum() == scores.mean()[1, 2]


def test_retrieval_scores_of_a_sentencepiece_model(pieces):
    """By hand: of the needle's tokens, a head copies all but the first, another one none."""
    subject = Subject(str(pieces), {"dtype": "float32"})
    fact, context = "Rosa paints in Naples.", " Snow falls in Turin. Rosa paints in Naples. Fog drifts."
    prefix, ids = [1, 300, 301], subject.tokenizer.encode(context)
    words = [subject.tokenizer._encode.__self__.id_to_piece(i) for i in ids]
    text = "".join(words).replace("\u2581", " ")[1:]             # the mark that every text begins with
    ends = np.cumsum([len(word) for word in words]) - 1
    expected = [len(prefix) + i for i, end in enumerate(ends)
                if end > text.index(fact) and end - len(words[i]) < text.index(fact) + len(fact)]
    scores = RetrievalScores(subject)
    place = range(len(prefix), len(prefix) + len(ids))
    look = scores.watch([prefix + ids], [place], [SimpleNamespace(needle=fact)])
    assert list(scores.find(prefix + ids, place, fact)) == expected
    for position in expected[1:]:
        tops = torch.zeros(scores.shape, dtype=torch.long)
        tops[2, 0] = position
        look(0, (prefix + ids)[position], tops)
    assert scores.mean()[2, 0].item() == pytest.approx((len(expected) - 1) / len(expected))
    assert scores.mean().sum() == scores.mean()[2, 0] and scores.left_out == 0


def test_a_needle_that_is_not_found_is_left_out_and_counted(tiny, capsys):
    ids = tiny.tokenizer.encode(" Snow falls in Turin. Rosa paints in Naples.")
    scores, look = watched(tiny, ids, ["Ida", "Rosa paints in Naples."])
    tops = torch.full(scores.shape, scores.find(ids, range(len(ids)), "Rosa paints in Naples.").start)
    look(0, ids[tops[0, 0]], tops)
    look(1, ids[tops[0, 0]], tops)
    scores.print()
    assert scores.left_out == 1 and torch.equal(scores.mean(), torch.full(scores.shape, 1 / 5))  # not 1 / 10
    assert "1 of 2 needles not found" in capsys.readouterr().out
    nothing, _ = watched(tiny, ids, ["Ida"])
    nothing.print()
    assert nothing.mean().tolist() == [] and "1 of 1 needles not found" in capsys.readouterr().out


def test_the_needle_command_finds_sentencepiece_needles(pieces, tmp_path):
    main(["needle", str(pieces), f"haystack={WORLD}", "tasks=single", "lengths=[40]", "depths=[0,50,100]", "samples=2",
          "max_new_tokens=2", "retrieval=True", f"out={tmp_path}"])
    found = json.loads((tmp_path / "needle.json").read_text())
    assert found["left_out"] == {pieces.name: 0} and np.shape(found["heads"][pieces.name]) == (3, 4)


# --------------------------------------------------------------------------------------------------------- needles

def test_wilson_intervals():
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998's method, by hand
    low, high = interval(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)


def test_the_score_is_the_share_of_the_answers_given():
    assert needle.given("It is 12 and 34.", ["34", "12", "56", "1"]) == 0.5


@pytest.mark.parametrize("task", needle.TASKS)
def test_needles_lie_where_the_depth_says(tiny, task):
    for depth in (0, 25, 50, 75, 100):
        facts, question, answers, others = needle.make_facts(task, random.Random(depth))
        context = needle.hide(facts, needle.NOISE, 3000, depth, tiny.tokenizer, random.Random(1))
        assert all(fact in context for fact in facts) and len(answers) == {"single": 1, "multikey": 1, "association": 1}.get(task, 4)
        if task != "variables":
            assert abs(context.index(facts[0]) / (len(context) - len(facts[0])) - depth / 100) < 0.03
        assert len(facts) == (1 if task == "single" else 4)
        # What the other sentences say, and nothing that was asked for.
        assert len(others) == (3 if task in ("multikey", "association") else 0) and not set(others) & set(answers)
        assert all(any(other in fact for fact in facts[1:]) and other not in facts[0] for other in others)


@pytest.mark.parametrize("size", [64, 512, 2048])
def test_a_context_has_the_tokens_that_its_length_says(tiny, pieces, size):
    """Of SentencePiece too: by the sentence, each would count one word mark more than it has in a text."""
    longest = max(len(load_tokenizer(pieces).encode(sentence)) for sentence in needle.NOISE)
    for tokenizer in (tiny.tokenizer, load_tokenizer(pieces)):
        context = needle.hide(["Rosa paints in Naples."], needle.NOISE, size, 50, tokenizer, random.Random(1))
        assert size <= len(tokenizer.encode(context)) <= size + longest


# Words that say nothing by themselves: what is left of needle and question must have nothing in common.
EMPTY_WORDS = "a an and around at be been before below beside even for from has have in is must need never of on the three to was what which who with".split()


def share_a_word(a, b):
    """Whether two texts have a word in common, in any form: by four letters from its beginning, or all where it has fewer."""
    words = [{word for word in re.findall(r"\w+", text.lower()) if word not in EMPTY_WORDS} for text in (a, b)]
    return any(x[:4] == y[:4] or x.startswith(y) or y.startswith(x) for x in words[0] for y in words[1])


def test_no_word_leads_from_an_associations_question_to_its_needle():
    assert len(needle.ASSOCIATIONS) >= 10 and len(needle.PEOPLE) >= 4
    for seed in range(200):
        facts, question, answers, others = needle.make_facts("association", random.Random(seed))
        assert not share_a_word(facts[0], question) and question.count("?") == 1
        assert answers[0] in facts[0].split() and not any(name in facts[0] for name in others)
    seen = {needle.make_facts("association", random.Random(seed)).question for seed in range(200)}
    assert len(seen) == len(needle.ASSOCIATIONS)
    # The check finds what it is for.
    for a, b in (("Yuki lives next to the Semperoper.", "Who lived in Dresden?"), ("She was a farmer.", "Who works on a farm?")):
        assert share_a_word(a, b)


KINDS_BY_HAND = [
    ("It is 12.", "right"), ("12, or 34", "right"), ("34", "other"), ("The number is 34, not 56.", "other"), ("77", "invented"),
    ("The magic number is 127.", "invented"), ("", "silent"), (" \n", "silent"), ("The text does not mention it.", "silent"),
    ("I'm sorry, I cannot tell.", "silent"), ("I don't know.", "silent"), ("There is no such number.", "silent"), ("unknown", "silent"),
    ("It is not mentioned, but 34 is.", "other"), ("Nothing but grass.", "invented")]


@pytest.mark.parametrize("said, kind", KINDS_BY_HAND)
def test_kinds_of_answers_by_hand(said, kind):
    assert needle.kind_of_answer(said, needle.Example("", "", ["12"], ["34", "56"], "")) == kind
    assert needle.kind_of_answer(said + " 12", needle.Example("", "", ["12", "99"], ["34"], "")) == "part"


def test_each_cell_says_what_its_wrong_answers_are(tiny, monkeypatch, capsys):
    """Counts by hand, of answers that were put in the model's mouth."""
    world = run_file(WORLD)
    options = {**needle.OPTIONS, "tasks": "multikey", "lengths": [60, 120], "depths": [0, 100], "samples": 3, "haystack": WORLD}
    examples = {size: [world.needle("multikey", size, depth, [0, i]) for depth in (0, 100) for i in range(3)] for size in (60, 120)}
    said = []
    for size in (60, 120):
        first = examples[size]
        assert len(first[0]["others"]) == max(2, min(16, size // 14)) - 1
        said.append([first[0]["answers"][0], "", "I do not know.", "Rosa paints in Nowhere.", f"Rosa {first[4]['others'][0]}", "Who?"])
    monkeypatch.setattr(Subject, "answers", lambda *args: said.pop(0))
    found = needle.measure([tiny], options)
    kinds = [[row["kinds"][kind] for kind in needle.KINDS] for row in found["table"]]
    assert kinds == [[1, 0, 0, 0, 2], [0, 0, 1, 2, 0]] * 2 and [row["score"] for row in found["table"]] == [1 / 3, 0] * 2
    assert found["areas"] == [{"model": "tiny", "task": "multikey", "area": pytest.approx(1 / 6)}]
    out = capsys.readouterr().out
    assert out.count("wrong: 2 silent, 2 invented, 1 other") == 2 and "area 0.167 over 60..120" in out


@pytest.mark.parametrize("lengths", [[512, 1024, 2048, 4096], [100, 110, 5000], [4096, 512], [7]])
def test_the_area_is_numpys_trapezoid_over_the_logarithm_of_length(lengths):
    rng = np.random.default_rng(0)
    shares = rng.random(len(lengths))
    order = np.argsort(lengths)
    x, y = np.log(np.array(lengths))[order], shares[order]
    expected = np.trapezoid(y, x) / (x[-1] - x[0]) if len(x) > 1 else y[0]
    assert area_by_length(lengths, shares.tolist()) == pytest.approx(expected)
    assert area_by_length(lengths, [0.25] * len(lengths)) == pytest.approx(0.25)


def test_a_variable_is_assigned_before_it_is_used(tiny):
    """Also where two facts of a chain fall on one place."""
    for seed in range(40):
        facts = needle.make_facts("variables", random.Random(seed)).sentences
        context = needle.hide(facts, needle.NOISE, 60, 50, tiny.tokenizer, random.Random(seed))
        places = [context.index(fact) for fact in facts]
        assert places == sorted(places)


def test_the_tiny_worlds_needles():
    world = run_file(WORLD)
    for task in ("single", "multikey", "multiquery"):
        for depth in (0, 50, 100):
            e = world.needle(task, 400, depth, 3)
            assert e["needle"] in e["context"] and abs(e["context"].index(e["needle"]) / len(e["context"]) - depth / 100) < 0.06
            assert len(e["answers"]) == (2 if task == "multiquery" else 1) and all(a in e["context"] for a in e["answers"])


def test_needle_command(tmp_path, capsys):
    (tmp_path / "same").symlink_to(TINY)
    main(["needle", TINY, f"haystack={WORLD}", "tasks=multikey", "lengths=[60,100]", "depths=[0,100]", "samples=3",
          TAIL, "max_new_tokens=16", "retrieval=True", f"out={tmp_path}", f"compare={tmp_path / 'same'}/", "window=80"])
    found = json.loads((tmp_path / "needle.json").read_text())
    assert len(found["table"]) == 8 and {r["length"] for r in found["table"]} == {60, 100}
    assert np.mean([r["score"] for r in found["table"]]) > 0.8 and found["window"] == 80
    out = capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert "retrieval heads" in out and (tmp_path / "needle_multikey.png").is_file() and (tmp_path / "retrieval.png").is_file()
    (mine, same) = found["heads"].values()
    assert mine == same and found["table"][:4] == [{**row, "model": TINY} for row in found["table"][4:]]


# ------------------------------------------------------------------------------------------------------ perplexity

def windows(ids, length, stride):
    """(window, how many of its last tokens it scores), as a list: (Press et al., 2021)."""
    done, found = 0, []
    for begin in range(0, len(ids), stride):
        if done < len(ids) - 1:
            window = ids[begin:begin + length]
            found.append((window, begin + len(window) - 1 - done))
            done = begin + len(window) - 1
    return found


@torch.no_grad()
def float64_losses(model, ids, length, stride):
    """-log softmax of transformers' logits, in float64."""
    losses = []
    for window, scored in windows(ids, length, stride):
        logps = model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
        losses.append(-logps[torch.arange(len(window) - 1), window[1:]][len(window) - 1 - scored:])
    return torch.cat(losses)


def test_perplexity_equals_transformers_on_the_same_windows(tiny, theirs):
    ids = tiny.tokenizer.encode(run_file(WORLD).world(random.Random(0), 330)[0])
    for length, stride in ((64, 16), (100, 99), (64, 64 - 1), (400, 50)):
        ours = token_losses(tiny.model, ids, length, stride)
        assert len(ours) == len(ids) - 1
        torch.testing.assert_close(ours.double(), float64_losses(theirs, ids, length, stride), atol=1e-4, rtol=1e-4)


def test_logits_exist_for_a_chunk_of_scored_rows_only(tiny, monkeypatch):
    ids, rows = (tiny.tokenizer.encode(" Rosa paints in Naples.") * 160)[:700], []
    expected = token_losses(tiny.model, ids, 650, 50)
    one_by_one = Llama.token_logps

    def counted(self, x, targets):
        rows.append(len(x))
        return one_by_one(self, x, targets)
    monkeypatch.setattr(Llama, "token_logps", counted)
    monkeypatch.setattr(Llama, "logits", lambda *args: pytest.fail("logits of whole windows"))
    assert torch.equal(token_losses(tiny.model, ids, 650, 50), expected)
    assert max(rows) <= HEAD_CHUNK and sum(rows) == len(ids) - 1     # each token once


def long_text(seed):
    """Facts, filler that is longer than the truncated context, and the facts again: what LongPPL looks for."""
    world = run_file(WORLD)
    rng = random.Random(seed)
    context, facts = world.world(rng, 80, people=2)
    asked = [f"\nQuestion: Who is {name}?\nAnswer: {fact}" for name, fact in facts.items()]
    return context + "".join(asked) + world.world(rng, 60, people=1)[0]


def write_texts(folder, n=6):
    folder = folder / "texts"
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(long_text(i))
    return [f"text={folder}", "lengths=[96,128]", "stride=8", "truncated=16", "tokens=400"]


def test_longppl_is_the_papers_formula(tiny, theirs, tmp_path):
    """In float64, from transformers' logits: gain > 2, long log-prob > -2, over one evaluator's windows."""
    words = write_texts(tmp_path)
    main(["perplexity", TINY, *words, f"out={tmp_path}"])
    rows = table_of(tmp_path / "perplexity.json")
    encoded = [tiny.tokenizer.encode(long_text(i)) for i in range(6)]
    assert all(len(ids) > 128 for ids in encoded)
    long = torch.cat([float64_losses(theirs, ids, 128, 8) for ids in encoded])
    short = torch.cat([float64_losses(theirs, ids, 16 + 8, 8) for ids in encoded])
    key = (short - long > 2) & (long < 2)
    assert ((short - long - 2).abs() > 1e-3).all() and 10 < key.sum() < ((short - long) > 2).sum()  # both terms matter
    for row in rows:
        losses = torch.cat([float64_losses(theirs, ids, row["length"], 8) for ids in encoded])
        assert row["key_tokens"] == key.sum() and row["tokens"] == len(losses)
        assert row["long"] == pytest.approx(losses[key].mean().exp().item(), rel=1e-4)
        assert row["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)


def test_the_short_context_has_truncated_tokens_or_up_to_stride_more():
    """The paper's code: a step of `stride` tokens shares one window, whose first `truncated` are not judged."""
    truncated, stride, ids = 16, 8, list(range(100))
    token = 0
    for window, scored in windows(ids, truncated + stride, stride):
        for i in range(len(window) - scored, len(window)):
            token += 1
            assert window[i] == token and (token < truncated + stride or truncated <= i < truncated + stride)


def test_one_set_of_key_tokens_for_all_models_and_lengths(tiny, tmp_path):
    """Whichever model is judged, the evaluator's key tokens are the ones."""
    words, other = write_texts(tmp_path), tmp_path / "other"
    model = load_pretrained(TINY)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.06 * torch.randn_like(p)
    save_pretrained(model, str(other), tokenizer=TINY)
    counts = {}
    for folder, compare, evaluator in ((TINY, other, ""), (other, TINY, ""), (other, TINY, TINY), (other, "", TINY)):
        main(["perplexity", str(folder), *words, f"compare={compare or ''}", f"evaluator={evaluator}", f"out={tmp_path}"])
        rows = table_of(tmp_path / "perplexity.json")
        assert len({row["key_tokens"] for row in rows}) == 1
        counts[str(folder), str(evaluator)] = rows[0]["key_tokens"]
        if evaluator or folder == TINY:
            long = {Path(row["model"]).name: row["long"] for row in rows if row["length"] == 128}["other"]
            counts.setdefault("other", long)
            assert long == counts["other"]                           # the same tokens of the same texts
    assert counts[str(other), TINY] == counts[TINY, ""] != counts[str(other), ""]


def test_key_tokens_of_another_tokenizer_are_those_of_the_same_characters(tiny, pieces):
    """A run of key tokens is a stretch of text; in other tokens, those wholly within it."""
    text = " Snow falls in Turin. Rosa paints in Naples. Fog drifts in Paris."
    other = Subject(str(pieces), {"dtype": "float32"})
    ids, other_ids = tiny.tokenizer.encode(text), other.tokenizer.encode(text)
    assert len(other_ids) > len(ids)
    words = [other.tokenizer._encode.__self__.id_to_piece(i).replace("\u2581", " ") for i in other_ids]
    ends = np.cumsum([len(word) for word in words]) - 1              # the mark that every text begins with
    for first, last in ((5, 7), (5, 6), (9, 10), (1, len(ids))):     # tokens of " Rosa paints", " Rosa", " Naples", all but the first
        is_key = torch.zeros(len(ids) - 1, dtype=torch.bool)
        is_key[first - 1:last - 1] = True
        start, stop = len(tiny.tokenizer.decode(ids[:first])), len(tiny.tokenizer.decode(ids[:last]))
        expected = [end - len(word) >= start and end <= stop for word, end in zip(words, ends)][1:]
        assert perplexity.carry_over(is_key, ids, tiny, other_ids, other).tolist() == expected and any(expected)
    assert perplexity.carry_over(is_key, ids, tiny, ids, tiny) is is_key
    with pytest.raises(BadInput, match="does not keep the text"):
        perplexity.carry_over(is_key, ids, tiny, other_ids[:-1], other)


@pytest.mark.parametrize("T", [1024, 4096])
def test_perplexity_makes_logits_of_a_few_rows_at_a_time(T):
    """Every byte: what HEAD_CHUNK rows of logits take, and not what the window's would."""
    config = LlamaConfig(vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=16, max_position_embeddings=T)
    model = Llama(config)
    taken = peak_bytes(lambda: token_losses(model, [5] * T, T, T // 2), "cpu")
    chunk = 4 * HEAD_CHUNK * config.vocab_size
    states = 4 * T * 16 * 12                                     # hidden states, heads and an MLP of the window
    assert chunk < taken < 3 * chunk + states < 4 * T * config.vocab_size


# ---------------------------------------------------------------------------------------------------------- dtypes

@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_takes_the_dtype_that_the_folder_stores(tmp_path, stored):
    """And a CPU float32. A dtype that is named is taken on both."""
    save_pretrained(load_pretrained(TINY), str(tmp_path / "hf"), stored, TINY)
    folder = str(tmp_path / "hf")
    assert dtype_named("auto", folder, "cuda") == stored and dtype_named("auto", folder, "cpu") == torch.float32
    for device in ("cuda", "cpu"):
        assert dtype_named("float32", folder, device) == torch.float32 and dtype_named("bfloat16", folder, device) == torch.bfloat16


@pytest.mark.parametrize("file", ["evals.common", "sample"])
def test_commands_read_the_model_in_that_dtype(tmp_path, monkeypatch, file):
    """With auto by default: on a GPU, bfloat16 from a folder of bfloat16."""
    save_pretrained(load_pretrained(TINY), str(tmp_path / "hf"), torch.bfloat16, TINY)

    class Read(Exception):
        pass

    def load(folder, dtype, device):
        raise Read(dtype, device)

    monkeypatch.setattr(f"{file}.load_pretrained", load)
    for there, expected in ((True, (torch.bfloat16, "cuda")), (False, (torch.float32, "cpu"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(Read) as found:
            if file == "sample":
                sample.main([str(tmp_path / "hf"), "Who is Rosa?"])
            else:
                main(["needle", str(tmp_path / "hf"), "lengths=[64]", f"haystack={WORLD}", f"out={tmp_path}"])
        assert found.value.args == expected


def test_perplexity_command_without_key_tokens(tmp_path, capsys):
    main(["perplexity", TINY, f"text={WORLD}", "lengths=[64,128]", "stride=32", "truncated=64", "tokens=300", "documents=2", f"out={tmp_path}"])
    rows = table_of(tmp_path / "perplexity.json")
    assert [row["length"] for row in rows] == [64, 128] and rows[0]["tokens"] == 2 * 299
    assert rows[0]["long"] is None and "no key tokens" in capsys.readouterr().out
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text(" Rosa paints in Naples." * (60 if i > 1 else 3))
    main(["perplexity", TINY, f"text={tmp_path / 'texts'}", "lengths=[64,128]", "stride=32", "truncated=64", "documents=1", f"out={tmp_path}"])
    assert table_of(tmp_path / "perplexity.json")[0]["tokens"] == 60 * 5 - 1          # the third: the first two are too short
    with pytest.raises(BadInput, match="no text has more than 9000 tokens"):
        main(["perplexity", TINY, f"text={WORLD}", "lengths=[9000]", f"out={tmp_path}"])


# ----------------------------------------------------------------------------------------------------------------- qa

def test_token_f1_by_hand():
    assert qa.token_f1("The Paris of 1889, an exhibition!", "the exhibition of Paris in 1889") == pytest.approx(8 / 9)  # P 1, R 4/5
    assert qa.token_f1("", "Paris") == 0 and qa.token_f1("paris paris", "Paris") == pytest.approx(2 / 3)


def test_token_f1_is_two_precision_recall_over_their_sum():
    words, rng = "Paris Rome 1889 city of light exhibition".split(), random.Random(0)
    for _ in range(50):
        found, wanted = rng.choices(words, k=4), rng.choices(words, k=3)
        same = sum(min(Counter(found)[w], Counter(wanted)[w]) for w in set(found))
        precision, recall = same / 4, same / 3
        expected = 2 * precision * recall / (precision + recall) if same else 0
        assert qa.token_f1(" ".join(found), " ".join(wanted)) == pytest.approx(expected)


def squad_v2(a_gold, a_pred):
    """F1 of SQuAD's script, evaluate-v2.0.py."""
    def normalize_answer(s):
        s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s).split())

    gold_toks, pred_toks = normalize_answer(a_gold).split(), normalize_answer(a_pred).split()
    num_same = sum((Counter(gold_toks) & Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = num_same / len(pred_toks), num_same / len(gold_toks)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("gold, said", [
    ("US", "the U.S."), ("USA", "U.S.A."), ("don't know", "dont know"), ("a well-known man", "The wellknown man."), ("3.14", "314"), ("O'Brien", "OBrien"),
    ("1,000 men", "1000 men"), ("", ""), ("A", "the"), ("A", "B"), ("snake_case", "snakecase"), ("Hepatitis A", "hepatitis b"), ("in the Alps", "“the” Alps—a")])
def test_token_f1_is_squads(gold, said):
    assert qa.token_f1(said, gold) == pytest.approx(squad_v2(gold, said))


def test_token_f1_of_text_without_spaces_counts_characters():
    assert qa.token_f1("在北京", "北京") == pytest.approx(2 * 2 / (3 + 2))


def test_qa_asks_about_no_document_that_pairs_are_built_from(tmp_path, monkeypatch):
    """300 documents of three questions each: the last questions of the order whose head is trained on."""
    rows = [{"context": f"Text {d}.", "question": f"Question {q} about {d}?", "answers": ["x"]} for q in range(3) for d in range(300)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = {e["document"] for e in read_examples(load_config([str(ROOT / "configs" / "tiny.py"), f"examples={tmp_path / 'q.jsonl'}", "n_examples=780"]), "train")}
    asked = []
    monkeypatch.setattr(qa, "measure_row", lambda subject, examples, *rest: asked.extend(example["document"] for example in examples))
    qa.measure([None], {**qa.OPTIONS, "examples": str(tmp_path / "q.jsonl"), "questions": 120})
    assert len(asked) == 120 and not set(asked) & trained


def test_qa_command_on_contexts_and_passages_together(tmp_path):
    rows = [{"question": f"Who is {i}?", "answers": ["Rosa"], "text": f"Rosa paints {i}."} for i in range(5)]
    rows.append({"context": " Rosa paints in Naples.", "question": "Who is Rosa?", "answers": ["Rosa paints in Naples."]})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["qa", TINY, f"examples={tmp_path / 'q.jsonl'}", "passages=[1,2]", TAIL, f"out={tmp_path}"])
    table = table_of(tmp_path / "qa.json")
    assert [(r["passages"], r["n"]) for r in table] == [(None, 1), (1, 5), (2, 5)] and table[0]["right"] == 1


def test_qa_command_on_passages(tmp_path, tiny):
    world, rows = run_file(WORLD), []
    for i in range(12):
        _, facts = world.world(random.Random(i), 60)
        question, answer = world.ask(random.Random(i), facts, 1)
        rows.append({"question": question, "answers": [answer], "text": answer + f" Snow falls in {world.CITIES[i]}."})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    answers = Subject.answers

    def noted(self, prompts, *rest):
        asked.append(prompts)
        return answers(self, prompts, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "answers", noted)
        main(["qa", TINY, f"examples={tmp_path / 'q.jsonl'}", "passages=[1,4]", "questions=12", TAIL, f"out={tmp_path}"])
    table = table_of(tmp_path / "qa.json")
    assert [r["passages"] for r in table] == [1, 4] and table[0]["right"] >= 0.4 and table[0]["f1"] > 0.6
    places = []
    for ids in asked[1]:                                             # by hand, from the prompts of four passages
        context, question = tiny.tokenizer.decode(ids).rsplit("\nQuestion: ", 1)
        gold = next(row["text"] for row in rows if row["question"] in question and row["text"] in context)
        places.append([p.strip() for p in context.strip().split("\n\n")].index(gold))
    assert [n for _, n in table[1]["by_place"]] == [sum(p < 2 for p in places), places.count(2), places.count(3)]
    assert sum(good for good, _ in table[1]["by_place"]) == round(12 * table[1]["right"])


@pytest.mark.parametrize("as_list", [False, True])
def test_qa_command_on_contexts_as_they_are(tmp_path, capsys, as_list):
    """{context, question, answers}: asked once, whatever passages says, and with no place."""
    rows = []
    for example in run_file(WORLD).examples(6, 60, 1):
        context = [example["context"], " Snow falls in Turin."] if as_list else example["context"]
        rows.append({"context": context, "question": example["question"], "answers": example["answers"]})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["qa", TINY, f"examples={tmp_path / 'q.jsonl'}", TAIL, f"out={tmp_path}"])
    row, = table_of(tmp_path / "qa.json")
    assert row["by_length"] == []                                    # all are of one length
    assert row["n"] == 6 and row["right"] > 0.5 and row["passages"] is None and row["by_place"] is None
    out = capsys.readouterr().out
    assert "gold" not in out and "passages" not in out


def test_qa_says_right_answers_by_tokens_of_the_context(tmp_path, tiny, capsys, monkeypatch):
    """By hand: which contexts lie from a power of two to the next, and how many of their answers are right."""
    sizes, rows, said = [20, 31, 40, 100, 120, 127, 900], [], []
    for i, size in enumerate(sizes):
        text = " Rosa" * size
        rows.append({"context": text, "question": f"Who is {i}?", "answers": ["Rosa"]})
        assert len(tiny.tokenizer.encode(text)) == size
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Right are those over 20, 40, 100 and 900 tokens, in whatever order they are asked.
    def answers(self, prompts, *rest):
        tail = len(self.prompt("", "", "\nQuestion: Who is 0?\nAnswer:")[0])
        for ids in prompts:
            said.append("Rosa." if min(sizes, key=lambda size: abs(len(ids) - tail - size)) in (20, 40, 100, 900) else "Ida.")
        return said
    monkeypatch.setattr(Subject, "answers", answers)
    main(["qa", TINY, f"examples={tmp_path / 'q.jsonl'}", TAIL, f"out={tmp_path}"])
    row, = table_of(tmp_path / "qa.json")
    assert row["by_length"] == [[16, 31, 1, 2], [32, 63, 1, 1], [64, 127, 1, 3], [512, 1023, 1, 1]]
    assert row["right"] == 4 / 7
    low, high = interval(1, 3)
    assert f"     64 to     127 tokens   right 0.333 ({low:.3f}..{high:.3f}) of 3" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- preferences

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step: its pairs' file, and what it logged before that step."""
    out = tmp_path_factory.mktemp("run")
    done = subprocess.run([sys.executable, "train_logo.py", "configs/tiny.py", "n_examples=40", "steps=1", "batch_size=4", "micro_batch=4",
                           "held_out=8", "fresh_questions=0", "rope_theta=0", "yarn_factor=0", f"out={out}", "save_interval=1",
                           f"evals=['needle haystack={TINY}/world.py lengths=[60] depths=[50] samples=1']"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


METRICS = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def test_a_checkpoint_is_evaluated_in_between(run):
    assert table_of(run / "eval" / "step_000001" / "needle.json")
    assert not (run / "eval" / "step_000001" / "step_000001").exists()  # the merged model was only for that


def test_preferences_equal_the_training_runs_metrics(run, tmp_path):
    """The held-out metrics that a run logged before its first step."""
    before = json.loads((run / "result.json").read_text())["before"]["held_out"]
    main(["preferences", TINY, f"pairs={run / 'pairs.jsonl'}", "config=configs/tiny.py", "last=8", f"out={tmp_path}"])
    row, = table_of(tmp_path / "preferences.json")
    for key in METRICS:
        assert row[key] == pytest.approx(before[key], abs=1e-4), key


def test_preferences_take_prompts_from_the_header_and_the_rest_from_the_command_line(run, tmp_path):
    """Another prompt in the config changes nothing; beta on the command line does, by its factor."""
    pairs = f"pairs={run / 'pairs.jsonl'}"
    (tmp_path / "c.py").write_text((ROOT / "configs" / "tiny.py").read_text() + "\nconfig['prompt_tail'] = ' Say: {question}'\n")
    found = []
    tiny_config = run_file(str(ROOT / "configs" / "tiny.py")).config
    given = [f"{key}={tiny_config[key]}" for key in ("window", "positions", "draws", "gamma")] + ["sparse_share=0.1"]
    for words in ([f"config={tmp_path / 'c.py'}"], ["config=configs/tiny.py"], [*given, f"beta={tiny_config['beta']}"],
                  [*given, f"beta={2 * tiny_config['beta']}"]):
        main(["preferences", TINY, pairs, *words, "last=8", f"out={tmp_path}"])
        found.append(table_of(tmp_path / "preferences.json")[0])
    assert found[0] == found[1] == found[2]
    assert found[3]["rewards/margins"] == pytest.approx(2 * found[0]["rewards/margins"], rel=1e-5)


def test_preferences_use_the_chat_template_of_the_pairs(run, tmp_path, monkeypatch):
    header, *lines = (run / "pairs.jsonl").read_text().splitlines()
    settings = {**json.loads(header)["settings"], "template": "plain"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps({"settings": settings}), *lines]) + "\n")
    asked = []
    monkeypatch.setattr(preferences, "load_tokenizer", lambda folder, template: asked.append(template) or load_tokenizer(folder, template))
    main(["preferences", TINY, f"pairs={tmp_path / 'pairs.jsonl'}", "config=configs/tiny.py", "last=1", f"out={tmp_path}"])
    assert asked == ["plain"]


@pytest.mark.parametrize("words, message", [
    ([], "does not say window, positions, sparse_share, draws, beta, gamma"), (["window=1024", "beta=2"], "does not say positions"),
    (["config=configs/tiny.py", "positions=sideways"], "positions is 'sideways'")])
def test_preferences_take_nothing_in_silence(run, words, message):
    with pytest.raises(BadInput, match=message):
        main(["preferences", TINY, f"pairs={run / 'pairs.jsonl'}", *words])


def test_pairs_without_settings_need_a_config(run, tmp_path):
    lines = (run / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(BadInput, match="its first line has no settings: name the config"):
        main(["preferences", TINY, f"pairs={tmp_path / 'pairs.jsonl'}"])


def test_pairs_of_another_tokenizer_are_refused(run, tiny, pieces, tmp_path):
    header, *lines = (run / "pairs.jsonl").read_text().splitlines()
    settings = {**json.loads(header)["settings"], "tokenizer": tiny.tokenizer.digest}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps({"settings": settings}), *lines]) + "\n")
    with pytest.raises(BadInput, match=f"{pieces}.*{tiny.tokenizer.digest}"):
        main(["preferences", str(pieces), f"pairs={tmp_path / 'pairs.jsonl'}", "config=configs/tiny.py"])


def test_log_probs_of_pairs_are_transformers(run, tiny, theirs):
    """Each answer in a row of its own, at the group's positions, in float64."""
    cfg = preferences.settings_of({**preferences.OPTIONS, "pairs": str(run / "pairs.jsonl"), "config": "configs/tiny.py"})
    pair = preferences.load_pairs(str(run / "pairs.jsonl"), {**cfg, "model": TINY}, tiny.tokenizer)[0]
    batch = encode_group(pair, tiny.tokenizer, cfg)
    prompt, *answers = batch.segments
    expected = []
    for answer in answers:
        rows = [*range(prompt.end), *range(answer.start, answer.end)]
        mask = torch.zeros(len(rows), len(rows)).masked_fill(~torch.ones(len(rows), len(rows)).tril().bool(), -math.inf)
        logits = theirs(batch.tokens[rows][None], position_ids=batch.positions[rows][None], attention_mask=mask[None, None]).logits[0]
        logps = logits[prompt.end:].double().log_softmax(-1)
        expected.append(logps.gather(1, batch.targets[answer.start:answer.end, None]).mean())
    torch.testing.assert_close(preferences.pair_logps(tiny, pair, tiny.tokenizer, cfg).double(), torch.stack(expected), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ results and pictures

def test_a_word_that_is_not_utf8_loses_no_result(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    words = ["needle", TINY, f"haystack={WORLD}", "lengths=[40]", "depths=[50]", "samples=1", "max_new_tokens=2"]
    done = subprocess.run([sys.executable, "-m", "evals", *words, b"out=" + folder], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})    # as in any UTF-8 locale but C
    assert done.returncode == 0, done.stderr
    found = json.loads(open(folder + b"/needle.json", encoding="utf-8").read())
    assert found["table"] and os.fsencode(found["options"]["out"]) == folder
    assert folder + b"/needle.json" in done.stdout


@pytest.mark.parametrize("error", [OSError("disk is full"), ValueError("no such glyph"), ImportError("matplotlib")])
def test_a_picture_that_fails_leaves_the_result(tmp_path, monkeypatch, capsys, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(needle, "save_panels", fail)
    main(["needle", TINY, f"haystack={WORLD}", "lengths=[40]", "depths=[50]", "samples=1", "max_new_tokens=2", f"out={tmp_path}"])
    assert table_of(tmp_path / "needle.json") and "no picture: " in capsys.readouterr().out


def axes_of(monkeypatch, draw, *args):
    """The axes that a draw function painted."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    draw(*args)
    figure, = kept
    return figure.axes


def test_the_ticks_of_perplexity_are_the_lengths(tmp_path, monkeypatch):
    table = [{"model": "a", "length": n, "perplexity": p} for n, p in ((96, 5.0), (384, 4.0), (1536, 6.0))]
    axis, = axes_of(monkeypatch, perplexity.draw, {"table": table, "window": 400}, {"lengths": [1536, 96, 384], "out": str(tmp_path)})
    assert axis.get_xticks().tolist() == [96, 384, 1536] and [label.get_text() for label in axis.get_xticklabels()] == ["96", "384", "1536"]
    assert axis.get_xticks(minor=True).tolist() == [] and axis.lines[0].get_ydata().tolist() == [5, 4, 6]


def test_needle_pictures_show_each_score_in_its_cell(tmp_path, monkeypatch):
    rows = [{"model": m, "length": n, "depth": d, "score": s + (0.25 if m == "b" else 0)}
            for m in "ab" for n, scores in ((64, (0.5, 0.25)), (128, (0.75, 0))) for d, s in zip((0, 100), scores)]
    options = {"lengths": [64, 128], "depths": [0, 100], "out": str(tmp_path)}
    axes = axes_of(monkeypatch, needle.draw_task, "single", rows, 100, options)
    shown = [[text.get_text() for text in axis.texts] for axis in axes if axis.get_xlabel()]
    assert shown == [["0.50", "0.75", "0.25", "0.00"], ["0.75", "1.00", "0.50", "0.25"], ["+0.25"] * 4]
    assert {text.get_fontsize() for axis in axes for text in axis.texts} == {9}


def relative_luminance(colour):
    """Of WCAG 2, from sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("difference", [False, True])
def test_numbers_can_be_read_on_every_colour(difference):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    values = np.linspace(-1 if difference else 0, 1, 101)[None]
    pictures.heat_map(axis, values, values.min(), 1, ".2f", difference)
    image, = axis.images
    for text, value in zip(axis.texts, values[0]):
        cell, ink = relative_luminance(image.cmap(image.norm(value))), {"black": 0, "white": 1}[text.get_color()]
        assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) >= 4.5     # what WCAG asks for of small text
    pyplot.close(figure)


def test_better_and_worse_differ_for_the_colour_blind():
    """Deuteranopia and protanopia as by Machado et al. (2009), severity 1: the ends stay far apart, in hue order."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    worse, even, better = (np.array(to_rgb(colour)) for colour in pictures.BLUE_ORANGE)
    for seen in (np.eye(3), deutan, protan):
        assert np.linalg.norm(seen @ worse - seen @ better) > 0.8
        assert min(np.linalg.norm(seen @ end - seen @ even) for end in (worse, better)) > 0.5


# ------------------------------------------------------------------------------------------------------------- options

NEEDLE, QA, PPL = ["needle", TINY], ["qa", TINY, f"examples={WORLD}"], ["perplexity", TINY, f"text={WORLD}"]


@pytest.mark.parametrize("words, message", [
    ([*NEEDLE, "batch_tokens=-1"], "batch_tokens is -1"), ([*NEEDLE, "samples=0"], "samples is 0"), ([*NEEDLE, "lengths=[]"], r"lengths is \[\]"),
    ([*NEEDLE, "lengths=[64,0]"], "lengths is"), ([*NEEDLE, "lengths=['a']"], "lengths is"), ([*NEEDLE, "depths=[50,101]"], "depths is"),
    ([*NEEDLE, "depths=[]"], "depths is"), ([*NEEDLE, "dtype=nn"], "dtype is 'nn'"), ([*NEEDLE, f"seed={10 ** 20}"], "seed is 1000"),
    ([*NEEDLE, "seed=10**20"], "seed is '10"), ([*NEEDLE, "tasks=many"], "expected some of single"), ([*NEEDLE, "max_new_tokens=0"], "max_new_tokens is 0"),
    ([*NEEDLE, "haystack=nowhere"], "haystack=nowhere"),
    ([*NEEDLE, f"haystack={ROOT / 'configs' / 'tiny.py'}"], "tiny.py: expected a function needle"), ([*QA, "passages=[]"], "passages is"), ([*QA, "questions=0"], "questions is 0"),
    ([*QA, "prompt_tail=Say"], "prompt_tail"), ([*QA, "examples="], "examples is empty"), ([*PPL, "lengths=[64]", "stride=64"], "stride is 64"),
    ([*PPL, "lengths=[64,128]", "stride=32", "truncated=96"], "truncated is 96"), ([*PPL, "documents=0"], "documents is 0"),
    ([*PPL, "text=nowhere"], "text=nowhere"), (["preferences", TINY], "pairs is empty"), ([*NEEDLE, "task=single"], "did you mean 'tasks'?")])
def test_options_are_checked_before_a_model_is_read(words, message, monkeypatch):
    monkeypatch.setattr("evals.common.load_pretrained", lambda *args: pytest.fail("the model was read"))
    with pytest.raises(BadInput, match=message) as found:
        main(words)
    assert "\n" not in str(found.value)


def test_both_folders_are_looked_at_before_a_model_is_read(monkeypatch):
    monkeypatch.setattr("evals.common.load_pretrained", lambda *args: pytest.fail("the model was read"))
    with pytest.raises(BadInput, match="nowhere"):
        main([*NEEDLE, f"haystack={WORLD}", "compare=nowhere"])
    with pytest.raises(BadInput, match="compare is"):
        main([*NEEDLE, f"haystack={WORLD}", f"compare={TINY}/"])
    with pytest.raises(BadInput, match="nowhere"):
        main([*PPL, "evaluator=nowhere", "lengths=[64,128]", "stride=8", "truncated=16"])


@pytest.mark.parametrize("command", ["needle", "qa", "perplexity", "preferences"])
def test_every_default_of_a_command_passes_its_check(command, run):
    words = {"qa": [f"examples={WORLD}"], "perplexity": [f"text={WORLD}"],
             "preferences": [f"pairs={run / 'pairs.jsonl'}", "config=configs/tiny.py"]}.get(command, [])
    assert read_command([command, TINY, *words])[1] == TINY


@pytest.mark.parametrize("imported, absent", [
    ("evals.questions", ("evals.common", "evals.pictures", "matplotlib", "pairs.build")),
    ("evals.__main__", ("evals.common", "evals.needle", "evals.qa", "matplotlib")), ("evals.perplexity", ("evals.needle", "evals.heads", "matplotlib"))])
def test_what_is_not_asked_for_is_not_imported(imported, absent):
    code = f"import sys, {imported}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("args, message", [
    (["nonsense", TINY], "expected: python -m evals"), (["needle", "none"], "none"),
    (["questions", TINY, "configs/tiny.py", "fresh_questions=0"], "nothing to ask"),
    (["questions", TINY, "fresh_sizes=[104]"], "MODEL CONFIG"), (["questions", TINY, "configs/tiny.py", "max_new_tokens=0"], "max_new_tokens is 0")])
def test_bad_input_ends_with_one_line(args, message):
    done = subprocess.run([sys.executable, "-m", "evals", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_questions_command_counts_what_the_trainer_counts(tmp_path):
    words = ["questions", TINY, "configs/tiny.py", "fresh_sizes=[60,104,300]", "fresh_questions=20", f"out={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "evals", *words], cwd=ROOT, capture_output=True, text=True)
    assert "context    104" in done.stdout and "of 20" in done.stdout, done.stderr
    found = json.loads((tmp_path / "eval" / "questions.json").read_text())
    x, y = np.log([60, 104, 300]), [row["right"] for row in found["table"]]
    assert [row["size"] for row in found["table"]] == [60, 104, 300] and 0 < y[2] < y[0]
    assert found["area"] == pytest.approx(np.trapezoid(y, x) / np.log(5)) and f"area {found['area']:.3f}" in done.stdout


COUNT = """
import os, sys
sys.path.insert(0, ".")
import torch.distributed as dist
from checkpoint import load_pretrained
from configs import load_config
from evals.questions import count_right
from tokenizer import load_tokenizer

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
model, tokenizer = load_pretrained("models/tiny"), load_tokenizer("models/tiny")
found = [count_right(model, tokenizer, load_config(["configs/tiny.py", f"fresh_questions={n}"]), 488, rank, world) for n in (23, 2)]
print(f"{found}\\n", end="", flush=True)   # in one piece
"""


def test_processes_share_the_questions_and_all_know_the_sum(tmp_path):
    """Also where there are fewer questions than processes."""
    (tmp_path / "count.py").write_text(COUNT)
    found = {}
    for world in (1, 3):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(tmp_path / "count.py")],
                              cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found[world] = done.stdout.splitlines()
        assert len(found[world]) == world and len(set(found[world])) == 1, done.stderr
    assert found[1][0] == found[3][0] and found[1][0].count("asked=23,") == found[1][0].count("asked=2,") == 1
    assert found[1][0].count("'said': ") == 3 + 2  # the first three answers, or as many as there are


def test_texts_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.txt").write_text("Two.")
    assert texts(str(tmp_path)) == ["One.", "Two."] and len(texts(WORLD)) == 8
