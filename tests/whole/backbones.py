"""A small instance of each backbone class that KerasHub exports."""

import keras
import numpy as np

TOKENS = 6

# What most classes that read text are made of.
TEXT = {
    "vocabulary_size": 20,
    "num_layers": 1,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}
HEADS = {**TEXT, "num_heads": 2}
GROUPED = {**TEXT, "num_query_heads": 4, "num_key_value_heads": 2}
SHORT = {**HEADS, "max_sequence_length": TOKENS}
CLIP_TEXT = {**SHORT, "embedding_dim": 16}
EXPERTS = {**GROUPED, "num_experts": 4, "top_k": 2}
QWEN_EXPERTS = {**EXPERTS, "moe_intermediate_dim": 8}
GATED_DELTA = {
    **GROUPED,
    "num_layers": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
GEMMA = {**GROUPED, "num_key_value_heads": 1, "head_dim": 8}
T5_GEMMA = {
    "vocabulary_size": 20,
    "sliding_window": 4,
    "cross_attention_hidden_size": 16,
    **{
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "num_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["full_attention"],
        }.items()
    },
}
SMOLLM = {
    **TEXT,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True],
    "layer_types": ["full_attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": TOKENS,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}

# And those that look at images.
IMAGE = {"image_shape": (16, 16, 3)}
PATCHES = {
    **IMAGE,
    "patch_size": 4,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}
VIT = {
    **{k: v for k, v in PATCHES.items() if k != "intermediate_dim"},
    "mlp_dim": 24,
}
RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [3],
    # KerasHub wants the first to be 64, and no fewer later.
    "stackwise_num_filters": [64, 64, 64, 64],
    "stackwise_num_blocks": [1, 1, 1, 1],
    "stackwise_num_strides": [1, 2, 2, 2],
    "block_type": "basic_block",
}
HGNET = {
    "image_shape": (64, 64, 3),
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 16, 16],
    "stackwise_stage_filters": [
        [8, 8, 16, 1, 1, 3],
        [16, 8, 16, 1, 1, 3],
        [16, 8, 16, 1, 1, 3],
        [16, 8, 16, 1, 1, 3],
    ],
    "apply_downsample": [False, True, True, True],
    "use_lightweight_conv_block": [False] * 4,
    "use_learnable_affine_block": True,
    "hidden_act": "relu",
    "out_features": ["stage3", "stage4"],
}
MIT = {
    **IMAGE,
    "image_shape": (32, 32, 3),
    "num_layers": 2,
    "layerwise_depths": [1, 1],
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [2, 1],
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
    "hidden_dims": [8, 16],
    "max_drop_path_rate": 0.0,
}


def models():
    import keras_hub

    return keras_hub.models


def parts():
    import keras_hub

    return keras_hub.layers


def two_towers(family):
    return {
        "vision_encoder": getattr(models(), f"{family}VisionEncoder")(
            **PATCHES
        ),
        "text_encoder": getattr(models(), f"{family}TextEncoder")(**CLIP_TEXT),
    }


def resnet(**kwargs):
    return models().ResNetBackbone(**RESNET, **kwargs)


def blip2():
    common = {
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "intermediate_dim": 24,
    }
    return {
        "vision_encoder": models().BLIP2VisionEncoder(
            **common,
            image_size=16,
            patch_size=4,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            initializer_range=0.02,
        ),
        "qformer": models().BLIP2QFormer(
            **common,
            num_query_tokens=2,
            vision_dim=16,
            cross_attention_frequency=1,
            dropout=0.0,
            layer_norm_epsilon=1e-6,
        ),
        "language_model": models().BLIP2CustomOPT(
            **common,
            vocabulary_size=20,
            num_query_tokens=2,
            qformer_hidden_dim=16,
            max_sequence_length=12,
            dropout=0.0,
        ),
    }


def d_fine():
    return {
        "backbone": models().HGNetV2Backbone(**HGNET),
        "image_shape": (64, 64, 3),
        "anchor_image_size": (64, 64),
        "out_features": ["stage3", "stage4"],
        "feat_strides": [16, 32],
        "num_feature_levels": 2,
        "encoder_in_channels": [16, 16],
        "encoder_hidden_dim": 16,
        "encode_proj_layers": [1],
        "encoder_ffn_dim": 24,
        "num_encoder_layers": 1,
        "num_attention_heads": 2,
        "decoder_in_channels": [16, 16],
        "hidden_dim": 16,
        "num_decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 24,
        "decoder_n_points": [2, 2],
        "lqe_hidden_dim": 8,
        "num_lqe_layers": 2,
        "hidden_expansion": 0.5,
        "depth_multiplier": 0.5,
        "eval_idx": -1,
        "num_labels": 4,
        "num_denoising": 0,
        "num_queries": 10,
        "learn_initial_query": False,
        "seed": 0,
    }


def depth_anything():
    encoder = models().DINOV2Backbone(
        **{**PATCHES, "num_layers": 2},
        position_embedding_shape=(16, 16, 3),
        apply_layernorm=True,
    )
    return {
        "image_encoder": encoder,
        "reassemble_factors": [2, 1],
        "neck_hidden_dims": [8, 8],
        "fusion_hidden_dim": 8,
        "head_hidden_dim": 8,
        "head_in_index": -1,
        "feature_keys": ["stage1", "stage2"],
    }


def gemma3n():
    return {
        "text_vocab_size": 20,
        "text_hidden_size": 16,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": [24],
        "hidden_activation": "gelu_approximate",
        "layer_types": ["full_attention"],
        "sliding_window": 4,
        "rope_theta": 10000.0,
        "max_position_embeddings": TOKENS,
        "vocab_size_per_layer_input": 20,
        "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
    }


def sam():
    return {
        "image_encoder": models().ViTDetBackbone(**BACKBONES["ViTDetBackbone"]),
        "prompt_encoder": parts().SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=8,
        ),
        "mask_decoder": parts().SAMMaskDecoder(
            num_layers=1,
            hidden_size=8,
            intermediate_dim=16,
            num_heads=2,
            embedding_dim=8,
            iou_head_hidden_dim=8,
        ),
    }


def sam3():
    common = {
        "num_layers": 1,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_heads": 2,
    }
    image = {"image_shape": (28, 28, 3), "patch_size": 14}
    return {
        "vision_encoder": parts().SAM3VisionEncoder(
            **common,
            **image,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(28, 28, 3),
            window_size=2,
            global_attn_indexes=[0],
        ),
        "text_encoder": parts().SAM3TextEncoder(
            **common, vocabulary_size=20, embedding_dim=16
        ),
        "geometry_encoder": parts().SAM3GeometryEncoder(**common, roi_size=2),
        "detr_encoder": parts().SAM3DetrEncoder(**common),
        "detr_decoder": parts().SAM3DetrDecoder(
            **common, **image, num_queries=4
        ),
        "mask_decoder": parts().SAM3MaskDecoder(
            num_upsampling_stages=2, hidden_dim=16, num_heads=2
        ),
    }


def stable_diffusion_3():
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    # Without its sampling the outputs are the same at each call.
    vae = VAEBackbone(
        [32, 32, 32, 32],
        [1, 1, 1, 1],
        [32, 32, 32, 32],
        [1, 1, 1, 1],
        sampler_method="mode",
        name="vae",
    )
    clips = {
        name: models().CLIPTextEncoder(
            **CLIP_TEXT, intermediate_output_index=-1, name=name
        )
        for name in ("clip_l", "clip_g")
    }
    return {
        "vae": vae,
        **clips,
        "image_shape": (16, 16, 3),
        "mmdit_patch_size": 2,
        "mmdit_hidden_dim": 16,
        "mmdit_num_layers": 1,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 4,
        "mmdit_qk_norm": None,
        "mmdit_dual_attention_indices": None,
    }


# The arguments of each class, or what makes them.
BACKBONES = {
    "AlbertBackbone": {**SHORT, "embedding_dim": 8},
    "BASNetBackbone": lambda: {
        "image_encoder": resnet(),
        "num_classes": 1,
        "image_shape": (32, 32, 3),
        "projection_filters": 64,
    },
    "BLIP2Backbone": blip2,
    "BartBackbone": SHORT,
    "BertBackbone": SHORT,
    "BloomBackbone": HEADS,
    "CLIPBackbone": lambda: {**two_towers("CLIP"), "projection_dim": 8},
    "CLIPTextEncoder": CLIP_TEXT,
    "CLIPVisionEncoder": PATCHES,
    "CSPNetBackbone": {
        "image_shape": (32, 32, 3),
        "stem_filters": 8,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_strides": 2,
        "stackwise_depth": [1, 1],
        "stackwise_num_filters": [8, 16],
        "block_type": "dark_block",
        "stage_type": "csp",
        "stem_padding": "same",
        "down_growth": True,
        "bottle_ratio": (0.5, 1.0),
        "block_ratio": (1.0, 0.5),
        "expand_ratio": (2.0, 1.0),
    },
    "DFineBackbone": d_fine,
    "DINOV2Backbone": {
        **PATCHES,
        "position_embedding_shape": (16, 16, 3),
    },
    "DINOV3Backbone": PATCHES,
    "DebertaV3Backbone": {**SHORT, "bucket_size": 4},
    "DeepLabV3Backbone": lambda: {
        "image_encoder": resnet(),
        "image_shape": (32, 32, 3),
        "low_level_feature_key": "P2",
        "spatial_pyramid_pooling_key": "P4",
        "dilation_rates": [1, 2],
        "upsampling_size": 4,
        "projection_filters": 8,
    },
    "DeiTBackbone": PATCHES,
    "DenseNetBackbone": {
        "image_shape": (32, 32, 3),
        "stackwise_num_repeats": [1, 1],
        "growth_rate": 4,
    },
    "DepthAnythingBackbone": depth_anything,
    "DistilBertBackbone": SHORT,
    "ESMBackbone": SHORT,
    "EdRecBackbone": {
        "vocab_size": 20,
        "num_layers_enc": 1,
        "num_layers_dec": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "intermediate_dim": 24,
    },
    "EfficientNetBackbone": {
        "input_shape": (32, 32, 3),
        "stackwise_kernel_sizes": [3, 3],
        "stackwise_num_repeats": [1, 1],
        "stackwise_input_filters": [8, 8],
        "stackwise_output_filters": [8, 16],
        "stackwise_expansion_ratios": [1, 2],
        "stackwise_squeeze_and_excite_ratios": [0.0, 0.25],
        "stackwise_strides": [1, 2],
        "stackwise_block_types": ["fused", "unfused"],
        "stackwise_force_input_filters": [0, 0],
        "stackwise_nores_option": [False, False],
        "stackwise_width_coefficients": [1.0, 1.0],
        "stackwise_depth_coefficients": [1.0, 1.0],
        "num_features": 16,
    },
    "ElectraBackbone": {
        **{k: v for k, v in SHORT.items() if k != "vocabulary_size"},
        "vocab_size": 20,
        "embedding_dim": 8,
    },
    "FNetBackbone": {k: v for k, v in SHORT.items() if k != "num_heads"},
    "FalconBackbone": {**TEXT, "num_attention_heads": 2},
    "FluxBackbone": {
        "input_channels": 8,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [2, 2, 4],
        "theta": 10_000,
        "use_bias": True,
        "guidance_embed": True,
        "image_shape": (4, 8),
        "text_shape": (4, 8),
        "image_ids_shape": (4, 3),
        "text_ids_shape": (4, 3),
        "y_shape": (8,),
    },
    "GPT2Backbone": SHORT,
    "GPTNeoXBackbone": SHORT,
    "Gemma3Backbone": {**GEMMA, "image_size": 16},
    "Gemma3nBackbone": gemma3n,
    "Gemma4Backbone": {**GEMMA, "image_size": 16},
    "GemmaBackbone": GEMMA,
    "GptOssBackbone": {**EXPERTS, "head_dim": 8},
    "HGNetV2Backbone": HGNET,
    "Llama3Backbone": GROUPED,
    "LlamaBackbone": GROUPED,
    "MetaCLIP2Backbone": lambda: {
        **two_towers("MetaCLIP2"),
        "projection_dim": 8,
    },
    "MetaCLIP2TextEncoder": CLIP_TEXT,
    "MetaCLIP2VisionEncoder": PATCHES,
    "MiTBackbone": MIT,
    "MistralBackbone": GROUPED,
    "MixtralBackbone": EXPERTS,
    "MobileNetBackbone": {
        "image_shape": (32, 32, 3),
        "stackwise_expansion": [[8], [16]],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_filters": [[8], [16]],
        "stackwise_kernel_size": [[3], [3]],
        "stackwise_num_strides": [[2], [2]],
        "stackwise_se_ratio": [[None], [0.25]],
        "stackwise_activation": [["relu"], ["hard_swish"]],
        "stackwise_padding": [[1], [1]],
        "input_num_filters": 8,
        "output_num_filters": 16,
        "depthwise_filters": 8,
        "depthwise_stride": 1,
        "depthwise_residual": True,
        "last_layer_filter": 16,
    },
    "MobileNetV5Backbone": {
        "image_shape": (32, 32, 3),
        "stackwise_block_types": [["er"], ["uir"]],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_filters": [[8], [16]],
        "stackwise_strides": [[2], [2]],
        "stackwise_act_layers": [["relu"], ["relu"]],
        "stackwise_exp_ratios": [[2.0], [2.0]],
        "stackwise_se_ratios": [[0.0], [0.0]],
        "stackwise_dw_kernel_sizes": [[0], [3]],
        "stackwise_dw_start_kernel_sizes": [[0], [0]],
        "stackwise_dw_end_kernel_sizes": [[0], [0]],
        "stackwise_exp_kernel_sizes": [[3], [0]],
        "stackwise_pw_kernel_sizes": [[1], [0]],
        "stackwise_num_heads": [[0], [0]],
        "stackwise_key_dims": [[0], [0]],
        "stackwise_value_dims": [[0], [0]],
        "stackwise_kv_strides": [[0], [0]],
        "stackwise_use_cpe": [[False], [False]],
        "use_msfa": False,
        "stem_size": 8,
    },
    "MoonshineBackbone": {
        "vocabulary_size": 20,
        "filter_dim": 16,
        "encoder_num_layers": 1,
        "decoder_num_layers": 1,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "encoder_num_heads": 2,
        "decoder_num_heads": 2,
    },
    "OPTBackbone": SHORT,
    "PARSeqBackbone": lambda: {
        "image_encoder": models().ViTBackbone(**VIT, use_class_token=False),
        "vocabulary_size": 20,
        "max_label_length": TOKENS,
        "decoder_hidden_dim": 16,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "decoder_mlp_dim": 24,
    },
    "PaliGemmaBackbone": {
        **GEMMA,
        "image_size": 16,
        "vit_patch_size": 4,
        "vit_num_heads": 2,
        "vit_hidden_dim": 8,
        "vit_num_layers": 1,
        "vit_intermediate_dim": 16,
    },
    "Phi3Backbone": GROUPED,
    "Qwen3Backbone": {**GROUPED, "head_dim": 8},
    "Qwen3MoeBackbone": {**QWEN_EXPERTS, "head_dim": 8},
    "Qwen3_5Backbone": GATED_DELTA,
    "Qwen3_5MoeBackbone": {
        **{k: v for k, v in GATED_DELTA.items() if k != "intermediate_dim"},
        "moe_intermediate_dim": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "top_k": 2,
    },
    "QwenBackbone": GROUPED,
    "QwenMoeBackbone": {
        **QWEN_EXPERTS,
        "shared_expert_intermediate_dim": 8,
    },
    "RWKV7Backbone": {
        "vocabulary_size": 20,
        "hidden_size": 16,
        "head_size": 4,
        "num_layers": 1,
        "intermediate_dim": 24,
        "gate_lora": 8,
        "mv_lora": 8,
        "aaa_lora": 8,
        "decay_lora": 8,
    },
    "ResNetBackbone": {**RESNET, "image_shape": (32, 32, 3)},
    "RetinaNetBackbone": lambda: {
        "image_encoder": resnet(),
        "image_shape": (64, 64, 3),
        "min_level": 3,
        "max_level": 6,
        "use_p5": False,
    },
    "RobertaBackbone": SHORT,
    "RoformerV2Backbone": {**HEADS, "head_size": 8},
    "SAM3PromptableConceptBackbone": sam3,
    "SAMBackbone": sam,
    "SegFormerBackbone": lambda: {
        "image_encoder": models().MiTBackbone(**MIT),
        "projection_filters": 8,
    },
    "SigLIPBackbone": lambda: two_towers("SigLIP"),
    "SigLIPTextEncoder": CLIP_TEXT,
    "SigLIPVisionEncoder": PATCHES,
    "SmolLM3Backbone": SMOLLM,
    "StableDiffusion3Backbone": stable_diffusion_3,
    "SwinTransformerBackbone": {
        "image_shape": (32, 32, 3),
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "window_size": 4,
    },
    "T5Backbone": HEADS,
    "T5Gemma2Backbone": T5_GEMMA,
    "T5GemmaBackbone": T5_GEMMA,
    "VGGBackbone": {
        "image_shape": (32, 32, 3),
        "stackwise_num_repeats": [1, 1],
        "stackwise_num_filters": [8, 8],
    },
    "ViTBackbone": VIT,
    "ViTDetBackbone": {
        "image_shape": (16, 16, 3),
        "patch_size": 4,
        "hidden_size": 8,
        "num_layers": 1,
        "intermediate_dim": 16,
        "num_heads": 2,
        "global_attention_layer_indices": [0],
        "num_output_channels": 8,
        "window_size": 2,
    },
    "VideoPrismBackbone": {
        "image_shape": (16, 16, 3),
        "num_frames": 2,
        "patch_size": 4,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_heads": 2,
        "num_spatial_layers": 1,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 1,
        "vocabulary_size": 20,
        "num_text_layers": 1,
    },
    "WhisperBackbone": {
        **HEADS,
        "num_mels": 8,
        "max_encoder_sequence_length": 2 * TOKENS,
        "max_decoder_sequence_length": TOKENS,
    },
    "XLMRobertaBackbone": SHORT,
    "XLNetBackbone": HEADS,
    "XceptionBackbone": {
        "image_shape": (32, 32, 3),
        "stackwise_conv_filters": [[8, 8], [16, 16]],
        "stackwise_pooling": [False, True],
    },
}

# A base class that makes no model.
ABSTRACT = {"Backbone", "FeaturePyramidBackbone"}

# Nothing in them to convert.
CONVOLUTIONAL = {
    "BASNetBackbone",
    "CSPNetBackbone",
    "DeepLabV3Backbone",
    "DenseNetBackbone",
    "EfficientNetBackbone",
    "HGNetV2Backbone",
    "MobileNetBackbone",
    "MobileNetV5Backbone",
    "ResNetBackbone",
    "RetinaNetBackbone",
    "VGGBackbone",
    "XceptionBackbone",
}

# Long: run where the table is written.
SLOW = {"DFineBackbone"}
SLOW_ON_JAX = {
    "BLIP2Backbone",
    "FluxBackbone",
    "MiTBackbone",
    "Qwen3_5Backbone",
    "Qwen3_5MoeBackbone",
    "SAM3PromptableConceptBackbone",
    "SAMBackbone",
    "SegFormerBackbone",
    "StableDiffusion3Backbone",
    "VideoPrismBackbone",
}

# KerasHub itself asks for it, on PyTorch.
NEEDS_TORCHVISION = {"SAM3PromptableConceptBackbone"}

# Shapes of inputs that are not as long as `inputs` would make them.
SAMPLES = 2000
INPUTS = {
    "MoonshineBackbone": {
        "encoder_input_values": (SAMPLES, 1),
        "encoder_padding_mask": (SAMPLES,),
    },
    # KerasHub's mask fits one box in each of two images.
    "SAM3PromptableConceptBackbone": {"boxes": (1, 5), "box_labels": (1,)},
    # No mask.
    "SAMBackbone": {"masks": (0, 16, 16, 1)},
}


def make(name):
    arguments = BACKBONES[name]
    if callable(arguments):
        arguments = arguments()
    return getattr(models(), name)(**arguments)


def inputs(name, backbone, rng):
    """A batch of two for a backbone; what a name means is the same in all."""

    def fill(x):
        key = x.name
        sides = INPUTS.get(name, {}).get(key, x.shape[1:])
        shape = [2, *(TOKENS if side is None else side for side in sides)]
        if "mask" in key:
            return np.ones(shape, "int32")
        if "token" in key:
            ids = rng.integers(3, 19, shape).astype("int32")
            # The end, where MetaCLIP 2 looks for its output.
            ids[:, -1] = 2
            return ids
        if "segment" in key:
            return rng.integers(0, 2, shape).astype("int32")
        if "labels" in key:
            # Of points and boxes in the foreground; 0 hides a box of SAM 3.
            return np.ones(shape, x.dtype)
        if "int" in x.dtype:
            return rng.integers(0, 19, shape).astype("int32")
        if key == "boxes":
            # In parts of the image.
            return rng.random(shape, "float32")
        return rng.standard_normal(shape).astype("float32")

    return keras.tree.map_structure(fill, backbone.input)
