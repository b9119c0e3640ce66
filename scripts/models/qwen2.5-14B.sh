# Qwen2.5-14B and Qwen2.5-14B-Instruct: source this file, then pass "${MODEL_ARGS[@]}".
# The Instruct model's norm epsilon is another: MODEL_ARGS_NORM_EPSILON=1e-6.
MODEL_ARGS=(
    --num-layers 48
    --hidden-size 5120
    --ffn-hidden-size 13824
    --num-attention-heads 40
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --add-qkv-bias
    --disable-bias-linear
    --swiglu
    --normalization RMSNorm
    --norm-epsilon "${MODEL_ARGS_NORM_EPSILON:-1e-5}"
    --position-embedding-type rope
    --rotary-base 1000000
    --vocab-size 152064
    --untie-embeddings-and-output-weights
)
