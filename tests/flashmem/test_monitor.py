"""The monitored row against `output_attentions=True`, and against SDPA."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from transformers import GenerationConfig

from flashmem import ConfigError, MonitorConfig, UnsupportedBackboneError, generate
from flashmem.backbone import Backbone
from flashmem.monitor import attention_rows, monitored_attention, row_entropy
from tests.flashmem.conftest import make_backbone, make_tokenizer, prompts_of, reference_model


def _eager_row(family: str, layer: int, embeds: torch.Tensor, keep: torch.Tensor, sinks: int) -> float:
    """Entropy of the last row of one layer, the slow way: eager weights, keys removed, renormalised, scipy."""
    model = reference_model(family, "eager")
    weights = model(inputs_embeds=embeds, output_attentions=True).attentions[layer][0, :, -1].detach()
    kept = weights[:, keep][:, sinks:]
    return float(scipy_entropy(kept.double().numpy(), axis=1).mean())


def test_entropy_equals_output_attentions_with_latents_and_padding(family: str) -> None:
    backbone = make_backbone(family)
    prompts = prompts_of(18, 7, 25, seed=2)
    backbone.observe(True)
    with torch.no_grad():
        state = backbone.prefill(prompts)
        latents = torch.randn(3, 3, backbone.hidden_size) * 0.5
        takes = torch.tensor([True, False, True])
        after_prefill = state.entropy.tolist()
        backbone.inject(state, latents, takes)
        after_inject = state.entropy.tolist()
        tokens = torch.tensor([9, 10, 11])
        backbone.step(state, tokens)
        after_step = state.entropy.tolist()
        for row, prompt in enumerate(prompts):
            embeds = backbone.embed(torch.tensor([prompt]))
            keep = torch.ones(len(prompt), dtype=torch.bool)
            layer = backbone.monitor_layer
            assert after_prefill[row] == pytest.approx(_eager_row(family, layer, embeds, keep, 4), abs=1e-4)
            if takes[row]:
                embeds = torch.cat([embeds, latents[row : row + 1]], 1)
                keep = torch.cat([keep, torch.zeros(3, dtype=torch.bool)])
                assert after_inject[row] == pytest.approx(_eager_row(family, layer, embeds, keep, 4), abs=1e-4)
            else:
                assert after_inject[row] == after_prefill[row]
            embeds = torch.cat([embeds, backbone.embed(tokens[row][None, None])], 1)
            keep = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
            assert after_step[row] == pytest.approx(_eager_row(family, layer, embeds, keep, 4), abs=1e-4)


def test_watching_leaves_logits_unchanged(family: str) -> None:
    backbone = make_backbone(family)
    seen = {}
    for on in (False, True):
        backbone.observe(on)
        with torch.no_grad():
            state = backbone.prefill(prompts_of(16, 11))
            first = state.logits.clone()
            backbone.step(state, torch.tensor([5, 6]))
            seen[on] = torch.stack([first, state.logits])
    torch.testing.assert_close(seen[True], seen[False], rtol=1e-5, atol=1e-5)


def test_monitored_layer_is_the_last_full_one() -> None:
    gemma = make_backbone("gemma3_text")
    assert gemma.layer_types[-1] == "sliding_attention"
    assert gemma.layer_types[gemma.monitor_layer] == "full_attention"
    assert gemma.monitor_layer == max(i for i, t in enumerate(gemma.layer_types) if t == "full_attention")
    assert make_backbone("llama").monitor_layer == 2
    # Every layer slides: the row is the window of the last one.
    assert make_backbone("mistral").monitor_layer == 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_one_pass_row_equals_sdpa(masked: bool, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads[0], 1, 16)
    key, value = torch.randn(2, heads[1], 70, 16), torch.randn(2, heads[1], 70, 16)
    mask = (torch.rand(2, 1, 1, 70) > 0.4) if masked else None
    module = torch.nn.Module()
    from flashmem.monitor import attach

    tap = attach(module)
    output, _ = monitored_attention(module, query, key, value, mask, scaling=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert tap.entropy is not None and tap.entropy.shape == (2, 1)


def test_prefill_rows_equal_the_rows_of_single_steps(backbone) -> None:
    """Scoring R rows of a long query gives what R decode steps would have given."""
    (prompt,) = prompts_of(20)
    backbone.observe(True, rows=6)
    with torch.no_grad():
        backbone.prefill([prompt])
        rows = backbone.row_entropies()[0].tolist()
        backbone.observe(True)
        state = backbone.prefill([prompt[:15]])
        stepwise = [float(state.entropy)]
        for token in prompt[15:]:
            backbone.step(state, torch.tensor([token]))
            stepwise.append(float(state.entropy))
    assert rows == pytest.approx(stepwise, abs=1e-5)


@pytest.mark.parametrize("on_host", [False, True])
def test_uniform_and_peaked_rows(on_host: bool) -> None:
    def entropy(scores: torch.Tensor, **options: object) -> float:
        return float(row_entropy(scores, scores.softmax(-1), on_host=on_host, **options))

    uniform = torch.full((1, 2, 1, 1, 10), 3.0)
    assert entropy(uniform) == pytest.approx(math.log(10), abs=1e-6)
    latents = torch.zeros(1, 12, dtype=torch.bool)
    latents[0, 5] = True
    assert entropy(uniform, sinks=4) == pytest.approx(math.log(6), abs=1e-6)
    assert entropy(uniform, sinks=4, latents=latents) == pytest.approx(math.log(5), abs=1e-6)
    assert entropy(uniform, sinks=4, latents=latents, normalise=True) == pytest.approx(1.0, abs=1e-6)
    assert entropy(uniform, latents=torch.ones(1, 10, dtype=torch.bool)) == 0.0
    peaked = torch.full((1, 2, 1, 1, 10), torch.finfo(torch.float32).min)
    peaked[..., 7] = 1.0
    assert entropy(peaked, sinks=4) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("on_host", [False, True])
def test_a_sink_that_takes_almost_everything_costs_no_digits(on_host: bool) -> None:
    """What is left of a row is summed by itself, never as one minus the sink."""
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 3, 1, 200)
    scores[..., 0] = 25.0
    left = scores[..., 4:].double().softmax(-1)
    wanted = scipy_entropy(left.numpy(), axis=-1).mean()
    found = float(row_entropy(scores, scores.softmax(-1), sinks=4, on_host=on_host))
    assert found == pytest.approx(wanted, abs=2e-5)


def test_settings_change_what_is_counted(backbone) -> None:
    def entropy(config: MonitorConfig) -> float:
        backbone.monitor = config
        run = generate(backbone, prompts_of(12), generation_config=GenerationConfig(max_new_tokens=1), trace=True)
        return run[0].entropies[0]

    values = {s: entropy(MonitorConfig(sinks=s)) for s in (0, 4, 11, 12)}
    assert values[0] != values[4]
    assert values[11] == pytest.approx(0.0, abs=1e-6)
    assert values[12] == 0.0
    with pytest.raises(ConfigError, match="sinks"):
        MonitorConfig(sinks=-1)


def test_softcap_rows_differ_from_plain_ones() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 1, 8) * 30, torch.randn(1, 2, 9, 8)
    capped = attention_rows(query, key, None, 1.0, softcap=5.0)
    scores = torch.tanh(torch.matmul(query, key.transpose(-1, -2)) / 5.0) * 5.0
    torch.testing.assert_close(capped[:, :, 0], scores.softmax(-1), rtol=1e-5, atol=1e-6)


def test_unknown_family_is_refused_with_its_reason() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(UnsupportedBackboneError, match=r"gpt2.*not supported"):
        Backbone("gpt2", model, make_tokenizer())
