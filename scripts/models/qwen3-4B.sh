# Qwen3-4B and Qwen3-4B-Base: source this file, then pass "${MODEL_ARGS[@]}".
# The Instruct-2507 and Thinking-2507 models have another base: MODEL_ARGS_ROTARY_BASE=5000000.
MODEL_ARGS=(
    --num-layers 36
    --hidden-size 2560
    --ffn-hidden-size 9728
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --qk-layernorm
    --disable-bias-linear
    --swiglu
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --position-embedding-type rope
    --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
    --vocab-size 151936
)
