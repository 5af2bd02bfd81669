"""What goes where in the models that people train, by module and by name.

Tiny configurations on the meta device. A parameter is written with the last two parts
of its name, without numbers and ".weight". Vectors, never rotated, are left out.
"""

import logging
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.exclusion import kind_by_name

SIZE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=50,
)
KV = dict(num_key_value_heads=1)
VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
TEXT = {**SIZE, "max_position_embeddings": 8}


def causal(config, **sizes):
    return lambda: tf.AutoModelForCausalLM.from_config(config(**sizes))


MODELS = {
    "llama": causal(tf.LlamaConfig, **SIZE, **KV),
    "qwen2": causal(tf.Qwen2Config, **SIZE, **KV),
    "qwen3": causal(tf.Qwen3Config, **SIZE, **KV),
    "mixtral": causal(tf.MixtralConfig, **SIZE, **KV, num_local_experts=4),
    "qwen2_moe": causal(
        tf.Qwen2MoeConfig,
        **SIZE,
        **KV,
        num_experts=4,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
    "qwen3_moe": causal(
        tf.Qwen3MoeConfig, **SIZE, **KV, num_experts=4, moe_intermediate_size=8
    ),
    "deepseek_v3": causal(
        tf.DeepseekV3Config,
        **SIZE,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "gpt_oss": causal(tf.GptOssConfig, **SIZE, **KV, num_local_experts=4, head_dim=8),
    "olmoe": causal(tf.OlmoeConfig, **SIZE, num_experts=4),
    "phimoe": causal(
        tf.PhimoeConfig, **SIZE, num_key_value_heads=2, num_local_experts=4
    ),
    "jamba": causal(
        tf.JambaConfig,
        **{**SIZE, "num_hidden_layers": 2},
        **KV,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=4,
    ),
    "mamba": causal(
        tf.MambaConfig, hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4
    ),
    "mamba2": causal(
        tf.Mamba2Config,
        hidden_size=16,
        num_hidden_layers=1,
        vocab_size=50,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=1,
    ),
    "gpt2": causal(
        tf.GPT2Config, n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8
    ),
    "gpt_neox": causal(tf.GPTNeoXConfig, **SIZE),
    "bloom": causal(tf.BloomConfig, hidden_size=16, n_layer=1, n_head=2, vocab_size=50),
    "gemma3": causal(tf.Gemma3TextConfig, **SIZE, **KV, head_dim=8),
    "phi3": causal(tf.Phi3Config, **SIZE, **KV, pad_token_id=0),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZE)),
    "bert_cls": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZE)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZE)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=50,
            max_position_embeddings=8,
        )
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=60,
            pad_token_id=0,
            num_mel_bins=8,
        )
    ),
    "wav2vec2": lambda: tf.Wav2Vec2ForCTC(
        tf.Wav2Vec2Config(
            **SIZE,
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    ),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    ),
    "siglip": lambda: tf.SiglipModel(
        tf.SiglipConfig(text_config=TEXT, vision_config=VISION)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=2,
        )
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "mobilenet_v2": lambda: tf.MobileNetV2ForImageClassification(
        tf.MobileNetV2Config(depth_multiplier=0.25)
    ),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
    ),
    "segformer": lambda: tf.SegformerForSemanticSegmentation(
        tf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
        )
    ),
    "encodec": lambda: tf.EncodecModel(
        tf.EncodecConfig(
            num_filters=4, hidden_size=8, codebook_size=16, upsampling_ratios=[2, 2]
        )
    ),
    "perceiver": lambda: tf.PerceiverModel(
        tf.PerceiverConfig(
            num_latents=4,
            d_latents=16,
            d_model=8,
            num_blocks=1,
            num_self_attends_per_block=1,
            num_self_attention_heads=2,
            num_cross_attention_heads=2,
        )
    ),
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_decoder_layers=2,
            num_heads=2,
            vocab_size=50,
            num_experts=4,
        )
    ),
    "rwkv": causal(
        tf.RwkvConfig,
        hidden_size=16,
        num_hidden_layers=1,
        vocab_size=50,
        context_length=8,
    ),
    "levit": lambda: tf.LevitForImageClassification(
        tf.LevitConfig(
            image_size=32,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[1, 1, 1],
            depths=[1, 1, 1],
            key_dim=[4, 4, 4],
        )
    ),
}
# By kind; "matrix" is what is rotated. "by name" is where DeepSpeed's way differs.
TABLE = {
    "llama": {
        "embedding": ("embed_tokens"),
        "matrix": ("down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        "head": ("lm_head"),
    },
    "qwen3": {
        "embedding": ("embed_tokens"),
        "matrix": ("down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        "head": ("lm_head"),
    },
    "qwen2": {
        "embedding": ("embed_tokens"),
        "matrix": ("down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        "head": ("lm_head"),
    },
    "mixtral": {
        "embedding": ("embed_tokens"),
        "matrix": ("k_proj o_proj q_proj v_proj"),
        "router": ("gate"),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "head": ("lm_head"),
    },
    "qwen2_moe": {
        "embedding": ("embed_tokens"),
        "matrix": ("down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        "router": ("gate"),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "a side of 1": ("shared_expert_gate"),
        "head": ("lm_head"),
    },
    "qwen3_moe": {
        "embedding": ("embed_tokens"),
        "matrix": ("k_proj o_proj q_proj v_proj"),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "router": ("gate"),
        "head": ("lm_head"),
    },
    "deepseek_v3": {
        "embedding": ("embed_tokens"),
        "matrix": (
            "down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj "
            "q_a_proj q_b_proj up_proj"
        ),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "router": ("gate"),
        "head": ("lm_head"),
    },
    "gpt_oss": {
        "embedding": ("embed_tokens"),
        "matrix": ("k_proj o_proj q_proj v_proj"),
        "router": ("router"),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "bias": ("experts.down_proj_bias experts.gate_up_proj_bias"),
        "head": ("lm_head"),
    },
    "olmoe": {
        "embedding": ("embed_tokens"),
        "matrix": ("k_proj o_proj q_proj v_proj"),
        "router": ("gate"),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "head": ("lm_head"),
    },
    "phimoe": {
        "embedding": ("embed_tokens"),
        "matrix": ("k_proj o_proj q_proj v_proj"),
        "router": ("router"),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "head": ("lm_head"),
    },
    "jamba": {
        "embedding": ("embed_tokens"),
        "decay": ("mamba.A_log"),
        "depthwise convolution": ("conv1d"),
        "matrix": (
            "down_proj dt_proj gate_proj in_proj k_proj o_proj out_proj "
            "q_proj up_proj v_proj x_proj"
        ),
        "router": ("router"),
        "stack of 4 matrices": ("experts.down_proj experts.gate_up_proj"),
        "head": ("lm_head"),
    },
    "mamba": {
        "embedding": ("embeddings"),
        "decay": ("mixer.A_log"),
        "depthwise convolution": ("conv1d"),
        "matrix": ("in_proj out_proj x_proj"),
        "a side of 1": ("dt_proj"),
    },
    "mamba2": {
        "embedding": ("embeddings"),
        "depthwise convolution": ("conv1d"),
        "matrix": ("in_proj out_proj"),
        "head": ("lm_head"),
    },
    "gpt2": {
        "embedding": ("wpe wte"),
        "matrix": ("c_attn c_fc c_proj"),
    },
    "gpt_neox": {
        "embedding": ("embed_in"),
        "matrix": ("dense dense_4h_to_h dense_h_to_4h query_key_value"),
        "head": ("lm_head"),
    },
    "bloom": {
        "embedding": ("word_embeddings"),
        "matrix": ("dense dense_4h_to_h dense_h_to_4h query_key_value"),
    },
    "gemma3": {
        "embedding": ("embed_tokens"),
        "matrix": ("down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    },
    "phi3": {
        "embedding": ("embed_tokens"),
        "matrix": ("down_proj gate_up_proj o_proj qkv_proj"),
        "head": ("lm_head"),
    },
    "bert": {
        "embedding": ("position_embeddings token_type_embeddings word_embeddings"),
        "matrix": ("dense key query value"),
    },
    "bert_cls": {
        "embedding": ("position_embeddings token_type_embeddings word_embeddings"),
        "matrix": ("dense key query value"),
        "head": ("classifier"),
    },
    "roberta": {
        "embedding": ("position_embeddings token_type_embeddings word_embeddings"),
        "matrix": ("dense key query value"),
        "by name: head": ("dense"),
    },
    "t5": {
        "embedding": ("relative_attention_bias shared"),
        "matrix": ("k o q v wi wo"),
    },
    "bart": {
        "embedding": ("embed_positions shared"),
        "matrix": ("fc1 fc2 k_proj out_proj q_proj v_proj"),
    },
    "whisper": {
        "matrix": ("conv1 conv2 fc1 fc2 k_proj out_proj q_proj v_proj"),
        "embedding": ("embed_positions embed_tokens"),
    },
    "wav2vec2": {
        "matrix": (
            "conv intermediate_dense k_proj out_proj output_dense "
            "projection q_proj v_proj"
        ),
        "by name: depthwise convolution": ("conv"),
        "a side of 1": ("weight.original0"),
        "direction of a weight norm": ("weight.original1"),
        "head": ("lm_head"),
    },
    "clip": {
        "embedding": ("position_embedding token_embedding"),
        "matrix": ("fc1 fc2 k_proj out_proj patch_embedding q_proj v_proj"),
        "head": ("text_projection visual_projection"),
    },
    "siglip": {
        "embedding": ("position_embedding token_embedding"),
        "matrix": (
            "attention.in_proj_weight fc1 fc2 head k_proj out_proj "
            "patch_embedding q_proj v_proj"
        ),
        "by name: head": ("attention.in_proj_weight fc1 head out_proj"),
        "a side of 1": ("head.probe"),
        "head": ("fc2"),
    },
    "vit": {
        "a side of 1": ("embeddings.cls_token embeddings.position_embeddings"),
        "matrix": ("fc1 fc2 k_proj o_proj projection q_proj v_proj"),
        "head": ("classifier"),
    },
    "swin": {
        "matrix": ("fc1 fc2 k_proj o_proj projection q_proj reduction v_proj"),
        "a side of 1": ("relative_position_bias.relative_position_bias_table"),
        "bias": ("relative_position_bias.relative_position_bias_table"),
        "head": ("classifier"),
    },
    "convnext": {
        "matrix": ("downsampling_layer patch_embeddings pwconv1 pwconv2"),
        "depthwise convolution": ("dwconv"),
        "head": ("classifier"),
    },
    "mobilenet_v2": {
        "matrix": ("convolution"),
        "depthwise convolution": ("convolution"),
        "head": ("classifier"),
    },
    "resnet": {
        "matrix": ("convolution"),
        "head": ("classifier"),
    },
    "segformer": {
        "matrix": (
            "classifier fc1 fc2 k_proj linear_fuse o_proj proj q_proj "
            "sequence_reduction v_proj"
        ),
        "depthwise convolution": ("dwconv"),
    },
    "encodec": {
        "a side of 1": ("weight.original0 weight.original1"),
        "direction of a weight norm": ("weight.original1"),
        "matrix": (
            "lstm.weight_hh_l0 lstm.weight_hh_l1 lstm.weight_ih_l0 lstm.weight_ih_l1"
        ),
    },
    "perceiver": {
        "embedding": ("embeddings.latents"),
        "matrix": ("dense dense1 dense2 key query value"),
        "head": ("dense2"),
        "by name: matrix": ("dense2"),
    },
    "switch": {
        "embedding": ("relative_attention_bias shared"),
        "matrix": ("k o q v wi wo"),
        "router": ("classifier"),
    },
    "rwkv": {
        "embedding": ("embeddings"),
        "a side of 1": (
            "attention.time_mix_key attention.time_mix_receptance "
            "attention.time_mix_value feed_forward.time_mix_key "
            "feed_forward.time_mix_receptance"
        ),
        "matrix": ("key output receptance value"),
        "head": ("head"),
    },
    "levit": {
        "matrix": ("convolution linear"),
        "a side of 1": ("layers.attention_biases module.attention_biases"),
        "bias": ("layers.attention_biases"),
        "head": ("linear"),
    },
}


def built(name):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS[name]()


def short(name):
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]).removesuffix(".weight")


def sorted_by_module(model, caplog):
    """Short names by kind, as the report and the groups have it."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sharded_adadiag"):
        groups = param_groups(model)
    kinds = {}
    for line in caplog.messages[-1].splitlines():
        if line.startswith("  ") and line.endswith(")"):
            name, _, rest = line.strip().removesuffix(")").partition(" (")
            kind = rest.partition(", ")[2].removesuffix(", not rotated")
            kinds[name.partition(" x")[0]] = kind
    found = {}
    for group in groups:
        for name, param in group["params"]:
            if param.dim() < 2 or not param.requires_grad:  # not in the report
                continue
            alike = ".".join("*" if p.isdigit() else p for p in name.split("."))
            kind = kinds[name] if name in kinds else kinds[alike]
            assert (kind == "") is group["rotate"], name
            found.setdefault(kind or "matrix", set()).add(short(name))
    return found, groups


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_where(name, caplog):
    found, groups = sorted_by_module(built(name), caplog)
    table = {kind: set(names.split()) for kind, names in TABLE[name].items()}
    wanted = {k: v for k, v in table.items() if not k.startswith("by name")}
    assert found == wanted
    # DeepSpeed knows names and shapes only.
    pairs = [(n, p, g["rotate"]) for g in groups for n, p in g["params"] if p.dim() > 1]
    names = {n for n, _, _ in pairs}
    differing = {}
    for n, param, rotated in pairs:
        kind = kind_by_name(n, param.shape, names, guess=True)
        if min(param.shape[0], param[0].numel()) > 1 and (kind == "") is not rotated:
            differing.setdefault(f"by name: {kind or 'matrix'}", set()).add(short(n))
    assert differing == {k: v for k, v in table.items() if k.startswith("by name")}


def test_the_directions_of_the_older_weight_norm_are_not_rotated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = torch.nn.utils.weight_norm(nn.Linear(6, 8))
    model = nn.ModuleDict({"block": normed, "head": nn.Linear(8, 2)})
    assert [g["rotate"] for g in param_groups(model)] == [False]


def test_a_matrix_of_absurd_proportions_is_warned_of_by_name(caplog):
    """Experts in a rotated group by hand: the expert axis is the short one."""
    ordinary, experts = torch.zeros(8, 14336), torch.zeros(8, 64, 256)
    params = [("lora_a", ordinary), ("experts", experts)]
    for _, param in params:
        param.grad = torch.zeros_like(param)
    opt = AdaDiag([{"params": params, "rotate": True}])
    with caplog.at_level(logging.WARNING, logger="sharded_adadiag"):
        opt.step()
        opt.step()
    (message,) = caplog.messages
    assert message.startswith("experts: ") and "8 x 16384" in message


def test_an_expert_without_tokens_moves_as_under_adam():
    """One basis for all experts would mix them: it moved six times as far."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.ones(4, 6, 5))
    model.last = nn.Linear(6, 3)
    opt = AdaDiag(param_groups(model), lr=1e-2)
    twin = model.experts.detach().clone().requires_grad_()
    adam = torch.optim.Adam([twin], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        grad = torch.randn(4, 6, 5, generator=generator)
        grad[2] *= step == 0
        model.experts.grad, twin.grad = grad, grad.clone()
        opt.step()
        adam.step()
    torch.testing.assert_close(model.experts, twin, atol=1e-6, rtol=0.0)


def test_the_report_counts_frozen_parameters_on_one_line(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="sharded_adadiag"):
        param_groups(model)
    (report,) = caplog.messages
    assert "0.weight" not in report
    assert "rotated: 1 parameters, 16 elements" in report
    assert "frozen: 2 parameters, 20 elements" in report
