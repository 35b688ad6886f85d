"""One decoder in a process of its own, that answers one line of JSON with one: the contender of ``llama_models.py``.

    python benchmarks/decoder_turns.py qcompile|llama.cpp|llama.cpp-plain|llama.cpp-single FILE THREADS CONTEXT

``{"turn": [prompt tokens, new tokens]}`` gives seconds of prefill and of decoding, ``{"likelihood": {..}}`` tokens and nats of a text,
``{"memory": 0}`` the most bytes this process held. ``plain`` leaves weights as the file has them, without places that repack them;
``single`` takes a prompt token by token.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import numpy as np
import torch

from qcompile.peers.memory import high_water_bytes
from qcompile.perplexity import Windows, measure


class Ours:
    """A compiled decoder."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        from qcompile.generation import Generator
        from qcompile.generation.session import Session

        self.path, self.threads, self.whole = path, threads, None
        self.model = Generator.open(path, threads=threads, context=context).model
        self.vocabulary = self.model.vocabulary
        self._new = lambda: Session(self.model, 1)
        self.model.build()

    def begin(self) -> None:
        self.session = self._new()

    def extend(self, tokens: list[int]) -> int:
        """Take tokens and return the most likely next one."""
        return int(self.session.extend([tokens])[0].argmax())

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return logits f32[tokens, vocabulary] of a whole text."""
        from qcompile.artifact import load

        if self.whole is None:
            self.whole = load(self.path, threads=self.threads)
        return self.whole(torch.tensor([tokens]))[0]


class LlamaCpp:
    """A GGUF file in llama.cpp, by the functions of its C interface."""

    def __init__(self, path: str, threads: int, context: int, *, repack: bool, single: bool) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.threads, self.single = threads, single
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        model_options = llama_cpp.llama_model_default_params()
        model_options.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.past = 0

    def begin(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.past = 0

    def _decode(self, tokens: list[int], all_logits: bool) -> np.ndarray:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, self.past + place, 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = all_logits or place == len(tokens) - 1
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.past += len(tokens)
        rows = len(tokens) if all_logits else 1
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (rows, self.vocabulary))

    def extend(self, tokens: list[int]) -> int:
        """Take tokens and return the most likely next one."""
        for part in [[token] for token in tokens] if self.single else [tokens]:
            found = self._decode(part, False)[0]
        return int(found.argmax())

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return logits f32[tokens, vocabulary] of a whole text; with one thread, which does not wait for others on a busy machine."""
        self.begin()
        self.api.llama_set_n_threads(self.context, 1, 1)
        found = torch.from_numpy(self._decode(tokens, True).copy())
        self.api.llama_set_n_threads(self.context, self.threads, self.threads)
        return found


def turn(decoder: Any, prompt: int, new: int, numbers: random.Random) -> dict[str, float]:
    """Return seconds of reading a random prompt, and of ``new`` further tokens one by one; and seconds of processors of both."""
    tokens = [numbers.randrange(decoder.vocabulary) for _ in range(prompt)]
    decoder.begin()
    start, worked = time.perf_counter(), time.process_time()
    token = decoder.extend(tokens)
    middle, read = time.perf_counter(), time.process_time()
    for _ in range(new):
        token = decoder.extend([token])
    end, written = time.perf_counter(), time.process_time()
    return {"prefill": middle - start, "decode": end - middle, "prefill cpu": read - worked, "decode cpu": written - read}


def likelihood(decoder: Any, text: dict[str, Any]) -> dict[str, float]:
    """Return how many tokens were judged, and their nats together."""
    windows = Windows(**text)
    found = measure(lambda batch: [torch.stack([decoder.logits(row) for row in batch[0].tolist()])], None, windows, decoder.vocabulary)
    return {"tokens": found.tokens, "nats": found.nats}


def main(kind: str, path: str, threads: str, context: str) -> None:
    """Answer until there is nothing more to read."""
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    if kind == "qcompile":
        decoder: Any = Ours(path, int(threads), int(context))
    else:
        decoder = LlamaCpp(path, int(threads), int(context), repack=kind != "llama.cpp-plain", single=kind == "llama.cpp-single")
    print(json.dumps({"ready": True}), flush=True)
    numbers = random.Random(0)
    for line in sys.stdin:
        ((task, given),) = json.loads(line).items()
        if task == "turn":
            answer = turn(decoder, *given, numbers)
        else:
            answer = likelihood(decoder, given) if task == "likelihood" else {"bytes": high_water_bytes()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
