"""What others open of ours and we of theirs: TRL's preference files, an export's chat, lm-evaluation-harness."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from checkpoint import load_pretrained, save_pretrained
from configs import BadInput, load_config, run_file
from data import encode_group, load_pairs
from evals import needle, qa
from evals.common import Subject
from generate import generate
from loss import logo_loss
from pairs import convert, corpus
from pairs.build import build_pairs
from tokenizer import CONTROL, OTHER_NAMES, TEMPLATES, load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")
BETA, GAMMA, SFT = 0.2, 0.6, 0.5


# ------------------------------------------------------------------------------------------------ TRL's preferences

def config(*args):
    return load_config([str(ROOT / "configs" / "tiny.py"), "positions=none", "yarn_factor=0", f"beta={BETA}", f"gamma={GAMMA}",
                        f"sft_weight={SFT}", *args])


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """A few pairs that the tiny model makes."""
    out = tmp_path_factory.mktemp("pairs")
    cfg = config("n_examples=24", "context_size=200", f"out={out}")
    build_pairs(cfg, lambda: load_pretrained(TINY), load_tokenizer(TINY))
    return out / "pairs.jsonl"


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def converted(form, path, out):
    convert.convert([form, str(path), str(out)])
    return rows_of(out)


def our_loss(pair, cfg, model, tokenizer):
    """Of one pair at the positions that an ordinary text has."""
    batch = encode_group(pair, tokenizer, cfg)
    sums, lengths = model(batch.tokens, batch.positions, batch.targets, batch.segments)
    logps = sums / lengths
    return logo_loss(logps[:1], logps[None, 1:], BETA, GAMMA, SFT)[0]


def trl_training(rows, folder, steps):
    """The losses that TRL's CPOTrainer logs, a row a step, in the rows' order."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    cpo = pytest.importorskip("trl.experimental.cpo", reason="trl is not installed")
    import datasets
    import transformers
    args = cpo.CPOConfig(output_dir=str(folder), loss_type="simpo", beta=BETA, simpo_gamma=GAMMA, cpo_alpha=SFT, max_length=4096,
                         max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
                         bf16=False, activation_checkpointing=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY, pad_token="<|end|>")  # it wants one, though no row is padded
    trainer = cpo.CPOTrainer(transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), args,
                             train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trl_trains_on_our_pairs_and_its_first_loss_is_ours(pairs_file, tmp_path):
    rows = converted("to-trl", pairs_file, tmp_path / "trl.jsonl")
    tokenizer, cfg = load_tokenizer(TINY), config("n_rejected=1")
    pairs = load_pairs(str(pairs_file), cfg, tokenizer)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(pair["chosen"], text) for pair in pairs for text in pair["rejected"]]
    losses = trl_training(rows, tmp_path, 2)
    with torch.no_grad():
        expected = our_loss(pairs[0], cfg, load_pretrained(TINY), tokenizer).item()
    assert losses[0] == pytest.approx(expected, rel=1e-3) and len(losses) == 2


def test_we_train_on_what_trl_trains_on(pairs_file, tmp_path):
    """A file of TRL's as corpus, whole run by whole run: the first step's loss is the mean of theirs."""
    rows = converted("to-trl-first", pairs_file, tmp_path / "trl.jsonl")[:2]
    (tmp_path / "trl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    converted("trl", tmp_path / "trl.jsonl", tmp_path / "ours.jsonl")
    done = subprocess.run([sys.executable, "train_logo.py", "configs/tiny.py", f"examples={tmp_path}/ours.jsonl", f"out={tmp_path}/run",
                           "n_examples=0", "fresh_questions=0", "n_rejected=1", "positions=none", "draws=1", "held_out=0", "yarn_factor=0", "lora_r=0",
                           f"beta={BETA}", f"gamma={GAMMA}", f"sft_weight={SFT}", "n_chunks=20", "steps=2", "batch_size=2", "micro_batch=2",
                           "log_interval=1", "lr=1e-4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = [trl_training([row], tmp_path, 1)[0] for row in rows]
    logged = [row for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert logged[0]["loss"] == pytest.approx(sum(theirs) / 2, rel=1e-3) and logged[1]["loss"] < logged[0]["loss"]


def test_what_went_to_trl_comes_back_as_it_was(pairs_file, tmp_path, capsys):
    """Prompt, system, chosen and all M rejected answers; by the rows of one pair, and by one row a pair."""
    pairs = [row for row in rows_of(pairs_file) if "chosen" in row]
    tokenizer, cfg = load_tokenizer(TINY), config("n_rejected=2")
    converted("to-trl", pairs_file, tmp_path / "all.jsonl")
    back = converted("trl", tmp_path / "all.jsonl", tmp_path / "back.jsonl")
    assert f"{len(pairs)} of them have 2 rejected: n_rejected=2" in capsys.readouterr().out
    assert [(row["chosen"], row["rejected"]) for row in back] == [(row["chosen"], row["rejected"]) for row in pairs]
    for row, pair in zip(back, pairs):
        inner = cfg["prompt_tail"].replace("{question}", pair["question"])
        assert tokenizer.encode(row["prompt"]) == sum(pair["chunks"], []) + tokenizer.encode(inner)
        assert corpus.example_of(row) == {**row, "system": None}
    first = converted("to-trl-first", pairs_file, tmp_path / "first.jsonl")
    assert [row["rejected"] for row in first] == [pair["rejected"][0] for pair in pairs]


@pytest.mark.parametrize("change, words", [
    (lambda settings: settings.pop("prompt_tail"), "line 1: no 'prompt_tail' among its settings"),
    (lambda settings: settings.update(model=3), "line 1: model is 3"),
    (lambda settings: settings.update(n_chunks=1), "line 2: 'chunks' is"),
    (lambda settings: settings.update(tokenizer="0" * 16), "with digest '0000000000000000'")])
def test_pairs_that_do_not_say_what_they_hold_are_not_converted(pairs_file, tmp_path, change, words):
    first, *rest = rows_of(pairs_file)
    change(first["settings"])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [first, *rest]))
    with pytest.raises(BadInput, match="^[^\n]*$") as error:
        converted("to-trl", tmp_path / "pairs.jsonl", tmp_path / "out.jsonl")
    assert words in str(error.value) and not (tmp_path / "out.jsonl").exists()


def test_only_neighbours_with_one_prompt_and_chosen_answer_become_a_pair(tmp_path):
    rows = [("P", "C", "R1"), ("P", "C", "R2"), ("P", "C", "R1"), ("P", "D", "R3"), ("Q", "D", "R4"), ("P", "C", "R5")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row))) + "\n" for row in rows))
    found = converted("trl", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [row["rejected"] for row in found] == [["R1", "R2"], ["R1"], ["R3"], ["R4"], ["R5"]]


# ------------------------------------------------------------------------------------------------ chats

def bytes_folder(folder, template, **generation):
    """A random model whose tokens are bytes and a template's control tokens; no chat template of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = set(CONTROL.findall("".join(part or "" for part in TEMPLATES[template]))) - {"<bos>", "<eos>"}
    tokenizer.add_special_tokens(["<|start|>", "<|stop|>", *sorted(OTHER_NAMES.get(name, name) for name in names)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|stop|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=len(fast), max_position_embeddings=512, bos_token_id=256, eos_token_id=257, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(generation)) if generation else path.unlink()
    return folder


MESSAGES = [{"role": "system", "content": "Be brief. {x}"}, {"role": "user", "content": "  Who?\n\n- {{ Rosa }}, 東京\n"}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_export_says_to_transformers_how_it_was_talked_to(tmp_path, template):
    base = str(bytes_folder(tmp_path / "base", template))
    save_pretrained(load_pretrained(base), tmp_path / "out", tokenizer=base, template=template)
    ours, theirs = load_tokenizer(base, template), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").template == template         # found again without being told
    for messages in (MESSAGES, MESSAGES[1:]):
        system = messages[0]["content"] if len(messages) == 2 else None
        prefix, suffix, stops = ours.chat(MESSAGES[1]["content"], "", system)
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == prefix + suffix
        turns = [*messages, {"role": "assistant", "content": "Ida."}]
        said = theirs.apply_chat_template(turns, return_dict=True)["input_ids"]
        assert said == prefix + suffix + ours.encode("Ida.") + stops[:1]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == stops and generation.pad_token_id == stops[0] and generation.bos_token_id == ours.bos_id


def test_an_export_keeps_the_sampling_and_the_template_of_its_base(tmp_path):
    base = bytes_folder(tmp_path / "base", "chatml", temperature=0.3, top_p=0.8, do_sample=True, eos_token_id=257, pad_token_id=7)
    (base / "chat_template.jinja").write_text("<|im_start|>their own")
    save_pretrained(load_pretrained(base), tmp_path / "out", tokenizer=str(base))
    names = load_tokenizer(base).special
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"temperature": 0.3, "top_p": 0.8, "do_sample": True, "pad_token_id": 7, "bos_token_id": 256,
                     "eos_token_id": [257, names["<|im_end|>"], names["<|endoftext|>"]]}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "<|im_start|>their own"


def greedy_chat(folder, text, n):
    """What transformers' pipeline answers to a user, told nothing but where the model lies and not to sample."""
    chat = transformers.pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    return chat([{"role": "user", "content": text}], do_sample=False, max_new_tokens=n)[0]["generated_text"][-1]["content"]


def test_a_pipeline_answers_as_we_do(tmp_path):
    save_pretrained(load_pretrained(TINY), tmp_path / "out", tokenizer=TINY)
    subject = Subject(str(tmp_path / "out"), {"dtype": "float32"})
    for i in range(4):
        example = run_file(f"{TINY}/world.py").needle("multikey", 100, 50, i)
        tail = f"\nQuestion: {example['question']}\nAnswer:"
        ours, = subject.answers([subject.prompt(example["context"], "", tail)[0]], [0], 16)
        assert greedy_chat(tmp_path / "out", example["context"] + tail, 16) == ours and ours.strip()


def test_a_pipeline_stops_where_a_turn_ends_that_the_base_did_not_know(tmp_path):
    """A base model that ends texts with <|stop|>, and has learned to end turns with <|im_end|>."""
    base = bytes_folder(tmp_path / "base", "chatml")
    model, tokenizer = load_pretrained(base), load_tokenizer(base, "chatml")
    prompt = sum(tokenizer.chat("Who?", "")[:2], [])
    answer, = generate(model, [prompt], 60)
    with torch.no_grad():
        head = model.lm_head.weight
        head[tokenizer.special["<|im_end|>"]] = 1.5 * head[answer[5]]  # ahead of that token wherever its logit is positive
    save_pretrained(model, tmp_path / "out", tokenizer=str(base), template="chatml")
    ours, = Subject(str(tmp_path / "out"), {"dtype": "float32"}).answers([prompt], [0], 60)
    assert greedy_chat(tmp_path / "out", "Who?", 60) == ours
    assert ours and tokenizer.decode(answer[:5]).startswith(ours)


def test_pairs_of_a_chat_model_become_messages_that_trl_makes_the_same_prompt_of(tmp_path):
    """Also with a system message, and with a character whose bytes lie in two chunks."""
    from trl.data_utils import maybe_apply_chat_template
    base = str(bytes_folder(tmp_path / "base", "chatml"))
    save_pretrained(load_pretrained(base), tmp_path / "model", tokenizer=base, template="chatml")
    tokenizer, theirs = load_tokenizer(tmp_path / "model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer.encode("Rosa paints in 東京.\n")
    settings = {"model": str(tmp_path / "model"), "template": "auto", "prompt_head": "Read:\n", "prompt_tail": "\n{question}?",
                "n_chunks": 2, "n_rejected": 1, "tokenizer": tokenizer.digest}
    pair = {"id": 3, "question": "Who", "chunks": [ids[:16], ids[16:]], "chosen": "Rosa.", "rejected": ["Ida.", "Ada."]}
    rows = [{"settings": settings}, pair, {"id": 4, "dropped": "chosen wrong"}, {**pair, "id": 5, "question": None, "system": "Be kind."}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = converted("to-trl", tmp_path / "pairs.jsonl", tmp_path / "trl.jsonl")
    assert [[turn["role"] for turn in row["prompt"]] for row in found] == [["user"]] * 2 + [["system", "user"]] * 2
    assert [row["rejected"] for row in found] == [[{"role": "assistant", "content": text}] for text in ("Ida.", "Ada.")] * 2
    for row, pair in zip(found, (rows[1], rows[1], rows[3], rows[3])):
        group = encode_group({**pair, "chunks": [torch.tensor(c).numpy() for c in pair["chunks"]]}, tokenizer,
                             {**config(), **settings, "window": 4096})
        text = maybe_apply_chat_template(row, theirs)["prompt"]
        last = group.tokens[group.segments[1].start].item()       # each answer begins with the prompt's last token
        assert theirs(text, add_special_tokens=False)["input_ids"] == group.tokens[:group.segments[0].end].tolist() + [last]
    back = converted("trl", tmp_path / "trl.jsonl", tmp_path / "back.jsonl")
    assert [(row.get("system"), row["rejected"]) for row in back] == [(None, ["Ida.", "Ada."]), ("Be kind.", ["Ida.", "Ada."])]


# ------------------------------------------------------------------------------------------------ lm-evaluation-harness

def test_lm_evaluation_harness_counts_what_we_count(tmp_path):
    """Of an export, offline: its answers are ours, and its scores what our own functions say of them."""
    pytest.importorskip("lm_eval", reason="needs pip install lm-eval[hf]==0.4.13: three minutes, so it is not in requirements-dev.txt")
    model = load_pretrained(TINY)
    model.config.extend(512)                                    # the longer window, which it must not cut at 128
    save_pretrained(model, tmp_path / "hf", tokenizer=TINY)
    subject, world, rows, expected = Subject(str(tmp_path / "hf"), {"dtype": "float32"}), run_file(f"{TINY}/world.py"), {}, {}
    for task in ("ruler_like", "longbench_like"):
        examples = [world.needle("multiquery", 240, 25 * (i % 5), i) for i in range(12)] if task == "ruler_like" else [*world.examples(12, 240, 3)]
        prompts, tails = [], [f"\nQuestion: {example['question']}\nAnswer:" for example in examples]
        for example, tail in zip(examples, tails):
            prompts.append(subject.prompt(example["context"], "", tail)[0])
        rows[task] = [{"input": example["context"] + tail, "outputs": example["answers"], "context": example["context"],
                       "question": example["question"], "answers": example["answers"]} for example, tail in zip(examples, tails)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        said = subject.answers(prompts, [0] * len(prompts), 16)
        score = needle.given if task == "ruler_like" else lambda text, answers: max(qa.token_f1(text, answer) for answer in answers)
        expected[task] = said, sum(score(text, example["answers"]) for text, example in zip(said, examples)) / len(said)
    done = subprocess.run([sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path}/hf,dtype=float32", "--device", "cpu",
                           "--tasks", "ruler_like,longbench_like", "--include_path", str(ROOT / "tests" / "lm_eval_tasks"), "--apply_chat_template",
                           "--batch_size", "1", "--output_path", str(tmp_path / "found"), "--log_samples"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    result, = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(result.read_text())["results"]
    for task, metric in (("ruler_like", "string_match_all"), ("longbench_like", "qa_f1_score")):
        samples, = (tmp_path / "found").rglob(f"samples_{task}_*.jsonl")
        samples = sorted(rows_of(samples), key=lambda sample: sample["doc_id"])
        said, score = expected[task]
        assert [sample["resps"][0][0].strip() for sample in samples] == [text.strip() for text in said]
        assert found[task][f"{metric},none"] == pytest.approx(score) and 0.2 < score < 1


def test_the_tasks_that_the_readme_names_exist():
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs pip install lm-eval[hf]==0.4.13")
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("    lm_eval ")]
    named = {name for line in lines for name in line.split("--tasks ")[1].split()[0].split(",")}
    assert named >= {"ruler", "babilong_longctx", "longbench", "longbench2", "mmlu"}
    assert named <= set(tasks.TaskManager().all_tasks)
    assert all("--apply_chat_template" in line and line.startswith("    lm_eval --model hf ") for line in lines)
