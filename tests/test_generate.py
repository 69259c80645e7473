"""generate.py against transformers, against recomputation without a cache, and against arithmetic by hand."""
import pytest
import torch

from configs import BadInput
from generate import generate, sample
from test_model import WINDOW, gaps, hf_model, reopen, rows

PROMPTS = [[5, 17, 33, 60, 2, 81, 44], [12, 9], [70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82], [3]]


def hf_greedy(hf, prompts, n, stop_ids=()):
    """transformers, row by row."""
    out = []
    for prompt in prompts:
        ids = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                          max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=list(stop_ids) or None)
        out.append(ids[0, len(prompt):].tolist())
    return out


@pytest.mark.parametrize("rope", ["default", "yarn", "llama3"])
def test_greedy_generation_equals_transformers(tmp_path, rope):
    hf = hf_model(rope)
    hf.generation_config.eos_token_id = None
    ours = reopen(hf, tmp_path)
    free = generate(ours, PROMPTS, 24)
    assert free == hf_greedy(hf, PROMPTS, 24) and all(len(answer) == 24 for answer in free)
    stop_ids = (free[0][5], free[2][9])
    stopped = generate(ours, PROMPTS, 24, stop_ids=stop_ids)
    assert stopped == hf_greedy(hf, PROMPTS, 24, stop_ids)
    assert stopped[0][-1] in stop_ids and len(stopped[0]) <= 6  # the stop token is part of the answer


def test_padded_batch_in_transformers_gives_the_same(tmp_path):
    hf = hf_model()
    hf.generation_config.eos_token_id = None
    T = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = hf.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert generate(reopen(hf, tmp_path), PROMPTS, 24) == theirs[:, T:].tolist()


def test_dynamic_rope_generates_past_its_window_as_transformers_does(tmp_path):
    hf = hf_model("dynamic")
    hf.generation_config.eos_token_id = None
    prompt = rows(1, WINDOW - 6)[0].tolist()
    assert generate(reopen(hf, tmp_path), [prompt], 16) == hf_greedy(hf, [prompt], 16)


def test_cached_generation_equals_recomputation(tmp_path):
    ours = reopen(hf_model("yarn"), tmp_path)
    for prompt, answer in zip(PROMPTS, generate(ours, PROMPTS, 24)):
        again = ours.logits(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1:].argmax(-1)
        assert answer == again.tolist()


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_neighbours_in_a_batch_change_nothing(tmp_path, rope):
    ours = reopen(hf_model(rope), tmp_path)
    prompts = [*PROMPTS, rows(1, 2 * WINDOW)[0].tolist()]  # the last is past dynamic RoPE's window, the others not
    assert generate(ours, prompts, 12) == [generate(ours, [prompt], 12)[0] for prompt in prompts]
    with torch.no_grad():
        tokens, near, far = rows(2, 20), gaps(1, 20, 200), gaps(1, 20, 2_000)
        batch, alone = ours.logits(tokens, torch.cat([near, far])), ours.logits(tokens[:1], near)
    assert (batch[0] - alone[0]).abs().max() < 1e-4


def test_sampling_repeats_under_its_seed(tmp_path):
    ours = reopen(hf_model(), tmp_path)

    def draw(seed, **how):
        return generate(ours, PROMPTS, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed), **how)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_p=1e-6) == generate(ours, PROMPTS, 12)  # a nucleus of one token is greedy


def test_answers_to_one_prompt_share_its_prefill(tmp_path):
    ours = reopen(hf_model(), tmp_path)
    streams, trunk = [], ours.trunk
    ours.trunk = lambda tokens, *rest: streams.append(len(tokens)) or trunk(tokens, *rest)
    assert generate(ours, [PROMPTS[1], PROMPTS[0], PROMPTS[1]], 6) == [generate(ours, [PROMPTS[i]], 6)[0] for i in (1, 0, 1)]
    assert streams[0] == len(PROMPTS[0]) + len(PROMPTS[1])


def test_what_a_row_draws_does_not_depend_on_rows_that_ended(tmp_path):
    ours = reopen(hf_model(), tmp_path)
    rows = []
    for i in range(40):  # until some answers stop early and others do not
        free, stopped = (generate(ours, PROMPTS, 24, 1.0, 1.0, stops, torch.Generator().manual_seed(i)) for stops in ((), (7, 8)))
        for a, b in zip(free, stopped):
            assert b == a[:len(b)] and (len(b) == 24 or b[-1] in (7, 8))
            rows.append(len(b))
    assert len(set(rows)) > 5


@pytest.mark.parametrize("temperature, top_p, expected", [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
    (1.0, 0.7, [0, 0.625, 0, 0.375]),              # 0.5 is not enough, 0.5 + 0.3 is
    (0.5, 1.0, [0.0616, 0.6849, 0.0068, 0.2466]),  # squares, normalised
    (0.0, 0.7, [0, 1, 0, 0]),
])
def test_sample_draws_from_the_nucleus(temperature, top_p, expected):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20_000, 4)
    drawn = sample(logits, temperature, top_p, torch.Generator().manual_seed(0), range(20_000), 20_000)
    assert torch.allclose(drawn.bincount(minlength=4) / 20_000, torch.tensor(expected).float(), atol=0.015)


def test_empty_prompt_is_refused(tmp_path):
    with pytest.raises(BadInput, match="prompt 1 of 2 is empty"):
        generate(reopen(hf_model(), tmp_path), [[5], []], 4)
