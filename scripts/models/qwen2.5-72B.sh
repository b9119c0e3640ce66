# Qwen2.5-72B and Qwen2.5-72B-Instruct: source this file, then pass "${MODEL_ARGS[@]}".
# The Instruct model's norm epsilon is another: MODEL_ARGS_NORM_EPSILON=1e-6.
MODEL_ARGS=(
    --num-layers 80
    --hidden-size 8192
    --ffn-hidden-size 29568
    --num-attention-heads 64
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
