"""evals/, sample.py: needles where they belong, and every number against transformers or by hand."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_pretrained
from configs import BadInput, run_file
from evals.__main__ import COMMON, main
from evals.common import Subject, interval, texts
from evals.needle import Copies, given, hide, needles, sentences_of, span_of
from evals.perplexity import token_losses
from generate import generate, top_keys
from pairs.corpus import Corpus, Examples
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")
TAIL = "prompt_tail=\nQuestion: {question}\nAnswer:"


@pytest.fixture(scope="module")
def tiny():
    return Subject(TINY, {**COMMON, "batch": 3})


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


def prompts_of(tiny, n, size=100):
    world = run_file(f"{TINY}/world.py")
    examples = [world.needle("multikey", size, 25 * (i % 5), i) for i in range(n)]
    return [tiny.prompt(e["context"], "", f"\nQuestion: {e['question']}\nAnswer:") for e in examples]


# ------------------------------------------------------------------------------------------------------ generation

def test_a_shared_beginning_changes_no_answer(tiny):
    """Prompts that share 0, some or all but a token of their beginning: the answers are those of each alone."""
    base, _ = prompts_of(tiny, 1)[0]
    other, _ = prompts_of(tiny, 2)[1]
    words = tiny.tokenizer.encode("\nQuestion: Who is Rosa?\nAnswer:")
    prompts, shared = [base, base[:90] + words, base, other, base[:90] + base[80:]], [90, 90, 90, 0, 400]
    alone = [generate(tiny.model, [p], 12)[0] for p in prompts]
    assert generate(tiny.model, prompts, 12, shared=shared) == alone == generate(tiny.model, prompts, 12)


def test_greedy_answers_equal_transformers(tiny, theirs):
    prompts = prompts_of(tiny, 12)
    ours = tiny.answers(prompts, 16)
    stops = tiny.tokenizer.chat("", "")[2]
    for (ids, _), said in zip(prompts, ours):
        full = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=stops, pad_token_id=0)[0, len(ids):].tolist()
        assert said == tiny.tokenizer.decode([t for t in full if t not in stops])


def test_answers_come_back_in_the_order_of_the_prompts(tiny):
    """Batches are by length; what is seen and said is of the prompt that it belongs to."""
    prompts, seen = [prompts_of(tiny, 1, size)[0] for size in (100, 40, 80, 60, 90)], {}
    said = tiny.answers(prompts, 12, look=lambda i, token, tops: seen.setdefault(i, []).append(token))
    stops = tiny.tokenizer.chat("", "")[2]
    for i, prompt in enumerate(prompts):
        assert [said[i]] == tiny.answers([prompt], 12)
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


def test_only_seen_keys_are_looked_at():
    q, keys = torch.ones(2, 2, 4), torch.tensor([-3.0, -1, -2, 0, 0])[None, None, :, None].expand(2, 1, 5, 4)
    seen = torch.tensor([[True] * 3 + [False] * 2, [True] + [False] * 4])[:, None, None]
    assert top_keys(q, keys, seen).tolist() == [[1, 1], [0, 0]]


def test_retrieval_scores_count_what_was_copied_from_the_needle(tiny):
    copies = Copies(tiny)
    ids = tiny.tokenizer.encode(" Snow falls in Turin. Rosa paints in Naples. Fog drifts in Paris.")
    look = copies.watching([(ids, "Rosa paints in Naples.")])
    start, end = span_of(ids, "Rosa paints in Naples.", tiny.tokenizer)
    assert tiny.tokenizer.decode(ids[start:end]).strip() == "Rosa paints in Naples."
    tops = torch.zeros(copies.shape, dtype=torch.long)
    tops[1, 2] = start + 1
    look(0, ids[start + 1], tops)         # head 1.2 looked at "paints" when "paints" was written
    look(0, ids[start + 1], tops)         # the same token again counts once
    other = torch.zeros(copies.shape, dtype=torch.long)
    other[0, 1], other[0, 2] = start + 1, end + 1
    look(0, ids[start + 2], other)        # looked at "paints" or behind the needle, wrote "in": no copies
    scores = copies.scores()
    assert scores[1, 2] == 1 / (end - start) and scores.sum() == scores[1, 2]
    assert span_of(ids, "Ida", tiny.tokenizer) == (0, 0)


# --------------------------------------------------------------------------------------------------------- needles

def test_wilson_intervals():
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998's method, by hand
    low, high = interval(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)


def test_the_score_is_the_share_of_the_answers_given():
    assert given("It is 12 and 34.", ["34", "12", "56", "1"]) == 0.5


@pytest.mark.parametrize("task", ["single", "multikey", "multivalue", "multiquery", "variables"])
def test_needles_lie_where_the_depth_says(tiny, task):
    hay = sentences_of("")
    for depth in (0, 25, 50, 75, 100):
        facts, question, answers = needles(task, random.Random(depth))
        context = hide(facts, hay, 3000, depth, load_tokenizer(TINY), random.Random(1))
        assert all(fact in context for fact in facts) and len(answers) == {"single": 1, "multikey": 1, "variables": 4}.get(task, 4)
        if task != "variables":
            assert abs(context.index(facts[0]) / (len(context) - len(facts[0])) - depth / 100) < 0.03
        else:
            places = [context.index(fact) for fact in facts]
            assert places == sorted(places)                      # a variable is assigned before it is used
        assert len(facts) == (1 if task == "single" else 4)


def test_the_tiny_worlds_needles():
    world = run_file(f"{TINY}/world.py")
    for task in ("single", "multikey", "multiquery"):
        for depth in (0, 50, 100):
            e = world.needle(task, 400, depth, 3)
            assert e["needle"] in e["context"] and abs(e["context"].index(e["needle"]) / len(e["context"]) - depth / 100) < 0.06
            assert len(e["answers"]) == (2 if task == "multiquery" else 1) and all(a in e["context"] for a in e["answers"])


def test_needle_command(tmp_path, capsys):
    main(["needle", TINY, f"haystack={TINY}/world.py", "tasks=multikey", "lengths=[60,100]", "depths=[0,100]", "samples=3",
                     TAIL, "max_new_tokens=16", "retrieval=True", f"out={tmp_path}", f"compare={TINY}/", "window=80"])
    found = json.loads((tmp_path / "needle.json").read_text())
    assert len(found["table"]) == 8 and {r["length"] for r in found["table"]} == {60, 100}
    assert np.mean([r["score"] for r in found["table"]]) > 0.8 and "heads" in found
    assert "retrieval heads" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ perplexity

def test_perplexity_equals_transformers_on_the_same_windows(tiny, theirs):
    text = run_file(f"{TINY}/world.py").world(random.Random(0), 330)[0]
    ids = tiny.tokenizer.encode(text)
    for length, stride in ((64, 16), (100, 99), (64, 64 - 1), (400, 50)):
        ours, expected, done = token_losses(tiny.model, ids, length, stride), [], 0
        for begin in range(0, len(ids) - 1, stride):
            window = torch.tensor([ids[begin:begin + length]])
            labels = window.clone()
            labels[0, :done + 1 - begin] = -100                      # scored by the window before
            count = int((labels[0, 1:] != -100).sum())
            expected.append(float(theirs(window, labels=labels).loss) * count)
            done = begin + window.shape[1] - 1
            if done == len(ids) - 1:
                break
        assert len(ours) == len(ids) - 1
        assert ours.sum() / len(ours) == pytest.approx(sum(expected) / len(ours), abs=1e-4)


def test_perplexity_command(tmp_path, capsys):
    main(["perplexity", TINY, f"text={TINY}/world.py", "lengths=[64,128]", "stride=32", "tokens=300", "documents=2", f"out={tmp_path}"])
    rows = json.loads((tmp_path / "perplexity.json").read_text())["table"]
    assert [row["length"] for row in rows] == [64, 128] and rows[0]["long"] is None and rows[0]["tokens"] == 2 * 299
    model, gained, total = load_pretrained(TINY), 0, 0.0         # LongPPL, by hand
    for text in texts(f"{TINY}/world.py")[:2]:
        ids = load_tokenizer(TINY).encode(text)[:300]
        short, long = (token_losses(model, ids, n, 32) for n in (64, 128))
        gained, total = gained + int((short > long + 0.05).sum()), total + float(long[short > long + 0.05].sum())
    main(["perplexity", TINY, f"text={TINY}/world.py", "lengths=[64,128]", "stride=32", "tokens=300", "documents=2", "gain=0.05", f"out={tmp_path}"])
    row = json.loads((tmp_path / "perplexity.json").read_text())["table"][1]
    assert gained >= 3 and row["key_tokens"] == gained and row["long"] == pytest.approx(np.exp(total / gained), rel=1e-4)
    with pytest.raises(BadInput, match="stride=128"):
        main(["perplexity", TINY, f"text={TINY}/world.py", "lengths=[64]", "stride=128"])
    with pytest.raises(BadInput, match="no text has more than 9000 tokens"):
        main(["perplexity", TINY, f"text={TINY}/world.py", "lengths=[9000]", f"out={tmp_path}"])


# -------------------------------------------------------------------------------------------- qa, preferences, sample

def test_qa_command(tmp_path):
    world = run_file(f"{TINY}/world.py")
    rows = []
    for i in range(12):
        context, facts = world.world(random.Random(i), 60)
        question, answer = world.ask(random.Random(i), facts, 1)
        rows.append({"question": question, "answers": [answer], "text": answer + f" Snow falls in {world.CITIES[i]}."})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["qa", TINY, f"examples={tmp_path / 'q.jsonl'}", "passages=[1,4]", "questions=12", TAIL, f"out={tmp_path}"])
    table = json.loads((tmp_path / "qa.json").read_text())["table"]
    assert [r["passages"] for r in table] == [1, 4] and table[0]["right"] >= 0.4 and table[0]["f1"] > 0.6
    corpus = Corpus(str(tmp_path / "q.jsonl"), {"strict": True, "questions": 1})
    order = np.random.default_rng(0).permutation(12)
    found = Examples(corpus, order, 4, 0)
    places = [found[i]["context"].index(corpus[order[i]]["passage"]) for i in range(12)]
    assert [asked for _, asked in table[1]["by_place"]] == [sum(p < 2 for p in places), places.count(2), places.count(3)]


def test_preferences_equal_the_training_runs_metrics(tmp_path):
    """The held-out metrics that a run logged before its first step."""
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, "train_logo.py", "configs/tiny.py", "n_examples=40", "steps=1", "batch_size=4", "micro_batch=4",
                           "held_out=8", "fresh_questions=0", "rope_theta=0", f"out={out}", "save_interval=1",
                           f"evals=['needle haystack={TINY}/world.py lengths=[60] depths=[50] samples=1']"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(out / "eval" / "step_000001") and json.loads((out / "eval" / "step_000001" / "needle.json").read_text())["table"]
    assert not (out / "eval" / "step_000001" / "step_000001").exists()  # the merged model was only for that
    before = json.loads((out / "result.json").read_text())["before"]["held_out"]
    (tmp_path / "c.py").write_text((ROOT / "configs" / "tiny.py").read_text())
    main(["preferences", TINY, f"pairs={out / 'pairs.jsonl'}", f"config={tmp_path / 'c.py'}", "last=8", f"out={tmp_path}"])
    row, = json.loads((tmp_path / "preferences.json").read_text())["table"]
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert row[key] == pytest.approx(before[key], abs=1e-4), key


def test_sample_answers_and_says_where_it_looked(tmp_path):
    (tmp_path / "c.txt").write_text(" Snow falls in Turin. The old bridge leans. Rosa paints in Naples. Fog drifts in Paris.")
    done = subprocess.run([sys.executable, "sample.py", TINY, "Who is Rosa?", f"context={tmp_path / 'c.txt'}",
                           "tail=\nQuestion: {question}\nAnswer:", "chunk_size=6"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "Rosa paints in Naples." and "looked at and copied from" in done.stderr and "Naples" in done.stderr


@pytest.mark.parametrize("args, message", [
    (["-m", "evals"], "expected: python -m evals"), (["-m", "evals", "needle", TINY, "task=single"], "did you mean 'tasks'?"),
    (["-m", "evals", "needle", TINY, "tasks=many"], "expected some of single"), (["-m", "evals", "qa", TINY], "examples is empty"),
    (["-m", "evals", "needle", "none"], "none"),
    (["sample.py", TINY], "expected: python sample.py"), (["sample.py", TINY, "Who?", "context=none.txt"], "no such file")])
def test_bad_input_ends_with_one_line(args, message):
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
