"""Careless and hostile input: some thousands by category (fuzz.py), what they found, and laws for any input (hypothesis)."""
import json
import math
import random
from collections import Counter
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import data
import report
from bench import plan
from checkpoint import tensor_names
from configs import (
    BadInput,
    check_settings,
    checked,
    default_groups,
    load_config,
    read_json,
    with_arguments,
    write_json,
)
from evals import curves
from evals.common import check_path
from model import IGNORE
from pairs import convert, corpus
from pairs.show import show
from pairs.stats import stats

ROOT = Path(__file__).parent.parent
# 11,150 inputs; by hand more: python -m tests.fuzz CATEGORY N.
INPUTS = {"words": 1000, "config": 900, "pairs": 800, "model_config": 700, "adapter": 400, "safetensors": 700, "index": 600, "tokenizer": 900,
          "state": 600, "corpus": 1200, "generated": 600, "convert": 1200, "options": 800, "plan": 150, "metrics": 600}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    return fuzz.World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("category", fuzz.CATEGORIES)
def test_whatever_is_given_it_is_taken_or_refused_in_one_line(world, category):
    counts, found = fuzz.fuzz(world, category, INPUTS[category], seed=1)
    assert not found, "\n".join(f"{where}: python -m tests.fuzz {category} 1:{first}  {said}" for where, (_, first, said) in found.items())
    # Both ends are reached: a fuzzer whose inputs are all refused at the door says nothing of what lies behind it.
    assert counts["accepted"] > 10 and (counts["refused"] > 10 or category == "convert"), counts


def test_at_least_ten_thousand_inputs():
    assert INPUTS.keys() == fuzz.CATEGORIES.keys() and sum(INPUTS.values()) >= 10_000


def fails(rng):
    raise KeyError("x")


@pytest.mark.parametrize("work, said", [
    (lambda world, rng: fails(rng), "KeyError at"),
    (lambda world, rng: fuzz.sane(False, "nonsense"), "Nonsense at"),
    (lambda world, rng: iter(lambda: None, 0).__class__ and [None for _ in iter(int, 1)], "Hang at"),
    (lambda world, rng: bytearray(fuzz.MEMORY + (1 << 30)), "MemoryError at")])
def test_the_fuzzer_sees_what_it_looks_for(world, monkeypatch, work, said):
    monkeypatch.setitem(fuzz.CATEGORIES, "broken", work)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    counts, found = fuzz.fuzz(world, "broken", 1)
    assert counts == Counter(found=1) and list(found)[0].startswith(said), found


def test_an_input_is_a_function_of_category_seed_and_number():
    one, other = (json.dumps(fuzz.changed(random.Random("a 1 2"), fuzz.ROWS[0])) for _ in range(2))
    assert one == other


# ---------------------------------------------------------------------------------------- what was found

def refused(pattern, work, *arguments):
    with pytest.raises(BadInput, match=pattern) as caught:
        work(*arguments)
    fuzz.one_line(caught.value)


@pytest.mark.parametrize("found, shown", [
    ("a\nb", r"a\\nb"), ("\x1b[2Jgone", r"\\x1b\[2Jgone"), ("\u202egnp.exe", r"\\u202egnp"), ("x" * 100_000, r"x \.\.\. x")])
def test_what_a_message_quotes_cannot_break_the_line_or_move_the_cursor(found, shown):
    refused(shown, with_arguments, {"key": 3}, [f"key={found}"])
    refused(shown, check_path, {"text": found}, "text")  # whose message has no quotes around it
    assert "\udcff" in str(BadInput("\udcff"))  # a file's name that is not UTF-8 is printed as it came


def test_a_whole_number_that_no_array_could_count_to_is_refused():
    cfg = load_config([str(ROOT / "configs" / "tiny.py"), f"context_size={2**63}"])
    refused(r"^context_size is 9223372036854775808, expected less than 2 \*\* 63", check_settings, cfg)


@pytest.mark.parametrize("body, said", [
    ("return 3", "TypeError: 'int' object is not iterable"),
    ("raise OSError('x')", "OSError: x"),
    ("return [0]", "example 0: expected a JSON object"),
    ("return [{'context': 'a', 'question': 'b', 'answers': 'c'}]", "example 0: 'answers' is 'c'"),
    ("return [{'context': 3, 'question': 'b', 'answers': ['c']}]", "example 0: 'context' is 3"),
    ("return [{'question': 'b'}]", "example 0: 'context' is None"),
    ("return [{'text': 'a', 'question': 'b'}]", "example 0: has a 'text' that answers")])
def test_what_a_python_corpus_yields_is_checked(tmp_path, body, said):
    path = tmp_path / "made.py"
    path.write_text(f"def examples(count, size, seed):\n    {body}\n")
    refused(f"made.py.*{said}", corpus.generated_examples, str(path), 1, 1, 1)


def test_a_damaged_record_of_steps_is_named_where_a_run_goes_on(tmp_path):
    for line in ("{", '{"loss": 1}', '{"step": "x"}', "3", "\udced", "[" * 100_000):
        (tmp_path / "metrics.jsonl").write_text(line + "\n", errors="surrogateescape")
        refused("metrics.jsonl", report.keep_metrics, str(tmp_path), 2)
        assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_picture_of_steps_without_end_is_none(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10**400, "loss": 1.0}) + "\n")
    curves.draw_curves(str(tmp_path))
    assert "no picture of the run" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["gpus=0", "answer=0", "samples=10**400", f"samples={2**62}", "memory=[0]", "memory=['x']", "memory=[[1]]",
                                  "utilisation=[-1]", "utilisation=[True]", "dtype=float3", "utilisation=[1e400]", "memory=[1, 1]"])
def test_a_plan_of_nonsense_is_refused(word):
    own, config = fuzz.split_words(plan.OPTIONS, [str(ROOT / "configs" / "tiny.py"), f"model={fuzz.TINY}", word])
    refused(word.partition("=")[0], lambda: plan.run(with_arguments(plan.OPTIONS, own), config))


@pytest.mark.parametrize("number", ["²", "-1", "9" * 5000, "x", ""])
def test_an_id_to_show_is_a_number(number):
    refused("expected: python -m pairs show PAIRS ID", show, ["p.jsonl", number])


@pytest.mark.parametrize("key, value, said", [
    ("template", ["auto"], "line 1: template is .*expected str"), ("model", 3, "line 1: model is 3"), ("template", "nothing", "line 1: unknown template"),
    ("model", "nowhere", "line 1: nowhere: found no tokenizer"), ("model", "x" * 100_000, "line 1: xxx")])
def test_settings_of_a_pairs_file_are_checked_before_they_are_used(world, tmp_path, key, value, said):
    header, *rows = world.world_rows
    header = {"settings": {**header["settings"], key: value}}
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    refused(f"p.jsonl, {said}", show, [str(path), "0"])
    refused(f"p.jsonl, {said}", convert.convert, ["to-trl", str(path), str(tmp_path / "out.jsonl")])
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "Who?", "chosen": "Rosa.", "rejected": "Ida."}) + "\n")

    def full(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(convert.os, "replace", full)
    refused("No space left", convert.convert, ["trl", str(path), str(tmp_path / "out.jsonl")])
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_role_of_no_kind_is_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"conversations": [{"role": [], "content": "x"}]}) + "\n")
    convert.convert(["long-llm-data", str(path), str(tmp_path / "out.jsonl")])
    assert "in.jsonl, line 1: a message is" in capsys.readouterr().err


def test_a_shard_with_half_a_character_in_its_name_is_refused(world):
    names = [name for name, _ in world.network.named_parameters()]
    index = json.dumps({"weight_map": dict.fromkeys(names, "\ud800.safetensors")}).encode()
    folder = world.model_folder(**{"model.safetensors": None, "model.safetensors.index.json": index})
    refused("not a readable safetensors file", fuzz.load_pretrained, folder)


def test_half_a_character_in_a_model_config_comes_through(world, tmp_path):
    config = {**world.config, "x\ud800": "\udcff"}
    write_json(config, str(tmp_path / "c.json"))
    assert read_json(str(tmp_path / "c.json")) == config


def test_a_factor_without_a_kind_of_scaling_is_refused(world, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**world.config, "rope_scaling": {"factor": 2.0}}))
    refused("config.json: factor is 2.0, expected a rope_type", fuzz.read_config, str(path))


@pytest.mark.parametrize("value", [10**400, 2**64, math.inf])
def test_a_number_that_no_float_holds_is_refused(world, tmp_path, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**world.config, "rope_scaling": {"rope_type": "linear", "factor": value}}))
    refused("config.json: factor is .*, expected a finite number above 0", fuzz.read_config, str(path))


@pytest.mark.parametrize("change, said", [
    ({"rope_scaling": {"rope_type": "linear", "factor": 1e-320}}, "rope is .*expected what makes finite frequencies"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 1e-320}}, "rope is .*expected what makes finite frequencies"),
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647, expected at most 1024")])
def test_a_model_that_would_say_nothing_or_take_for_ever_is_refused(world, tmp_path, change, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**world.config, **change}))
    refused(f"config.json: {said}", fuzz.read_config, str(path))


def test_an_end_of_text_that_is_no_token_is_refused(world):
    folder = world.model_folder(**{"tokenizer_config.json": b'{"eos_token_id": [4294967296]}'})
    refused(f"^{folder}: eos_token_id is 4294967296, its tokenizer has 551 ids", fuzz.load_tokenizer, folder)


@pytest.mark.parametrize("name, shown", [(7, "7"), ("<\ud800>", r"'<\\ud800>'")])
def test_an_added_token_without_a_name_is_refused(world, name, shown):
    spec = {**world.tokenizer_files["tokenizer.json"], "added_tokens": [{"id": 549, "content": name}]}
    folder = world.model_folder(**{"tokenizer.json": json.dumps(spec).encode()})
    refused(f"tokenizer.json: an added token is {shown}, expected a text", fuzz.load_tokenizer, folder)
    folder = world.model_folder(**{"tokenizer_config.json": json.dumps({"bos_token": name}).encode()})
    refused(f"tokenizer_config.json: bos_token is {shown}, expected a text", fuzz.load_tokenizer, folder)


def test_statistics_of_nothing_are_none(world, tmp_path, capsys):
    header, row, *_ = world.world_rows
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (header, {**row, "rejected": []})))
    stats([str(path)])
    out = capsys.readouterr().out
    assert "words of a rejected                none" in out and "nan" not in out
    for scores in ([math.nan, 1], [math.inf, 0], [[], []], ["x", 1], [10**400, 0]):
        path.write_text("".join(json.dumps(each) + "\n" for each in (header, {**row, "scores": scores})))
        refused("p.jsonl: not as expected", stats, [str(path)])


def test_a_folder_whose_answers_cannot_end_is_named(world):
    folder = world.model_folder(**{"tokenizer_config.json": b"{}"})
    tokenizer = fuzz.load_tokenizer(folder, "plain")
    tokenizer.eos_id = None
    refused(f"^{folder}: template plain ends answers with <eos>", tokenizer.chat, "", "")


# ---------------------------------------------------------------------------------------- laws of any input

TOKENIZER = fuzz.load_tokenizer(fuzz.TINY)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LAWS = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@LAWS
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), prefix=st.integers(0, 9), tail=st.integers(1, 30), slack=st.integers(0, 500),
       kind=st.sampled_from([*data.STRATEGIES]), draws=st.integers(1, 5), pick=st.integers(0, 4), seed=st.integers(0, 2**32 - 1))
def test_the_laws_of_positions(lengths, prefix, tail, slack, kind, draws, pick, seed):
    """Each token has a place of its own, in order, within the window; the prefix lies at its beginning; the same for the same arguments."""
    window = prefix + sum(lengths) + tail + slack
    how = (lengths, prefix, tail, window, kind, pick % draws, draws, (seed, 1, 2))
    positions, after = data.synthesize_positions(*how)
    assert len(positions) == prefix + sum(lengths) and positions[:prefix].tolist() == list(range(prefix))
    assert (np.diff(positions) > 0).all() and positions[0] >= 0
    assert after == positions[-1] + 1 and after + tail <= window
    if kind == "continuous":  # a chunk stays in one piece
        inside = np.delete(np.diff(positions[prefix:]), np.cumsum(lengths)[:-1] - 1)
        assert (inside == 1).all()
    assert np.array_equal(positions, data.synthesize_positions(*how)[0])
    with pytest.raises(BadInput, match="positions, window is"):
        data.synthesize_positions(lengths, prefix, tail, prefix + sum(lengths) + tail - 1, kind, 0, draws, (seed, 1, 2))


@LAWS
@given(TEXT, st.integers(1, 30))
def test_the_laws_of_chunks(text, size):
    """A text's chunks are its tokens, cut; no text makes a control token."""
    chunks = data.chunk(text, TOKENIZER, size)
    ids = TOKENIZER.encode(text)
    assert sum(chunks, []) == ids and all(len(chunk) == size for chunk in chunks[:-1])
    assert not set(ids) & set(TOKENIZER.special.values()) and all(0 <= i < TOKENIZER.vocab_size for i in ids)


ANSWERS = st.lists(TEXT.filter(lambda text: TOKENIZER.encode(text)), min_size=3, max_size=3)
PAIRS = st.builds(lambda number, chunks, question, answers: {"id": number, "chunks": chunks, "question": question, "chosen": answers[0],
                                                             "rejected": answers[1:]},
                  st.integers(0, 2**32 - 1), st.lists(st.lists(st.integers(0, 548), min_size=1, max_size=9), min_size=1, max_size=4),
                  st.none() | TEXT, ANSWERS)
CFG = {**load_config([str(ROOT / "configs" / "tiny.py")]), "window": 1024}


@LAWS
@given(PAIRS, st.integers(0, 3), st.integers(0, 5))
def test_the_laws_of_a_group(pair, draw, epoch):
    """A branch's inputs are the prompt's last token and its answer but the last; its targets are the answer, ended."""
    batch = data.encode_group(pair, TOKENIZER, CFG, draw, epoch)
    prefix, suffix, answers = data.token_ids(pair, TOKENIZER, CFG)
    prompt = prefix + sum(pair["chunks"], []) + suffix
    P = batch.segments[0].end
    assert batch.tokens[:P].tolist() == prompt[:-1] and (batch.targets[:P] == IGNORE).all()
    last = batch.positions[:P].max().item() if P else -1
    for segment, answer in zip(batch.segments[1:], answers, strict=True):
        own = slice(segment.start, segment.end)
        assert batch.tokens[own].tolist() == [prompt[-1], *answer[:-1]] and batch.targets[own].tolist() == answer
        assert batch.positions[own].tolist() == list(range(last + 1, last + 1 + len(answer))) or pair["chunks"]
        assert (segment.prefix_start, segment.prefix_end) == (0, P)
    assert batch.positions.min() >= 0 and batch.positions.max() < CFG["window"]


@LAWS
@given(st.lists(PAIRS, min_size=1, max_size=4))
def test_the_laws_of_collating(pairs):
    """A batch is its groups one after another: each can be cut out of it again as it was."""
    groups = [data.encode_group(pair, TOKENIZER, CFG) for pair in pairs]
    batch = data.collate(groups)
    start, number = 0, 0
    for group in groups:
        end = start + len(group.tokens)
        for name in ("tokens", "positions", "targets"):
            assert torch.equal(getattr(batch, name)[start:end], getattr(group, name))
        for segment in group.segments:
            moved = batch.segments[number]
            assert (moved.start - start, moved.end - start) == (segment.start, segment.end) and moved == segment.moved(start)
            number += 1
        start = end
    assert start == len(batch.tokens) and number == len(batch.segments)


DEFAULTS = {key: value for group in default_groups().values() for key, value in group.items()}
VALUES = {int: st.integers(0, 2**62), float: st.floats(0, 1e300), bool: st.booleans(), str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
          list: st.lists(st.integers(0, 9) | st.text(max_size=3), max_size=4)}


@LAWS
@given(st.sampled_from(sorted(DEFAULTS)).flatmap(lambda key: st.tuples(st.just(key), VALUES[type(DEFAULTS[key])])))
def test_a_word_says_what_python_says(item):
    """key=repr(value) is value, for every key and each value of its type."""
    key, value = item
    text = value if isinstance(value, str) else repr(value)
    assert with_arguments(DEFAULTS, [f"{key}={text}"])[key] == value == checked(DEFAULTS, key, value, "here")


@LAWS
@given(st.sampled_from(sorted(DEFAULTS)), st.text(max_size=30) | st.sampled_from(["1e999", "nan", "-1", "{[]: 1}", "-" * 9999, "[" * 9999]))
def test_any_word_is_a_value_of_the_keys_type_or_refused(key, text):
    try:
        found = with_arguments(DEFAULTS, [f"{key}={text}"])[key]
    except BadInput as error:
        fuzz.one_line(error)
        assert key in str(error)
        return
    assert type(found) is type(DEFAULTS[key])
    assert not isinstance(found, float) or math.isfinite(found)


@LAWS
@given(st.binary(max_size=200))
def test_any_bytes_are_a_safetensors_file_or_refused(world, content):
    path = Path(world.fresh(), "x.safetensors")
    path.write_bytes(content)
    try:
        tensor_names(str(path))
    except BadInput as error:
        assert str(path) in str(fuzz.one_line(error))


def test_weights_that_are_no_numbers_of_a_model_are_refused(world):
    tensors = {name: p.detach().clone() for name, p in world.network.named_parameters()}
    name = "model.norm.weight"
    for other in (tensors[name].to(torch.int8), tensors[name][:3], tensors[name][None]):
        folder = world.model_folder(**{"model.safetensors": None})
        save_file({**tensors, name: other.contiguous()}, f"{folder}/model.safetensors")
        refused(name, fuzz.load_pretrained, folder)
