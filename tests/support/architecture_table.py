"""What goes where: the kinds of the parameters of each model, by the names of both.

A parameter is written with the last two parts of its name, without numbers and
".weight"; "matrix" is what is rotated. Vectors are left out, and so are matrices,
embeddings, norms and sides of 1 of the models that come after "levit", which are here
for what is peculiar to them.

"By name" is where names and shapes, all that a DeepSpeed config file has, tell less
than modules do, and why. What is rotated by name alone: the last linear layer of a
model if its name does not say so, convolutions of several groups, embeddings of unusual
names. What is not: convolutions of one input channel, which look depthwise, those of
one dimension that are not called so, linear layers called like an embedding.
"""

from importlib.metadata import version

TABLE = {
    "llama": {
        "embedding": "embed_tokens",
        "matrix": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "head": "lm_head",
    },
    "qwen2": {
        "embedding": "embed_tokens",
        "matrix": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "head": "lm_head",
    },
    "qwen3": {
        "embedding": "embed_tokens",
        "matrix": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "head": "lm_head",
    },
    "mixtral": {
        "embedding": "embed_tokens",
        "matrix": "k_proj o_proj q_proj v_proj",
        "router": "gate",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "head": "lm_head",
    },
    "qwen2_moe": {
        "embedding": "embed_tokens",
        "matrix": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        "router": "gate",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "a side of 1": "shared_expert_gate",
        "head": "lm_head",
    },
    "qwen3_moe": {
        "embedding": "embed_tokens",
        "matrix": "k_proj o_proj q_proj v_proj",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "router": "gate",
        "head": "lm_head",
    },
    "deepseek_v3": {
        "embedding": "embed_tokens",
        "matrix": (
            "down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj "
            "q_b_proj up_proj"
        ),
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "router": "gate",
        "head": "lm_head",
    },
    "gpt_oss": {
        "embedding": "embed_tokens",
        "matrix": "k_proj o_proj q_proj v_proj",
        "router": "router",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "bias": "experts.down_proj_bias experts.gate_up_proj_bias",
        "head": "lm_head",
    },
    "olmoe": {
        "embedding": "embed_tokens",
        "matrix": "k_proj o_proj q_proj v_proj",
        "router": "gate",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "head": "lm_head",
    },
    "phimoe": {
        "embedding": "embed_tokens",
        "matrix": "k_proj o_proj q_proj v_proj",
        "router": "router",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "head": "lm_head",
    },
    "jamba": {
        "embedding": "embed_tokens",
        "decay": "mamba.A_log",
        "depthwise convolution": "conv1d",
        "matrix": (
            "down_proj dt_proj gate_proj in_proj k_proj o_proj out_proj q_proj "
            "up_proj v_proj x_proj"
        ),
        "router": "router",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "head": "lm_head",
    },
    "mamba": {
        "embedding": "embeddings",
        "decay": "mixer.A_log",
        "depthwise convolution": "conv1d",
        "matrix": "in_proj out_proj x_proj",
        "a side of 1": "dt_proj",
    },
    "mamba2": {
        "embedding": "embeddings",
        "depthwise convolution": "conv1d",
        "matrix": "in_proj out_proj",
        "head": "lm_head",
    },
    "gpt2": {
        "embedding": "wpe wte",
        "matrix": "c_attn c_fc c_proj",
    },
    "gpt_neox": {
        "embedding": "embed_in",
        "matrix": "dense dense_4h_to_h dense_h_to_4h query_key_value",
        "head": "lm_head",
    },
    "bloom": {
        "embedding": "word_embeddings",
        "matrix": "dense dense_4h_to_h dense_h_to_4h query_key_value",
    },
    "gemma3": {
        "embedding": "embed_tokens",
        "matrix": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    },
    "phi3": {
        "embedding": "embed_tokens",
        "matrix": "down_proj gate_up_proj o_proj qkv_proj",
        "head": "lm_head",
    },
    "bert": {
        "embedding": ("position_embeddings token_type_embeddings word_embeddings"),
        "matrix": "dense key query value",
    },
    "bert_cls": {
        "embedding": ("position_embeddings token_type_embeddings word_embeddings"),
        "matrix": "dense key query value",
        "head": "classifier",
    },
    "roberta": {
        "embedding": ("position_embeddings token_type_embeddings word_embeddings"),
        "matrix": "dense key query value",
    },
    "t5": {
        "embedding": "relative_attention_bias shared",
        "matrix": "k o q v wi wo",
    },
    "bart": {
        "embedding": "embed_positions shared",
        "matrix": "fc1 fc2 k_proj out_proj q_proj v_proj",
    },
    "whisper": {
        "matrix": "conv1 conv2 fc1 fc2 k_proj out_proj q_proj v_proj",
        "embedding": "embed_positions embed_tokens",
    },
    "wav2vec2": {
        "matrix": (
            "conv intermediate_dense k_proj out_proj output_dense projection "
            "q_proj v_proj"
        ),
        "by name plain: one channel": "conv",
        "a side of 1": "weight.original0",
        "direction of a weight norm": "weight.original1",
        "head": "lm_head",
    },
    "clip": {
        "embedding": "position_embedding token_embedding",
        "matrix": "fc1 fc2 k_proj out_proj patch_embedding q_proj v_proj",
        "head": "text_projection visual_projection",
    },
    "siglip": {
        "embedding": "position_embedding token_embedding",
        "matrix": (
            "attention.in_proj_weight fc1 fc2 k_proj out_proj patch_embedding "
            "q_proj v_proj"
        ),
        "head": "fc2 head",
        "a side of 1": "head.probe",
        "by name rotated: last layer": "fc2",
    },
    "vit": {
        "a side of 1": "embeddings.cls_token embeddings.position_embeddings",
        "matrix": "fc1 fc2 k_proj o_proj projection q_proj v_proj",
        "head": "classifier",
    },
    "swin": {
        "matrix": "fc1 fc2 k_proj o_proj projection q_proj reduction v_proj",
        "a side of 1": "relative_position_bias.relative_position_bias_table",
        "bias": "relative_position_bias.relative_position_bias_table",
        "head": "classifier",
    },
    "convnext": {
        "matrix": "downsampling_layer patch_embeddings pwconv1 pwconv2",
        "depthwise convolution": "dwconv",
        "head": "classifier",
    },
    "mobilenet_v2": {
        "matrix": "convolution",
        "depthwise convolution": "convolution",
        "head": "classifier",
    },
    "resnet": {
        "matrix": "convolution",
        "head": "classifier",
    },
    "segformer": {
        "matrix": (
            "fc1 fc2 k_proj linear_fuse o_proj proj q_proj sequence_reduction v_proj"
        ),
        "depthwise convolution": "dwconv",
        "head": "classifier",
    },
    "encodec": {
        "a side of 1": "weight.original0 weight.original1",
        "direction of a weight norm": "weight.original1",
        "matrix": (
            "lstm.weight_hh_l0 lstm.weight_hh_l1 lstm.weight_ih_l0 lstm.weight_ih_l1"
        ),
    },
    "perceiver": {
        "learned token": "embeddings.latents",
        "matrix": "dense dense1 dense2 key query value",
        "head": "dense2",
        "by name rotated: last layer": "dense2",
    },
    "switch": {
        "embedding": "relative_attention_bias shared",
        "matrix": "k o q v wi wo",
        "router": "classifier",
    },
    "rwkv": {
        "embedding": "embeddings",
        "a side of 1": (
            "attention.time_mix_key attention.time_mix_receptance "
            "attention.time_mix_value feed_forward.time_mix_key "
            "feed_forward.time_mix_receptance"
        ),
        "matrix": "key output receptance value",
        "head": "head",
    },
    "levit": {
        "matrix": "convolution linear",
        "a side of 1": "layers.attention_biases module.attention_biases",
        "bias": "layers.attention_biases",
        "head": "linear",
    },
    "aria": {
        "learned token": "multi_modal_projector.query",
        "router": "router",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "head": "lm_head",
    },
    "bark": {
        "head": "lm_head",
        "by name rotated: unusual name": "input_embeds_layers",
        "direction of a weight norm": "weight.original1",
    },
    "camembert": {},
    "dbrx": {
        "router": "layer",
        "stack of matrices": "mlp.v1 mlp.w1 mlp.w2",
        "head": "lm_head",
    },
    "deepseek_v4": {
        "stack of matrices": "o_a_proj",
        "bias": "compressor.position_bias indexer.position_bias",
        "router": "gate",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "hyper-connection": "attn_hc.fn ffn_hc.fn hc_head.hc_fn",
        "head": "lm_head",
    },
    "deit": {
        "head": "cls_classifier distillation_classifier",
    },
    "detr": {
        "head": "class_labels_classifier layers",
        "by name rotated: last layer": "layers",
    },
    "falcon_mamba": {
        "decay": "mixer.A_log",
        "depthwise convolution": "conv1d",
    },
    "gemma3n": {
        "router": "modality_router",
    },
    "glm5_next": {
        "depthwise convolution": "conv1d",
        "hyper-connection": "attn_hc.fn ffn_hc.fn",
        "position table": "indexer.index_kpool_compress_ape",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "router": "gate",
        "head": "lm_head",
    },
    "hubert": {
        "by name plain: one channel": "conv",
        "direction of a weight norm": "weight.original1",
        "head": "lm_head",
    },
    "inkling2": {
        "depthwise convolution": "conv1d",
        # Of norms that have one for each head; transformers 5.24 renamed them.
        "scale": "q_l2_clip.scale rel_l2_clip.scale"
        if tuple(map(int, version("transformers").split(".")[:2])) < (5, 24)
        else "norm.scale",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
        "router": "gate",
        "head": "lm_head",
    },
    "jetmoe": {
        "stacked experts": "input_linear output_linear",
        "router": "layer",
    },
    "kosmos2": {
        "learned token": "image_to_text_projection.latent_query",
    },
    "llama_cls": {
        "head": "score",
    },
    "mask2former": {
        "bias": "relative_position_bias.relative_position_bias_table",
        "by name rotated: unusual name": "queries_features",
        "head": "mask_embedder",
        "by name rotated: last layer": "mask_embedder",
    },
    "parakeet_ctc": {
        "by name plain: one channel": "layers",
        "depthwise convolution": "depthwise_conv layers",
        "bias": "self_attn.bias_u self_attn.bias_v",
        "head": "ctc_head",
    },
    "patchtst": {},
    "radio": {
        "learned token": "embeddings.cls_register_token",
    },
    "recurrent_gemma": {
        "depthwise convolution": "conv_1d",
        "stack of 10 matrices": (
            "rg_lru.input_gate_weight rg_lru.recurrent_gate_weight"
        ),
        "bias": "rg_lru.input_gate_bias rg_lru.recurrent_gate_bias",
    },
    "regnet": {
        "stack of 2 matrices": "convolution",
        "by name rotated: groups": "convolution",
        "stack of 3 matrices": "convolution",
        "stack of 8 matrices": "convolution",
        "stack of 17 matrices": "convolution",
        "head": "classifier",
    },
    "rf_detr": {
        "by name rotated: unusual name": "query_feat",
        "head": "class_embed enc_out_class_embed layers",
        "by name rotated: last layer": "layers",
    },
    "sam": {
        "position table": (
            "attn.rel_pos_h attn.rel_pos_w shared_image_embedding.positional_embedding"
        ),
        "by name plain: one channel": "conv1",
        "head": "layers",
        "by name rotated: last layer": "layers",
    },
    "siglip2": {
        "head": "fc2 head",
        "by name rotated: last layer": "fc2",
    },
    "swiftformer": {
        "depthwise convolution": "depth_wise_conv",
        "head": "dist_head head",
    },
    "unispeech_sat": {
        "by name plain: one channel": "conv",
        "direction of a weight norm": "weight.original1",
        "head": "speaker_proj",
        "by name rotated: last layer": "speaker_proj",
    },
    "vits": {
        "by name plain: not called a convolution": "project upsampler",
        "direction of a weight norm": "weight.original1",
        "depthwise convolution": "convs_dilated",
    },
    "vjepa2": {
        "learned token": "embeddings.mask_tokens",
        "by name plain: called an embedding": "predictor_embeddings",
        "head": "proj",
        "by name rotated: last layer": "proj",
    },
    "xlm": {},
    "xlnet": {
        "stack of 1024 matrices": (
            "rel_attn.k rel_attn.o rel_attn.q rel_attn.r rel_attn.v"
        ),
        "bias": "rel_attn.r_r_bias rel_attn.r_s_bias rel_attn.r_w_bias",
    },
    "zamba": {
        "stack of 2 matrices": "mamba.dt_proj_weight mamba.x_proj_weight",
        "bias": "mamba.dt_proj_bias",
        "decay": "mamba.A_log",
        "scale": "mamba.D",
        "depthwise convolution": "conv1d",
    },
    "zaya": {
        "depthwise convolution": "conv_qk_depthwise",
        "stack of 10 matrices": "conv_qk_grouped",
        "by name rotated: groups": "conv_qk_grouped",
        "router": "down_proj fc1 fc2 out_proj",
        "stacked experts": "experts.down_proj experts.gate_up_proj",
    },
    "dlrm": {
        "by name rotated: unusual name": "bag",
        "head": "top",
        "by name rotated: last layer": "top",
    },
    "heads": {
        "head": (
            "decoder_class_head enc_score_head cls_logits cls_score aux_head "
            "kps_score_lowres bpe_head vision_head word_timestamp_head head_linear "
            "decoder output_projection seq_relationship fc fc2 heads linear last"
        ),
        "by name rotated: last layer": "last",
    },
    "open_clip": {
        "position table": "positional_embedding visual.positional_embedding",
        "head": "out_proj text_projection visual.proj",
        "by name rotated: last layer": "out_proj",
    },
    "peft": {
        "by name plain: called a head": "original_module",
        "head": "default",
    },
    "timm's botnet": {
        "position table": "pos_embed.height_rel pos_embed.width_rel",
        "stack of 2 matrices": "conv2_kxk",
        "by name rotated: groups": "conv2_kxk",
        "head": "fc",
    },
    "timm's caformer": {
        "head": "fc2",
    },
    "timm's convnext": {
        "depthwise convolution": "conv_dw",
        "head": "fc",
    },
    "timm's deit": {
        "head": "head head_dist",
    },
    "timm's dla": {
        "head": "fc",
    },
    "timm's efficientvim": {
        "scale": "stages.alpha",
        "head": "head",
    },
    "timm's inception_v4": {
        "head": "last_linear",
    },
    "timm's levit": {
        "head": "l",
    },
    "torch.nn.utils.weight_norm": {
        "direction of a weight norm": "hidden.weight_v",
        "head": "last",
        "by name rotated: last layer": "last",
    },
    "torchtitan's llama": {
        "router": "gate",
        "stacked experts": "experts.w1",
        "by name rotated: norm of matrices": "norm",
        "head": "output",
    },
}
