"""Who writes the answers: the policy in this process, or an OpenAI-compatible server."""
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import torch

from configs import BadInput
from generate import generate

PADDING = 1024    # tokens by which prompts that are answered together may differ in length
RETRIES = 5       # of a request that fails
TIMEOUT = 300     # seconds to wait for an answer
PAUSE = 0.5       # seconds before a failed request's first retry; twice that before the next, ...


class Request(NamedTuple):
    """One answer to write: the text before the chunks, their tokens, the text after them."""
    head: str
    tokens: list
    tail: str
    temperature: float
    seed: int


class Failure(str):
    """Why a request has no answer."""


def local(cfg, policy, tokenizer):
    """Answers by the policy in this process: block seed -> (requests -> texts; None for one that did not end)."""
    def block(seed):
        generator = torch.Generator(policy().lm_head.weight.device).manual_seed(seed)
        return lambda requests: answer(requests, generator)

    def answer(requests, generator):
        around = [tokenizer.chat(request.head, request.tail) for request in requests]
        prompts = [prefix + request.tokens + suffix for request, (prefix, suffix, _) in zip(requests, around)]
        out = [None] * len(requests)
        for temperature in sorted({request.temperature for request in requests}):
            of = [i for i, request in enumerate(requests) if request.temperature == temperature]
            for batch in by_length([len(prompts[i]) for i in of]):
                batch, stops = [of[i] for i in batch], around[0][2]
                answers = generate(policy(), [prompts[i] for i in batch], cfg["max_new_tokens"], temperature, cfg["top_p"],
                                            stops, generator)
                for i, ids in zip(batch, answers):
                    out[i] = tokenizer.decode(ids[:-1]) if ids[-1] in stops else None
        return out

    return block


def by_length(lengths):
    """Indices in batches of similar lengths: a KV cache is as wide as its longest row."""
    batches = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or lengths[i] - lengths[batches[-1][0]] > PADDING:
            batches.append([])
        batches[-1].append(i)
    return [sorted(batch) for batch in batches]


class Endpoint:
    """Answers by an OpenAI-compatible server, as local() gives them; at most endpoint_requests at a time.

    chat: the server's own chat template; completions: our token ids as they are. OPENAI_API_KEY is sent where it is set.
    """

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer, self.url = cfg, tokenizer, cfg["endpoint"].rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {key}"
        self.model = cfg["endpoint_model"]
        try:
            listed = self.reply("/models")["data"]
            self.model = self.model or listed[0]["id"]
        except urllib.error.HTTPError as e:
            if not self.model:  # some servers list nothing, and answer all the same
                raise BadInput(f"endpoint={self.url}: /models answers {e.code}: name a model with endpoint_model=") from e
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
            raise BadInput(f"endpoint={self.url}: cannot be used ({e}), expected an OpenAI-compatible server, as "
                           "http://127.0.0.1:8000/v1") from e
        self.pool = ThreadPool(cfg["endpoint_requests"])

    def __call__(self, seed):
        return lambda requests: self.pool.map(self.answer, requests, chunksize=1)

    def reply(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.loads(answer.read())

    def answer(self, request):
        """A text; None for one that did not end within max_new_tokens; a Failure after the last retry."""
        body = {"model": self.model, "max_tokens": self.cfg["max_new_tokens"], "temperature": request.temperature,
                "top_p": self.cfg["top_p"], "seed": request.seed}
        if self.cfg["endpoint_api"] == "chat":
            path, text = "/chat/completions", request.head + self.tokenizer.decode(request.tokens) + request.tail
            body["messages"] = [{"role": "user", "content": text}]
        else:
            prefix, suffix, _ = self.tokenizer.chat(request.head, request.tail)
            path, body["prompt"] = "/completions", prefix + request.tokens + suffix
        for attempt in range(RETRIES + 1):
            try:
                choice = self.reply(path, body)["choices"][0]
                text = choice["message"]["content"] if "message" in choice else choice["text"]
                if not isinstance(text, str):
                    raise ValueError(f"the answer is {text!r}, expected a text")
                return None if choice.get("finish_reason") == "length" else text
            except urllib.error.HTTPError as e:
                fault = f"HTTP {e.code} {e.reason}: {e.read(200).decode('utf-8', 'replace').strip()}"
                if e.code not in (408, 409, 425, 429) and e.code < 500:
                    break  # asking again would not change it
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
                fault = f"{type(e).__name__}: {e}"
            if attempt < RETRIES:
                time.sleep(min(30, PAUSE * 2 ** attempt) * random.uniform(0.5, 1))  # not all at the same moment
        return Failure(" ".join(fault.split()))
