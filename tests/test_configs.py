"""configs: every key known, typed, in range and explained; the paper's settings as the paper has them."""
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs import BadInput, check_settings, check_training, default_groups, load_config, run_file

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "default"))
PAPER = [path for path in FILES if path.stem not in ("tiny", "smollm2")]


def config(*words):
    return load_config([str(ROOT / "configs" / "tiny.py"), f"model={ROOT}/models/tiny", *words])


@pytest.mark.parametrize("args, message", [
    (["gama=2"], "unknown key 'gama', did you mean 'gamma'?"),
    (["steps=many"], "steps is 'many', expected int like"),
    (["steps=1.5"], "steps is 1.5, expected int"),
    (["lr=-1"], "lr is -1"),
    (["lr=1" + "0" * 400], "lr is inf"),
    (["lr=nan"], "lr is 'nan', expected float"),
    (["steps"], "expected key=value, found 'steps'"),
    (["fresh_sizes=5"], "fresh_sizes is 5, expected list"),
    (["checkpointing=1"], "checkpointing is 1, expected bool"),
    (["lora_r=0", "train_also=embed"], "train_also='embed' needs lora_r"),
])
def test_a_bad_key_or_value_is_refused(args, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        config(*args)


@pytest.mark.parametrize("word", [
    "positions=random", "score_with=all", "dtype=float16", "prompt_tail=who?", "evaluator=ner", "chosen_from=gold",
    "endpoint_api=responses", "micro_batch=0", "context_size=0", "window=0", "top_p=0.0", "top_p=1.5", "candidates=1",
    "grad_clip=0.0", "lora_alpha=0", "yarn_factor=0.5", "rope_theta=1.0", "rope_theta=0.5", "rope_theta=1e+300", "yarn_factor=1e+300", "warmup=1.5", "sparse_share=2.0", "correct_share=1.5", "beta1=1.0", "beta2=1.0", "seed=9223372036854775808",
    "window=100000000", "lora_r=100000", "threads=100000000000000", "workers=100000", "endpoint_requests=100000",
    "batch_size=100000000000", "draws=1000000", "n_rejected=1025", "fresh_sizes=[[1]]", "fresh_sizes=['a']", "fresh_sizes=[0]",
    "fresh_sizes=[True]", "fresh_sizes=[1.5]", "evals=[1]", "evals=['']", "evals=[['needle']]"])
def test_a_value_out_of_range_is_refused_before_any_work(word):
    key, _, value = word.partition("=")
    with pytest.raises(BadInput, match=f"^{key} is '?{re.escape(value)}'?, expected"):
        check_settings(config(word))


@pytest.mark.parametrize("words, message", [
    ("model=nowhere", "model is 'nowhere', expected a folder"),
    ("model=", "model is '', expected a folder"),
    ("adapter=README.md", "adapter is 'README.md', expected a folder"),
    ("examples=", "examples is '', expected a corpus"),
    (f"pairs={ROOT}", "expected a file"),
    ("n_examples=64 held_out=64", "held_out is 64, expected less than n_examples=64"),
    ("held_out=3", "held_out is 3, expected a multiple of 2 processes"),
    ("batch_size=8 micro_batch=3", "batch_size is 8, expected a multiple of 2 processes x micro_batch=3"),
    ("shard_size=3", "shard_size is 3, expected a divisor of 2 processes"),
    ("offload_activations=True", "offload_activations is True, expected False where checkpointing=False"),
])
def test_what_a_run_cannot_do_is_refused_before_any_work(words, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        check_training(config("micro_batch=1", *words.split()), processes=2)


def test_the_command_line_wins_and_takes_the_default_type():
    cfg = config("lr=1", "fresh_sizes=[5]", "checkpointing=True")
    assert cfg["lr"] == 1.0 and type(cfg["lr"]) is float and cfg["fresh_sizes"] == [5] and cfg["checkpointing"] is True
    assert load_config([])["name"] == "tiny"


@pytest.mark.parametrize("name, content, message", [
    ("notes.md", "config = {}", "expected a Python file, as configs/tiny.py"),
    ("half.py", "config = dict(", "half.py: SyntaxError: "),
    ("bytes.py", b"\xff\xfe\x00", "bytes.py: SyntaxError: "),
    ("wrong.py", "config = dict(lr=rate)", "wrong.py: NameError: name 'rate' is not defined"),
    ("zero.py", "config = dict(lr=1 / 0)", "zero.py: ZeroDivisionError: "),
    ("none.py", "x = 1", "none.py: expected a dict named 'config'"),
    ("keys.py", "config = dict(gama=1)", "keys.py: unknown key 'gama'"),
])
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        load_config([str(path)])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line():
    with pytest.raises(BadInput, match="nowhere.py: no such file"):
        run_file("nowhere.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_loads_and_passes_its_checks(path):
    cfg = load_config([str(path)])
    check_settings(cfg)
    assert cfg["name"] == path.stem and cfg["n_chunks"] * cfg["chunk_size"] + cfg["max_new_tokens"] < cfg["window"]
    assert f"{path.parent.name}/{path.name}" in path.read_text() or path.stem == "tiny"  # its command is in it


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_configs_train_the_papers_samples(path):
    """12,000 samples after position synthesis (Sec. 3.2.2), each seen once, in steps of 64."""
    cfg = load_config([str(path)])
    samples = cfg["n_examples"] * cfg["draws"]
    assert samples == 12_000
    assert cfg["verify"] and not load_config([])["verify"]
    assert abs(cfg["steps"] * cfg["batch_size"] - samples) < cfg["batch_size"]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_lora_r_0_trains_everything_whatever_the_file_trains_beside_lora(path):
    assert load_config([str(path)])["train_also"] == "embed,norm"
    cfg = load_config([str(path), "lora_r=0"])
    assert cfg["lora_r"] == 0 and cfg["train_also"] == ""
    assert load_config([str(path), "lora_r=8", "train_also=norm"])["train_also"] == "norm"


def test_a_file_that_trains_something_beside_no_lora_is_refused(tmp_path):
    """Else every weight would train in silence, where its owner meant these alone."""
    path = tmp_path / "mine.py"
    path.write_text("config = dict(train_also='embed')")
    with pytest.raises(BadInput, match="train_also='embed' needs lora_r"):
        load_config([str(path)])
    assert load_config([str(path), "lora_r=4"])["train_also"] == "embed"
    assert load_config([str(path), "train_also="])["train_also"] == ""


def test_the_trainer_shows_the_defaults_as_they_are():
    shown = re.findall(r"^    #     (\w+)=(\S+) ", (ROOT / "train_logo.py").read_text(), re.MULTILINE)
    defaults = {key: value for group in default_groups().values() for key, value in group.items()}
    assert len(shown) == 6 and shown == [(key, str(defaults[key])) for key, _ in shown]


def test_every_key_is_read_somewhere_and_explained_once():
    source = ""
    for path in ROOT.rglob("*.py"):
        if "tests" not in path.parts and path.name != "default.py":
            source += path.read_text()
    lines = (ROOT / "configs" / "default.py").read_text().splitlines()
    for key in load_config([]).keys() - {"name"}:
        assert f'cfg["{key}"]' in source, f"{key} is never read"
        assert sum(bool(re.match(rf"    {key}=.*  # ", line)) for line in lines) == 1, f"{key} has no comment of its own"


@pytest.mark.parametrize("command", [
    "import evals.__main__ as m, evals.questions as q; q.count_right = interrupt; "
    "m.main(['questions', 'models/tiny', 'configs/tiny.py'])",
    "import sample as m; m.load_pretrained = interrupt; m.main(['models/tiny', 'Who is Rosa?'])"], ids=["evals", "sample"])
def test_ctrl_c_ends_a_command_with_one_line(command):
    code = f"""
import os, signal, sys
from configs import exit_on_bad_input
sys.excepthook = exit_on_bad_input
def interrupt(*args):
    os.kill(os.getpid(), signal.SIGINT)
{command}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "interrupted\n" and done.returncode == -signal.SIGINT
