"""kernels/decoder.py and csrc/cpu/decoder.h against transformers' own forward pass, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpalette.kernels.base import FORCE_VARIABLE, Packed
from bitpalette.kernels.decoder import MOST_TOKENS, NativeDecoder, NotNativeError, why_not
from bitpalette.kernels.linear import QuantLinear
from bitpalette.kernels.native_linear import NativeLinear
from bitpalette.kernels.norm import RotatedNorm
from bitpalette.kernels.reference import ReferenceKernel
from bitpalette.kernels.registry import kernels
from bitpalette.quant.codec import get_codec
from bitpalette.quant.native import ISA_VARIABLE, available_isas, cpu_module, isa_index
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.stats import Stats
from bitpalette.quant.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,  # less than a vector more than one
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "one kv head": ("Llama", {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}),
    "no shared heads": ("Llama", {"num_key_value_heads": 4, "head_dim": 64}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}),
    "llama3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "yarn rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "windows": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2 windows in some": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "layers without rope": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def build(family: str, **values: Any) -> Any:
    import transformers

    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **values})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                nn.init.normal_(parameter, std=0.3)  # attention that is far from uniform
    return model


def ids_of(n: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (n,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def eager(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None]).logits[0].float()


def stepped(decoder: NativeDecoder, ids: Tensor, together: int) -> Tensor:
    parts = [(i, ids[i : i + together]) for i in range(0, ids.shape[0], together)]
    return torch.cat([decoder.step(part, i, part.shape[0]).clone() for i, part in parts])


def assert_close(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    error = float((got - want).norm() / want.norm())
    assert error <= bound, f"{error:.2e}"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    family, values = MODELS[name]
    model, ids = build(family, **values), ids_of(45)  # past one tile of attention, and past every window
    want = eager(model, ids)
    for together in (1, 3, 8):
        assert_close(stepped(NativeDecoder(model, 45), ids, together), want)


def test_models_differ_from_llama() -> None:
    """Each case shows what it is for: none of them has the logits of another. Mistral without windows is a Llama."""
    cases = [MODELS[name] for name in MODELS if name != "mistral"]
    logits = [eager(build(family, **values), ids_of(45)) for family, values in cases]
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert float((a - b).norm() / b.norm()) > 1e-3


def test_the_cache_grows_and_goes_back() -> None:
    model, ids = build("Qwen3"), ids_of(40)
    want = eager(model, ids)
    decoder = NativeDecoder(model, 1)
    assert_close(stepped(decoder, ids, 1), want)
    other = torch.cat([ids[:10], ids_of(50)[40:48]])
    assert_close(decoder.step(other[10:], 10, 8).clone(), eager(model, other)[10:])  # a draft from position 10 on
    assert decoder.length == 18
    assert_close(decoder.step(ids[10:11], 10), want[10:11])
    assert decoder.length == 11


def test_fill_goes_on_from_a_prompt() -> None:
    from transformers import DynamicCache

    model, ids = build("Mistral", sliding_window=7), ids_of(30)
    past: Any = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[None, :20], past_key_values=past, use_cache=True)
    decoder = NativeDecoder(model, 20)
    decoder.fill([(layer.keys, layer.values) for layer in past.layers])
    assert decoder.length == 20
    got = torch.cat([decoder.step(ids[i : i + 1], i).clone() for i in range(20, 30)])
    assert_close(got, eager(model, ids)[20:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype: torch.dtype) -> None:
    """Nearer to the float32 model with the same weights than the 16-bit forward pass is."""
    model, ids = build("Qwen2").to(dtype), ids_of(40)
    rough = eager(model, ids)
    got = stepped(NativeDecoder(model, 40), ids, 1)
    inverse = model.model.rotary_emb.inv_freq.float()  # .to(dtype) rounded it, and the model goes by that
    model.float().model.rotary_emb.inv_freq.copy_(inverse)
    exact = eager(model, ids)
    error = (got - exact).norm() / exact.norm()
    assert error < (rough - exact).norm() / exact.norm()
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)  # the cache is bfloat16, or float32


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_large_activations(isa: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model, ids = build("Llama", hidden_act=activation), ids_of(8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(100)  # gates of some hundreds, either sign
            layer.self_attn.q_proj.weight.mul_(10)
    assert_close(stepped(NativeDecoder(model, 8), ids, 8), eager(model, ids))


def test_nan_reaches_its_own_tokens() -> None:
    model, ids = build("Llama"), torch.tensor([5, 6, 7])
    with torch.no_grad():
        model.model.embed_tokens.weight[6, 3] = torch.nan
    logits = NativeDecoder(model, 3).step(ids, 0, 3)
    assert bool(logits[0].isfinite().all())
    assert not bool(logits[1:].isfinite().any())


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("Llama", hidden_size=256, intermediate_size=512, head_dim=64), ids_of(60)
    alone = stepped(NativeDecoder(model, 60), ids, 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(stepped(NativeDecoder(model, 60), ids, 4), alone)


def test_bad_steps() -> None:
    decoder = NativeDecoder(build("Llama"), 4)
    for ids, first, keep, message in (
        (torch.tensor([1]), 1, 1, "position 1, 0 are held"),
        (torch.tensor([1]), -1, 1, "position -1"),
        (torch.tensor([61]), 0, 1, "row 61 of a weight with 61"),
        (torch.tensor([-1]), 0, 1, "row -1"),
        (torch.zeros(0, dtype=torch.int64), 0, 0, "a step of 0 tokens"),
        (torch.zeros(9, dtype=torch.int64), 0, 1, "a step of 9 tokens, not 1 to 8"),
        (torch.tensor([1]), 0, 2, "logits of 2 of 1 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.step(ids, first, keep)
    assert decoder.length == 0
    assert cpu_module().Decoder.most_tokens == MOST_TOKENS


# -- packed layers


class DecodedKernel(NativeLinear, ReferenceKernel):
    """Any scheme as a native linear: the decoded weight."""

    name, rank, canonical = "decoded", 1, True

    def make_native(self, packed: Packed) -> Any:
        qt = QuantizedTensor(packed.scheme, packed.shape, packed.tensors)
        dense = get_codec(packed.scheme.codec).decode(qt).contiguous()
        packed.tensors["dense"] = dense  # alive as long as the handle
        return cpu_module().DenseWeight(self.resolve_isa(), dense.data_ptr(), 0, *packed.shape)


@pytest.fixture
def native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels(), "decoded", DecodedKernel())
    monkeypatch.setenv(FORCE_VARIABLE, "decoded")


def quantized(model: Any, transforms_of: Callable[[str], tuple[str, ...]], tied: bool) -> Any:
    from bitpalette.hf import replace_modules

    packed = {}
    g = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or (tied and "lm_head" in name):
            continue
        values = {"codec": "int", "bits": 8, "group_size": 0, "transforms": list(transforms_of(name))}
        n = parameter.shape[1]
        samples = torch.randn(4 * n, n, generator=g) * (torch.arange(n) % 7 + 1)
        stats = Stats(samples.T @ samples / len(samples), samples.abs().mean(0), len(samples))
        packed[name] = quantize_tensor(parameter.detach(), Scheme.from_dict(values), stats=stats)
    return replace_modules(model, packed)


@pytest.mark.usefixtures("native_kernel")
@pytest.mark.parametrize("tied", [False, True])
def test_packed_layers_with_transforms(tied: bool) -> None:
    """All of q, k and v share one input, q and v do, or none do; rows of the embedding are transformed back."""

    def transforms(name: str) -> tuple[str, ...]:
        if "embed" in name or "lm_head" in name:
            return ("rotate",)
        if "layers.0" in name:
            return ("rotate", "order")
        if "layers.1" in name:
            return ("rotate",) if "k_proj" in name or "up" in name else ("scale",) if "down" in name else ()
        # scales are chosen by the weight, so no two are equal
        return ("scale", "rotate") if "gate" in name or "v_proj" in name else ("rotate",)

    model, ids = quantized(build("Qwen2", tie_word_embeddings=tied), transforms, tied), ids_of(20)
    assert type(model.lm_head) is QuantLinear and (model.lm_head.tied_to is not None) == tied
    assert why_not(model) is None
    want = eager(model, ids)
    for together in (1, 8):
        assert_close(stepped(NativeDecoder(model, 20), ids, together), want)


@pytest.mark.usefixtures("native_kernel")
def test_a_rotation_that_only_torch_has() -> None:
    """An odd part above 1024 is for torch's FFT: the model is refused in words, so that its own loop takes over."""
    model = build("Llama", intermediate_size=1031)
    reason = why_not(quantized(model, lambda name: ("rotate",) if "down_proj" in name else (), False))
    assert reason is not None and "down_proj" in reason and "odd part above 1024" in reason


@pytest.mark.usefixtures("native_kernel")
def test_rotated_norm() -> None:
    model, ids = build("Llama", tie_word_embeddings=True), ids_of(12)
    plain = eager(model, ids)
    model.model.norm = RotatedNorm(model.model.norm)
    want = eager(model, ids)
    assert float((want - plain).norm() / plain.norm()) > 0.1
    assert_close(stepped(NativeDecoder(model, 12), ids, 5), want)


def test_an_embedding_whose_kernel_is_not_native() -> None:
    """Its rows come from the module, all else from native code."""
    model, ids = build("Llama"), ids_of(12)
    table = model.model.embed_tokens.weight.detach()
    from bitpalette.hf import replace_modules

    scheme = Scheme.from_dict({"codec": "int", "bits": 3, "group_size": 0})
    model = replace_modules(model, {"model.embed_tokens.weight": quantize_tensor(table, scheme)})
    assert why_not(model) is None
    assert_close(stepped(NativeDecoder(model, 12), ids, 4), eager(model, ids))


# -- what is refused


def hooked(model: Any) -> Any:
    model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    return model


def patched(model: Any) -> Any:
    model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward
    return model


def other_linear(model: Any) -> Any:
    class Adapter(nn.Linear):
        pass

    model.model.layers[2].mlp.up_proj = Adapter(40, 52, bias=False)
    return model


def double(model: Any) -> Any:
    return model.double()


def of_meta(model: Any) -> Any:
    return model.to("meta")


def other_norm(model: Any) -> Any:
    model.model.layers[0].input_layernorm = nn.RMSNorm(40)
    return model


def other_activation(model: Any) -> Any:
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    return model


def reference_kernel(model: Any) -> Any:
    qt = quantize_tensor(model.lm_head.weight.detach(), Scheme.from_dict({"codec": "int", "bits": 3, "group_size": 0}))
    model.lm_head = QuantLinear.from_tensor(qt)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "model.layers.1.mlp has forward hooks"),
        (patched, "model.layers.1.mlp has a forward of its own"),
        (other_linear, "layers.2.mlp.up_proj is a Adapter, not an nn.Linear or a QuantLinear"),
        (double, "is torch.float64, none of torch.float32"),
        (of_meta, "is on meta, not on the CPU"),
        (other_norm, "layers.0.input_layernorm is a RMSNorm, not a LlamaRMSNorm"),
        (other_activation, "activation ReLU, SiLUActivation is none of"),
        (reference_kernel, "lm_head runs on kernel reference, which is no native linear"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_why_not(change: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change is reference_kernel:
        monkeypatch.setenv(FORCE_VARIABLE, "reference")
    model = change(build("Llama"))
    reason = why_not(model)
    assert reason is not None and message in reason
    with pytest.raises(NotNativeError, match=message.split(",")[0]):
        NativeDecoder(model, 4)


def test_why_not_by_configuration() -> None:
    reason = why_not(build("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    assert reason is not None and "rope type 'dynamic'" in reason
    training = build("Llama", attention_dropout=0.1).train()
    assert "attention dropout 0.1" in str(why_not(training))
    assert why_not(training.eval()) is None
    assert "Linear is none of LlamaForCausalLM" in str(why_not(nn.Linear(2, 2)))


def test_other_families_are_refused(families: dict[str, Callable[[], Any]]) -> None:
    for name, make in families.items():
        reason = why_not(make())
        assert (reason is None) == (name in ("llama", "mistral", "qwen2", "qwen3")), f"{name}: {reason}"


def test_parts_that_do_not_fit() -> None:
    native, isa, ones = cpu_module(), isa_index(available_isas()[0]), torch.ones(64, 64)
    weight = native.DenseWeight(isa, ones.data_ptr(), 0, 8, 8)
    norm, wrong = native.DecoderNorm(ones.data_ptr(), 8, 1e-5), native.DecoderNorm(ones.data_ptr(), 7, 1e-5)
    linear = native.DecoderLinear(weight, None, 0)
    narrow = native.DecoderLinear(native.DenseWeight(isa, ones.data_ptr(), 0, 8, 4), None, 0)

    def decoder(before: Any = norm, linears: Any = (linear,) * 7, frequencies: int = 2, window: int = 0) -> None:
        model = native.DecoderModel(8, 2, 2, 4, 0.5, 0, [1.0] * frequencies, 1.0)
        model.add_block(before, norm, None, None, list(linears), True, window)
        model.set_embedding(weight, None)
        model.set_head(norm, None, linear)
        native.Decoder(isa, model, 0, 4)

    decoder()
    for values, message in (
        ({"before": wrong}, "the gain before attention is 7, not 8"),
        ({"linears": (linear,) * 6}, "a block has 7 linears, not 6"),
        ({"linears": (*(linear,) * 6, narrow)}, "down_proj is 4, not 8"),
        ({"frequencies": 3}, "twice the count of frequencies is 6, not 4"),
        ({"window": -1}, "a window of -1"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(**values)
    empty = native.DecoderModel(8, 2, 2, 4, 0.5, 0, [1.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="no blocks"):
        native.Decoder(isa, empty, 0, 4)
    empty.add_block(norm, norm, None, None, [linear] * 7, True, 0)
    empty.set_head(norm, None, linear)
    with pytest.raises(ValueError, match="not of float16"):
        native.Decoder(isa, empty, 1, 4)
