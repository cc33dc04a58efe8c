"""Text from a model: Llama-like models on the CPU by one native call a token, all others by transformers' own loop.

transformers' `generate` prepares either way: the configuration, what changes logits (temperature, top_k, penalties and
so on) and what ends a text are its own objects. Only its loop of forward passes is exchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.decoder import MOST_TOKENS, NativeDecoder
from .kernels.decoder import why_not as why_no_decoder
from .kv_use import plan_of

_KNOWN_OPTIONS = {
    "attention_mask",
    "generation_config",
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
}
"""Arguments of transformers' `generate`, beside the fields of its configuration, that the native loop sees to."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
    "guidance_scale": (1,),
    "return_dict_in_generate": (False,),
    "cache_implementation": (),
    "dola_layers": (),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "stop_strings": (),
    "token_healing": (False,),
    "use_mtp": (False,),
}
"""Fields of the configuration that ask for another loop -> values beside None that do not."""


def why_not(model: Any, input_ids: Tensor, options: dict[str, Any]) -> str | None:
    """None where `native_generate` can do this, else the reason in words. options: of transformers' `generate`."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        return f"input ids {list(input_ids.shape)} are not one prompt [1, length]"
    mask = options.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        return "the attention mask hides tokens"
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    for name, value in options.items():
        if value is not None and name not in _KNOWN_OPTIONS and not hasattr(config, name):
            return f"option {name} is for transformers' own loop"
    for name, allowed in _ONLY.items():
        value = options.get(name, getattr(config, name, None))
        if value is not None and value not in allowed:
            return f"{name}={value!r} is for transformers' own loop"
    if plan_of(model) is not None:
        return "its cache is packed, as its plan says (kv='16' or --kv 16 turns that off)"
    return why_no_decoder(model)


@cache
def say_fallback(model_name: str, reason: str) -> None:
    """One line on stderr, once for each reason."""
    print(f"bitpalette: {model_name} generates by transformers' loop: {reason}", file=sys.stderr)


def native_generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int,
    options: dict[str, Any],
    generator: torch.Generator | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """As transformers' `generate` for what `why_not` has no objection to: ids [1, prompt + new]."""
    streamer = options.get("streamer")

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **unused: Any,
    ) -> Tensor:
        length, limit = input_ids.shape[1], generation_config.max_length
        ids = torch.empty(1, max(limit, length + 1), dtype=torch.int64)
        ids[:, :length] = input_ids
        decoder = NativeDecoder(model, ids.shape[1])
        scores = _read_prompt(decoder, model, input_ids, generation_config.prefill_chunk_size)
        while True:
            scores = logits_processor(ids[:, :length], scores)
            if generation_config.do_sample:
                probabilities = nn.functional.softmax(scores, dim=-1)
                token = torch.multinomial(probabilities, num_samples=1, generator=generator)[0]
            else:
                token = scores.argmax(dim=-1)
            ids[0, length] = token
            length += 1
            if streamer is not None:
                streamer.put(token)
            if on_token is not None:
                on_token(int(token))
            if bool(stopping_criteria(ids[:, :length], None).all()) or length == ids.shape[1]:
                break
            scores = decoder.step(token, length - 1)
        if streamer is not None:
            streamer.end()
        return ids[:, :length].clone()

    return model.generate(input_ids, max_new_tokens=max_new_tokens, custom_generate=loop, **options)


def _read_prompt(decoder: NativeDecoder, model: Any, input_ids: Tensor, chunk: int | None = None) -> Tensor:
    """Logits float32 [1, vocabulary] after the prompt, whose keys and values the decoder then holds.

    chunk: tokens of one pass (transformers' prefill_chunk_size); None: all. Activations take memory for so many.
    """
    from transformers import DynamicCache

    n = input_ids.shape[1]
    if n <= MOST_TOKENS:
        return decoder.step(input_ids[0], 0)
    # the model's own pass: its kernels for many tokens. Not given a config, the cache keeps what windows leave behind
    past = DynamicCache()
    for part in input_ids.split(chunk or n, dim=1):
        logits = model(input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=1).logits
    layers: list[Any] = past.layers
    decoder.fill([(layer.keys, layer.values) for layer in layers])
    return logits[:, -1].float()
