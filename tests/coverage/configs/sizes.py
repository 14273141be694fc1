"""Says which size a field of a config gets, by the field's name."""

from __future__ import annotations

import re

WIDTH, HEADS, KV_HEADS, LAYERS, VOCAB, INNER, HEAD_DIM, IMAGE, PATCH = 32, 4, 2, 2, 96, 48, 8, 32, 8
#: ids of plain text lie in this range; those of special tokens lie below or above it
TEXT_IDS = (4, 60)

_LAYER_NAMES = (
    r"(num_)?(hidden_|encoder_|decoder_|main_|n_)?layers?|n_layers?|num_(encoder|decoder|block|transformer)_layers|"
    r"(depth|num_hidden_blocks|(encoder|decoder)_(depth|num_hidden_layers)|num_(blocks|layer)|\w+_num_hidden_layers|"
    r"(speech_|t2u_)?(encoder|decoder)_layers|adapter_layers|\w+_layers_count|num_\w+_layers)"
)
_WIDTH_NAMES = (
    r"(\w+_)?hidden_size|(\w+_)?d_model|n_embd|dim|(\w+_)?embed_dim|hidden_dim|model_dim|(\w+_)?embedding_size|"
    r"(d|dim)_embed|word_embed_proj_dim|(\w+_)?projection_(dim|size)|output_dim|(\w+_)?input_dim|"
    r"(\w+_)?embedding_dim|(\w+_)?channels_dim|conv_dim|bottleneck_dim|(\w+_)?out_dim|bottleneck_features|"
    r"fusion_hidden_size"
)
_INNER_NAMES = (
    r"(\w+_)?intermediate_size|(\w+_)?ffn_dim|n_inner|d_ff|d_inner|(\w+_)?ffn_hidden_size|(\w+_)?mlp_dim|inner_dim|"
    r"(\w+_)?feed_?forward_(size|dim)|dim_feedforward"
)
#: field names -> the most that a field of this name may be
SIZES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(names), size)
    for names, size in (
        (r"num_feat_extract_layers|num_layers_per_\w+", 99),
        (r"mm_tokens_per_image", 4),
        (r"num_kv_shared_layers|num_nextn_predict_layers|num_meta_layers|num_mtp_layers|num_dense_layers", 1),
        (_LAYER_NAMES, LAYERS),
        (r"(\w+_)?head_dim|attention_head_dim|d_kv|v_head_dim|key_length|attention_head_size|d_head", HEAD_DIM),
        (r"\w*num_(key_value|kv)_heads|n_kv_heads?|multi_query_group_num|\w+_num_key_value_heads", KV_HEADS),
        (r"(num_|n_|\w+_)?(attention_)?(num_)?(attention_)?heads?|num_head|\w+_attention_heads|index_n_heads", HEADS),
        (_WIDTH_NAMES, WIDTH),
        (_INNER_NAMES, INNER),
        (r"(\w+_)?vocab_size(_\w+)?", VOCAB),
        (r"codebook_size|num_embeddings", 64),
        (r"(\w+_)?lora_rank|low_rank_dim", 12),
        (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts|expert_num", 4),
        (r"num_experts_per_tok\w*|top_k_experts|moe_top_?k|moe_k|num_selected_experts|num_topk", 2),
        (r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace", 1),
        (r"linear_num_(key|value)_heads|\w*n_groups|num_expert_group", 2),
        (r"(\w+_)?(image|img)_size|(\w+_)?image_resolution", IMAGE),
        (r"(\w+_)?patch_size", PATCH),
        (r"mamba_d_state|state_size|ssm_state_size", 8),
        (r"time_step_rank|dt_rank|\w*dt_rank", 4),
        (r"num_mel_bins|n_mels|feature_size", 16),
        (r"max_source_positions", 16),
        (r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|seq_length", 128),
        (r"num_conv_pos_embeddings", 16),
        (r"num_conv_pos_embedding_groups", 4),
        (r"sliding_window(_size)?|attention_window|window_size|local_attention|chunk_size|attention_chunk_size", 8),
        (r"num_queries|num_query_tokens|num_latents|query_length|num_proposals", 12),
        (r"num_feature_levels|decoder_n_points|num_labels", 3),
        (r"num_frames|tubelet_size|frames_per_clip", 4),
        (r"index_topk|max_batch_size", 4),
    )
]
