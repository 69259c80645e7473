"""experiments/variants.py and remade.py: each piece that replaces one of the core, against what no one here wrote."""
import inspect
import json
import math
import os
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import loss
from checkpoint import load_pretrained
from configs import BadInput, load_config
from data import IRRELEVANT, NEAR, Placing, collate, encode_group, load_pairs, random_stream
from experiments import remade, variants
from experiments.run import BASES, ROOT
from experiments.variants import VARIANTS
from loss import logo_loss
from model import IGNORE, Llama, LoRALinear
from tokenizer import load_tokenizer

TINY = os.path.join(ROOT, "models", "tiny")
CFG = {**load_config([BASES["tiny"]]), "model": TINY, "rope_theta": 0.0, "beta": 1.0, "seed": 5}
TOKENIZER = load_tokenizer(TINY)
CHUNKS = [" Rosa paints in Naples. Ida sings in", " Turin. The old lamp leans today.", " Hugo bakes in Oslo."]
PAIR = {"id": 3, "question": "Who is Rosa?", "chunks": [np.array(TOKENIZER.encode(text)) for text in CHUNKS],
        "chosen": " Rosa paints in Naples.", "rejected": [" Rosa sings in Turin. Ida sings in Turin.", " Rosa bakes."]}
OTHER = {**PAIR, "id": 4, "question": "Who is Hugo?", "chosen": " Hugo bakes in Oslo.", "rejected": [" Hugo sings.", " Ida."]}


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def ours():
    return load_pretrained(TINY)


def trained(scale=0.05):
    """The tiny model with LoRA whose B is not zero: it is no longer the base."""
    model = load_pretrained(TINY)
    model.train_only(8, 16, "q_proj,k_proj", "")
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_A.weight)
            torch.nn.init.normal_(layer.lora_B.weight, std=scale)
    return model


def their_logps(theirs, tokens, positions):
    """log P (T, V) of each next token in one full row."""
    with torch.no_grad():
        return theirs(tokens[None], position_ids=positions[None]).logits[0].log_softmax(-1)


def row_of(group, branch):
    """(tokens, positions, targets) of the prompt and one answer, as a full row."""
    P, segment = group.segments[0].end, group.segments[1 + branch]
    index = torch.tensor([*range(P), *range(segment.start, segment.end)])
    return group.tokens[index], group.positions[index], group.targets[index]


def their_answer(theirs, group, branch, ordinary=False):
    """The sum of an answer's log-probs."""
    tokens, positions, targets = row_of(group, branch)
    logps = their_logps(theirs, tokens, torch.arange(len(tokens)) if ordinary else positions)
    scored = targets != IGNORE
    return logps[scored].gather(1, targets[scored, None]).sum()


# ------------------------------------------------------------------------------------------------------- all of them

@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_put_in_place_and_measures_as_the_method_does(name, ours, monkeypatch):
    """On held-out pairs, which are looked at without gradients, nothing is another: neither the batch nor what is said of it."""
    with torch.no_grad():
        plain = encode_group(PAIR, TOKENIZER, CFG)
        sums, lengths = ours(plain.tokens, plain.positions, plain.targets, plain.segments)
        wanted = logo_loss((sums / lengths)[None, 0], (sums / lengths)[None, 1:], 1.0, 0.5, 0.1)
    for where, old, _ in VARIANTS[name]:
        if isinstance(where, dict):
            monkeypatch.setitem(where, old, where[old])
        else:
            monkeypatch.setattr(where, old, getattr(where, old))
    variants.put_in_place(name)
    for where, old, new in VARIANTS[name]:
        assert (where[old] if isinstance(where, dict) else getattr(where, old)) is new
    with torch.no_grad():
        group = data.encode_group(PAIR, TOKENIZER, CFG)
        for mine, its in zip((group.tokens, group.positions, group.targets), (plain.tokens, plain.positions, plain.targets)):
            assert torch.equal(mine, its)
        assert group.segments == plain.segments
        sums, lengths = ours(group.tokens, group.positions, group.targets, group.segments)
        found = loss.logo_loss((sums / lengths)[None, 0], (sums / lengths)[None, 1:], 1.0, 0.5, 0.1)
    assert found[0] == wanted[0] and found[1] == wanted[1]


def test_an_unknown_variant_is_refused():
    with pytest.raises(BadInput, match="sft_all"):
        variants.put_in_place("nothing")


# -------------------------------------------------------------------------------------------------------- objectives

def test_sft_on_everything_is_the_likelihood_of_all_tokens(theirs, ours):
    cfg = {**CFG, "beta": 0.0}
    batch = collate([variants.sft_all(pair, TOKENIZER, cfg, draw=1) for pair in (PAIR, OTHER)])
    sums, lengths = ours(batch.tokens, batch.positions, batch.targets, batch.segments)
    chosen = (sums / lengths).view(2, 3)[:, 0]
    wanted = []
    for pair in (PAIR, OTHER):
        tokens, positions, targets = row_of(encode_group(pair, TOKENIZER, cfg, draw=1), 0)
        text = torch.cat([tokens, targets[-1:]])
        # The first token is given, and the one after it opens the branch that is scored.
        logps = their_logps(theirs, tokens, positions)[1:].gather(1, text[2:, None])
        wanted.append(logps.mean())
    assert torch.allclose(chosen, torch.stack(wanted), atol=1e-5)
    assert len(batch.tokens) < 2 * 70  # the rejected answers cost nothing
    with pytest.raises(BadInput, match="beta"):
        variants.sft_all(PAIR, TOKENIZER, CFG)


@pytest.mark.parametrize("beta, gamma", [(1.0, 0.0), (1.0, 1.0), (0.05, 0.02), (10.0, 3.0)])
def test_discopop_is_that_of_trl(beta, gamma):
    """TRL's own lines, with a reference whose log-ratio is gamma / beta."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    source = inspect.getsource(dpo.DPOTrainer)
    branch = source.split('loss_type == "discopop":\n')[1].split("elif")[0]
    torch.manual_seed(0)
    chosen, rejected = -torch.rand(6, dtype=torch.float64), -torch.rand(6, 3, dtype=torch.float64)
    names = {"torch": torch, "F": F, "delta_score": chosen - rejected.mean(1) - gamma / beta,
             "self": SimpleNamespace(beta=beta, args=SimpleNamespace(discopop_tau=dpo.DPOConfig.discopop_tau))}
    exec(textwrap.dedent(branch), names)
    found, metrics = variants.discopop(chosen, rejected, beta, gamma, 0.3)
    assert found.item() == pytest.approx((names["per_sequence_loss"] - 0.3 * chosen).mean().item(), abs=1e-12)
    assert metrics.keys() == logo_loss(chosen, rejected, beta, gamma)[1].keys()


def test_longpo_is_relative_to_the_base_at_ordinary_positions(theirs):
    model = trained()
    groups = [encode_group(pair, TOKENIZER, CFG, draw=2) for pair in (PAIR, OTHER)]
    batch = collate(groups)
    with torch.no_grad():
        plain, _ = model(batch.tokens, batch.positions, batch.targets, batch.segments)
    sums, lengths = variants.longpo(model, batch.tokens, batch.positions, batch.targets, batch.segments)
    base = torch.stack([their_answer(theirs, group, branch, ordinary=True) for group in groups for branch in range(3)])
    assert torch.allclose(sums, plain - base, atol=1e-4)
    assert not torch.allclose(plain, base, atol=0.1), "the policy is another model than the base"
    assert sums.requires_grad and all(layer.scale == 2.0 for layer in model.modules() if isinstance(layer, LoRALinear))
    with pytest.raises(BadInput, match="lora_r"):
        variants.longpo(load_pretrained(TINY), batch.tokens, batch.positions, batch.targets, batch.segments)


def test_base_kl_is_the_divergence_from_the_base_at_ordinary_positions(theirs, monkeypatch):
    model = trained()
    group = encode_group(PAIR, TOKENIZER, CFG, draw=2)
    monkeypatch.setattr(Llama, "hidden_states", variants.base_kl)
    monkeypatch.setattr(variants, "BESIDE", [])
    sums, lengths = model(group.tokens, group.positions, group.targets, group.segments)
    tokens, positions, targets = row_of(group, 0)
    with torch.no_grad():
        said = model.logits(tokens[None], positions)[0][targets != IGNORE]
        wanted = theirs(tokens[None]).logits[0][targets != IGNORE]
    divergence = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (wanted, said))).mean()
    assert len(variants.BESIDE) == 1 and divergence > 0.01
    assert variants.BESIDE[0].item() == pytest.approx(divergence.item(), rel=1e-4)
    logps = (sums / lengths)[None]
    plain, _ = logo_loss(logps[:, 0], logps[:, 1:], 1.0, 1.0, 0.1)
    found, _ = variants.with_base_kl(logps[:, 0], logps[:, 1:], 1.0, 1.0, 0.1)
    assert found.item() == pytest.approx(plain.item() + divergence.item(), rel=1e-4) and not variants.BESIDE


# ------------------------------------------------------------------------------------------------- prompts, positions

def test_longrecipe_moves_whole_sentences(monkeypatch):
    monkeypatch.setitem(data.STRATEGIES, "continuous", variants.longrecipe_places)
    stop = TOKENIZER.encode(".")[0]
    starts = set()
    for draw in range(40):
        group = variants.longrecipe_group(PAIR, TOKENIZER, {**CFG, "draws": 40}, draw)
        plain = encode_group(PAIR, TOKENIZER, {**CFG, "draws": 40}, draw)
        assert torch.equal(group.tokens, plain.tokens) and torch.equal(group.targets, plain.targets)
        P = group.segments[0].end
        steps = group.positions[1:P].diff()
        assert (steps >= 1).all() and group.positions[0] == 0 and group.positions[1] == 1 and group.positions.max() < CFG["window"]
        # A gap comes after a full stop, or nowhere.
        for step, token in zip(steps.tolist(), group.tokens[1:P - 1].tolist()):
            assert step == 1 or token == stop
        starts.add(int(group.positions[P - 1]))
    assert len(starts) > 20 and max(starts) - min(starts) > 100  # the slack is not shared out in slots


def test_longrecipe_has_all_gaps_alike():
    """Three sentences over two free places: the later two stand at any of the C(5, 3) choices, the first at 0."""
    found = {}
    for seed in range(2000):
        placed = variants.longrecipe_places(Placing([2, 1, 3], 2, 0, 1, None, random_stream("test", seed)))
        assert placed.tolist()[:2] == [0, 1] and placed.max() < 8 and len(placed) == 6
        key = placed[2] - 2, placed[3] - placed[2] - 1
        found[key] = found.get(key, 0) + 1
    # Of places a < b < c of five: a is moved to 0, and the gaps are b - 1 and c - b - 1.
    wanted = {}
    for a in range(5):
        for b in range(a + 1, 5):
            for c in range(b + 1, 5):
                wanted[b - 1, c - b - 1] = wanted.get((b - 1, c - b - 1), 0) + 1
    assert found.keys() == wanted.keys()
    for key, ways in wanted.items():
        assert found[key] / 2000 == pytest.approx(ways / 10, abs=0.05)


def test_untied_knots_are_the_same_chunks_in_other_orders():
    orders = set()
    sizes = [len(chunk) for chunk in PAIR["chunks"]]
    for draw in range(30):
        group = variants.untie_knots(PAIR, TOKENIZER, {**CFG, "draws": 30}, draw)
        plain = encode_group(PAIR, TOKENIZER, {**CFG, "draws": 30}, draw)
        assert group.segments == plain.segments and torch.equal(group.targets, plain.targets)
        n, rest = sum(sizes), group.tokens[1:].tolist()
        order = []
        while n:
            c, = [c for c, chunk in enumerate(PAIR["chunks"]) if rest[:len(chunk)] == chunk.tolist()]
            order.append(c)
            rest, n = rest[sizes[c]:], n - sizes[c]
        assert sorted(order) == [0, 1, 2] and rest == plain.tokens[1 + sum(sizes):].tolist()
        assert (group.positions[:group.segments[0].end].diff() >= 1).all()
        orders.add(tuple(order))
    assert len(orders) == 6


# ------------------------------------------------------------------------------------------------ the public code's bugs

def test_the_slice_takes_both_rejected_answers():
    chosen, rejected = torch.tensor([-0.5, -1.0]), torch.tensor([[-1.0, -3.0], [-2.0, -2.0]])
    # The second becomes (-1 - 3) / 2 = -2, and the mean of both -1.5.
    found, _ = variants.bug_slice(chosen, rejected, 1.0, 0.0)
    assert found.item() == pytest.approx((math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-1.0))) / 2)
    assert torch.equal(variants.bug_slice(chosen, rejected[:, :1], 1.0, 0.0)[0], logo_loss(chosen, rejected[:, :1], 1.0, 0.0)[0])


def test_the_unshifted_term_scores_the_token_itself(theirs, monkeypatch):
    monkeypatch.setattr(variants, "BESIDE", [])
    monkeypatch.setattr(Llama, "hidden_states", variants.unshifted_states)
    model = load_pretrained(TINY)
    groups = [encode_group(pair, TOKENIZER, CFG) for pair in (PAIR, OTHER)]
    batch = collate(groups)
    sums, lengths = model(batch.tokens, batch.positions, batch.targets, batch.segments)
    wanted = []
    for group in groups:
        tokens, positions, targets = row_of(group, 0)
        n = int((targets != IGNORE).sum()) - 1  # answer tokens that are read
        logps = their_logps(theirs, tokens, positions)
        wanted.append(-logps[-n:].gather(1, tokens[-n:, None]).mean())
    logps = (sums / lengths).view(2, 3)
    preference, _ = logo_loss(logps[:, 0], logps[:, 1:], 1.0, 1.0)
    found, _ = variants.bug_unshifted(logps[:, 0], logps[:, 1:], 1.0, 1.0, 0.5)
    assert found.item() == pytest.approx((preference + 0.5 * torch.stack(wanted).mean()).item(), rel=1e-4)
    assert not variants.BESIDE


def test_the_padding_is_scored(monkeypatch):
    plain = encode_group(PAIR, TOKENIZER, CFG)
    monkeypatch.setattr(data, "token_ids", variants.bug_padding)
    group = encode_group(PAIR, TOKENIZER, CFG)
    longest = max(segment.length for segment in plain.segments[1:])
    for before, after in zip(plain.segments[1:], group.segments[1:]):
        labels = group.targets[after.start:after.end].tolist()
        assert labels == plain.targets[before.start:before.end].tolist() + [0] * (longest - before.length)
        # What is read behind the answer's end is its end, then padding.
        assert group.tokens[after.start:after.end].tolist()[1:] == labels[:-1]
    assert torch.equal(group.positions[:group.segments[0].end], plain.positions[:group.segments[0].end])


# ------------------------------------------------------------------------------------------------------- other pairs

def pairs_file(tmp_path, n=6, **changes):
    """A file of n pairs with four rejected answers, in whose middle an example was dropped."""
    settings = {"seed": 5, "n_rejected": 4, "model": "elsewhere", "tokenizer": TOKENIZER.digest}
    rows = [{"settings": settings}]
    for i in range(n):
        rejected = [f" Rosa {job} in Oslo." for job in ("sings", "bakes", "sews", "sails")]
        rows.append({**PAIR, "id": 2 * i, "document": 2 * i, "chunks": [ids.tolist() for ids in PAIR["chunks"]], "answers": ["Rosa paints in Naples."],
                     "rejected": rejected, "audit": {"evidence": [IRRELEVANT, NEAR, IRRELEVANT, NEAR]}, **changes})
        rows.append({"id": 2 * i + 1, "dropped": "chosen wrong"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(tmp_path, difference, **changes):
    cfg = {**CFG, "held_out": 2, "n_examples": 12}
    target = str(tmp_path / "made.jsonl")
    remade.remake(pairs_file(tmp_path, **changes), target, cfg, difference)
    with open(target) as f:
        header, *rows = [json.loads(line) for line in f]
    assert header["settings"]["n_rejected"] == 2 and header["settings"]["model"] == TINY
    assert [row["id"] for row in rows] == list(range(12)), "an example without a line would be built anew"
    pairs = load_pairs(target, cfg, TOKENIZER)
    return pairs, rows, cfg


def test_few_pairs_are_the_first_and_the_held_out_ones(tmp_path):
    pairs, _, _ = made(tmp_path, {"few": 1})
    assert [pair["id"] for pair in pairs] == [0, 8, 10]


@pytest.mark.parametrize("kind, kept", [("irrelevant", ["sings", "sews"]), ("partial", ["bakes", "sails"]), ("both", ["sings", "bakes"])])
def test_kinds_of_prompts_are_told_apart(tmp_path, kind, kept):
    pairs, _, _ = made(tmp_path, {"kinds": kind})
    assert [text.split()[1] for text in pairs[0]["rejected"]] == kept
    assert [text.split()[1] for text in pairs[-1]["rejected"][:2]] == ["sings", "bakes"]  # held out
    with pytest.raises(BadInput, match="irrelevant, partial, both"):
        made(tmp_path, {"kinds": "all"})


def test_a_pair_with_too_few_of_a_kind_is_none(tmp_path):
    pairs, rows, _ = made(tmp_path, {"kinds": "both"}, audit={"evidence": [IRRELEVANT, NEAR, IRRELEVANT, IRRELEVANT]})
    assert [pair["id"] for pair in pairs] == [8, 10] and rows[0] == {"id": 0, "dropped": "too few of one kind"}


def test_own_answers_are_those_of_the_model_at_the_training_positions(theirs, ours):
    cfg = {**CFG, "max_new_tokens": 10}
    rows = [PAIR, OTHER, {**PAIR, "id": 9, "question": "Who are Ida and Hugo?"}]
    for draw in (0, 1):
        found = remade.own_answers(ours, rows, cfg, TOKENIZER, draw)
        stop = TOKENIZER.chat("", "")[2][0]
        for row, text in zip(rows, found):
            group = encode_group(row, TOKENIZER, cfg, draw)
            n = group.segments[0].end + 1
            tokens, positions = group.tokens[:n], group.positions[:n]
            for _ in range(10):
                best = their_logps(theirs, tokens, positions)[-1].argmax()
                if best == stop:
                    break
                tokens, positions = torch.cat([tokens, best[None]]), torch.cat([positions, positions[-1:] + 1])
            assert text == (TOKENIZER.decode(tokens[n:].tolist()) if best == stop else None)


@pytest.mark.parametrize("how", ["own", "own_only", "own_where"])
def test_own_wrong_answers_take_the_place_of_others(tmp_path, monkeypatch, how):
    """Wrong at the second draw of example 2, unfinished or right elsewhere."""
    def answers(model, rows, cfg, tokenizer, draw):
        texts = {2: [" Rosa paints in Naples.", " Rosa paints in Oslo."], 4: [None, " Rosa bakes in Oslo."]}
        return [texts.get(row["id"], [" Rosa paints in Naples."] * 2)[draw % 2] for row in rows]

    monkeypatch.setattr(remade, "own_answers", answers)
    pairs, _, _ = made(tmp_path, {"negatives": how})
    rejected = {pair["id"]: [text.split()[1:4:2] for text in pair["rejected"][:2]] for pair in pairs}
    sings, bakes, own = ["sings", "Oslo."], ["bakes", "Oslo."], ["paints", "Oslo."]
    plain = [sings, bakes]
    # Example 4's own answer is its second rejected one already.
    wanted = {"own": {0: plain, 2: [own, bakes], 4: plain, 6: plain, 8: plain, 10: plain},
              "own_only": {2: [own, own], 8: plain, 10: plain}, "own_where": {2: plain, 8: plain, 10: plain}}
    assert rejected == wanted[how]
    assert remade.count_own(str(tmp_path / "made.jsonl")) == 1


def test_the_whole_document_is_the_prompt(tmp_path):
    """The chunks of a pair's own example, whatever the prompt held before."""
    cfg = {**CFG, "context_size": 300, "n_examples": 4, "held_out": 1, "n_chunks": 19, "window": 400,
           "examples": os.path.join(TINY, "world.py")}
    target = str(tmp_path / "whole.jsonl")
    remade.remake(pairs_file(tmp_path, n=2), target, cfg, {"whole": True})
    from pairs.corpus import read_examples
    examples = read_examples(cfg, "train")
    pairs = load_pairs(target, cfg, TOKENIZER)
    assert [pair["id"] for pair in pairs] == [0, 2]
    for pair in pairs:
        assert TOKENIZER.decode(np.concatenate(pair["chunks"]).tolist()) == examples[pair["id"]]["context"]
