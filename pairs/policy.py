"""Who writes the answers: the policy in this process (Local), or a server (Endpoint). Both take a
block of requests.

    source.begin_block(seed)
    source.answers(requests)    a text each; None where it did not end; a Failure where none came
"""
import os
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlparse

import torch

from configs import BadInput
from generate import generate
from model import Llama
from tokenizer import Tokenizer

RETRIES = 5       # of a request that fails
TIMEOUT = 300     # seconds to wait for an answer


class Request(NamedTuple):
    """One answer to write: the text before the chunks, their tokens, the text after them."""
    head: str
    tokens: list[int]
    tail: str
    seed: int


class Failure(str):
    """Why a request has no answer. The next build asks again: the example is not dropped."""


# ---------------------------------------------------------------------------------- in this process

class Local:
    """Answers by the policy in this process."""

    def __init__(self, cfg: dict, policy: Callable[[], Llama], tokenizer: Tokenizer):
        # A function, not a model: a build that has nothing left to ask opens none.
        self.cfg = cfg
        self.policy = policy
        self.tokenizer = tokenizer

    def begin_block(self, seed: int) -> None:
        # One stream of random numbers a block, so that a block's answers do not depend on where a
        # build was cut.
        self.seed = seed
        self.generator = None

    def answers(self, requests: list[Request]) -> list[str | None]:
        # Of ready pairs nothing is asked, and so no model is opened for them.
        if not requests:
            return []
        if self.generator is None:
            device = self.policy().lm_head.weight.device
            self.generator = torch.Generator(device).manual_seed(self.seed)
        prompts = []
        stops = []
        for request in requests:
            prefix, suffix, stops = self.tokenizer.chat(request.head, request.tail)
            prompts.append(prefix + request.tokens + suffix)
        found = generate(
            self.policy(),
            prompts,
            self.cfg["max_new_tokens"],
            self.cfg["temperature"],
            self.cfg["top_p"],
            stops,
            self.generator,
            batch_tokens=self.cfg["batch_tokens"],
        )
        texts = []
        for ids in found:
            # Cut by max_new_tokens, it is no answer: to train on it would teach to end like that.
            ended = ids[-1] in stops
            texts.append(self.tokenizer.decode(ids[:-1]) if ended else None)
        return texts


# -------------------------------------------------------------------------------------- by a server

class Endpoint:
    """Answers by an OpenAI-compatible server, through the `openai` client, one request after
    another.

    endpoint_api=chat: the server's own chat template; completions: our token ids as they are. By
    the first, a Qwen3 thinks before it answers; by the second it answers at once, as here.
    OPENAI_API_KEY is sent where it is set. model: the name that the server was asked for.
    """

    def __init__(self, cfg: dict, tokenizer: Tokenizer):
        self.cfg = cfg
        self.tokenizer = tokenizer
        url = cfg["endpoint"]
        if urlparse(url).scheme not in ("http", "https"):
            raise BadInput(f"endpoint is {url!r}, expected http:// or https://, as "
                           "http://127.0.0.1:8000/v1")
        # Only here, since most builds need no server.
        try:
            import openai
        except ImportError as e:
            raise BadInput("endpoint= needs: pip install openai") from e
        self.error = openai.OpenAIError
        # A redirect is an error: followed to another host, it would take the key along.
        http = openai.DefaultHttpxClient(follow_redirects=False)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=TIMEOUT,
                                    max_retries=RETRIES, http_client=http)
        self.model = cfg["endpoint_model"] or self.first_model()

    def first_model(self) -> str:
        """The first model that the server lists. It answers before any work is done for it."""
        url = self.cfg["endpoint"]
        # Once more at most: a server that is not there is better said at once.
        client = self.client.with_options(max_retries=1)
        try:
            return client.models.list().data[0].id
        except self.error as e:
            raise BadInput(f"endpoint={url}: cannot be used ({one_line(e)}), expected an "
                           "OpenAI-compatible server; one that lists no models needs "
                           "endpoint_model=") from e
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise BadInput(f"endpoint={url}: lists no model, expected an OpenAI-compatible server; "
                           "one that lists no models needs endpoint_model=") from e

    def begin_block(self, seed: int) -> None:
        """Nothing to do: each request has a seed of its own."""

    def answers(self, requests: list[Request]) -> list[str | Failure | None]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> str | Failure | None:
        """A text; None where max_new_tokens cut it; a Failure after the client's last retry."""
        cfg = self.cfg
        # The client waits longer from retry to retry, and gives up at once where asking again is
        # vain.
        sampling = {"model": self.model, "max_tokens": cfg["max_new_tokens"], "seed": request.seed,
                    "temperature": cfg["temperature"], "top_p": cfg["top_p"]}
        try:
            if cfg["endpoint_api"] == "chat":
                content = request.head + self.tokenizer.decode(request.tokens) + request.tail
                turn = {"role": "user", "content": content}
                reply = self.client.chat.completions.create(messages=[turn], **sampling)
                text = reply.choices[0].message.content
            else:
                prefix, suffix, _ = self.tokenizer.chat(request.head, request.tail)
                prompt = prefix + request.tokens + suffix
                reply = self.client.completions.create(prompt=prompt, **sampling)
                text = reply.choices[0].text
            cut = reply.choices[0].finish_reason == "length"
        except self.error as e:
            return Failure(one_line(e))
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            # The client does not check what it was sent: an answer that is none shows up as a
            # missing attribute.
            return Failure(f"the server's answer is no completion ({one_line(e)})")
        if cut:
            return None
        if not isinstance(text, str):
            return Failure(f"the answer is {text!r}, expected a text")
        # JSON can spell half a character, which no file can hold.
        return text.encode("utf-8", "replace").decode()


def one_line(error: Exception) -> str:
    """An error with its cause ("Connection error." alone says little)."""
    cause = f": {error.__cause__}" if error.__cause__ else ""
    return " ".join(f"{type(error).__name__}: {error}{cause}".split())[:300]
