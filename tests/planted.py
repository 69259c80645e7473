"""Bugs, planted one at a time in a copy of the tree: the tests that should see each, and the bugs that none saw.

    python tests/planted.py [WORD ...]     those whose file or description holds a WORD; none: all

The first ones are what the method's public code gets wrong. A bug whose text is no longer in its file is stale; of one
whose tests fail without it, or are none, nothing is known. Both are failures of this table.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

import importlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from readability import HERE

sys.dont_write_bytecode = True
for slow in ("torch", "hypothesis", "transformers", "trl", "peft", "torch.distributed.fsdp", "matplotlib.pyplot"):
    try:
        importlib.import_module(slow)
    except ImportError:
        pass  # the tests that need it are skipped as well


class Bug(NamedTuple):
    what: str
    file: str
    old: str      # stands in the file exactly once
    new: str
    tests: str    # arguments of pytest: those that must turn red


DATA, MODEL, LOSS, GENERATE, CHECKPOINT, TOKENIZER, PAIRS, CORPUS, ANSWERS, EVALS, TRAIN = (
    f"tests/test_{name}.py" for name in ("data", "model", "loss", "generate", "checkpoint", "tokenizer", "pairs", "corpus",
                                         "answers", "evals", "train"))
CONSOLE, REPORT = "tests/test_console.py", "tests/test_report.py"
FUZZ, KILLS = "tests/test_fuzz.py", "tests/test_kills.py"
BRANCHES = f"{MODEL} -k 'branches_equal_full_rows and not rope'"
SELECTION = f"{DATA} -k 'selection or side or cap or short_document'"
POSITIONS = f"{DATA} -k 'positions or slots or draws or chunks_have or pose'"
GROUP = f"{DATA} -k 'group or window or collating or batch'"
ROWS = f"{DATA} -k 'trained_on or whatever or refused'"

BUGS = [
    # ---- what the public code gets wrong
    Bug("the second rejected answer is everything after the chosen one", "model.py",
        "            answer_of[answer.start:answer.end] = i\n", "            answer_of[answer.start:] = min(i, 1)\n", BRANCHES),
    Bug("targets are not shifted", "data.py",
        "        targets.append(np.array(answer))\n", "        targets.append(np.array([prompt[P], *answer[:-1]]))\n", GROUP),
    Bug("each answer repeats the prompt", "data.py",
        "        tokens.append(np.array([prompt[P], *answer[:-1]]))\n",
        "        tokens.append(np.array([*prompt[:P], prompt[P], *answer[:-1]]))\n", GROUP),
    Bug("positions run past the window", "data.py",
        "(Placing(chunk_lengths, window - used, draw", "(Placing(chunk_lengths, window - used + tail, draw", POSITIONS),
    Bug("groups are packed without moving their segments", "data.py",
        "            segments.append(segment.moved(offset))\n", "            segments.append(segment)\n", GROUP),
    Bug("the prompt is labelled with token 0 instead of nothing", "data.py",
        "    targets = [np.full(P, IGNORE)]\n", "    targets = [np.full(P, 0)]\n", GROUP),
    Bug("the logits of every token are made", "model.py",
        "        scored = (targets != IGNORE).nonzero()[:, 0]\n", "        scored = (targets > -200).nonzero()[:, 0]\n",
        f"{MODEL} -k 'prompt_tokens_are_not_scored or branches_equal_full_rows'"),
    Bug("one answer's length for all", "model.py",
        "        lengths = torch.bincount(owner, minlength=A)\n", "        lengths = torch.bincount(owner, minlength=A).max().expand(A)\n",
        BRANCHES),

    # ---- chunks and scores
    Bug("the last, shorter chunk is lost", "data.py",
        "        for start in range(0, len(ids), size):\n", "        for start in range(0, len(ids) - size + 1, size):\n",
        f"{DATA} -k chunks_are"),
    Bug("passages are joined", "data.py",
        '        texts = [passage + "\\n\\n" for passage in context]\n', '        texts = ["\\n\\n".join(context)]\n',
        f"{DATA} -k chunks_are"),
    Bug("numbers are cut at their points", "data.py",
        'WORD = re.compile(r"\\w+(?:[.,]\\d+)*")', 'WORD = re.compile(r"\\w+")', f"{DATA} -k evaluator"),
    Bug("common words count", "data.py", "word.lower() not in COMMON", "word not in COMMON", f"{DATA} -k evaluator"),
    Bug("a word counts as often as it occurs", "data.py",
        "        shared = wanted & evaluator(tokenizer.decode(np.asarray(ids).tolist()))\n        scores.append(len(shared))\n",
        "        text = tokenizer.decode(np.asarray(ids).tolist())\n"
        "        scores.append(sum(text.lower().count(word) for word in wanted & evaluator(text)))\n", f"{DATA} -k scores"),

    # ---- selection
    Bug("a chunk at delta is critical", "data.py", "if scores[c] > delta]", "if scores[c] >= delta]", SELECTION),
    Bug("max_critical wins over n_chunks", "data.py",
        "min(max_critical or n_chunks, n_chunks))", "max_critical or n_chunks)", SELECTION),
    Bug("evidence over the cap counts as irrelevant", "data.py",
        "    return critical[:most], others\n", "    return critical[:most], critical[most:] + others\n", SELECTION),
    Bug("the best chunk of a poor document counts as irrelevant as well", "data.py",
        "        others = ranked[1:]\n", "        others = ranked\n", SELECTION),
    Bug("a document without any evidence makes a pair", "data.py",
        "if not critical and ranked and scores[ranked[0]] > 0:", "if not critical and ranked:", SELECTION),
    Bug("ties go to the later chunk", "data.py", "(-scores[c], c))", "(-scores[c], -c))", SELECTION),
    Bug("a lone irrelevant chunk", "data.py",
        "    irrelevant = others[-max(n_chunks, len(others) // 2):]\n", "    irrelevant = others[-1:]\n", SELECTION),
    Bug("half right has the best chunk", "data.py",
        "    weaker_half = critical[(len(critical) + 1) // 2:]\n", "    weaker_half = critical[:(len(critical) + 1) // 2]\n",
        SELECTION),
    Bug("a chunk twice in a prompt", "data.py", " if c not in half_right]", "]", SELECTION),
    Bug("two kinds of rejected prompts are one", "data.py",
        "    if not weaker_half and len(others) <= n_chunks:\n", "    if False:\n", SELECTION),
    Bug("half right is called by the other's name", "data.py",
        "            evidence.append(PARTIAL if weaker_half else NEAR)\n", "            evidence.append(PARTIAL)\n", SELECTION),
    Bug("the training prompt lacks evidence", "data.py",
        "    training = critical + near_misses", "    training = critical[:1] + near_misses", SELECTION),
    Bug("a prompt is not in document order", "data.py", "        rejected.append(sorted(picked))\n",
        "        rejected.append(picked)\n", SELECTION),

    # ---- positions
    Bug("rooms lose the remainder", "data.py",
        "        room = (c + 1) * slack // N - c * slack // N\n", "        room = slack // N\n", POSITIONS),
    Bug("a chunk may leave its slot", "data.py",
        "        offset = int(share * (room + 1))\n", "        offset = int(share * (2 * room + 1))\n", POSITIONS),
    Bug("draws are not stratified", "data.py",
        "        stratum = p.shared.permutation(p.draws)[p.draw]\n", "        stratum = p.own.integers(p.draws)\n", POSITIONS),
    Bug("all draws of an example are the same", "data.py",
        '    own = random_stream("positions of a draw", *seed, draw)\n',
        '    own = random_stream("positions of a draw", *seed, 0)\n', POSITIONS),
    Bug("sparse positions are not sorted", "data.py", "start + np.sort(places)", "start + places", POSITIONS),
    Bug("PoSE skips by half the slack", "data.py",
        "    skip = p.own.integers(0, p.slack + 1)\n", "    skip = p.own.integers(0, p.slack // 2 + 1)\n", POSITIONS),
    Bug("the share of sparse draws is turned round", "data.py",
        '"sparse" if chance < cfg["sparse_share"]', '"sparse" if chance > cfg["sparse_share"]', f"{DATA} -k mix"),
    Bug("a stream without its tag", "data.py",
        "    return np.random.default_rng([zlib.crc32(tag.encode()), *numbers])\n", "    return np.random.default_rng([*numbers])\n",
        f"{DATA} -k streams"),

    # ---- groups, batches, order
    Bug("answers lack their end", "data.py", "tokenizer.encode(text) + stops[:1]", "tokenizer.encode(text)", GROUP),
    Bug("answers follow each other's positions", "data.py",
        "        positions.append(prompt_positions[P] + np.arange(len(answer)))\n",
        "        positions.append(prompt_positions[P] + start - P + np.arange(len(answer)))\n", GROUP),
    Bug("an answer sees the one before it", "data.py",
        "start + len(answer), 0, P))", "start + len(answer), 0, start))", GROUP),
    Bug("the chosen answer says how much slack there is", "data.py",
        "    longest = max(len(answer) for answer in answers)\n    # By the pair", "    longest = len(answers[0])\n    # By the pair", GROUP),
    Bug("a batch does not check itself", "data.py",
        '            assert segment.start == end, "segments cover the stream in order"\n', "", GROUP),
    Bug("each step begins the epoch anew", "data.py",
        '    for i in range(step * cfg["batch_size"], (step + 1) * cfg["batch_size"]):\n',
        '    for i in range(cfg["batch_size"]):\n', f"{DATA} -k every_sample"),
    Bug("every epoch has the same order", "data.py",
        'random_stream("order of an epoch", cfg["seed"], epoch)', 'random_stream("order of an epoch", cfg["seed"], 0)',
        f"{DATA} -k every_sample"),
    Bug("a held-out document is trained on", "data.py",
        "        if document_of(pair) not in unseen:\n", "        if True:\n", f"{DATA} -k document"),
    Bug("a pair without a document is taken for the document of its number", "data.py",
        '        return "pair", pair["id"]\n', '        return "document", pair["id"]\n', f"{DATA} -k document"),
    Bug("more held-out pairs than there are wrap round", "data.py",
        "    border = max(0, len(pairs) - held_out)\n", "    border = len(pairs) - held_out\n", f"{DATA} -k document"),

    # ---- the pairs' file
    Bug("True is an id", "data.py", "if type(value) is not int or", "if not isinstance(value, int) or", ROWS),
    Bug("an id of two words", "data.py", "not 0 <= value < 1 << 32:", "value < 0:", ROWS),
    Bug("300.7 is a token id", "data.py", "set(map(type, ids)) != {int}:", "not set(map(type, ids)) <= {int, float}:", ROWS),
    Bug("negative token ids", "data.py", "if min(ids) < 0 or max(ids)", "if max(ids)", ROWS),
    Bug("token ids past the vocabulary", "data.py", "max(ids) >= vocab_size:", "max(ids) > vocab_size:", ROWS),
    Bug("more than n_chunks", "data.py", "1 <= len(chunks) <= n_chunks:", "1 <= len(chunks):", ROWS),
    Bug('"No." becomes three answers', "data.py",
        "    if not isinstance(rejected, list) or len(rejected)", "    if not rejected or len(rejected)", ROWS),
    Bug("an answer equal to the chosen but for spaces", "data.py",
        "        if text.strip() == chosen.strip():\n", "        if text == chosen:\n", ROWS),
    Bug("blank answers", "data.py", "if not is_text(text) or not text.strip():", "if not is_text(text):", ROWS),
    Bug("an answer too long for the window is met at its step", "data.py",
        '    if prompt + longest > cfg["window"]:\n', "    if False:\n", ROWS),
    Bug("one position too many", "data.py",
        '    if prompt + longest > cfg["window"]:\n', '    if prompt + longest > cfg["window"] + 1:\n', f"{DATA} -k just_fits"),
    Bug("half a character reaches the tokenizer", "data.py", "    try:\n        value.encode()\n", "    try:\n        str(value)\n", ROWS),
    Bug("two pairs of one id", "data.py", "        if first != number:\n", "        if False:\n", ROWS),
    Bug("pairs of another tokenizer", "data.py", "    if built_with != tokenizer.digest:\n", "    if False:\n", ROWS),

    # ---- the model
    Bug("an answer sees the other answers", "model.py",
        "    mask = torch.full((rows, P + rows), -math.inf)\n",
        "    mask = torch.full((rows, P + rows), 0.0)\n", BRANCHES),
    Bug("an answer sees its own future", "model.py",
        "        itself.triu_(1)", "        itself.zero_()", BRANCHES),
    Bug("rotary pairs neighbours' signs the other way", "model.py", "torch.cat([-b, a], dim=-1)", "torch.cat([b, -a], dim=-1)",
        f"{MODEL} -k logits_equal_transformers"),
    Bug("angles in bf16", "model.py",
        "    angles = positions[:, None].float() * frequencies\n",
        "    angles = (positions[:, None].bfloat16() * frequencies.bfloat16()).float()\n", f"{MODEL} -k angles"),
    Bug("llama3 keeps what it should interpolate", "model.py",
        "    keep = ((turns - low) / (high - low)).clamp(0, 1)\n",
        "    keep = 1 - ((turns - low) / (high - low)).clamp(0, 1)\n", f"{MODEL} -k frequencies"),
    Bug("the keys of a varlen call lack the prompt", "model.py",
        "            key_index.append(torch.arange(segment.prefix_start, segment.prefix_end))\n", "", f"{MODEL} -k varlen"),
    Bug("log-probs in the model's dtype", "model.py",
        "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype", f"{MODEL} -k log_probs_are_fp32"),
    Bug("a group's segments move, their prefix does not", "model.py",
        "self.prefix_start + offset, self.prefix_end + offset)", "self.prefix_start, self.prefix_end)",
        f"{MODEL} -k 'move or another_group'"),
    Bug("LoRA is not scaled", "model.py", "        self.scale = alpha / r\n", "        self.scale = 1.0\n",
        "tests/test_checkpoint.py -k peft"),
    Bug("everything trains beside LoRA", "model.py",
        "            p.requires_grad = of_lora or asked_for\n", "            p.requires_grad = True\n", "tests/test_checkpoint.py -k peft"),

    # ---- the loss
    Bug("gamma stands inside beta", "loss.py", "-F.logsigmoid(margin - gamma)", "-F.logsigmoid(margin - beta * gamma)", LOSS),
    Bug("Eq. 3 as printed", "loss.py", "    sft = -chosen\n", "    sft = chosen\n", LOSS),
    Bug("rejected answers are added up", "loss.py",
        "    margin = beta * (chosen - rejected.mean(dim=1))\n", "    margin = beta * (chosen - rejected.sum(dim=1))\n", LOSS),
    Bug("only the first rejected answer counts", "loss.py",
        "    margin = beta * (chosen - rejected.mean(dim=1))\n", "    margin = beta * (chosen - rejected[:, 0])\n", LOSS),
    Bug("the logarithm of a sigmoid that can be 0", "loss.py",
        "-F.logsigmoid(margin - gamma)", "-(margin - gamma).sigmoid().log()", LOSS),
    Bug("accuracy counts ties", "loss.py", '"rewards/accuracies": chosen > rejected', '"rewards/accuracies": chosen >= rejected', LOSS),

    # ---- decoding
    Bug("a row sees slots that nobody filled", "generate.py",
        "        unseen = self.unseen(S, self.lengths, device)\n",
        "        unseen = self.unseen(S, self.lengths.max().expand_as(self.lengths), device)\n", f"{GENERATE} -k 'neighbours or cached'"),
    Bug("a token's position is one too many", "generate.py",
        "    positions = cache.lengths.to(device)\n", "    positions = cache.lengths.to(device) + 1\n",
        f"{GENERATE} -k 'greedy or cached'"),
    Bug("the nucleus lacks the token that crosses top_p", "generate.py",
        "mass_before >= top_p", "mass_before + probs >= top_p", f"{GENERATE} -k nucleus"),
    Bug("noise for the rows that go on alone", "generate.py",
        "probs / noise[alive]", "probs / noise[:len(alive)]", f"{GENERATE} -k rows_that_ended"),
    Bug("heads look in the model's dtype", "generate.py",
        "        products.append(one.float() @ other.float())\n", "        products.append((one @ other).float())\n", f"{GENERATE} -k fp32"),
    Bug("a GPU's scores are rounded to 16 bits", "generate.py",
        "torch.bmm(q, k, out_dtype=torch.float32)", "torch.bmm(q, k).float()", f"{GENERATE} -k copies_nothing"),
    Bug("the second batch draws on where the first one ended", "generate.py",
        "            generator.set_state(begin)\n", "            pass\n", f"{GENERATE} -k every_split"),
    Bug("a batch's rows are numbered anew", "generate.py",
        "    alive = list(numbers)  #", "    alive = list(range(len(numbers)))  #", f"{GENERATE} -k every_split"),
    Bug("a batch has room for its first row's length", "generate.py",
        "(len(found[-1]) + 1) * slots > budget", "len(found[-1]) * slots > budget", f"{GENERATE} -k batch"),
    Bug("a piece of a prompt sees only itself", "generate.py",
        "        end = S - T + start + n  #", "        end = start + n  #", f"{GENERATE} -k 'pieces or last_queries'"),

    # ---- files: models, adapters, checkpoints
    Bug("a tied head is parted from the embeddings", "checkpoint.py",
        "        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty has parted them\n", "        pass\n",
        f"{MODEL} -k logits_equal_transformers"),
    Bug("LoRA's product is not on the exported weight", "checkpoint.py",
        "tensor = tensor.float() + module.scale * (B @ A)", "tensor = tensor.float()", f"{CHECKPOINT} -k 'peft or adapter'"),
    Bug("each process draws an A of its own", "checkpoint.py", "            local.copy_(full[first:last])\n",
        "            local.copy_(full[:last - first].flip(0))\n", f"{TRAIN} -k 'lora_trains_what or losses_do_not_depend'"),
    Bug("an index may point out of its folder", "checkpoint.py",
        'if not isinstance(file, str) or not re.fullmatch(r"[^/\\\\\\0]+\\.safetensors", file):', "if not isinstance(file, str):",
        f"{CHECKPOINT} -k index"),
    Bug("whole numbers are taken for weights", "checkpoint.py", "    if found.get_dtype() not in FLOATS:\n", "    if False:\n",
        f"{CHECKPOINT} -k whole_numbers"),
    Bug("a flipped bit of a shard loads", "checkpoint.py", '        if sha256(file) != state["shards"][name]:\n', "        if False:\n",
        f"{TRAIN} -k damaged"),
    Bug("prune takes what is the user's", "checkpoint.py",
        'rf"step_([0-9]{{6,}}){ending}"', 'rf"step_([0-9]{{6,}}).*{ending}"', f"{CHECKPOINT} -k prune"),
    Bug("the best checkpoint is removed", "checkpoint.py", "        if folder != best:\n", "        if True:\n", f"{CHECKPOINT} -k kept"),
    Bug("the moments come back as zeros", "checkpoint.py",
        "        for key, tensor in stored_tensors(name, p, moments).items():\n",
        "        for key, tensor in [(name, p)]:\n", f"{TRAIN} -k 'another_number_of_processes'"),
    Bug("transformers cuts at the old window", "checkpoint.py",
        '        settings["model_max_length"] = model.config.max_position_embeddings\n', "", f"{CHECKPOINT} -k cut"),
    Bug("PEFT parts tied embeddings", "checkpoint.py",
        '        settings["ensure_weight_tying"] = True\n', "        pass\n", f"{CHECKPOINT} -k mean_the_same_in_peft"),
    Bug("others do not know where a turn ends", "checkpoint.py", "        if stop not in ends:\n", "        if not ends:\n",
        "tests/test_join.py -k 'keeps_the_sampling or how_it_was'"),
    Bug("a pair that went to TRL comes back as M pairs", "pairs/convert.py", "        if same and row", "        if False and row",
        "tests/test_join.py -k 'comes_back or neighbours'"),

    # ---- text
    Bug("the priority of merges is their id", "tokenizer.py",
        "        for word in bytes_first + merges:\n", "        for word in bytes_first + sorted(merges, key=lambda word: vocab.get(word, 0)):\n",
        f"{TOKENIZER} -k priority"),
    Bug("text between two matches is dropped", "tokenizer.py",
        'return [rf"(?:{pattern})|(?:(?!{pattern})[\\s\\S])+" for pattern in patterns]', "return patterns", f"{TOKENIZER} -k split"),
    Bug("answers end with the second of the stop tokens", "data.py",
        "tokenizer.encode(text) + stops[:1]", "tokenizer.encode(text) + stops[-1:]", f"{GROUP[:-1]} or ends'"),

    # ---- pairs
    Bug("an answer that did not end is taken", "pairs/policy.py",
        "            ended = ids[-1] in stops\n", "            ended = True\n", f"{PAIRS} -k whole_or_none"),
    Bug("answers to prompts of other lengths change places", "generate.py",
        "        for i, ids in zip(numbers, found):\n", "        for i, ids in zip(reversed(numbers), found):\n",
        f"{PAIRS} -k 'cut_at_any_byte or reference'"),
    Bug("every block draws the same", "pairs/build.py",
        'self.source.begin_block(self.cfg["seed"] * 1_000_003 + first)', "self.source.begin_block(0)",
        f"{PAIRS} -k blocks"),
    Bug("a line that a kill cut stays", "pairs/build.py", "            f.truncate(whole)\n", "", f"{PAIRS} -k cut_at_any_byte"),
    Bug("settings of another policy mix in one file", "pairs/build.py",
        "        refuse_other_settings(path, built, settings)\n", "        pass\n", f"{PAIRS} -k 'cut_at_any_byte or settings'"),
    Bug("the evidence's names go with other candidates", "pairs/build.py",
        "            evidence.append(new.selection.evidence[j])\n",
        "            evidence.append(new.selection.evidence[len(evidence)])\n",
        f"{PAIRS} -k audit_follows"),
    Bug("a rejected answer may be right", "pairs/answers.py",
        '    if cfg["require_wrong_rejected"] and gives', "    if False and gives", f"{ANSWERS} {PAIRS} -k 'degenerate or cut_at'"),
    Bug("a rejected answer may equal another", "pairs/answers.py", "    if normalize(text) in seen:\n", "    if False:\n",
        f"{ANSWERS} -k degenerate"),
    Bug("1,000 is not 1000", "pairs/answers.py",
        '    text = THOUSANDS.sub(lambda number: number.group().replace(",", ""), text.lower())\n', "    text = text.lower()\n",
        f"{ANSWERS} -k thousands"),
    Bug("no answer inside Chinese text", "pairs/answers.py", '    text = CJK.sub(r" \\1 ", text)\n', "", f"{ANSWERS} -k spaces"),
    Bug("documents are split by question", "pairs/corpus.py",
        "        order += members[int(document)]\n    return order\n",
        '        order += members[int(document)]\n    return [int(i) for i in random_stream("x", seed).permutation(len(order))]\n',
        f"{CORPUS} -k 'document or fresh'"),
    Bug("a distractor is about the same document", "pairs/corpus.py",
        "if other != document][:self.size - 1]", "][:self.size - 1]", f"{CORPUS} -k 'passages or mixed or fresh'"),

    # ---- the run
    Bug("micro-batches count alike whatever they hold", "train_logo.py",
        "        share.append((batch, len(kept) / len(usable)))\n", "        share.append((batch, 1.0))\n",
        f"{TRAIN} -k 'losses_do_not_depend'"),
    Bug("the gradient is the sum over processes", "train_logo.py",
        "        (loss * (weight * world)).backward()\n", "        (loss * weight).backward()\n", f"{TRAIN} -k 'losses_do_not_depend'"),
    Bug("weight decay for all", "train_logo.py",
        '        if p.ndim > 1 and "lora_B" not in name and not table:\n', "        if True:\n", f"{TRAIN} -k weight_decay"),
    Bug("the learning rate does not fall", "train_logo.py",
        "    return peak * 0.5 * (1 + math.cos(angle))\n", "    return peak\n", f"{TRAIN} -k learning_rate"),
    Bug("a step that is not finite changes the weights", "train_logo.py",
        "    if lr is not None and is_finite(metrics):\n", "    if lr is not None:\n", f"{TRAIN} -k not_finite"),
    Bug("what is left out is forgotten by a checkpoint", "train_logo.py",
        '    skipped.update(state["skipped"])\n', "", f"{TRAIN} -k resumed_run_leaves_out"),
    Bug("checkpoints are evaluated with older weights", "guard.py",
        "    shutil.rmtree(merged, ignore_errors=True)\n    if os.path.exists(done):\n", "    if os.path.exists(done):\n",
        f"{TRAIN} -k older_models"),
    Bug("metrics of steps that are done again stay", "report.py",
        '                if whole and json.loads(line)["step"] <= steps:\n', "                if whole:\n",
        f"{TRAIN} -k 'killed_at_random or signal'"),
    Bug("the export keeps the old RoPE base", "model.py",
        '            self.rope["rope_theta"] = rope_theta\n', "            pass\n", f"{TRAIN} -k 'export_opens or papers_formula'"),

    # ---- evaluations
    Bug("another needle is an invention", "evals/needle.py", "    if is_right(text, example.others):\n", "    if False:\n",
        f"{EVALS} -k kinds_of"),
    Bug("the area is over lengths, not their logarithm", "evals/common.py", "zip(np.log(lengths).tolist(), shares)", "zip(lengths, shares)",
        f"{EVALS} -k area_is"),
    Bug("a needle that is not found counts as 0", "evals/heads.py",
        "            if needle:\n                self.copied.append(hits)\n            else:\n",
        "            self.copied.append(torch.zeros(*self.shape, 1, dtype=torch.bool) if not needle else hits)\n            if not needle:\n",
        f"{EVALS} -k left_out"),
    Bug("tokens are decoded one by one to find the needle", "evals/heads.py",
        "        start = self.tokenizer.decode(context).find(needle)\n",
        '        start = "".join(self.tokenizer.decode([i]) for i in context).find(needle)\n', f"{EVALS} -k sentencepiece"),
    Bug("key tokens by gain alone", "evals/perplexity.py", "    return (long - short > GAIN) & (long > LIKELY)\n",
        "    return long - short > GAIN\n", f"{EVALS} -k longppl"),
    Bug("each model chooses its own key tokens", "evals/perplexity.py",
        "            is_key.append(carry_over(keys, ids, evaluator, own_ids, subject))\n",
        "            is_key.append(key_tokens(subject, own_ids, options))\n", f"{EVALS} -k one_set"),
    Bug("perplexity scores tokens twice", "evals/perplexity.py",
        "        done = begin + len(window) - 1\n", "        done = begin + len(window) - 2\n", f"{EVALS} -k perplexity_equals"),
    Bug("answers come in the order of their lengths", "generate.py",
        "    return [sorted(batch) for batch in found]\n",
        "    return [list(range(sum(map(len, found[:n])), sum(map(len, found[:n + 1])))) for n in range(len(found))]\n",
        f"{EVALS} -k order"),
    Bug("the interval is not Wilson's", "evals/common.py",
        "    middle = p + pull / 2\n", "    middle = p\n", f"{EVALS} -k wilson"),
    Bug("preferences take the defaults for what nobody says", "evals/preferences.py",
        "    if missing:\n", "    if False:\n", f"{EVALS} -k preferences"),

    # ---- what a command says
    Bug("progress takes an earlier run's work for its own pace", "console.py",
        "        here = self.done - self.before\n", "        here = self.done\n", f"{CONSOLE} -k how_far_it_is"),
    Bug("every process tells its progress", "console.py",
        '        if int(os.environ.get("RANK", "0")) == 0:\n            self.thread.start()\n', "        self.thread.start()\n",
        f"{CONSOLE} -k only_one_process"),
    Bug("a key's help ends with its first line", "console.py",
        '                found[key] += " " + more.group(1)\n', "                pass\n", f"{CONSOLE} -k all_its_lines"),
    Bug("the questions shown depend on the number of processes", "evals/questions.py",
        "shares[i % world][i // world]", "shares[-1 - i % world][i // world]", f"{EVALS} -k share_the_questions"),
    Bug("a slow run is silent between its intervals", "report.py",
        "        silent = time.time() - self.said > SILENT\n", "        silent = False\n", f"{REPORT} -k silence"),
    Bug("curves have other names than TRL's", "report.py",
        '"nll": "nll_loss", ', "", f"{REPORT} -k names"),
    Bug("a dry run writes", "train_logo.py",
        'writes = rank == 0 and not cfg["dry_run"]\n', "writes = rank == 0\n", f"{TRAIN} -k dry_run_without"),
    Bug("one loss that is no number hides twenty", "evals/curves.py",
        "        known = last[np.isfinite(last)]\n", "        known = last\n", f"{REPORT} -k panel"),
    Bug("the table after is the table before", "report.py",
        "old, share_of(counts), untrained)", "old, old, untrained)", f"{REPORT} -k by_hand"),
    Bug("another model's heads stay beside a table", "evals/heads.py",
        "            os.remove(stale)\n", "            pass\n", f"{CONSOLE} -k heads_stays"),

    # ---- hostile input, kills, full disks
    Bug("hostile: a message breaks the line", "configs/__init__.py",
        "        line = UNPRINTABLE.sub(lambda found: repr(found.group())[1:-1], message)\n", "        line = message\n", f"{FUZZ} -k cursor"),
    Bug("hostile: what a Python corpus yields is believed", "pairs/corpus.py",
        "            example = example_of(row)\n", "            example = row\n", f"{FUZZ} -k yields"),
    Bug("hostile: frequencies that are no numbers", "checkpoint.py",
        "        if not math.isfinite(scale) or not (frequencies.isfinite() & (frequencies > 0)).all():\n", "        if False:\n",
        f"{FUZZ} -k say_nothing"),
    Bug("hostile: a model's number that no float holds", "checkpoint.py",
        "(int, float) and 0 < value < 1 << 53,", "(int, float) and 0 < value,", f"{FUZZ} -k no_float"),
    Bug("hostile: a run ends with the disk of its log", "console.py",
        "        with still_at_work():\n            print(text, flush=True)\n", "        print(text, flush=True)\n", f"{KILLS} -k outlives"),
    Bug("Mistral's brackets are text where they are tokens", "tokenizer.py",
        "                self.special[other] = self.special[name]\n", "                pass\n", f"{TOKENIZER} -k brackets"),
    Bug("hostile: a damaged record of steps", "report.py",
        '        with reading(path), open(path, encoding="utf-8") as f:\n', '        with open(path, encoding="utf-8") as f:\n', f"{FUZZ} -k record"),
    Bug("hostile: half a converted file stays", "pairs/convert.py",
        '            os.remove(out + ".tmp")\n', "            pass\n", f"{FUZZ} -k conversion_that_fails"),
    Bug("hostile: evaluations that a kill has cost stay missing", "guard.py",
        "commands and own and not os.path.exists(done):\n", "False:\n", f"{KILLS} -k once"),
    Bug("hostile: a full disk leaves rows out", "pairs/corpus.py",
        "                with saving(f\"{tempfile.gettempdir()} ($TMPDIR), for what {name} unpacks to\"):\n", "                if True:\n", f"{KILLS} -k packed"),
    Bug("hostile: a full disk under an evaluation is a traceback", "evals/__main__.py",
        "    with saving(path):\n", "    if True:\n", f"{KILLS} -k measurement"),

    # ---- the plan, each without one of its items
    Bug("LoRA's gradients are planned as if reduced after each micro-batch", "bench/plan.py",
        'held = 4 * n.trained if cfg["lora_r"] else reduced\n', "held = reduced\n", "tests/test_dry_run.py"),
    Bug("the plan has one block's weights gathered at a time", "bench/plan.py",
        "    weights = size * (n.root + 2 * n.block)\n", "    weights = size * (n.root + n.block)\n", "tests/test_dry_run.py"),
    Bug("the plan repeats no prompt's keys", "bench/plan.py",
        "    keys = tokens + answers * (tokens - scored)\n", "    keys = tokens\n", "tests/test_dry_run.py"),
    Bug("flash's dk and dv are planned for key heads alone", "bench/plan.py",
        "        own += load.size * 2 * load.keys * H * D\n", "        pass\n", "tests/test_plan.py -k flash"),
]


def copy_of_the_tree(folder):
    """The files that git knows, or would know, in a new folder."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=HERE, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and (HERE / name).is_file():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / name, target)
    if (HERE / "tests" / ".cache").is_dir():
        (Path(folder) / "tests" / ".cache").symlink_to(HERE / "tests" / ".cache")


def first_red(folder, tests):
    """(exit code of pytest, its first test that fails) in a copy.

    In a fork of this process, which has imported what takes long and nothing of the tree.
    """
    report = Path(folder) / "report.txt"
    child = os.fork()
    if not child:
        os.chdir(folder)
        with open(report, "w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.path[:] = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(HERE)]
        for name in ("readability", "planted"):
            sys.modules.pop(name, None)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for line in report.read_text(errors="replace").splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return code, line.split(" ", 1)[1].split(" - ")[0]
    return code, ""


@cache
def fails_anyway(test):
    """Whether a test fails without any bug as well."""
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_tree(folder)
        return first_red(folder, [test])[0] != 0


def plant(bug):
    """("caught" | "SURVIVED" | "stale" | "unknown", which test saw it, or why nothing is known)."""
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_tree(folder)
        path = Path(folder) / bug.file
        text = path.read_text() if path.is_file() else ""
        if text.count(bug.old) != 1:
            return "stale", f"its text is there {text.count(bug.old)} times"
        path.write_text(text.replace(bug.old, bug.new))
        code, test = first_red(folder, shlex.split(bug.tests))
    if code == pytest.ExitCode.OK:
        return "SURVIVED", bug.tests
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return "unknown", f"no such tests: {bug.tests}"
    if "::" in test and fails_anyway(test):
        return "unknown", f"fails without it as well: {test}"
    return "caught", test or f"nothing could be imported: {bug.tests}"


def main(words):
    bugs = []
    for bug in BUGS:
        if not words or any(word in f"{bug.file} {bug.what}" for word in words):
            bugs.append(bug)
    found = {"caught": 0, "SURVIVED": 0, "stale": 0, "unknown": 0}
    for bug in bugs:
        start = time.time()
        end, told = plant(bug)
        found[end] += 1
        print(f"{end:9} {bug.file:17} {bug.what}  ({time.time() - start:.0f} s)  {told}", flush=True)
    print(", ".join(f"{number} {end}" for end, number in found.items()))
    return len(bugs) - found["caught"]


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
