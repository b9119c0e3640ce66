# Qwen3-14B and Qwen3-14B-Base: source this file, then pass "${MODEL_ARGS[@]}".
MODEL_ARGS=(
    --num-layers 40
    --hidden-size 5120
    --ffn-hidden-size 17408
    --num-attention-heads 40
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --qk-layernorm
    --disable-bias-linear
    --swiglu
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --position-embedding-type rope
    --rotary-base 1000000
    --vocab-size 151936
    --untie-embeddings-and-output-weights
)
