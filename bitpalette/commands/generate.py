"""`quantize generate`: text from a packed checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command("generate")(generate_command)


def generate_command(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint, or any model.")],
    prompt: Annotated[str, typer.Option(help="What to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to write at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Ask by the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of activations and unquantized weights.")] = "float32",
    kv: Annotated[
        str | None,
        typer.Option(help="The KV cache: k4v4, k3v2, auto:3.25, plan, or 16.", show_default="the checkpoint's plan"),
    ] = None,
) -> None:
    """Write on from PROMPT."""
    from ..calibrate.plan import PlanError
    from ..calibrate.skeleton import DTYPES
    from ..evaluation import load_any, load_tokenizer
    from ..formats.base import open_source
    from ..kv_use import apply_spec

    if dtype not in DTYPES:
        raise PlanError(f"--dtype is one of {list(DTYPES)}; got {dtype!r}")
    if not prompt or max_new_tokens < 1 or temperature < 0:
        raise PlanError("--prompt must not be empty, --max-new-tokens at least 1, --temperature at least 0")
    source = open_source(checkpoint)
    tokenizer = load_tokenizer(source)
    if chat and tokenizer.chat_template is None:
        raise PlanError(f"--chat: {checkpoint} has no chat template; leave --chat out")
    model = apply_spec(load_any(source, DTYPES[dtype]), kv, source.path)
    from transformers import TextStreamer

    words = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # on stdout, as they come
    write_on(model, tokenizer, prompt, max_new_tokens, chat, temperature, seed, words)


def write_on(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
) -> str:
    """The continuation of `prompt`, without it. streamer: one of transformers', given each token as it comes."""
    import torch

    from ..api import generate

    if chat:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    if streamer is not None:
        options["streamer"] = streamer
    out = generate(model, ids, max_new_tokens, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
