"""Replaced blocks of language models, and the caches that both of their forms write to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vanishing
from architectures import VOCABULARY
from vanishing import LinearSchedule, Recipe, Replace, Transition, TransitionError

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8))


def gemma2() -> Any:
    """Sliding windows that are shorter than what is generated, and full attention in between."""
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=4))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def qwen3_next() -> Any:
    """Linear attention, whose states are cached, and experts."""
    config = transformers.Qwen3NextConfig(
        **SIZES, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama_layers": (llama, "model.layers.?"),
    "llama_attentions": (llama, "*.self_attn"),
    "llama_one_layer": (llama, "model.layers.1"),
    "qwen3_layers": (qwen3, "model.layers.?"),
    "qwen3_attentions": (qwen3, "*.self_attn"),
    "qwen3_next_layers": (qwen3_next, "model.layers.?"),
    "gemma2_layers": (gemma2, "model.layers.?"),
    "gpt2_layers": (gpt2, "transformer.h.?"),
    "gpt2_attentions": (gpt2, "*.attn"),
    "bart_layers": (bart, "model.decoder.layers.?"),
    "bart_attentions": (bart, "*.encoder_attn"),
}


@torch.no_grad()
def other_weights(block: nn.Module) -> nn.Module:
    """The same block with other weights, which attends to other things."""
    new = copy.deepcopy(block)
    for parameter in new.parameters():
        parameter.copy_(parameter.flatten().flip(0).view_as(parameter))
    return new


def prepared(name: str, factory: Callable[[nn.Module], nn.Module] = other_weights) -> tuple[Any, Transition]:
    build, key = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    recipe = Recipe({key: Replace(factory, name="of caches")}, schedule=LinearSchedule(steps=4))
    return model, vanishing.prepare(model, recipe)


def prompt() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def scores(model: Any, **options: Any) -> Tensor:
    """The scores of every token that is generated."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    torch.manual_seed(2)
    output = model.generate(**prompt(), **options, output_scores=True, return_dict_in_generate=True)
    return torch.cat([output.sequences[:, -6:, None], torch.stack(output.scores, 1)], -1)


@pytest.mark.parametrize("steps_done", [0, 1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_generation_without(name: str, steps_done: int) -> None:
    model, transition = prepared(name)
    transition.seek(steps_done)
    torch.testing.assert_close(scores(model), scores(model, use_cache=False), rtol=1e-3, atol=1e-4)
    with transition.original():
        original = scores(model)
    with transition.compressed():
        compressed = scores(model)
    assert not torch.allclose(original, compressed, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama_layers", "gpt2_attentions", "bart_layers"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["beams", "tokens that are taken back", "several sequences"],
)
def test_what_generation_does_to_a_cache_it_does_to_both_sides(name: str, options: dict[str, Any]) -> None:
    model, transition = prepared(name)
    transition.seek(2)
    if "prompt_lookup_num_tokens" in options:
        ids = prompt()["input_ids"][1:].repeat(1, 2)
        model.generation_config.update(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        looked_up = model.generate(ids, **options)
        assert torch.equal(looked_up, model.generate(ids, use_cache=False))
        return
    got, expected = (
        model.generate(**prompt(), **options, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["llama_layers", "qwen3_attentions", "gemma2_layers"])
def test_a_static_cache(name: str) -> None:
    model, transition = prepared(name)
    transition.seek(2)
    static = scores(model, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(static, scores(model, use_cache=False), rtol=1e-3, atol=1e-4)


def test_a_copy_of_a_cache_continues_on_its_own() -> None:
    model, transition = prepared("llama_layers")
    transition.seek(2)
    ids = prompt()["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :3], cache=cache)
        again = copy.deepcopy(cache)
        first = model(ids[:, 3:], cache=cache).logits
        second = model(ids[:, 3:], cache=again).logits
        assert torch.equal(first, second)
        torch.testing.assert_close(first, model(ids).logits[:, 3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("before, after", [(0, 2), (2, 4), (2, 0)])
def test_a_cache_that_was_filled_at_another_beta_is_an_error(before: int, after: int) -> None:
    model, transition = prepared("llama_layers")
    ids = prompt()["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    transition.seek(before)
    model(ids, cache=cache)
    transition.seek(after)
    with pytest.raises(TransitionError, match=r"'model\.layers\.0' got a cache that was filled at another beta"):
        model(ids, cache=cache)
    cache.reset()
    model(ids, cache=cache)


class Careless(nn.Module):
    """A replacement that writes to a layer of the cache that is not its own."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.place = (block.self_attn.layer_idx + 1) % 3

    def forward(self, hidden_states: Tensor, cache: Any = None, **_: Any) -> Tensor:
        keys = hidden_states[:, None, :, :8].repeat(1, 2, 1, 1)
        cache.update(keys, keys, self.place)
        return hidden_states


def test_writing_to_another_layer_of_the_cache_is_an_error() -> None:
    model, transition = prepared("llama_one_layer", Careless)
    transition.seek(2)
    with pytest.raises(TransitionError, match=r"the replacement of 'model\.layers\.1' writes to a layer of the cache"):
        model(prompt()["input_ids"])


class Memory:
    """A cache of the user's own."""

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, memory: Any) -> Tensor:
        layers = memory if isinstance(memory, dict) else memory.layers
        layers[0] = torch.cat([layers[0], x]) if 0 in layers else x
        return self.scale * layers[0].sum(0, keepdim=True)


@pytest.mark.parametrize("memory", [dict, Memory])
def test_a_cache_of_the_users_own_that_both_forms_would_write_to_is_an_error(memory: Callable[[], Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Remembering()

        def forward(self, x: Tensor, memory: Any) -> Any:
            return self.block(x, memory)

    model = Model()
    recipe = Recipe({"block": Replace(other_weights, name="of caches")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe)
    model(torch.ones(1, 2), memory())
    transition.step()
    with pytest.raises(TransitionError, match=r"the original of block\(\.\.\.\) writes into its input"):
        model(torch.ones(1, 2), memory())


def test_a_training_whose_forward_makes_a_cache_is_that_without() -> None:
    losses = []
    for use_cache in (True, False):
        model, transition = prepared("llama_layers")
        transition.seek(2)
        ids = prompt()["input_ids"]
        loss = model.train()(ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
        losses.append([loss, *(p.grad for p in model.parameters())])
    for got, expected in zip(*losses, strict=True):
        assert torch.equal(got, expected)


def test_a_compiled_model_with_a_cache_gives_what_it_gives_without() -> None:
    model, transition = prepared("llama_one_layer")
    transition.seek(2)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    ids = prompt()["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=True).logits, expected, rtol=1e-4, atol=1e-5)
