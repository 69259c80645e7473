"""pairs/: builds that survive kills and servers that fail, the same file whatever the workers, and what an audit says."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from checkpoint import load_pretrained
from configs import BadInput, default_groups, load_config, run_file
from data import encode_group, load_pairs, read_header, words_evaluator
from generate import generate
from pairs.answers import is_right, normalize
from pairs.build import Writer, build_pairs, draft, question_in
from pairs.corpus import open_corpus
from pairs.parts import Merge, parts_of, write_part
from pairs.policy import Local, Request
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "models" / "tiny")


def config(*args):
    return load_config([str(ROOT / "configs" / "tiny.py"), f"model={TINY}", f"examples={TINY}/world.py", *args])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def build(path, *args, examples=24):
    cfg = config(f"pairs={path}", f"n_examples={examples}", "build_batch=5", "temperature=0.7", *args)
    build_pairs(cfg, lambda: load_pretrained(TINY), load_tokenizer(TINY))
    return Path(path).read_bytes()


def rows(content):
    return [json.loads(line) for line in content.splitlines()][1:]


# ------------------------------------------------------------------------------------------------------- builds

def test_a_build_cut_at_any_byte_goes_on_to_the_same_file(tmp_path, capsys):
    whole = build(tmp_path / "whole.jsonl")
    assert [row["id"] for row in rows(whole)] == list(range(24)) and sum("chosen" in row for row in rows(whole)) >= 8
    for cut in np.random.default_rng(0).integers(0, len(whole), 6):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(whole[:cut])
        assert build(path) == whole
    assert build(tmp_path / "whole.jsonl") == whole              # nothing left to do
    assert "pairs of 24 examples" in capsys.readouterr().out
    with pytest.raises(BadInput, match="was built with delta=1, now it is 3"):
        build(tmp_path / "whole.jsonl", "delta=3")
    for pair in load_pairs(tmp_path / "whole.jsonl", config(), load_tokenizer(TINY)):
        texts = [normalize(a) for a in (pair["chosen"], *pair["rejected"])]
        assert len(set(texts)) == 3 and all(texts)
        assert is_right(pair["chosen"], pair["answers"]) and not any(is_right(a, pair["answers"]) for a in pair["rejected"])


def test_the_file_does_not_depend_on_the_workers(tmp_path):
    one = build(tmp_path / "1.jsonl", "workers=1")
    assert build(tmp_path / "3.jsonl", "workers=3") == one == build(tmp_path / "0.jsonl", "workers=0")


KILLS = int(os.environ.get("NANOLOGO_KILLS", 3))


def test_killed_at_random_moments_a_build_ends_with_the_same_file(tmp_path):
    """kill -9 of the whole build, workers included only by themselves noticing."""
    def start(path):
        return subprocess.Popen([sys.executable, "-m", "pairs", "configs/tiny.py", f"pairs={path}", "n_examples=60", "build_batch=4",
                                 "temperature=0.7", "workers=2"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    begun, whole = time.time(), tmp_path / "whole.jsonl"
    assert start(whole).wait() == 0
    took, path, kills, rng = time.time() - begun, tmp_path / "killed.jsonl", 0, np.random.default_rng(1)
    while kills < KILLS:
        build = start(path)
        try:
            build.wait(timeout=took * rng.uniform(0.4, 1))
            assert path.read_bytes() == whole.read_bytes()       # too late to kill: from the start
            path.unlink()
        except subprocess.TimeoutExpired:
            build.send_signal(signal.SIGKILL)
            build.wait()
            kills += 1
    assert start(path).wait() == 0
    assert path.read_bytes() == whole.read_bytes()


def test_more_rejected_answers_than_kinds_of_prompts_differ(tmp_path):
    found = [row for row in rows(build(tmp_path / "p.jsonl", "n_rejected=5", "candidates=8")) if "chosen" in row]
    assert len(found) >= 3
    for row in found:
        answers = [normalize(a) for a in (row["chosen"], *row["rejected"])]
        assert len(set(answers)) == 6
        assert "irrelevant" in row["audit"]["evidence"] and len(set(row["audit"]["evidence"])) == 2


def test_blocks_draw_different_answers(tmp_path):
    row = {"context": [" Rosa paints in Naples.", " Snow falls in Turin.", " Ida sings in Rome."], "question": "Who is Rosa?"}
    found = rows(build(tmp_path / "p.jsonl", f"examples={lines(tmp_path / 'same.jsonl', [row] * 10)}", "temperature=2.0", examples=0))
    texts = [row.get("rejected", row.get("dropped")) for row in found]
    assert texts[:5] != texts[5:]


def test_the_reference_answer_may_be_the_chosen(tmp_path):
    kept = [row for row in rows(build(tmp_path / "p.jsonl", "chosen_from=reference")) if "chosen" in row]
    # After "Answer:" the model writes " Rosa paints in Naples.", and so the reference begins with a space too.
    written = [row["chosen"] for row in rows(build(tmp_path / "q.jsonl")) if "chosen" in row]
    assert len(kept) > 12 and all(row["chosen"] == " " + row["answers"][0] for row in kept)
    assert len(set(written) & {row["chosen"] for row in kept}) > 12


def lines(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_ready_pairs_go_through_to_the_loss(tmp_path, tokenizer):
    source = lines(tmp_path / "r.jsonl", [
        {"prompt": " Who is Rosa?", "chosen": " Rosa paints in Naples.", "rejected": [" Rosa sings.", " Rosa sails in Rome."]},
        {"prompt": " Who is Ida?", "chosen": " Ida sings in Turin.", "rejected": " Ida sings."},
        {"prompt": " Snow falls in Turin." * 40, "chosen": " Ida sings.", "rejected": [" Ida.", " Turin."]}])
    build(tmp_path / "p.jsonl", f"examples={source}", examples=0)
    dropped = [row["dropped"] for row in rows((tmp_path / "p.jsonl").read_bytes()) if "dropped" in row]
    assert sorted(dropped) == ["fewer than M rejected answers", "prompt longer than n_chunks"]
    pair, = load_pairs(tmp_path / "p.jsonl", config(), tokenizer)
    group = encode_group(pair, tokenizer, config())
    prefix, suffix, stops = tokenizer.chat("", "")               # the user's turn is the prompt, no template of ours around it
    prompt = prefix + tokenizer.encode(" Who is Rosa?") + suffix
    assert group.tokens[:group.segments[0][1]].tolist() == prompt[:-1] and len(group.segments) == 4
    start, end, *_ = group.segments[1]
    assert group.targets[start:end].tolist() == tokenizer.encode(" Rosa paints in Naples.") + stops[:1]


def test_no_model_is_opened_for_ready_pairs(tmp_path, tokenizer):
    row = {"prompt": " Who is Rosa?", "chosen": " Rosa paints in Naples.", "rejected": [" Rosa sings.", " Rosa sails in Rome."]}
    cfg = config(f"pairs={tmp_path / 'p.jsonl'}", f"examples={lines(tmp_path / 'r.jsonl', [row])}", "n_examples=0")
    build_pairs(cfg, lambda: pytest.fail("the model was opened"), tokenizer)
    assert len(load_pairs(tmp_path / "p.jsonl", cfg, tokenizer)) == 1


def test_evidence_in_a_rejected_prompt_is_seen():
    """Two passages tell the answer; only one is critical, so the other may reach the rejected prompts."""
    texts = [" Rosa paints in Naples.", " Snow falls in Turin.", " Ida sings in Rome.", " The old bridge leans."] + [" Fog drifts in Paris."] * 3
    cfg, tok = config("max_critical=1", "delta=9", "candidates=8"), load_tokenizer(TINY)
    new = draft(cfg, tok, words_evaluator, 0, {"document": 0, "context": texts + [" Snow falls in Naples."], "question": "Who is Rosa?", "answers": ["Naples"]})
    assert new.selection.chosen == [0]
    assert new.saw[0]
    for picked, saw in zip(new.selection.rejected, new.saw[1:]):
        assert saw == (7 in picked)
    assert set(new.saw[1:]) == {True, False}


def test_the_audit_follows_the_candidates_that_were_kept(tokenizer):
    """The first candidate is empty, the third equal to the chosen: names and evidence are of the second and the fourth."""
    cfg = config("candidates=4")
    new = draft(cfg, tokenizer, words_evaluator, 0, {"document": 0, "question": "Where does Rosa paint?", "answers": ["Naples"],
                                                     "context": [" Rosa paints in Naples."] + [" Fog drifts in Paris."] * 20})
    new.row["chosen"] = " In Naples."
    new.saw = [True, "first", "second", "third", "fourth"]
    Writer(cfg, tokenizer, words_evaluator, None).choose_rejected(new, [" ", " In Rome.", " in Naples", " In Turin."])
    assert new.row["rejected"] == [" In Rome.", " In Turin."]
    assert new.row["audit"]["evidence"] == [new.selection.evidence[1], new.selection.evidence[3]]
    assert new.selection.evidence[1] != new.selection.evidence[0]
    assert new.row["audit"]["rejected_saw_evidence"] == ["second", "fourth"]


def test_the_policys_answer_is_whole_or_none(tokenizer):
    """Against generate itself: what it ended with a stop token, without that token; what was cut is no answer."""
    model = load_pretrained(TINY)
    tokens = tokenizer.encode(" Rosa paints in Naples.")
    prefix, suffix, stops = tokenizer.chat("", "\nQuestion: Where does Rosa paint?\nAnswer:")
    ids, = generate(model, [prefix + tokens + suffix], 16, stop_ids=stops)
    assert ids[-1] in stops and len(ids) > 2
    for most, expected in ((16, tokenizer.decode(ids[:-1])), (len(ids), tokenizer.decode(ids[:-1])), (len(ids) - 1, None)):
        local = Local(config(f"max_new_tokens={most}", "temperature=0.0"), lambda: model, tokenizer)
        local.begin_block(0)
        assert local.answers([Request("", tokens, "\nQuestion: Where does Rosa paint?\nAnswer:", 0)]) == [expected]


def test_the_batches_of_a_block_change_no_answer(tmp_path):
    """Sampled answers: each row draws its own, whatever is generated beside it."""
    whole = build(tmp_path / "whole.jsonl")
    for budget in (1, 256, 1024):
        assert build(tmp_path / f"{budget}.jsonl", f"batch_tokens={budget}") == whole


@pytest.mark.parametrize("text, question", [
    ("Who is Rosa?", "Who is Rosa?"), ('Here is a question:\n"Who is Rosa, the painter?"', "Who is Rosa, the painter?"),
    ("Question: Where does Ida sing? Answer: Turin.", "Where does Ida sing?"), ("The text is about Rosa.", None), ("?", None), (None, None)])
def test_the_question_in_what_a_model_writes(text, question):
    assert question_in(text) == question


# ------------------------------------------------------------------------------------------------------- servers

class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers as a good reader of the tiny world, and fails as servers do."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def redirected(self):
        """Whether the client was sent elsewhere."""
        self.server.seen.append(self.headers["Authorization"])
        if not self.server.redirect:
            return False
        self.send_response(307)
        self.send_header("Location", self.server.redirect + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def do_GET(self):
        if not self.redirected():
            self.send(200, json.dumps({"data": [{"id": self.server.model}]}))

    def send(self, code, text):
        self.send_response(code)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.redirected():
            return
        with self.server.lock:
            self.server.requests.append((self.path, body))
            number = len(self.server.requests)
            self.server.working += 1
            self.server.most = max(self.server.most, self.server.working)
        time.sleep(self.server.delay)
        fault = self.server.fault(number, body)
        with self.server.lock:
            self.server.working -= 1
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault:
            self.send(*fault)
        else:
            self.send(200, json.dumps({"choices": [self.server.choice(body)]}))


def reader(body):
    """What a perfect reader says: the facts about who is asked for, or an invention."""
    text = body["messages"][0]["content"]
    context, _, question = text.rpartition("Question:")
    if "Write one" in text:
        return {"message": {"content": "Who is " + text.split()[0] + "?"}, "finish_reason": "stop"}
    names = [word.strip("?,") for word in question.replace("Answer:", "").split()[1:] if word[0].isupper()]
    facts = [next((s for s in context.split(".") if s.split()[:1] == [name] and " in " in s), f" {name} sleeps {body['seed']}") + "." for name in names]
    return {"message": {"content": "".join(facts)}, "finish_reason": "stop"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("pairs.policy.RETRIES", 20)
    served = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    served.requests, served.lock, served.working, served.most, served.delay = [], threading.Lock(), 0, 0, 0.0
    served.fault, served.choice = lambda number, body: None, reader
    served.model, served.redirect, served.seen = "tiny", None, []
    served.url = f"http://127.0.0.1:{served.server_port}/v1"
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def remote(path, server, *args, examples=24):
    def never():
        raise AssertionError("the model here is not needed")
    cfg = config(f"pairs={path}", f"n_examples={examples}", "build_batch=5", f"endpoint={server.url}", "endpoint_requests=4", *args)
    return build_pairs(cfg, never, load_tokenizer(TINY)), rows(Path(path).read_bytes())


def test_a_server_writes_the_answers_several_at_a_time(tmp_path, server):
    server.delay = 0.02
    failed, found = remote(tmp_path / "p.jsonl", server)
    assert failed == 0 and [row["id"] for row in found] == list(range(24))
    kept = [row for row in found if "chosen" in row]
    assert len(kept) >= 12 and all(row["audit"]["chosen_right"] for row in kept)
    assert 2 <= server.most <= 4
    path, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "tiny" and body["temperature"] == 0.7 and body["max_tokens"] == 16


def test_completions_get_our_token_ids(tmp_path, server, tokenizer):
    server.choice = lambda body: {"text": " Rosa.", "finish_reason": "stop"}
    remote(tmp_path / "p.jsonl", server, "endpoint_api=completions", "endpoint_model=mine", examples=3)
    path, body = server.requests[0]
    prefix, suffix, _ = tokenizer.chat("", "\nQuestion: x\nAnswer:")
    assert path == "/v1/completions" and body["model"] == "mine" and all(type(t) is int for t in body["prompt"])
    assert body["prompt"][:len(prefix)] == prefix and body["prompt"][-2:] == suffix[-2:]


def test_faults_cost_no_pair(tmp_path, server):
    """Slow answers, 500s, 429s, dropped connections: the same file as from a server without them."""
    _, undisturbed = remote(tmp_path / "good.jsonl", server)
    kinds = [None, (500, "oops"), None, "drop", None, (429, ""), None, (503, "")]
    server.requests.clear()
    server.fault = lambda number, body: kinds[number % 8]
    failed, found = remote(tmp_path / "bad.jsonl", server)
    assert failed == 0 and found == undisturbed


@pytest.mark.parametrize("garbage", ["<html>", '{"choices": []}', "", "null", '{"choices": [{"finish_reason": "stop"}]}',
                                     '{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'])
def test_an_answer_that_is_none_is_asked_for_again_by_the_next_build(tmp_path, server, garbage):
    _, undisturbed = remote(tmp_path / "good.jsonl", server)
    server.requests.clear()
    server.fault = lambda number, body: (200, garbage) if number % 9 == 5 else None
    failed, found = remote(tmp_path / "bad.jsonl", server)
    assert failed > 0 and failed + len(found) == 24
    server.fault = lambda number, body: None
    failed, found = remote(tmp_path / "bad.jsonl", server)
    assert failed == 0 and sorted(found, key=lambda row: row["id"]) == undisturbed


def test_a_written_question_about_nothing_is_dropped(tmp_path, server):
    (tmp_path / "d.txt").write_text(" Rosa paints in Naples. Snow falls in Turin. Ida sings in Rome. Fog drifts in Paris." * 3)
    server.choice = lambda body: {"message": {"content": "What is it?"}, "finish_reason": "stop"}
    row, = remote(tmp_path / "p.jsonl", server, f"examples={tmp_path / 'd.txt'}", examples=0)[1]
    assert row["dropped"] == "written question is not about its chunk"


def test_what_keeps_failing_is_asked_for_again_by_the_next_build(tmp_path, server, capsys):
    def asks(number, body):
        return (400, '{"error": "too long"}') if body["seed"] // 64 % 3 == 0 else None

    _, undisturbed = remote(tmp_path / "good.jsonl", server, examples=40)
    server.fault = asks
    failed, found = remote(tmp_path / "p.jsonl", server, examples=40)
    assert 0 < failed == 40 - len(found) and "requests failed (as BadRequestError" in capsys.readouterr().out
    before = len(server.requests)
    server.fault = lambda number, body: None
    failed, found = remote(tmp_path / "p.jsonl", server, examples=40)
    assert failed == 0 and sorted(found, key=lambda row: row["id"]) == undisturbed
    assert {body["seed"] // 64 % 3 for _, body in server.requests[before:]} == {0}  # none that has a line is asked for again


def test_a_server_that_is_gone_ends_the_build_with_one_line(tmp_path, server):
    server.fault = lambda number, body: (401, "no key")
    with pytest.raises(BadInput, match="20 examples in a row failed, the last with AuthenticationError.*the same command goes on"):
        remote(tmp_path / "p.jsonl", server, examples=40)
    server.server_close()
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(BadInput, match="endpoint=http://127.0.0.1:9/v1: cannot be used"):
        remote(tmp_path / "q.jsonl", server)


def test_cut_and_empty_answers_are_dropped(tmp_path, server):
    server.choice = lambda body: {"message": {"content": "Rosa" if body["seed"] % 64 else ""}, "finish_reason": "stop"}
    assert {row["dropped"] for row in remote(tmp_path / "a.jsonl", server)[1]} <= {"chosen empty", "no critical chunk", "no irrelevant chunk"}
    server.choice = lambda body: {"message": {"content": "Rosa"}, "finish_reason": "length"}
    assert "chosen unfinished" in {row["dropped"] for row in remote(tmp_path / "b.jsonl", server)[1]}


def test_questions_are_written_about_documents(tmp_path, server):
    world = run_file(f"{TINY}/world.py")
    rng = random.Random(0)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(world.world(rng, 400)[0])
    server.choice = lambda body: reader(body) if "Write one" in body["messages"][0]["content"] else {
        "message": {"content": f"Says {body['seed']}."}, "finish_reason": "stop"}
    failed, found = remote(tmp_path / "p.jsonl", server, f"examples={tmp_path}", "questions=3", examples=0)
    assert failed == 0 and len(found) == 12
    kept = [row for row in found if "chosen" in row]
    assert kept and all(row["question"].startswith("Who is") for row in kept)
    assert all(max(row["scores"]) > 1 for row in kept)           # what the question was written from is among the critical
    assert all(saw is False for row in kept for saw in row["audit"]["rejected_saw_evidence"][:1])  # and in no irrelevant prompt


# ------------------------------------------------------------------------------------------------- a real server

PEOPLE = [("Ada Brandt", "Bergen"), ("Olga Marin", "Seville"), ("Hugo Lindt", "Dakar"), ("Selma Quist", "Kyoto"), ("Ivan Petrov", "Denver"),
          ("Clara Voss", "Hanoi"), ("Emil Novak", "Lagos"), ("Nina Rossi", "Oslo")]


class Proxy(Server):
    """In front of a real server: every other request is slow, fails or is dropped."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
        fault = [None, "slow", None, (500, "oops"), None, "drop"][number % 6]
        if fault == "slow":
            time.sleep(0.5)
        elif fault == "drop":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        elif fault:
            return self.send(*fault)
        request = urllib.request.Request(self.server.behind + self.path.removeprefix("/v1"), body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            self.send(200, answer.read().decode())


@pytest.fixture
def real(smollm2_folder):
    """transformers serve, with SmolLM2, on a free port of the loopback interface."""
    pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("openai")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", smollm2_folder, "--device", "cpu", "--dtype", "float32",
               "--host", "127.0.0.1", "--port", str(port)]
    served = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert served.poll() is None, "transformers serve ended"
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    served.kill()
    served.wait()


def test_a_real_server_with_faults_in_between(tmp_path, real, smollm2_folder, monkeypatch):
    """The same pairs, whether SmolLM2's answers come straight from the server or through faults."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("pairs.policy.RETRIES", 20)
    source = lines(tmp_path / "people.jsonl", [
        {"question": f"in which city does {name} live", "answers": [city], "title": name,
         "text": f"{name} is a painter, born in 19{i}4, who has lived in {city} for many years."} for i, (name, city) in enumerate(PEOPLE)])
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.requests, proxy.lock, proxy.behind = [], threading.Lock(), real
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    found = {}
    for name, url in (("straight", real), ("faulty", f"http://127.0.0.1:{proxy.server_port}/v1")):
        cfg = load_config([str(ROOT / "configs" / "smollm2.py"), f"model={smollm2_folder}", f"examples={source}", "n_examples=0",
                           "context_size=4", "n_rejected=1", "max_new_tokens=40", "require_wrong_rejected=False", f"endpoint={url}",
                           f"endpoint_model={smollm2_folder}", "endpoint_requests=2", f"pairs={tmp_path / name}.jsonl"])
        assert build_pairs(cfg, None, load_tokenizer(str(smollm2_folder))) == 0
        found[name] = rows((tmp_path / f"{name}.jsonl").read_bytes())
    proxy.shutdown()
    assert len(found["straight"]) == 8 and sum("chosen" in row for row in found["straight"]) >= 4
    assert found["faulty"] == found["straight"] and len(proxy.requests) > 20


# ------------------------------------------------------------------------------------ builds that are ended

def start(code, *args, **more):
    """A Python process that runs some code in the repository, in a process group of its own."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, **more)


BUILD = """
import os, signal, sys, time
sys.path.insert(0, ".")
import pairs.build
from checkpoint import load_pretrained
from configs import exit_on_bad_input, load_config
from tokenizer import load_tokenizer

sys.excepthook = exit_on_bad_input
path, what, *args = sys.argv[1:]
draft = pairs.build.draft

def disturbed(cfg, tokenizer, evaluator, i, example):
    if what == "killed" and i == 17:
        os.kill(os.getpid(), signal.SIGKILL)          # as the kernel does when memory runs out
    if what == "slow" and i >= 17:
        time.sleep(60)
    return draft(cfg, tokenizer, evaluator, i, example)

pairs.build.draft = disturbed
cfg = load_config(["configs/tiny.py", f"pairs={path}", "n_examples=24", "build_batch=5", "temperature=0.7", "workers=2", *args])
sys.exit(pairs.build.build_pairs(cfg, lambda: load_pretrained("models/tiny"), load_tokenizer("models/tiny")))
"""


def test_a_killed_worker_ends_the_build_with_one_line(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    done = start(BUILD, path, "killed")
    _, said = done.communicate(timeout=100)                       # it hung for ever
    assert done.returncode == 1 and said.count("\n") == 1
    assert said.startswith("error: a worker process was killed") and "the same command goes on" in said and "workers=1" in said
    for where in (path, whole):
        assert start(BUILD, where, "").wait(timeout=100) == 0
    assert path.read_bytes() == whole.read_bytes()


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.1)


def has_lines(path):
    return path.exists() and path.read_bytes().count(b"\n") > 5


def test_workers_die_with_a_killed_parent(tmp_path):
    parent = start(BUILD, tmp_path / "p.jsonl", "slow")
    wait_for(lambda: has_lines(tmp_path / "p.jsonl"))
    workers = children(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
                             for pid in workers), 10)


INTERRUPTED = "import sys; sys.path.insert(0, '.'); import pairs.__main__ as m; sys.exit(m.main(sys.argv[1:]))"


def test_ctrl_c_ends_a_build_with_one_line(tmp_path):
    path, args = tmp_path / "p.jsonl", ("n_examples=2000", "build_batch=5", "workers=2")
    build = start(INTERRUPTED, ROOT / "configs" / "tiny.py", f"pairs={path}", *args)
    wait_for(lambda: has_lines(path))
    os.killpg(build.pid, signal.SIGINT)                           # a terminal sends it to workers as well
    _, said = build.communicate(timeout=30)
    assert build.returncode == 130
    assert said == f"interrupted: what is in {path} stays, the same command goes on\n"


def test_ctrl_c_does_not_wait_for_a_server(tmp_path, server):
    path = tmp_path / "p.jsonl"
    server.fault = lambda number, body: time.sleep(60) if number > 60 else None
    build = start(INTERRUPTED, ROOT / "configs" / "tiny.py", f"pairs={path}", "n_examples=60", "endpoint_requests=4",
                  f"endpoint={server.url}")
    wait_for(lambda: has_lines(path))
    wait_for(lambda: len(server.requests) > 61)
    os.killpg(build.pid, signal.SIGINT)
    _, said = build.communicate(timeout=30)
    assert build.returncode == 130 and said.startswith("interrupted: ") and said.count("\n") == 1


# ------------------------------------------------------------------------------------------- several processes

def torchrun(path, processes, *args, module=("-m", "pairs"), **how):
    """A build of 60 examples in blocks of 4 by so many processes, in a session of its own. 0: without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen([sys.executable, *launcher, *module, "configs/tiny.py", f"pairs={path}", "n_examples=60", "build_batch=4",
                             "temperature=0.7", "workers=1", *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def descendants(pid):
    """All processes below one (torchrun's lead sessions of their own)."""
    found = children(pid)
    for each in found:
        found += children(each)
    return found


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:                                # gone meanwhile
            continue


def settled(path):
    """Examples with a line, in the file or in a part of it."""
    parts = Path(f"{path}.parts")
    found = path.read_text().splitlines()[1:] if path.exists() else []
    for part in parts.glob("*.jsonl") if parts.exists() else []:
        try:
            found += part.read_text().splitlines()
        except FileNotFoundError:                                 # taken into the file meanwhile
            continue
    return len(set(found))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of torchrun()'s pairs, by one process without torchrun."""
    path = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    done = torchrun(path, 0)
    assert done.wait() == 0, done.stderr.read()
    return path.read_bytes()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_file_does_not_depend_on_the_processes(tmp_path, whole, processes):
    build = torchrun(tmp_path / "p.jsonl", processes)
    said, errors = build.communicate()
    assert build.returncode == 0, errors
    assert (tmp_path / "p.jsonl").read_bytes() == whole
    assert said.count("pairs of 60 examples") == 1 and [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


ONE_ALONE = """
import os, runpy, sys, time
sys.path.insert(0, ".")
import pairs.build, pairs.parts
write = pairs.parts.write_part

def disturbed(folder, first, lines):
    rank = int(os.environ["RANK"])
    if what == "slow" and rank == 0:
        time.sleep(60)
    if what == "fails" and rank == 1 and first > 8:
        raise pairs.parts.BadInput("the disk is full")
    # One write: with PYTHONUNBUFFERED the pieces of a print() mix with the other process's.
    os.write(1, f"wrote {rank} {first} {rank == first // 4 % 2}\\n".encode())
    write(folder, first, lines)

what = sys.argv.pop(1)
pairs.parts.write_part = pairs.build.write_part = disturbed
runpy.run_module("pairs", run_name="__main__", alter_sys=True)
"""


def test_every_process_answers_its_share_of_the_blocks(tmp_path, whole):
    script = tmp_path / "alone.py"
    script.write_text(ONE_ALONE)
    build = torchrun(tmp_path / "p.jsonl", 2, module=(str(script), ""))
    said, errors = build.communicate()
    assert build.returncode == 0, errors
    assert said.count("wrote 0 ") == 8 and said.count("wrote 1 ") == 7 and "False" not in said
    assert (tmp_path / "p.jsonl").read_bytes() == whole


def test_what_others_have_written_is_counted_and_kept_when_the_first_is_slow(tmp_path, whole):
    """Process 0 never gets to its first block. What the other has written waits; one process alone goes on from there."""
    path, script = tmp_path / "p.jsonl", tmp_path / "alone.py"
    script.write_text(ONE_ALONE)
    build = torchrun(path, 2, module=(str(script), "slow"))
    wait_for(lambda: settled(path) == 28)                         # blocks 1, 3, 5, ..., 13 of 0 to 14
    kill([*descendants(build.pid), build.pid])
    build.communicate()
    assert path.read_text().count("\n") == 1 and len(list(Path(f"{path}.parts").glob("*.jsonl"))) == 7
    asked = start(COUNTED, path)
    assert asked.wait(timeout=100) == 0, asked.stderr.read()
    assert path.read_bytes() == whole and not Path(f"{path}.parts").exists()
    assert asked.stderr.read().split() == [str(first) for first in range(0, 60, 8)]


COUNTED = """
import sys
sys.path.insert(0, ".")
import pairs.build
from checkpoint import load_pretrained
from configs import load_config
from tokenizer import load_tokenizer

finish = pairs.build.Writer.finish

def spied(self, block):
    print(block[0].row["id"], file=sys.stderr)
    return finish(self, block)

pairs.build.Writer.finish = spied
cfg = load_config(["configs/tiny.py", f"pairs={sys.argv[1]}", "n_examples=60", "build_batch=4", "temperature=0.7", "workers=1"])
import torch
torch.set_num_threads(1)
pairs.build.build_pairs(cfg, lambda: load_pretrained("models/tiny"), load_tokenizer("models/tiny"))
"""


def test_a_process_that_fails_ends_all_with_one_line(tmp_path, whole):
    path, script = tmp_path / "p.jsonl", tmp_path / "alone.py"
    script.write_text(ONE_ALONE)
    build = torchrun(path, 2, module=(str(script), "fails"))
    _, errors = build.communicate(timeout=100)
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert build.returncode == 1 and len(said) == 1 and said[0].startswith("error: the disk is full"), errors
    assert errors.count("Traceback") == 1 and "ChildFailedError" in errors  # torchrun's own, after it
    assert errors.index("Traceback") > errors.index(said[0])
    again = torchrun(path, 2)
    assert again.wait() == 0 and path.read_bytes() == whole


def test_killed_at_random_moments_processes_end_with_the_same_file(tmp_path, whole):
    """kill -9 of one process of 2 or 4, which ends the others, and of all; each time another number of them goes on."""
    path, kills, rng = tmp_path / "p.jsonl", 0, np.random.default_rng(2)
    while kills <= KILLS:
        before, goal = settled(path), int(rng.integers(1, 60 // KILLS))
        processes = int(rng.choice([2, 4]))
        build = torchrun(path, processes)
        while build.poll() is None and settled(path) < min(before + goal, 59):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        ranks = [pid for pid in children(build.pid) if b"pairs" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if build.poll() is not None or len(ranks) < processes:    # too late to kill: from the start
            build.communicate()
            assert path.read_bytes() == whole
            path.unlink()
            continue
        if kills % 2:
            kill([*descendants(build.pid), build.pid])
            build.communicate()
        else:
            kill([ranks[int(rng.integers(processes))]])
            _, errors = build.communicate(timeout=60)             # torchrun ends the others
            assert build.returncode == 1 and "SIGKILL" in errors
        assert settled(path) >= before                            # nothing that was written is lost
        kills += 1
    build = torchrun(path, int(rng.choice([0, 1, 3])))
    assert build.wait() == 0 and path.read_bytes() == whole


def test_ctrl_c_ends_all_processes_with_one_line(tmp_path):
    path = tmp_path / "p.jsonl"
    build = torchrun(path, 2, "n_examples=2000")
    wait_for(lambda: has_lines(path))
    below = descendants(build.pid)
    build.send_signal(signal.SIGINT)
    _, errors = build.communicate(timeout=60)
    assert build.returncode and errors.count("interrupted: what is in") == 1, errors
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 10)


def test_parts_of_a_file_that_is_gone_are_not_taken(tmp_path, whole):
    parts = tmp_path / "p.jsonl.parts"
    parts.mkdir()
    (parts / "0.jsonl").write_text('{"id": 0, "dropped": "by other weights of the same name"}\n')
    assert torchrun(tmp_path / "p.jsonl", 0).wait() == 0
    assert (tmp_path / "p.jsonl").read_bytes() == whole


def test_one_process_of_several_asks_a_server(tmp_path, server):
    remote(tmp_path / "one.jsonl", server, "build_batch=4", "n_examples=60")
    asked = len(server.requests)
    build = torchrun(tmp_path / "two.jsonl", 2, f"endpoint={server.url}", "endpoint_requests=4")
    _, errors = build.communicate(timeout=100)
    assert build.returncode == 0 and len(server.requests) == 2 * asked, errors
    one, two = (rows((tmp_path / f"{name}.jsonl").read_bytes()) for name in ("one", "two"))
    assert one == two and len(two) == 60


def test_parts_are_taken_in_order_whenever_they_come(tmp_path):
    """Blocks of 2, the first cut after its first line by an earlier kill; the bar counts what waits as well."""
    class Bar:
        n = 1

        def update(self, more):
            self.n += more

    path, bar = tmp_path / "p.jsonl", Bar()
    path.write_text("".join(f'{{"id": {i}}}\n' for i in (0,)))
    Path(parts_of(str(path))).mkdir()
    merge = Merge(str(path), [range(0, 2), range(2, 4), range(4, 5)], {0}, bar)
    seen = []
    for block in ((2, 3), (0, 1), (4,)):
        write_part(parts_of(str(path)), block[0], [f'{{"id": {i}}}\n' for i in block])
        merge.take()
        seen.append((path.read_text().count("id"), bar.n, len(merge.waiting)))
    assert seen == [(1, 3, 3), (4, 5, 1), (5, 6, 0)]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- the header

def test_the_header_says_what_the_pairs_are_made_by(tmp_path, tokenizer):
    build(tmp_path / "p.jsonl", examples=2)
    cfg = config("n_examples=2", "build_batch=5", "temperature=0.7")
    expected = {key: cfg[key] for key in ("model", "adapter", "examples", "dtype", *default_groups()["build"])}
    assert read_header(tmp_path / "p.jsonl") == {**expected, "tokenizer": tokenizer.digest, "corpus_size": 0}


@pytest.mark.parametrize("key, other", [("adapter", "other"), ("dtype", "bfloat16"), ("tokenizer", "0123456789abcdef"), ("model", "other"),
                                        ("seed", 1), ("endpoint", "http://127.0.0.1:1/v1"), ("endpoint_model", "other")])
def test_a_file_made_by_anything_else_is_refused_by_its_key(tmp_path, key, other):
    path = tmp_path / "p.jsonl"
    first, _, rest = build(path, examples=2).decode().partition("\n")
    settings = json.loads(first)["settings"]
    path.write_text(json.dumps({"settings": {**settings, key: other}}) + "\n" + rest)
    with pytest.raises(BadInput, match=f"p.jsonl: was built with {key}='?{other}'?, now it is "):
        build(path, examples=2)


def test_a_corpus_that_has_grown_is_refused_and_a_newer_key_is_its_default(tmp_path):
    """One that has grown is another order of documents: an id would mean another example."""
    rows = [{"context": f" Rosa paints in Naples. Snow falls in Turin {i}." * 9, "question": "Who is Rosa?", "answers": ["Naples"]} for i in range(6)]
    corpus, path = tmp_path / "c.jsonl", tmp_path / "p.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    first, _, rest = build(path, f"examples={corpus}", examples=2).decode().partition("\n")
    settings = json.loads(first)["settings"]
    assert settings["corpus_size"] == 4
    older = {key: value for key, value in settings.items() if key not in ("questions", "corpus_size")}
    path.write_text(json.dumps({"settings": older}) + "\n" + rest)
    build(path, f"examples={corpus}", examples=2)                  # lacks a key, which then has its default
    with pytest.raises(BadInput, match="was built with questions=1, now it is 2"):
        build(path, f"examples={corpus}", "questions=2", examples=2)
    path.write_text(first + "\n" + rest)
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    open_corpus.cache_clear()                                       # as another process reads it
    with pytest.raises(BadInput, match="was built with corpus_size=4, now it is 6"):
        build(path, f"examples={corpus}", examples=2)


def test_answers_of_two_models_of_a_server_do_not_mix(tmp_path, server):
    remote(tmp_path / "p.jsonl", server, examples=5)
    assert read_header(tmp_path / "p.jsonl")["endpoint_model"] == "tiny"
    whole = (tmp_path / "p.jsonl").read_bytes()
    (tmp_path / "p.jsonl").write_bytes(whole[:-1])                # one line is missing, and the server has another model
    server.model = "another"
    with pytest.raises(BadInput, match="was built with endpoint_model='tiny', now it is 'another'"):
        remote(tmp_path / "p.jsonl", server, examples=5)
    server.model = "tiny"
    assert remote(tmp_path / "p.jsonl", server, examples=5)[0] == 0
    assert (tmp_path / "p.jsonl").read_bytes() == whole
    server.shutdown()
    server.server_close()                                         # training starts when the server has made room for it
    assert remote(tmp_path / "p.jsonl", server, examples=5)[0] == 0


def test_a_file_that_is_none_of_ours_stays_as_it_is(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Who?"}\n{"question": "the last line has no end"}')
    before = path.read_bytes()
    with pytest.raises(BadInput, match="mine.jsonl: is no file of pairs"):
        build(path, examples=2)
    assert path.read_bytes() == before
    with pytest.raises(BadInput, match="cannot be written"):
        build(tmp_path, examples=2)


def test_what_does_not_fit_the_window_makes_no_pair(tmp_path, tokenizer):
    source = lines(tmp_path / "r.jsonl", [{"prompt": " Who is Rosa?", "chosen": " Rosa sings." * n, "rejected": [" Ida sings.", " Ida."]}
                                          for n in (1, 400)])
    found = rows(build(tmp_path / "p.jsonl", f"examples={source}", examples=0))
    assert [row.get("dropped") for row in sorted(found, key=lambda row: "dropped" in row)] == [None, "longer than window"]
    assert len(load_pairs(tmp_path / "p.jsonl", config(), tokenizer)) == 1


# ---------------------------------------------------------------------------------------- what a server may do

def test_no_key_goes_to_another_host(tmp_path, server, monkeypatch):
    """A redirect is an error, of the list of models as of an answer; the other host is never asked."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    other = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    other.requests, other.lock, other.working, other.most, other.delay, other.model = [], threading.Lock(), 0, 0, 0.0, "tiny"
    other.seen, other.redirect = [], None
    threading.Thread(target=other.serve_forever, daemon=True).start()
    server.redirect = f"http://localhost:{other.server_port}"
    with pytest.raises(BadInput, match="endpoint=.*cannot be used .*30"):
        remote(tmp_path / "p.jsonl", server, examples=2)
    failed, found = remote(tmp_path / "q.jsonl", server, "endpoint_model=tiny", examples=2)
    assert failed == 2 and found == []
    assert other.requests == other.seen == [] and "Bearer secret" in server.seen
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/v1", "127.0.0.1:8000/v1"])
def test_only_http_is_asked(tmp_path, url):
    with pytest.raises(BadInput, match="endpoint is .*expected http:// or https://"):
        build(tmp_path / "p.jsonl", f"endpoint={url}", examples=2)


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(BadInput, match="pip install openai"):
        build(tmp_path / "p.jsonl", "endpoint=http://127.0.0.1:1/v1", examples=2)


def test_half_a_character_from_a_server_is_written(tmp_path, server, tokenizer):
    server.choice = lambda body: {"message": {"content": reader(body)["message"]["content"] + "\ud83d"}, "finish_reason": "stop"}
    failed, found = remote(tmp_path / "p.jsonl", server)
    assert failed == 0 and any(row.get("chosen", "").endswith("?") for row in found)
    assert load_pairs(tmp_path / "p.jsonl", config(), tokenizer)


def test_a_name_that_is_not_utf8_does_not_cost_the_result(tmp_path):
    path = os.fsencode(tmp_path) + b"/p\xff.jsonl"
    done = subprocess.run([sys.executable.encode(), b"-m", b"pairs", b"configs/tiny.py", b"pairs=" + path, b"n_examples=4"],
                          cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert done.stdout.startswith(path + b": ") and b" pairs of 4 examples" in done.stdout


def test_commands_take_no_other_files_for_configs(tmp_path):
    path = lines(tmp_path / "mine.jsonl", [{"context": "C", "question": "Q?"}])
    for args in (["score", path], [path]):
        done = subprocess.run([sys.executable, "-m", "pairs", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(f"error: {path}: expected a Python file") and done.stderr.count("\n") == 1
