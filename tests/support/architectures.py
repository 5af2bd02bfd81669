"""Models of the families that people train, tiny or on the meta device."""

import functools
import warnings

import torch
import transformers as tf
from torch import nn

tf.logging.set_verbosity_error()

LAYER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)
SIZE = {**LAYER, "vocab_size": 50}
VISION = {**LAYER, "image_size": 8, "patch_size": 4}
KV = dict(num_key_value_heads=1)
STATE_SPACE = dict(hidden_size=16, num_hidden_layers=1, vocab_size=50)
ENCODER_DECODER = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
)
T5 = dict(d_model=16, d_kv=8, d_ff=24, num_heads=2, vocab_size=50)
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
    "mamba": causal(tf.MambaConfig, **STATE_SPACE, state_size=4),
    "mamba2": causal(
        tf.Mamba2Config,
        **STATE_SPACE,
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
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, num_layers=1)),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(**ENCODER_DECODER, vocab_size=50, max_position_embeddings=8)
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **ENCODER_DECODER, vocab_size=60, pad_token_id=0, num_mel_bins=8
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
            **T5,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_decoder_layers=2,
            num_experts=4,
        )
    ),
    "rwkv": causal(tf.RwkvConfig, **STATE_SPACE, context_length=8),
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


def default(name, **sizes):
    """The configuration as it is published, but for the number of layers."""

    def make():
        model = getattr(tf, name)
        config = model.config_class(**sizes)
        for part in (config, *vars(config).values()):
            for layers in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
                if isinstance(getattr(part, layers, None), int) and not sizes:
                    setattr(part, layers, min(getattr(part, layers), 4))
        return model(config)

    return make


LARGE = {
    "aria": default("AriaForConditionalGeneration"),
    "bark": default("BarkModel"),
    "camembert": default("CamembertForMaskedLM"),
    "dbrx": default(
        "DbrxForCausalLM",
        n_layers=1,
        attn_config={"kv_n_heads": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4},
    ),
    "deepseek_v4": default("DeepseekV4ForCausalLM"),
    "deit": default("DeiTForImageClassificationWithTeacher"),
    "detr": default(
        "DetrForObjectDetection",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=tf.ResNetConfig(out_features=["stage4"]),
    ),
    "falcon_mamba": default("FalconMambaForCausalLM"),
    "gemma3n": default("Gemma3nForCausalLM", num_kv_shared_layers=15),
    "glm5_next": default("Glm5NextForConditionalGeneration"),
    "hubert": default("HubertForCTC"),
    "inkling2": default("Inkling2ForConditionalGeneration"),
    "jetmoe": default("JetMoeForCausalLM"),
    "kosmos2": default("Kosmos2ForConditionalGeneration"),
    "llama_cls": default("LlamaForSequenceClassification"),
    "mask2former": default("Mask2FormerModel"),
    "parakeet_ctc": default("ParakeetForCTC"),
    "patchtst": default("PatchTSTModel"),
    "radio": default("RadioModel"),
    "recurrent_gemma": default("RecurrentGemmaForCausalLM"),
    "regnet": default("RegNetForImageClassification"),
    "rf_detr": default("RfDetrForObjectDetection"),
    "sam": default("SamModel"),
    "siglip2": default("Siglip2Model"),
    "swiftformer": default("SwiftFormerForImageClassification"),
    "unispeech_sat": default("UniSpeechSatForPreTraining"),
    "vits": default("VitsModel"),
    "vjepa2": default("VJEPA2Model"),
    "xlm": default("XLMModel"),
    "xlnet": default("XLNetLMHeadModel"),
    "zamba": default("ZambaForCausalLM"),
    "zaya": default("ZayaForCausalLM"),
}


def skeleton(**parts):
    """A model with modules and bare parameters (given by shape) of these names."""

    def make():
        model = nn.Module()
        for name, part in parts.items():
            *path, last = name.replace("__", ".").split(".")
            owner = model
            for step in path:
                if step not in dict(owner.named_children()):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            if isinstance(part, tuple):
                owner.register_parameter(last, nn.Parameter(torch.empty(part)))
            else:
                owner.add_module(last, part())
        return model

    return make


def linear(width=8, height=8):
    return functools.partial(nn.Linear, width, height, bias=False)


def conv(width=8, height=8, size=3, groups=1):
    return functools.partial(nn.Conv2d, width, height, size, groups=groups, bias=False)


# The names and modules of other libraries' models.
HEADS = """decoder_class_head__0 enc_score_head rpn__cls_logits cls_score aux_head
    kps_score_lowres bpe_head vision_head word_timestamp_head head_linear
    mim_head__decoder decoder__output_projection seq_relationship AuxLogits__fc
    aux1__fc2 heads__0 head__linear last"""
SKELETONS = {
    "dlrm": skeleton(bag=functools.partial(nn.EmbeddingBag, 20, 8), top=linear()),
    "heads": skeleton(
        hidden=linear(),
        **{name: linear() for name in HEADS.split()},
    ),
    "open_clip": skeleton(
        visual__conv1=conv(3),
        visual__positional_embedding=(10, 8),
        visual__proj=(8, 4),
        positional_embedding=(7, 8),
        text_projection=(8, 4),
        transformer__resblocks__0__attn=functools.partial(nn.MultiheadAttention, 8, 2),
    ),
    "peft": skeleton(
        model__0__q_proj__base_layer=linear(),
        model__0__q_proj__lora_A__default=linear(8, 2),
        model__0__q_proj__lora_B__default=linear(2, 8),
        model__embed_tokens__base_layer=functools.partial(nn.Embedding, 20, 8),
        model__embed_tokens__lora_embedding_A__default=(2, 20),
        model__embed_tokens__lora_embedding_B__default=(8, 2),
        score__original_module=linear(8, 3),
        score__modules_to_save__default=linear(8, 3),
    ),
    "timm's botnet": skeleton(
        stages__0__attn__pos_embed__height_rel=(15, 8),
        stages__0__attn__pos_embed__width_rel=(15, 8),
        stages__0__conv2_kxk=conv(groups=2),
        head__fc=linear(),
    ),
    "timm's caformer": skeleton(head__fc__fc1=linear(), head__fc__fc2=linear()),
    "timm's convnext": skeleton(
        stages__0__conv_dw=conv(groups=8),
        stages__0__mlp__fc1=linear(),
        head__fc=linear(),
    ),
    "timm's deit": skeleton(
        blocks__0__attn__qkv=linear(8, 24), head=linear(), head_dist=linear()
    ),
    "timm's dla": skeleton(base_layer=conv(3), fc=conv(size=1)),
    "timm's efficientvim": skeleton(stages__0__alpha=(4, 8), head=linear()),
    "timm's inception_v4": skeleton(features=conv(3), last_linear=linear()),
    "timm's levit": skeleton(stages__0__attn__qkv=linear(), head__l=linear()),
    "torch.nn.utils.weight_norm": skeleton(
        hidden=lambda: torch.nn.utils.weight_norm(conv()()), last=linear()
    ),
    "torchtitan's llama": skeleton(
        tok_embeddings=functools.partial(nn.Embedding, 20, 8),
        layers__0__moe__router__gate=linear(8, 4),
        layers__0__moe__experts__w1=(4, 6, 8),
        layers__0__feed_forward__gate=linear(8, 24),
        norm=functools.partial(nn.RMSNorm, (2, 8)),
        output=linear(),
    ),
}


@functools.cache
def built(name):
    """A model of that name on the meta device."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (MODELS | LARGE | SKELETONS)[name]()
